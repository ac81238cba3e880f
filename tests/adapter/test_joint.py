"""Several image prompts read in joint products: what each adds alone, and the same tensors as they change."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from compiled import run_unchecked
from imprompt.adapter.attention import FoldedKV, ImageKV, JointKV, split_heads
from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.adapter.joint import JointKeys, joint_mask
from imprompt.encoders.clip import ImageEncoder
from imprompt.schema.prompt import ImagePrompt
from tiny import (
    TEXT_WIDTH,
    first_cross_attention,
    picture,
    random_adapter_state,
    tiny_encoder,
)

LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1.0
COLUMNS = torch.linspace(0, 1, 8).expand(8, 8)


def attached(unet: UNet2DConditionModel) -> IPAdapter:
    encoder = ImageEncoder(*tiny_encoder(), name="tiny")
    return IPAdapter.from_state_dict(random_adapter_state(unet), image_encoder=encoder).attach(unet)


def states(rows: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 5, TEXT_WIDTH, generator=random)
    return sample.expand(rows, -1, -1, -1), text.expand(rows, -1, -1)


def first_layer(unet: UNet2DConditionModel, t: float = 500.0, rows: int = 1) -> Tensor:
    """What the first cross-attention gives: its output projection is linear, so prompts add up there."""
    sample, text = states(rows)
    return first_cross_attention(unet, sample, t, text)


def draw(unet: UNet2DConditionModel, t: float = 500.0) -> Tensor:
    sample, text = states(1)
    drawn: Tensor = unet(sample, t, text).sample
    return drawn


def read(unet: UNet2DConditionModel) -> Sequence[ImageKV | JointKV]:
    """What the first cross-attention has read in the last call."""
    kvs: Sequence[ImageKV | JointKV] = unet.get_submodule(cross_attentions(unet)[0].name).processor.image_kvs
    return kvs


PLAIN = [ImagePrompt(image=picture(i), scale=0.3 * i) for i in (1, 2, 3)]
MASKED = [
    ImagePrompt(image=picture(1), mask=LEFT, scale=0.7),
    ImagePrompt(image=picture(2), mask=1 - LEFT),
    ImagePrompt(image=picture(3), mask=COLUMNS, scale=-0.4),
    ImagePrompt(image=picture(4), scale=0.5),
]
TIMED = [
    ImagePrompt(image=picture(1), mask=LEFT, end=0.4),
    ImagePrompt(image=picture(2), curve="fade-in"),
    ImagePrompt(image=picture(3), start=0.3, scale=0.4),
]


@pytest.mark.parametrize("form", [JointKV, FoldedKV])
@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("contiguous", [False, True], ids=["as UNets lay it out", "contiguous"])
def test_every_form_is_the_sum_of_the_terms(form: type[JointKV], prompts: int, contiguous: bool) -> None:
    """In float64, with and without gradients, whatever the memory layout of what it is added to."""
    torch.manual_seed(prompts)
    rows, heads, places, tokens, width = 2, 3, 10, 4, 8
    query, text = (split_heads(torch.randn(rows, places, heads * width).double(), heads) for _ in range(2))
    if contiguous:
        text = text.contiguous()
    kvs = [
        ImageKV(
            *(torch.randn(rows, heads, tokens, width).double() for _ in range(2)),
            mask=torch.rand(1, 1, places, 1).double() if number != 1 else None,
            factor=torch.randn(rows, 1, 1, 1).double(),
            prompt=number,
        )
        for number in range(prompts)
    ]
    expected = text.clone()
    for kv in kvs:
        scores = query @ kv.key.transpose(-1, -2) / width**0.5
        mask = 1.0 if kv.mask is None else kv.mask
        expected = expected + kv.factor * mask * (scores.softmax(-1) @ kv.value)
    keys = JointKeys.of(form, kvs, [object()], None)
    factor = torch.stack([kv.factor for kv in kvs if kv.factor is not None], 2)
    joint = form(keys.key, keys.value, tuple(kvs), joint_mask([kv.mask for kv in kvs]), factor)
    with torch.no_grad():
        torch.testing.assert_close(joint.add_to(text.clone(), joint.attend(query)), expected)
    query.requires_grad_(True)
    (joint.add_to(text, joint.attend(query)) ** 2).sum().backward()
    assert query.grad is not None
    alone = query.detach().clone().requires_grad_(True)
    out = text
    for kv in kvs:
        out = kv.add_to(out, kv.attend(alone))
    (out**2).sum().backward()
    torch.testing.assert_close(query.grad, alone.grad)


@pytest.mark.parametrize("prompts", [PLAIN, MASKED, TIMED], ids=["plain", "masked", "timed"])
@pytest.mark.parametrize("t", [900.0, 300.0])
def test_joint_prompts_add_what_each_adds(
    unet: UNet2DConditionModel, adapter: IPAdapter, prompts: list[ImagePrompt], t: float
) -> None:
    adapter.clear_prompt()
    plain = first_layer(unet, t)
    total = plain.clone()
    for prompt in prompts:
        adapter.set_prompt([prompt])
        total += first_layer(unet, t) - plain
    adapter.set_prompt(prompts)
    torch.testing.assert_close(first_layer(unet, t), total, rtol=1e-5, atol=2e-6)
    (joint,) = read(unet)
    assert isinstance(joint, JointKV)
    assert [kv.prompt for kv in joint.parts] == list(range(len(prompts)))


def test_only_prompts_of_equal_length_are_joint(unet: UNet2DConditionModel, adapter: IPAdapter) -> None:
    longer = ImagePrompt(image=[picture(5), picture(6)], scale=0.8)
    adapter.clear_prompt()
    plain = first_layer(unet)
    alone = []
    for prompt in (longer, *PLAIN):
        adapter.set_prompt([prompt])
        alone.append(first_layer(unet) - plain)
    adapter.set_prompt([PLAIN[0], longer, *PLAIN[1:]])
    torch.testing.assert_close(first_layer(unet), plain + sum(alone), rtol=1e-5, atol=2e-6)
    assert sorted(len(kv.parts) for kv in read(unet)) == [1, 3]


def test_each_sample_of_a_batch_has_joint_prompts_of_its_own(
    unet: UNet2DConditionModel, adapter: IPAdapter
) -> None:
    samples = [MASKED, PLAIN, TIMED[:1]]
    adapter.set_batch(samples)
    together = first_layer(unet, 900.0, rows=3)
    for row, prompts in enumerate(samples):
        adapter.set_prompt(prompts)
        torch.testing.assert_close(
            together[row : row + 1], first_layer(unet, 900.0), rtol=1e-5, atol=2e-6, msg=f"sample {row}"
        )


def test_other_pictures_and_strengths_are_written_into_the_same_tensors(
    unet: UNet2DConditionModel, adapter: IPAdapter
) -> None:
    others = [prompt.replace(image=picture(10 + i), scale=0.9) for i, prompt in enumerate(MASKED)]
    adapter.set_prompt(others)
    wanted = first_layer(unet)
    adapter.clear_prompt()
    first_layer(unet)
    adapter.set_prompt(MASKED)
    first_layer(unet)
    (before,) = read(unet)
    adapter.set_prompt(others)
    assert torch.equal(first_layer(unet), wanted)
    (after,) = read(unet)
    assert isinstance(before, JointKV)
    assert isinstance(after, JointKV)
    for name in ("key", "value", "factor"):
        assert getattr(after, name).data_ptr() == getattr(before, name).data_ptr(), name


def test_gradients_through_joint_prompts_are_those_of_the_sum(
    unet: UNet2DConditionModel, adapter: IPAdapter
) -> None:
    """Against finite differences, since one by one is another formula."""
    sample, text = states(1)
    adapter.set_prompt(MASKED)
    sample = sample.clone().requires_grad_(True)
    direction = torch.randn(sample.shape, generator=torch.Generator().manual_seed(2))
    drawn = unet(sample, 500.0, text).sample
    weights = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(3))
    (drawn * weights).sum().backward()
    assert sample.grad is not None
    with torch.no_grad():
        ahead, behind = (
            (unet(sample + side * 1e-2 * direction, 500.0, text).sample * weights).sum() for side in (1, -1)
        )
    torch.testing.assert_close((sample.grad * direction).sum(), (ahead - behind) / 2e-2, rtol=2e-2, atol=1e-2)


@torch.no_grad()
def test_joint_prompts_are_measured_one_by_one(unet: UNet2DConditionModel, adapter: IPAdapter) -> None:
    adapter.set_prompt(MASKED)
    unwatched = draw(unet)
    with adapter.recording() as recorder:
        assert torch.equal(draw(unet), unwatched)
    together = recorder.result()
    assert together.maps.shape == (4, 8, 8)
    for number, prompt in enumerate(MASKED):
        adapter.set_prompt([prompt])
        with adapter.recording() as recorder:
            draw(unet)
        # Behind the first layer queries depend on the other prompts.
        torch.testing.assert_close(together.strength[number, 0, 0], recorder.result().strength[0, 0, 0])


COMPILING = """
import torch
from test_joint import MASKED, TIMED, attached, draw
from tiny import tiny_unet

torch._dynamo.reset()
compiled, plain, graphs = tiny_unet("sd"), tiny_unet("sd"), []
compiled.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
adapter, same = attached(compiled), attached(plain)
with torch.no_grad():
    for prompts in (MASKED[:3], TIMED, [prompt.replace(mask=None) for prompt in TIMED], MASKED[1:]):
        adapter.set_prompt(prompts), same.set_prompt(prompts)
        for t in (torch.tensor(900.0), torch.tensor(300.0)):
            assert torch.allclose(draw(compiled, t), draw(plain, t), rtol=1e-5, atol=2e-6)
assert len(graphs) == 1, f"{len(graphs)} graphs"
"""


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_other_joint_prompts_masks_and_windows_compile_nothing_anew() -> None:
    run_unchecked(COMPILING, folder=Path(__file__).parent)
