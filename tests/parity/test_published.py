"""Every published file's full shapes: on the base it was made for (without memory); SD1.5's tokens."""

from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.unet import UNet2DConditionLoadersMixin

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.checkpoints.checkpoint import read
from imprompt.errors import AdapterMismatch
from imprompt.projections.build import build_projection
from layouts import PUBLISHED, Layout


@cache
def unet(family: str) -> UNet2DConditionModel:
    """The published UNet of a family on the meta device."""
    sdxl = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    kolors = sdxl | {
        "projection_class_embeddings_input_dim": 5632,
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
    }
    known = {"sdxl": sdxl, "kolors": kolors, "sd15": {"cross_attention_dim": 768}}
    with torch.device("meta"):
        return UNet2DConditionModel(**known[family])


def weightless(layout: Layout) -> IPAdapter:
    tensors = {key: torch.empty(shape, device="meta") for key, shape in layout.shapes.items()}
    return IPAdapter(read(tensors, name=layout.name, variant=layout.variant))


def hooks(base: UNet2DConditionModel) -> int:
    """Forward hooks on the UNet's parts."""
    return sum(len(module._forward_hooks) for name, module in base.named_modules() if name)


@pytest.mark.parametrize("layout", PUBLISHED, ids=lambda layout: layout.name)
def test_a_published_file_attaches_to_the_full_size_base_it_was_made_for(layout: Layout) -> None:
    adapter = weightless(layout)
    others = {"sd15": ("sdxl", "with"), "sdxl": ("sd15", "with"), "kolors": ("sdxl", "of Kolors")}
    other, reason = others[layout.base or layout.family]
    with pytest.raises(AdapterMismatch, match=f"was made for a UNet {reason}"):
        adapter.attach(unet(other))
    if layout.family == "sdxl" and not layout.base:
        with pytest.raises(
            AdapterMismatch, match="was made for a UNet of SDXL, UNet2DConditionModel has one of"
        ):
            adapter.attach(unet("kolors"))
    base = unet(layout.base or layout.family)
    found, before = dict(base.attn_processors), hooks(base)
    adapter.attach(base)
    additions = hooks(base) - before
    attentions = {"sd15": 32, "sdxl": 140}[layout.family]
    assert additions == (4 * attentions if layout.rank else 0)
    adapter.detach()
    assert all(found[name] is processor for name, processor in base.attn_processors.items())
    assert hooks(base) == before
    expected = {key.replace("adapter_modules.", "ip_adapter.") for key in layout.shapes}
    assert {f"{part}.{k}" for part, keys in adapter.state_dict().items() for k in keys} == expected


UNLIKE = {layout.variant + str(layout.tokens): layout for layout in PUBLISHED if layout.family == "sd15"}


@pytest.mark.parametrize("layout", UNLIKE.values(), ids=lambda layout: layout.name)
def test_full_size_projections_make_diffusers_tokens(layout: Layout) -> None:
    random = torch.Generator().manual_seed(0)
    image_proj = {
        key: torch.randn(shape, generator=random) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)
        for key, shape in layout.image_proj.items()
    }
    state = {key: value for key, value in layout.shapes.items() if key.startswith("ip_adapter.")}
    tensors = {f"image_proj.{key}": value for key, value in image_proj.items()}
    tensors |= {key: torch.empty(shape, device="meta") for key, shape in state.items()}
    checkpoint = read(tensors, name=layout.name, variant=layout.variant)
    ours = build_projection(checkpoint.variant, checkpoint.state["image_proj"]).eval()
    convert = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers
    theirs = convert(None, dict(image_proj), low_cpu_mem_usage=False).eval()
    shape = (1, 257, 1280) if ours.feature == "hidden" else (1, ours.feature_width)
    features, crop = torch.randn(shape, generator=random), None
    if ours.patch_width is not None:
        crop = torch.randn(1, 257, 1280, generator=random)
        theirs.shortcut, theirs.clip_embeds = ours.variant.shortcut, crop[:, None]
    with torch.no_grad():
        expected = theirs(features).reshape(1, -1, 768)
        torch.testing.assert_close(ours(features, crop), expected, atol=1e-4, rtol=0)
