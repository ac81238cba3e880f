"""Masked prompts that only the queries inside their masks read."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from imprompt.adapter.attention import ImageKV, JointKV, split_heads
from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.gathered import GatheredKV, Places
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.adapter.joint import JointKeys, joint_mask
from imprompt.schema.prompt import ImagePrompt
from tiny import (
    TEXT_WIDTH,
    first_cross_attention,
    picture,
)

QUERIES = 300
STRIPS = torch.eye(8).repeat_interleave(4, 1)[:, None].expand(-1, 32, -1)  # 8 masks of 32×32
SOFT = torch.nn.functional.avg_pool2d(STRIPS[:, None], 5, stride=1, padding=2)[:, 0]


def masks_of(kind: str) -> Tensor:
    """Masks (P, L) of 300 queries."""
    random = torch.Generator().manual_seed(3)
    masks = torch.zeros(5, QUERIES)
    if kind == "side by side":
        for number in range(5):
            masks[number, 60 * number : 60 * number + 60] = 1
    elif kind == "gaps, overlaps and grey":
        for number in range(5):
            masks[number, 50 * number : 50 * number + 73 + number] = torch.rand(73 + number, generator=random)
    elif kind == "scattered":
        masks = (torch.rand(5, QUERIES, generator=random) < 0.2).float()
    elif kind == "one is black":
        masks[1, 20:40] = masks[2, 30:50] = masks[4, 299] = 1
    return masks


@pytest.mark.parametrize(
    "kind", ["side by side", "gaps, overlaps and grey", "scattered", "one is black", "all black"]
)
@pytest.mark.parametrize("contiguous", [False, True], ids=["as UNets lay it out", "contiguous"])
def test_it_is_the_sum_of_the_terms(kind: str, contiguous: bool) -> None:
    """In float64, with and without gradients, whatever the memory layout of query and output."""
    torch.manual_seed(1)
    rows, heads, tokens, width = 2, 3, 4, 8
    query, text = (split_heads(torch.randn(rows, QUERIES, heads * width).double(), heads) for _ in range(2))
    if contiguous:
        query, text = query.contiguous(), text.contiguous()
    kvs = [
        ImageKV(
            *(torch.randn(rows, heads, tokens, width).double() for _ in range(2)),
            mask=mask.double()[None, None, :, None],
            factor=torch.randn(rows, 1, 1, 1).double(),
            prompt=number,
        )
        for number, mask in enumerate(masks_of(kind))
    ]
    expected = text.clone()
    for kv in kvs:
        scores = query @ kv.key.transpose(-1, -2) / width**0.5
        expected = expected + kv.factor * kv.mask * (scores.softmax(-1) @ kv.value)
    places = Places.of(joint_mask([kv.mask for kv in kvs]), rows)
    assert places is not None
    keys = JointKeys.of(GatheredKV, kvs, [object()], None)
    factor = torch.stack([kv.factor for kv in kvs if kv.factor is not None], 2)
    gathered = GatheredKV(keys.key, keys.value, tuple(kvs), places.mask, factor, places)
    with torch.no_grad():
        torch.testing.assert_close(gathered.add_to(text.clone(), gathered.attend(query)), expected)
    query.requires_grad_(True)
    (gathered.add_to(text, gathered.attend(query)) ** 2).sum().backward()
    alone = query.detach().clone().requires_grad_(True)
    out = text
    for kv in kvs:
        out = kv.add_to(out, kv.attend(alone))
    (out**2).sum().backward()
    torch.testing.assert_close(query.grad, alone.grad)


def test_masks_that_leave_little_out_and_those_of_a_batch_are_read_whole() -> None:
    large, few = torch.ones(1, 1, 3, 1, QUERIES), torch.zeros(1, 1, 3, 1, 64)
    small = torch.zeros(1, 1, 3, 1, QUERIES)
    small[..., :9] = 1
    assert Places.of(small, 2) is not None
    for masks in (None, large, few, small.expand(2, -1, -1, -1, -1)):
        assert Places.of(masks, 2) is None


def first_layer(unet: UNet2DConditionModel, t: float) -> Tensor:
    """What the first cross-attention gives at 32×32: its output projection is linear, so prompts add up."""
    random = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 4, 32, 32, generator=random)
    return first_cross_attention(unet, sample, t, torch.randn(1, 5, TEXT_WIDTH, generator=random))


def forms(unet: UNet2DConditionModel) -> set[type]:
    """How the layers of the last call read their prompts."""
    sites = (unet.get_submodule(site.name).processor for site in cross_attentions(unet))
    return {type(kv) for site in sites for kv in site.image_kvs}


def prompts_of(masks: Tensor, **more: object) -> list[ImagePrompt]:
    return [
        ImagePrompt(image=picture(i), mask=mask, scale=0.4 + 0.1 * i, **more) for i, mask in enumerate(masks)
    ]


@pytest.mark.parametrize("masks", [STRIPS, SOFT], ids=["sharp", "soft"])
@pytest.mark.parametrize("more", [{}, {"curve": "fade-in"}], ids=["always", "by a curve"])
def test_prompts_add_what_each_adds_alone(
    unet: UNet2DConditionModel, adapter: IPAdapter, masks: Tensor, more: dict[str, object]
) -> None:
    adapter.clear_prompt()
    for t in (900.0, 300.0):
        plain = first_layer(unet, t)
        total = plain.clone()
        for prompt in prompts_of(masks, **more):
            adapter.set_prompt([prompt])
            total += first_layer(unet, t) - plain
        adapter.set_prompt(prompts_of(masks, **more))
        torch.testing.assert_close(first_layer(unet, t), total, rtol=1e-5, atol=2e-6)
        assert GatheredKV in forms(unet)
        adapter.clear_prompt()


def test_another_mask_may_be_read_in_another_form(unet: UNet2DConditionModel, adapter: IPAdapter) -> None:
    """Keys that were laid out for one form are not taken for those of the other."""
    wide, wanted = torch.ones(8, 32, 32), []
    for masks in (STRIPS, wide):
        adapter.clear_prompt()
        adapter.set_prompt(prompts_of(masks))
        wanted.append(first_layer(unet, 500.0))
    for masks, expected, form in ((STRIPS, wanted[0], GatheredKV), (wide, wanted[1], JointKV)) * 2:
        adapter.set_prompt(prompts_of(masks))
        assert torch.equal(first_layer(unet, 500.0), expected)
        assert form in forms(unet)
