"""Decoupled cross-attention in a real UNet: formula, batch layout, windows, masks, and no trace left."""

import gc
import math
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor, nn

from compiled import run_unchecked
from imprompt.adapter.attention import SiteProcessor
from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.injection import Injection
from imprompt.adapter.key_value import KeyValue
from imprompt.adapter.prompt import CompiledPrompt
from imprompt.adapter.source import PromptSource, TrainingTokens
from imprompt.errors import AdapterMismatch, UsageError
from tiny import TEXT_WIDTH, random_adapter_state, tiny_unet

WIDTH = TEXT_WIDTH  # of tokens
PARTS = ("to_k_ip", "to_v_ip")


class Weights(PromptSource):
    """A source of image keys and values with random weights, which counts how often they are computed."""

    def __init__(
        self, unet: UNet2DConditionModel, seed: int = 3, samples: tuple[tuple[CompiledPrompt, ...], ...] = ()
    ) -> None:
        self.unet: UNet2DConditionModel | None = unet
        self.asked: Counter[int] = Counter()
        self._samples = samples
        weights = random_adapter_state(unet, seed=seed)["ip_adapter"]
        self.layers = {}
        for index in sorted({int(name.split(".")[0]) for name in weights}):
            key, value = (nn.Linear(*weights[f"{index}.{n}.weight"].T.shape, bias=False) for n in PARTS)
            key.weight, value.weight = (nn.Parameter(weights[f"{index}.{n}.weight"]) for n in PARTS)
            self.layers[index] = KeyValue(key, value)
            self.layers[index].register_forward_hook(lambda *_, index=index: self.asked.update([index]))

    @property
    def samples(self) -> tuple[tuple[CompiledPrompt, ...], ...]:
        return self._samples

    @samples.setter
    def samples(self, value: tuple[tuple[CompiledPrompt, ...], ...]) -> None:
        self._samples = value

    def key_value(self, index: int) -> KeyValue:
        return self.layers[index]


def row(seed: int = 0, tokens: int = 4, negative: int | None = 4, **fields: object) -> CompiledPrompt:
    random = torch.Generator().manual_seed(seed)
    steering = {"scale": 1.0, "profile": "linear", "start": 0.0, "end": 1.0, "mask": None} | fields
    shown = torch.randn(tokens, WIDTH, generator=random)
    hidden = None if negative is None else torch.randn(negative, WIDTH, generator=random)
    return CompiledPrompt(tokens=shown, negative=hidden, **steering)


def alone_with(tokens: Tensor, profile: list[float] | str = "linear") -> CompiledPrompt:
    """Tokens alone, for every part of the batch."""
    return replace(row(profile=profile), tokens=tokens, negative=None)


def put(
    unet: UNet2DConditionModel, *prompts: CompiledPrompt, pipe: object = None, seed: int = 3
) -> tuple[Injection, Weights]:
    source = Weights(unet, seed, samples=(prompts,) if prompts else ())
    injection = Injection.into(unet, pipe)
    injection.sources.append(source)
    return injection, source


def noise(batch: int = 1, size: tuple[int, int] = (8, 8), seed: int = 11) -> Tensor:
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed))


def text(batch: int = 1, seed: int = 12) -> Tensor:
    return torch.randn(batch, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def draw(
    unet: nn.Module, sample: Tensor | None = None, timestep: float = 500, states: Tensor | None = None
) -> Tensor:
    sample = noise() if sample is None else sample
    return unet(sample, timestep, text(len(sample)) if states is None else states).sample


class Pipe:
    """The flags of a diffusers pipeline."""

    def __init__(self, **flags: bool) -> None:
        self.__dict__.update(flags)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet("sd")


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(one, other)


def test_a_layer_computes_the_published_formula(unet: UNet2DConditionModel) -> None:
    _, source = put(unet, row(0, scale=0.7), row(1, tokens=9, scale=-0.3))
    seen = {}
    layer = cross_attentions(unet)[-1]
    attention: Attention = unet.get_submodule(layer.name)
    attention.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(
            x=args[0], text=kwargs["encoder_hidden_states"], out=out
        ),
        with_kwargs=True,
    )
    draw(unet)

    def attend(tokens: Tensor, key: nn.Linear, value: nn.Linear) -> Tensor:
        heads = attention.heads
        q, k, v = (
            part.reshape(part.shape[0], heads, -1)
            for part in (attention.to_q(seen["x"])[0], key(tokens), value(tokens))
        )
        logits = torch.einsum("lhd,thd->hlt", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("hlt,thd->lhd", logits.softmax(-1), v).flatten(1)

    with torch.no_grad():
        wanted = attend(seen["text"][0], attention.to_k, attention.to_v)
        for prompt in source.samples[0]:
            wanted = wanted + prompt.scale * attend(prompt.tokens, *source.key_value(layer.index).children())
        wanted = attention.to_out[0](wanted)
    torch.testing.assert_close(seen["out"][0], wanted, atol=1e-5, rtol=1e-5)


def test_keys_and_values_are_computed_once_for_all_steps(unet: UNet2DConditionModel) -> None:
    _, source = put(unet, row())
    for timestep in (900, 500, 100):
        draw(unet, timestep=timestep)
    assert source.asked == Counter([layer.index for layer in cross_attentions(unet)])


def test_keys_and_values_follow_a_unet_that_changes_its_number_format(unet: UNet2DConditionModel) -> None:
    _, source = put(unet, row())
    single = draw(unet)
    double = draw(unet.double(), noise().double(), states=text().double())
    assert max(source.asked.values()) == 2
    torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = draw(unet.float())
    torch.testing.assert_close(half.float(), single, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "prompts",
    [
        (),
        (row(scale=0.0),),
        (row(start=0.4, end=0.4),),
        (row(end=0.3),),
        (row(profile=[0.0] * 4),),
    ],
    ids=["none", "scale", "empty window", "outside the window", "profile"],
)
def test_no_strength_in_any_form_equals_no_adapter_bit_for_bit(
    unet: UNet2DConditionModel, prompts: tuple[CompiledPrompt, ...]
) -> None:
    without = draw(unet)
    put(unet, *prompts)
    assert same(draw(unet, timestep=500), without)


def test_a_layer_of_weight_zero_keeps_its_own_processor(unet: UNet2DConditionModel) -> None:
    _, source = put(unet, row(profile="layout"))
    draw(unet)
    acting = {layer.index for layer in cross_attentions(unet) if layer.kind != "output"}
    assert set(source.asked) == acting


@pytest.mark.parametrize(
    ("window", "timestep", "acts"),
    [
        ((0.0, 1.0), 999, True),
        ((0.0, 1.0), 0, True),
        ((0.3, 0.7), 700, True),
        ((0.3, 0.7), 701, False),
        ((0.3, 0.7), 301, True),
        ((0.3, 0.7), 300, False),
        ((0.0, 0.5), 1000, True),
        ((0.5, 1.0), 0, True),
        ((0.5, 1.0), torch.tensor(500), True),
        ((0.5, 1.0), torch.tensor([500.5]), False),
    ],
)
def test_a_window_is_half_open_in_the_noise_schedule(
    unet: UNet2DConditionModel, window: tuple[float, float], timestep: float | Tensor, acts: bool
) -> None:
    without = draw(unet, timestep=timestep)
    put(unet, row(start=window[0], end=window[1]))
    assert same(draw(unet, timestep=timestep), without) is not acts


def test_a_window_opens_and_closes_while_steps_go_by(unet: UNet2DConditionModel) -> None:
    bare = [draw(unet, timestep=t) for t in (900, 500, 100)]
    _, source = put(unet, row(start=0.4, end=0.6))
    seen = [draw(unet, timestep=t) for t in (900, 500, 100)]
    assert [same(a, b) for a, b in zip(bare, seen, strict=True)] == [True, False, True]
    assert max(source.asked.values()) == 1


def test_a_full_mask_is_no_mask(unet: UNet2DConditionModel) -> None:
    injection, source = put(unet, row())
    without = draw(unet)
    source.samples = ((row(mask=torch.ones(1, 1, 3, 5)),),)
    injection.invalidate()
    assert same(draw(unet), without)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (6, 20)])
def test_outside_its_mask_a_prompt_does_nothing_at_the_first_layer(
    unet: UNet2DConditionModel, size: tuple[int, int]
) -> None:
    first = unet.get_submodule(cross_attentions(unet)[0].name)
    outputs = []
    first.register_forward_hook(lambda module, args, out: outputs.append(out[0].unflatten(0, size)))
    draw(unet, noise(size=size))
    mask = torch.zeros(1, 1, size[0] * 4, size[1] * 4)
    mask[..., : size[0] * 2, :] = 1
    left, right = row(0, mask=mask), row(1, mask=1 - mask)
    injection, source = put(unet)
    for prompts in ((left,), (right,), (left, right)):
        source.samples = (prompts,)
        injection.invalidate()
        draw(unet, noise(size=size))
    bare, one, other, both = outputs
    half = size[0] // 2
    assert same(one[half + 1 :], bare[half + 1 :])
    assert not torch.allclose(one[:half], bare[:half], atol=1e-3)
    torch.testing.assert_close(both[:half], one[:half])
    torch.testing.assert_close(both[half + 1 :], other[half + 1 :])


GUIDED = {"do_classifier_free_guidance": True}


@pytest.mark.parametrize(
    ("flags", "layout"),
    [
        ({"do_classifier_free_guidance": False}, "p"),
        (GUIDED, "np"),
        (GUIDED | {"do_perturbed_attention_guidance": True}, "npp"),
        ({"do_classifier_free_guidance": False, "do_perturbed_attention_guidance": True}, "pp"),
    ],
)
def test_each_part_of_a_guided_batch_sees_its_own_tokens(
    unet: UNet2DConditionModel, flags: dict[str, bool], layout: str
) -> None:
    pipe = Pipe(**flags)
    injection, source = put(unet, row())
    positive = draw(unet, noise(2), states=text(2))
    shown = source.samples[0][0]
    source.samples = (
        (
            row()
            if shown.negative is None
            else CompiledPrompt(shown.negative, None, 1.0, "linear", 0.0, 1.0, None),
        ),
    )
    injection.invalidate()
    negative = draw(unet, noise(2), states=text(2))
    source.samples = ((shown,),)
    Injection.into(unet, pipe)
    parts = len(layout)
    out = draw(unet, torch.cat([noise(2)] * parts), states=torch.cat([text(2)] * parts))
    wanted = torch.cat([{"p": positive, "n": negative}[part] for part in layout])
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


def test_guidance_may_end_in_the_middle_of_a_run(unet: UNet2DConditionModel) -> None:
    pipe = Pipe(do_classifier_free_guidance=True)
    put(unet, row(), pipe=pipe)
    draw(unet, noise(2))
    pipe.do_classifier_free_guidance = False
    late = draw(unet, noise(1))
    Injection.into(unet, None)
    assert same(late, draw(unet, noise(1)))


def test_a_negated_layer_shows_the_picture_to_the_negative_half_only(unet: UNet2DConditionModel) -> None:
    injection, source = put(unet, row(profile="composition precise"))
    source.branches = ("uncond", "cond")
    precise = draw(unet, torch.cat([noise()] * 2), states=torch.cat([text()] * 2))
    others = [0.0, 0.1, 0.1, 0.1]  # t = 0 is the composition block of this UNet, 1 the middle, 2 and 3 go up
    plain = row()
    source.branches = ("cond",)

    def alone(tokens: Tensor, profile: list[float]) -> Tensor:
        source.samples = ((alone_with(tokens, profile),),)
        injection.invalidate()
        return draw(unet)

    torch.testing.assert_close(precise[1:], alone(plain.tokens, [1.0, 0.0, 0.0, 0.0]), atol=1e-5, rtol=1e-5)
    # The composition block still shows the negative half its negative tokens; both act in one pass.
    source.samples = (
        (
            alone_with(plain.negative, [1.0, 0.0, 0.0, 0.0]),
            alone_with(plain.tokens, others),
        ),
    )
    injection.invalidate()
    torch.testing.assert_close(precise[:1], draw(unet), atol=1e-5, rtol=1e-5)


SAMPLES = (
    (row(0, scale=0.8),),
    (row(1, tokens=12, scale=0.4, end=0.5), row(2, tokens=3, negative=5)),
    (),
    (row(3, mask=torch.eye(6)[None, None]), row(4, profile="style", start=0.6), row(5, tokens=1)),
)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("timestep", [700, 200])
def test_every_sample_of_a_batch_is_drawn_as_it_is_alone(
    unet: UNet2DConditionModel, images: int, guided: bool, timestep: int
) -> None:
    injection, source = put(unet)
    source.branches = ("uncond", "cond") if guided else ("cond",)
    count = len(SAMPLES) * images
    noises, texts = noise(count), text(count)

    def drawn(samples: tuple[tuple[CompiledPrompt, ...], ...], pick: slice) -> Tensor:
        source.samples = samples if any(samples) else ()
        injection.invalidate()
        parts = len(source.branches)
        return draw(
            unet, torch.cat([noises[pick]] * parts), timestep, torch.cat([texts[pick]] * parts)
        ).unflatten(0, (parts, -1))

    together = drawn(SAMPLES, slice(None))
    alone = [drawn((SAMPLES[i // images],), slice(i, i + 1)) for i in range(count)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=2e-5, rtol=1e-5)


def test_several_adapters_add_up_and_leave_in_any_order(unet: UNet2DConditionModel) -> None:
    bare, found = draw(unet), dict(unet.attn_processors)
    injection, first = put(unet, row(0))
    only_first = draw(unet)
    again, second = put(unet, row(1), seed=4)
    assert again is injection
    both = draw(unet)
    injection.remove(first)
    only_second = draw(unet)
    assert len({float(x.sum()) for x in (bare, only_first, only_second, both)}) == 4
    injection.sources.append(first)
    injection.invalidate()
    torch.testing.assert_close(draw(unet), both, atol=1e-5, rtol=1e-5)
    injection.remove(second)
    assert same(draw(unet), only_first)
    injection.remove(first)
    assert same(draw(unet), bare)
    assert all(found[name] is processor for name, processor in unet.attn_processors.items())
    assert not unet._forward_pre_hooks


def test_processors_of_the_same_attention_are_kept_and_given_back(
    unet: UNet2DConditionModel,
) -> None:
    unet.set_attn_processor(SlicedAttnProcessor(1))
    found, bare = dict(unet.attn_processors), draw(unet)
    injection, source = put(unet, row(scale=0.0))
    assert same(draw(unet), bare)
    injection.remove(source)
    assert all(found[name] is processor for name, processor in unet.attn_processors.items())


def test_a_foreign_processor_is_refused_and_nothing_changed(
    unet: UNet2DConditionModel,
) -> None:
    class Foreign:
        def __call__(self, attn: Attention, hidden_states: Tensor, **kwargs: object) -> Tensor:
            return hidden_states

    last = unet.get_submodule(cross_attentions(unet)[-1].name)
    last.set_processor(Foreign())
    with pytest.raises(AdapterMismatch, match=r"mid_block.*Foreign"):
        Injection.into(unet, None)
    assert not any(isinstance(p, SiteProcessor) for p in unet.attn_processors.values())
    assert not unet._forward_pre_hooks


def sliced(unet: UNet2DConditionModel) -> None:
    unet.set_attention_slice("max")


CHANGES = {
    "attention slicing": sliced,
    "set_attn_processor": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "fused projections": lambda unet: unet.fuse_qkv_projections(),
    "one layer": lambda unet: unet.get_submodule(cross_attentions(unet)[1].name).set_processor(
        SlicedAttnProcessor(1)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("drawn", [False, True])
def test_processors_installed_afterwards_do_not_silence_the_prompt(
    unet: UNet2DConditionModel, change: str, drawn: bool
) -> None:
    injection, source = put(unet, row())
    wanted = draw(unet)
    if not drawn:
        injection.remove(source)
        injection, source = put(unet, row())
    CHANGES[change](unet)
    torch.testing.assert_close(draw(unet), wanted, atol=1e-5, rtol=1e-5)
    injection.remove(source)
    assert not any(isinstance(p, SiteProcessor) for p in unet.attn_processors.values())


def test_a_foreign_processor_installed_afterwards_is_refused_before_anything_is_drawn(
    unet: UNet2DConditionModel,
) -> None:
    class Foreign:
        def __call__(self, attn: Attention, hidden_states: Tensor, **kwargs: object) -> Tensor:
            raise AssertionError("drawn with")

    put(unet, row())
    draw(unet)
    unet.get_submodule(cross_attentions(unet)[-1].name).set_processor(Foreign())
    with pytest.raises(AdapterMismatch, match="has a Foreign"):
        draw(unet)


def test_unfusing_and_attaching_again_leaves_no_dead_processor(unet: UNet2DConditionModel) -> None:
    injection, source = put(unet, row())
    wanted = draw(unet)
    unet.fuse_qkv_projections()  # diffusers keeps our processors to give them back
    injection.remove(source)
    unet.unfuse_qkv_projections()
    put(unet, row())
    assert same(draw(unet), wanted)


def test_a_new_strength_mask_or_prompt_is_written_into_the_same_tensors(unet: UNet2DConditionModel) -> None:
    injection, source = put(unet, row(scale=0.4, mask=torch.eye(4)[None, None]))
    draw(unet)
    processor = unet.get_submodule(cross_attentions(unet)[0].name).processor
    (kv,) = processor.image_kvs
    asked = Counter(source.asked)
    source.samples = ((replace(source.samples[0][0], scale=0.9, end=0.7),),)
    injection.invalidate()
    stronger = draw(unet)
    assert source.asked == asked  # no keys for a new strength or window
    source.samples = ((row(5, mask=torch.ones(1, 1, 4, 4)),),)
    injection.invalidate()
    other = draw(unet)
    (now,) = processor.image_kvs
    assert now.key is kv.key
    assert now.value is kv.value
    assert now.factor is not None
    assert kv.factor is not None
    assert now.factor.data_ptr() == kv.factor.data_ptr()
    injection.remove(source)
    put(unet, row(5, mask=torch.ones(1, 1, 4, 4)))
    assert same(draw(unet), other)
    assert not same(stronger, other)


@pytest.mark.parametrize(
    ("pipe", "batch", "samples", "message"),
    [
        (Pipe(**GUIDED), 3, 1, "batch of 3"),
        (Pipe(), 2, 1, "does not say whether guidance is on"),
        (None, 3, 2, "2 samples, but 3 are drawn"),
    ],
)
def test_a_batch_that_cannot_be_told_apart_is_refused(
    unet: UNet2DConditionModel, pipe: object, batch: int, samples: int, message: str
) -> None:
    _, source = put(unet, row(), pipe=pipe)
    source.samples *= samples
    with pytest.raises(UsageError, match=message):
        draw(unet, noise(batch))


def test_guidance_without_negative_tokens_is_refused(unet: UNet2DConditionModel) -> None:
    _, source = put(unet, row(negative=None))
    draw(unet)
    source.branches = ("uncond", "cond")
    with pytest.raises(UsageError, match="negative="):
        draw(unet, noise(2))


def test_a_pipeline_that_is_gone_is_noticed(unet: UNet2DConditionModel) -> None:
    put(unet, row(), pipe=Pipe(**GUIDED))
    with pytest.raises(UsageError, match="is gone"):
        draw(unet, noise(2))


def test_live_tokens_equal_a_set_prompt_and_carry_gradients(unet: UNet2DConditionModel) -> None:
    prompt = row(scale=0.6)
    injection, source = put(unet, prompt)
    wanted = draw(unet, noise(2))
    tokens = prompt.tokens.expand(2, -1, -1).clone().requires_grad_()
    source.training = TrainingTokens(tokens, torch.tensor([0.6, 0.6]))
    out = unet(noise(2), 500, text(2)).sample
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    out.square().mean().backward()
    assert tokens.grad.abs().sum() > 0
    assert all(w.grad.abs().sum() > 0 for part in source.layers.values() for w in part.parameters())
    source.training = None
    injection.invalidate()
    assert same(draw(unet, noise(2)), wanted)


def test_live_tokens_work_under_gradient_checkpointing(unet: UNet2DConditionModel) -> None:
    _, source = put(unet)
    gradients = []
    for checkpointing in (False, True):
        unet.train()
        (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
        tokens = row().tokens[None].clone().requires_grad_()
        source.training = TrainingTokens(tokens)
        unet(noise(), 500, text()).sample.square().mean().backward()
        gradients.append(tokens.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_video_unet_counts_no_motion_module_and_prompts_every_frame(
    unet: UNet2DConditionModel,
) -> None:
    motion = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
    )
    video = UNetMotionModel.from_unet2d(unet, motion).eval()
    assert [layer.index for layer in cross_attentions(video)] == [
        layer.index for layer in cross_attentions(unet)
    ]
    states = text(2).repeat_interleave(3, 0)  # the caller repeats the text for its 3 frames
    frames = noise(2 * 3).unflatten(0, (2, 3)).transpose(1, 2)
    bare = draw(video, frames, states=states)
    injection, source = put(video, row(scale=0.0))
    assert same(draw(video, frames, states=states), bare)
    source.samples = ((row(0),), (row(1),))
    injection.invalidate()
    both = draw(video, frames, states=states)
    for i in range(2):
        source.samples = ((row(i),),)
        injection.invalidate()
        alone = draw(video, frames[i : i + 1], states=states[3 * i : 3 * i + 3])
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=1e-5)


COMPILING = """
import torch
from test_attention import draw, put, row, same, tiny_unet

for attached in ("before", "after"):  # compiling
    torch._dynamo.reset()
    unet, graphs = tiny_unet("sd"), []
    compiled = torch.compile(unet, backend=lambda graph, inputs: graphs.append(graph) or graph)
    injection, source = put({"before": unet, "after": compiled}[attached], row())
    plain = tiny_unet("sd")
    same_injection, same_source = put(plain, row())
    outs = []
    for scale in (0.9, 0.5, 0.1):
        fading = ((0.0, scale), (0.3, 0.9), (1.0, 0.5))
        source.samples = same_source.samples = ((row(scale=scale, end=0.6, curve=fading),),)
        injection.invalidate(), same_injection.invalidate()
        for timestep in (torch.tensor(800.0), torch.tensor(200.0)):
            outs.append(draw(compiled, timestep=timestep))
            assert same(outs[-1], draw(plain, timestep=timestep)), attached
    assert len(graphs) == 1, f"{len(graphs)} graphs, attached {attached} compiling"
    assert len({float(out.sum()) for out in outs}) == 4  # three strengths in the window, and none outside
"""


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_a_compiled_unet_is_one_graph_and_a_new_strength_compiles_nothing_anew() -> None:
    run_unchecked(COMPILING, folder=Path(__file__).parent)


def test_dropping_the_unet_frees_all_of_it_at_once() -> None:
    holder = [tiny_unet("sd")]
    put(holder[0], row())[1].unet = None  # the test's own reference, from the source back to the UNet
    draw(holder[0])
    inside = holder[0].get_submodule(cross_attentions(holder[0])[0].name).processor
    recording = [weakref.ref(inside.injection), weakref.ref(inside)]
    del inside
    gc.collect()
    gc.disable()  # adapters hold hundreds of megabytes: nothing may wait for the cycle collector
    try:
        holder.clear()
        assert [ref() for ref in recording] == [None, None]
    finally:
        gc.enable()
