"""What is changed after a prompt was set takes effect at the next call, as if it had been set anew."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from faces import face_state, person
from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.adapter.regions import TextRegions
from imprompt.encoders.clip import ImageEncoder
from imprompt.errors import ImpromptError, InputError, UsageError
from imprompt.schema.prompt import ImagePrompt, TextRegion
from tiny import (
    POOLED,
    TEXT_WIDTH,
    picture,
    random_adapter_state,
    tiny_encoder,
    tiny_sd,
    tiny_sdxl,
    tiny_unet,
)

CHANGES: list[dict[str, Any]] = [
    {"scale": 0.4},
    {"mask": torch.eye(8)},
    {"end": 0.2},
    {"curve": "0:1,1:0"},
]


@torch.no_grad()
def draw(unet: UNet2DConditionModel) -> Tensor:
    random = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 5, TEXT_WIDTH, generator=random)
    return unet(sample, 500.0, text).sample


def scale_in_place(adapter: IPAdapter, name: str) -> None:
    weights = dict(adapter.named_parameters())
    with torch.no_grad():
        weights[next(key for key in weights if name in key)].mul_(1.5)


@pytest.mark.parametrize("name", ["image_proj", "to_k_ip", "to_v_ip"])
def test_weights_changed_in_place_act_at_the_next_call(name: str) -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    features = torch.randn(1, POOLED, generator=torch.Generator().manual_seed(3))
    adapter.set_prompt(features)
    before = draw(unet)
    scale_in_place(adapter, name)
    changed = draw(unet)
    adapter.set_prompt(features)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, draw(unet))


def test_weights_that_are_replaced_act_at_the_next_call() -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    other = IPAdapter.from_state_dict(random_adapter_state(unet, seed=9))
    features = torch.ones(1, POOLED)
    adapter.set_prompt(features)
    before = draw(unet)
    adapter.module.load_state_dict(other.module.state_dict(), assign=True)
    changed = draw(unet)
    adapter.detach()
    other.attach(unet).set_prompt(features)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, draw(unet))


def test_the_loras_scale_acts_at_the_next_call() -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(face_state(unet, "faceid"), variant="faceid").attach(unet)
    adapter.set_prompt(person())
    before = draw(unet)
    assert adapter.lora is not None
    adapter.lora.scale = 0.3
    changed = draw(unet)
    adapter.set_prompt(person())
    assert not torch.equal(changed, before)
    assert torch.equal(changed, draw(unet))


@pytest.mark.parametrize(
    ("features", "fields", "error", "said"),
    [
        (torch.ones(1, POOLED), {"scale": 1e9}, UsageError, "less than or equal to 10"),
        (torch.ones(1, POOLED), {"scale": float("nan")}, UsageError, "finite"),
        (torch.full((1, POOLED), 1e38), {}, InputError, "too large"),
        (torch.full((1, POOLED), float("inf")), {}, InputError, "NaN or infinite"),
        (torch.ones(1, POOLED), {"curve": [(0, 1e9)]}, UsageError, "outside -10 to 10"),
    ],
)
def test_numbers_that_are_not_meant_are_refused(
    features: Tensor, fields: dict[str, object], error: type[ImpromptError], said: str
) -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    adapter.set_prompt(torch.ones(1, POOLED))
    before = draw(unet)
    with pytest.raises(error, match=said):
        adapter.set_prompt(features, **fields)
    assert torch.equal(draw(unet), before)


LEFT = torch.zeros(16, 16)
LEFT[:, :8] = 1


def run(pipe: DiffusionPipeline, **call: object) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    fixed = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(1), "output_type": "pt"}
    return pipe("a cat", height=32, width=32, **fixed, **call).images[0]


def words_of(kind: str, pipe: DiffusionPipeline) -> Callable[[str | Tensor], None]:
    """What sets a text for the left half."""
    if kind == "regions":
        regions = TextRegions().attach(pipe)
        return lambda text: regions.set([TextRegion(text, LEFT)])
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).attach(pipe)
    features = torch.ones(1, POOLED)
    return lambda text: adapter.set_prompt(ImagePrompt(features=features, text=text, mask=LEFT, scale=0.1))


@pytest.mark.parametrize("kind", ["adapter", "regions"])
def test_words_of_a_region_are_encoded_by_the_text_encoder_as_it_is_now(kind: str) -> None:
    pipe = tiny_sd()
    set_text = words_of(kind, pipe)
    set_text("a dog")
    run(pipe)
    with torch.no_grad():
        for weight in pipe.text_encoder.parameters():
            weight.mul_(1.5)
    changed = run(pipe)
    set_text("a dog")
    assert torch.equal(changed, run(pipe))


@pytest.mark.parametrize("kind", ["adapter", "regions"])
def test_words_of_a_region_are_encoded_with_the_options_of_the_pipelines_call(kind: str) -> None:
    pipe = tiny_sdxl()
    set_text = words_of(kind, pipe)
    set_text("a dog")
    skipped = run(pipe, clip_skip=1)
    drawn = []
    for options in ({"clip_skip": 1}, {}):
        set_text(pipe.encode_prompt("a dog", do_classifier_free_guidance=False, **options)[0])
        drawn.append(run(pipe, clip_skip=1))
    assert torch.equal(skipped, drawn[0])
    assert not torch.equal(skipped, drawn[1])


def test_what_several_samples_show_is_projected_once() -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    features, other = torch.ones(1, POOLED), torch.full((1, POOLED), 0.5)
    seen: list[Tensor] = []
    layer = next(module for module in adapter.projection.modules() if isinstance(module, nn.Linear))
    layer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    shown = [ImagePrompt(features=each, scale=scale) for each in (features, other) for scale in (0.3, 0.7, 1)]
    adapter.set_batch(shown)
    batch = [sample[0].tokens for sample in adapter.samples]
    assert [sum(torch.equal(each, one) for one in seen) for each in (features, other)] == [1, 1]
    for prompt, tokens in zip(shown, batch, strict=True):
        adapter.set_prompt(prompt)
        assert torch.equal(adapter.samples[0][0].tokens, tokens)
    features.mul_(2)  # what was written to is not what was projected
    adapter.set_prompt(features)
    assert not torch.equal(adapter.samples[0][0].tokens, batch[0])


@pytest.mark.parametrize("count", [1, 3])
def test_another_strength_mask_or_window_makes_no_tokens_keys_or_values(count: int) -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    shown = [torch.full((1, POOLED), 1.0 + n) for n in range(count)]
    worked: list[int] = []
    for module in (adapter.projection, *(adapter.key_value(site.index) for site in cross_attentions(unet))):
        module.register_forward_hook(lambda *_: worked.append(1))

    def drawn(features: list[Tensor], **fields: Any) -> Tensor:
        worked.clear()
        adapter.set_prompt([ImagePrompt(features=each) for each in features], **fields)
        return draw(unet)

    first = drawn(shown)
    assert worked
    others = [drawn(shown, **fields) for fields in CHANGES]
    assert not worked
    for fields, seen in zip(CHANGES, others, strict=True):
        fresh = IPAdapter.from_state_dict(random_adapter_state(unet))
        adapter.detach()
        fresh.attach(unet).set_prompt([ImagePrompt(features=each) for each in shown], **fields)
        assert torch.equal(seen, draw(unet))
        assert not torch.equal(seen, first)
        fresh.detach()
        adapter.attach(unet)
    drawn([each + 1 for each in shown])
    assert worked


def test_after_clear_prompt_weights_written_through_data_act() -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    features = torch.ones(1, POOLED)
    adapter.set_prompt(features)
    before = draw(unet)
    for weight in adapter.parameters():
        weight.data.mul_(1.5)
    adapter.clear_prompt()
    adapter.set_prompt(features)
    changed = draw(unet)
    assert not torch.equal(changed, before)
    scale_in_place(adapter, "image_proj")  # as if all were made anew
    with torch.no_grad():
        next(p for n, p in adapter.named_parameters() if "image_proj" in n).div_(1.5)
    adapter.set_prompt(features)
    torch.testing.assert_close(draw(unet), changed)


@pytest.mark.parametrize("how", ["inference mode", "numpy", "data"])
def test_features_that_were_written_to_unseen_are_projected_again(how: str) -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    with torch.inference_mode(how == "inference mode"):
        features = torch.ones(1, POOLED)
        adapter.set_prompt(features)
        before = draw(unet)
        seen = {"inference mode": features, "numpy": features.numpy(), "data": features.data}[how]
        seen *= 2  # PyTorch does not count these
        adapter.set_prompt(features)
        assert not torch.equal(draw(unet), before)


@pytest.mark.parametrize("kept", [True, False])
def test_a_prompt_is_not_set_for_a_model_that_the_pipeline_has_no_more(kept: bool) -> None:
    pipe = tiny_sd()
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).attach(pipe)
    before = pipe.unet if kept else None
    pipe.unet = tiny_unet(seed=4)
    with pytest.raises(UsageError, match=r"UNet of the StableDiffusionPipeline was replaced after adapter"):
        adapter.set_prompt(torch.ones(1, POOLED))
    adapter.detach()
    assert before is not pipe.unet
    plain = run(pipe)
    adapter.attach(pipe).set_prompt(torch.ones(1, POOLED))
    assert not torch.equal(run(pipe), plain)


def test_a_model_with_an_adapter_is_not_copied() -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    adapter.set_prompt(torch.ones(1, POOLED))
    with pytest.raises(UsageError, match="cannot be copied while an adapter is attached"):
        copy.deepcopy(unet)
    for part in (unet, unet.up_blocks):
        with pytest.raises(UsageError, match="cannot be pickled while an adapter is attached"):
            pickle.dumps(part)
    adapter.detach()
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(draw(twin), draw(unet))


def in_a_thread(act: Callable[[], object]) -> BaseException | None:
    """What it raises there."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).exception()


def test_while_a_thread_draws_no_other_uses_or_changes_the_adapter() -> None:
    pipe = tiny_sd()
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).attach(pipe)
    features, other = torch.ones(1, POOLED), -torch.ones(1, POOLED)
    sibling = StableDiffusionPipeline.from_pipe(
        pipe, scheduler=DDIMScheduler.from_config(pipe.scheduler.config)
    )
    adapter.set_prompt(features)
    expected = run(pipe)
    attempts: list[Callable[[], object]] = [
        lambda: adapter.set_prompt(other),
        lambda: run(sibling),
        lambda: draw(pipe.unet),
        lambda: adapter.set_guidance(2.0),
        lambda: IPAdapter.from_state_dict(random_adapter_state(pipe.unet, seed=5)).attach(pipe),
        adapter.clear_prompt,
        adapter.detach,
    ]
    raised: list[BaseException | None] = []

    def meanwhile(_: object, step: int, __: object, changed: dict[str, object]) -> dict[str, object]:
        if step == 0:
            raised.extend(map(in_a_thread, attempts))
        return changed

    assert torch.equal(run(pipe, callback_on_step_end=meanwhile), expected)
    assert len(raised) == len(attempts)
    for error in raised:
        assert isinstance(error, UsageError)
        assert "another thread is drawing" in str(error)
    assert in_a_thread(lambda: adapter.set_prompt(other) or run(sibling)) is None
    adapter.set_prompt(features)
    assert torch.equal(run(pipe), expected)


def test_a_prompt_that_another_thread_replaced_is_not_drawn_in_its_place() -> None:
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    features, other = torch.ones(1, POOLED), -torch.ones(1, POOLED)
    adapter.set_prompt(features)
    assert in_a_thread(lambda: adapter.set_prompt(other)) is None
    with pytest.raises(UsageError, match="another thread replaced the prompt"):
        draw(unet)
    adapter.set_prompt(features)
    assert in_a_thread(lambda: draw(unet)) is None
    assert in_a_thread(lambda: adapter.set_prompt(other)) is None
    draw(unet)  # its own was drawn before


def test_threads_that_draw_with_one_adapter_draw_right_or_are_told() -> None:
    pipe = tiny_sd()
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).attach(pipe)
    pipes = [
        StableDiffusionPipeline.from_pipe(pipe, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
        for _ in range(3)
    ]
    shown = [torch.full((1, POOLED), float(number)) for number in range(3)]

    def drawn(number: int) -> Tensor | UsageError:
        try:
            adapter.set_prompt(shown[number])
            return run(pipes[number])
        except UsageError as error:
            return error

    expected = [drawn(number) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(drawn, [0, 1, 2] * 4))
    for number, one in enumerate(found):
        assert isinstance(one, UsageError) or torch.equal(one, expected[number % 3])


def test_a_second_adapter_after_all_processors_were_replaced_is_added_to_the_first() -> None:
    pipe, alone = tiny_sd(), []
    adapters = [IPAdapter.from_state_dict(random_adapter_state(pipe.unet, seed=seed)) for seed in (1, 2)]
    for adapter in adapters:
        adapter.attach(pipe).set_prompt(torch.ones(1, POOLED))
    both = run(pipe)
    for adapter in adapters:
        adapter.detach()
    plain = run(pipe)
    for adapter in adapters:
        adapter.attach(pipe).set_prompt(torch.ones(1, POOLED))
        alone.append(run(pipe))
        pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(run(pipe), both)
    assert not torch.equal(both, alone[0])
    for adapter in adapters:
        adapter.detach()
    assert torch.equal(run(pipe), plain)
    assert not pipe.unet._forward_pre_hooks


def test_the_pipeline_of_an_adapter_stays_known_when_another_leaves_the_bare_unet() -> None:
    pipe = tiny_sd()
    first, second = (IPAdapter.from_state_dict(random_adapter_state(pipe.unet, seed=seed)) for seed in (1, 2))
    first.attach(pipe).set_prompt(torch.ones(1, POOLED))
    second.attach(pipe.unet).detach()
    first.set_prompt(ImagePrompt(features=torch.ones(1, POOLED), text="a hat", mask=LEFT))
    with pytest.raises(UsageError, match="called from outside of it"):
        draw(pipe.unet)


@pytest.mark.parametrize("fields", [{"curve": "fade-out"}, {"end": 0.5, "mask": torch.eye(8)}])
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_pass_through_several_calls_of_a_curve(fields: dict[str, Any], count: int) -> None:
    """Those of a call alone are summed by the chain rule; with checkpointing, they are refused."""
    unet = tiny_unet()
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    adapter.set_prompt([ImagePrompt(features=torch.ones(1, POOLED), **fields) for _ in range(count)])
    random = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 5, TEXT_WIDTH, generator=random)
    first = sample.clone().requires_grad_(True)
    half = unet(first, 900.0, text).sample
    unet(half, 100.0, text).sample.sum().backward()
    second = half.detach().clone().requires_grad_(True)
    unet(second, 100.0, text).sample.sum().backward()
    alone = sample.clone().requires_grad_(True)
    unet(alone, 900.0, text).sample.backward(second.grad)
    torch.testing.assert_close(first.grad, alone.grad)
    unet.train().enable_gradient_checkpointing()
    out = unet(unet(first, 900.0, text).sample, 100.0, text).sample
    with pytest.raises(UsageError, match="gradient checkpointing"):
        out.sum().backward()
    once = sample.clone().requires_grad_(True)
    unet(once, 900.0, text).sample.backward(second.grad)
    torch.testing.assert_close(once.grad, alone.grad)


def test_features_are_those_of_the_encoders_processor() -> None:
    unet, (model, processor) = tiny_unet(), tiny_encoder()
    adapter = IPAdapter.from_state_dict(
        random_adapter_state(unet), image_encoder=ImageEncoder(model, processor)
    )
    before = adapter.encode([picture(1)]).pooled
    other = copy.deepcopy(processor)
    other.image_mean = [0.1, 0.2, 0.3]
    adapter.image_encoder = ImageEncoder(model, other)
    assert not torch.equal(adapter.encode([picture(1)]).pooled, before)
