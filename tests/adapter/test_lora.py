"""A face adapter's LoRA: its formula, the user's own beside it, rows without a face, and no trace left."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline
from torch import nn

from compiled import run_unchecked
from faces import face_state, person
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import AdapterMismatch
from imprompt.schema.prompt import ImagePrompt
from tiny import PICTURE, StateDict, tiny_sd, tiny_sdxl


def draw(pipe: StableDiffusionPipeline, count: int = 1) -> np.ndarray:
    return pipe(
        ["a cat"] * count,
        num_inference_steps=2,
        width=PICTURE,
        height=PICTURE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        output_type="np",
    ).images


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny_sd()


def linears(unet: nn.Module) -> dict[int, dict[str, nn.Linear]]:
    """Every attention's four layers under its published number, counted as diffusers lists processors."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    found = {n: unet.get_submodule(name) for n, name in enumerate(names)}
    return {n: {"q": a.to_q, "k": a.to_k, "v": a.to_v, "out": a.to_out[0]} for n, a in found.items()}


def split(state: StateDict) -> tuple[StateDict, dict[str, torch.Tensor]]:
    """(the adapter without its LoRA, the LoRA)."""
    lora = {key: value for key, value in state["ip_adapter"].items() if "_lora" in key}
    rest = {key: value for key, value in state["ip_adapter"].items() if "_lora" not in key}
    return {"image_proj": state["image_proj"], "ip_adapter": rest}, lora


def users_lora(pipe: StableDiffusionPipeline, seed: int = 9) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"]), "mine")
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("mine", [False, True], ids=["alone", "beside the user's LoRA"])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_the_additions_are_those_of_weights_merged_by_hand(
    pipe: StableDiffusionPipeline, scale: float, mine: bool
) -> None:
    state = face_state(pipe.unet)
    bare, lora = split(state)
    if mine:
        users_lora(pipe)
    before, keys = draw(pipe), list(pipe.unet.state_dict())
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.lora.scale = scale
    adapter.set_prompt(person(), scale=0.7)
    drawn = draw(pipe)
    assert list(pipe.unet.state_dict()) == keys
    adapter.detach()
    assert np.array_equal(draw(pipe), before)
    with torch.no_grad():
        for n, parts in linears(pipe.unet).items():
            for part, layer in parts.items():
                down, up = (lora[f"{n}.to_{part}_lora.{half}.weight"] for half in ("down", "up"))
                getattr(layer, "base_layer", layer).weight += scale * up @ down
    merged = IPAdapter.from_state_dict(bare).attach(pipe)
    merged.set_prompt(person(), scale=0.7)
    np.testing.assert_allclose(drawn, draw(pipe), atol=1e-5)
    assert np.abs(drawn - before).max() > 0.01


def test_the_users_lora_may_come_and_go_while_a_face_is_attached(pipe: StableDiffusionPipeline) -> None:
    state = face_state(pipe.unet)
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(person())
    alone = draw(pipe)
    users_lora(pipe)
    both = draw(pipe)
    assert not np.array_equal(both, alone)
    adapter.detach()
    users = draw(pipe)
    adapter.attach(pipe)
    np.testing.assert_allclose(draw(pipe), both, atol=1e-6)
    pipe.unet.unload_lora()
    np.testing.assert_allclose(draw(pipe), alone, atol=1e-6)
    adapter.detach()
    assert not np.array_equal(draw(pipe), users)


def test_two_face_adapters_add_both_and_each_leaves_with_its_own(pipe: StableDiffusionPipeline) -> None:
    before = draw(pipe)
    first, second = (
        IPAdapter.from_state_dict(face_state(pipe.unet, seed=seed)).attach(pipe) for seed in (3, 4)
    )
    first.set_prompt(person(), scale=0.5)
    alone = draw(pipe)
    second.set_prompt(person(5), scale=0.5)
    assert not np.array_equal(draw(pipe), alone)
    second.detach()
    assert np.array_equal(draw(pipe), alone)
    first.detach()
    assert np.array_equal(draw(pipe), before)
    assert not any(each._forward_hooks for each in pipe.unet.modules())


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        ImagePrompt(features=person(), scale=0.0),
        ImagePrompt(features=person(), start=0.5, end=0.5),
    ],
    ids=["no prompt", "scale 0", "an empty window"],
)
def test_where_no_face_acts_nothing_is_added(
    pipe: StableDiffusionPipeline, prompt: ImagePrompt | None
) -> None:
    before = draw(pipe)
    adapter = IPAdapter.from_state_dict(face_state(pipe.unet)).attach(pipe)
    if prompt is not None:
        adapter.set_prompt(prompt)
    assert np.array_equal(draw(pipe), before)
    adapter.set_prompt(person())
    assert not np.array_equal(draw(pipe), before)
    adapter.clear_prompt()
    assert np.array_equal(draw(pipe), before)


def test_a_sample_without_a_face_is_drawn_without_the_lora(pipe: StableDiffusionPipeline) -> None:
    before = draw(pipe, 3)
    adapter = IPAdapter.from_state_dict(face_state(pipe.unet)).attach(pipe)
    adapter.set_batch([person(), None, person(7)])
    mixed = draw(pipe, 3)
    np.testing.assert_allclose(mixed[1], before[1], atol=1e-5)
    adapter.set_batch([person(), person(), person(7)])
    np.testing.assert_allclose(draw(pipe, 3)[[0, 2]], mixed[[0, 2]], atol=1e-5)


def test_a_lora_of_another_base_or_for_fused_attention_is_refused_and_nothing_changed(
    pipe: StableDiffusionPipeline,
) -> None:
    state = face_state(pipe.unet)
    lora = {key: value for key, value in state["ip_adapter"].items() if "_lora" in key}
    wrong = {
        key: torch.cat([value, value], -1) if "0.to_q_lora.down" in key else value
        for key, value in lora.items()
    }
    before, found = draw(pipe), dict(pipe.unet.attn_processors)
    spoiled = {"image_proj": state["image_proj"], "ip_adapter": state["ip_adapter"] | wrong}
    with pytest.raises(AdapterMismatch, match="has a LoRA for 8 attentions"):
        IPAdapter.from_state_dict(spoiled).attach(pipe)
    assert pipe.unet.attn_processors == found
    assert np.array_equal(draw(pipe), before)
    pipe.fuse_qkv_projections()
    with pytest.raises(AdapterMismatch, match="unfuse_qkv_projections"):
        IPAdapter.from_state_dict(state).attach(pipe)
    assert not any(each._forward_hooks for each in pipe.unet.modules())
    with pytest.raises(AdapterMismatch, match="made for a UNet with"):
        IPAdapter.from_state_dict(state).attach(tiny_sdxl())


def test_attention_that_is_fused_afterwards_is_refused_while_a_face_is_shown(
    pipe: StableDiffusionPipeline,
) -> None:
    adapter = IPAdapter.from_state_dict(face_state(pipe.unet)).attach(pipe)
    adapter.set_prompt(person())
    wanted = draw(pipe)
    pipe.fuse_qkv_projections()
    with pytest.raises(
        AdapterMismatch, match=rf"adapter '{adapter.checkpoint.name}' has .*unfuse_qkv_projections"
    ):
        draw(pipe)
    pipe.unfuse_qkv_projections()
    np.testing.assert_allclose(draw(pipe), wanted, atol=1e-5)


class Packed(nn.Linear):
    """A layer whose weights are bytes, as quantising libraries have them: nothing to read or merge."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_quantised_layers_are_added_to_and_left_as_they_are(pipe: StableDiffusionPipeline) -> None:
    state = face_state(pipe.unet)
    plain = IPAdapter.from_state_dict(state).attach(pipe)
    plain.set_prompt(person())
    exact = draw(pipe)
    plain.detach()
    for name in list(pipe.unet.attn_processors):
        attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
        for part in ("to_q", "to_k", "to_v"):
            setattr(attention, part, Packed(getattr(attention, part)))
    before = draw(pipe)
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(person())
    np.testing.assert_allclose(draw(pipe), exact, atol=0.05)
    adapter.detach()
    assert np.array_equal(draw(pipe), before)


@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_changes_no_pixel(kind: str, attached: str, pipe: StableDiffusionPipeline) -> None:
    state, plain = face_state(pipe.unet), tiny_sd()
    without = draw(plain)
    adapter = IPAdapter.from_state_dict(state).attach(plain)
    adapter.set_prompt(person(), scale=0.8)
    shown = draw(plain)
    assert not np.array_equal(shown, without)
    adapter.detach()

    adapter = IPAdapter.from_state_dict(state)
    if attached == "before":
        adapter.attach(pipe)
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:  # what enable_sequential_cpu_offload does to a UNet; accelerate fails on a text encoder for the CPU
        cpu_offload(pipe.unet, "cpu")
    assert next(pipe.unet.parameters()).is_meta == (kind == "sequential")
    if attached == "after":
        adapter.attach(pipe)
    for _ in "ab":
        adapter.set_prompt(person(), scale=0.8)
        assert np.array_equal(draw(pipe), shown)
        adapter.detach()
        assert np.array_equal(draw(pipe), without)
        adapter.attach(pipe)


COMPILED = """
import torch
from faces import face_state, person
from imprompt.adapter.ipadapter import IPAdapter
from tiny import tiny_unet

unet = tiny_unet()
adapter = IPAdapter.from_state_dict(face_state(unet))
sample, states = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 32)

def drawn(call):
    with torch.no_grad():
        without = call(sample, 500, states).sample
        adapter.attach(unet).set_prompt(person())
        shown = call(sample, 500, states).sample
        adapter.detach()
        return without, shown, call(sample, 500, states).sample

plain = drawn(unet)
compiled = drawn(torch.compile(unet, backend="eager"))
assert not torch.equal(plain[0], plain[1])
for one, other in zip(plain, compiled):
    torch.testing.assert_close(one, other)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_a_unet_compiled_before_draws_the_additions_too() -> None:
    run_unchecked(COMPILED, folder=Path(__file__).parent)
