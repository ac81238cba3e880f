"""UNets (SD1.5, SD2, SDXL, Kolors, AnimateDiff): image prompts in every text cross-attention ``attn2``.

Two orders matter and differ. Published checkpoints number layers as diffusers lists attention processors:
down, up, middle, the ``k``-th cross-attention being ``2k+1``. Named profiles count attention blocks as they
run: down, middle, up. Attention of motion modules (``motion_modules``, ``temporal``) looks along time and is
never counted.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from imprompt.adapter.attention import (
    SiteProcessor,
    cross_key_value,
    merge_heads,
    normed_key_value,
    split_heads,
)
from imprompt.adapter.backbones.base import (
    Backbone,
    BlockKind,
    Grid,
    Inputs,
    Site,
    batched_branches,
    block_of,
)

_KINDS: dict[str, BlockKind] = {"down_blocks": "input", "mid_block": "middle", "up_blocks": "output"}
"""Stage → kind of its blocks, in execution order."""


class UNetProcessor(SiteProcessor):
    """A cross-attention's processor: text as ever, plus the image prompts before the output projection."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if self.idle:
            if temb is not None:  # not every processor takes it
                kwargs["temb"] = temb
            return self.previous(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        residual, shape = hidden_states, hidden_states.shape
        hidden_states = _prepared(attn, hidden_states, temb)
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        key, value = self._key_value(attn, hidden_states, encoder_hidden_states)
        mask = _text_mask(attn, key, attention_mask)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if self.regional is not None:
            out = self.regional.read(attn, query, out)
        out = self.add_images(out, lambda kv: kv.attend(query), attn.to_out[0])
        out = attn.to_out[1](attn.to_out[0](merge_heads(out).to(query.dtype)))
        if len(shape) == 4:
            out = out.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    def _key_value(self, attn: Attention, states: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor]:
        if text is None:
            return normed_key_value(attn, states)
        kept = self.injection.kept_text
        if kept is None:
            return cross_key_value(attn, text)
        return kept.key_value(self.site.name, attn, lambda: cross_key_value(attn, text))


def _prepared(attn: Attention, hidden_states: Tensor, temb: Tensor | None) -> Tensor:
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    return hidden_states


def _text_mask(attn: Attention, key: Tensor, mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    rows, length = key.shape[0], key.shape[2]
    mask = attn.prepare_attention_mask(mask, length, rows)
    return mask.view(rows, attn.heads, -1, mask.shape[-1])


def cross_attentions(unet: Any) -> tuple[Site, ...]:
    """All cross-attentions of a diffusers UNet in the order of published checkpoints (down, up, middle)."""
    found = {  # not by `attn_processors`: it asks every module for a method, which takes longer
        name: module
        for name, module in unet.named_modules()
        if name.endswith("attn2") and "motion_modules" not in name and "temporal" not in name
        if hasattr(module, "get_processor")
    }
    blocks = list(dict.fromkeys(map(block_of, found)))
    stages = list(_KINDS)
    blocks.sort(key=lambda block: stages.index(block.split(".")[0]))  # stable: keeps the order inside each
    levels = _levels(unet)
    sites = []
    attention: Any
    for position, (name, attention) in enumerate(found.items()):
        stage = name.split(".")[0]
        sites.append(
            Site(
                name=name,
                index=2 * position + 1,
                block_index=blocks.index(block_of(name)),
                kind=_KINDS[stage],
                level=levels[stage if stage == "mid_block" else ".".join(name.split(".")[:2])],
                width=attention.to_k.out_features,
                cross_dim=attention.to_k.in_features,
            )
        )
    return tuple(sites)


def text_projection(unet: Any) -> nn.Module | None:
    """The UNet's text projection layer (Kolors: ``encoder_hid_proj``), if any."""
    config = getattr(unet, "config", {})
    if config.get("encoder_hid_dim_type") != "text_proj":
        return None
    return unet.get_submodule("encoder_hid_proj")


def _levels(unet: Any) -> dict[str, int]:
    """Halvings of the latent at each block's attention: a block's own resampler comes after its attention."""
    levels, level = {}, 0
    for i, block in enumerate(unet.down_blocks):
        levels[f"down_blocks.{i}"] = level
        level += getattr(block, "downsamplers", None) is not None
    levels["mid_block"] = level
    for i, block in enumerate(unet.up_blocks):
        levels[f"up_blocks.{i}"] = level
        level -= getattr(block, "upsamplers", None) is not None
    return levels


def _recognises(model: object) -> bool:
    parts = ("set_attn_processor", "down_blocks", "up_blocks", "mid_block")
    return isinstance(model, nn.Module) and all(hasattr(model, part) for part in parts)


def _inputs(given: Mapping[str, Any]) -> Inputs:
    text = given.get("encoder_hidden_states")
    timestep = torch.as_tensor(given["timestep"], device=given["sample"].device)
    return Inputs(given["sample"], text if isinstance(text, Tensor) else None, timestep)


def _grid(model: Any, inputs: Inputs, given: Mapping[str, Any]) -> Grid:
    frames = inputs.latents.shape[2] if inputs.latents.ndim == 5 else 1
    height, width = inputs.latents.shape[-2:]
    return Grid(height, width, frames)


UNET = Backbone(
    name="unet",
    component="unet",
    noun="UNet",
    recognises=_recognises,
    sites=cross_attentions,
    inputs=_inputs,
    grid=_grid,
    branches=batched_branches,
    processor=UNetProcessor,
    wraps=(
        AttnProcessor,
        AttnProcessor2_0,
        FusedAttnProcessor2_0,
        SlicedAttnProcessor,
        XFormersAttnProcessor,
    ),
    text_projection=text_projection,
)
