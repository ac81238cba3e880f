"""Stable Diffusion 3 and 3.5: joint attention, with InstantX's second attention beside it.

The adapter's attention has the image stream's raw query under norms of its own, and reads image keys and
values beside its tokens' (Tencent's formula for UNets has tokens alone). Its sum with the base's attention
is taken before the output projection. Both CFG branches are in one batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor, nn

from imprompt.adapter.attention import (
    ImageKV,
    SiteProcessor,
    merge_heads,
    query_key_value,
    split_heads,
    text_query_key_value,
)
from imprompt.adapter.backbones.base import Backbone, Grid, Inputs, Site, batched_branches
from imprompt.adapter.key_value import rms


class JointProcessor(SiteProcessor):
    """A joint attention with image prompts; the base's part as ``JointAttnProcessor2_0`` computes it."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        text = encoder_hidden_states
        if self.idle:
            return self.previous(attn, hidden_states, text, attention_mask)
        raw = [split_heads(part, attn.heads) for part in query_key_value(attn, hidden_states)]
        query, key, value = raw
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if text is not None:
            query, key, value = (
                torch.cat(pair, dim=2) for pair in zip((query, key, value), _text(attn, text), strict=True)
            )
        out = F.scaled_dot_product_attention(query, key, value)
        length = hidden_states.shape[1]
        image = self.add_images(out[:, :, :length], lambda kv: _attend(kv, *raw), attn.to_out[0])
        image = attn.to_out[1](attn.to_out[0](merge_heads(image)))
        if text is None:
            return image
        text_out = merge_heads(out[:, :, length:])
        return image, text_out if attn.context_pre_only else attn.to_add_out(text_out)


def _attend(kv: ImageKV, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The second attention: over image keys under the adapter's norm, and over its tokens' keys."""
    if kv.norms is not None:
        query, key = rms(query, kv.norms.query), rms(key, kv.norms.key)
    bias = None if kv.bias is None else F.pad(kv.bias, (key.shape[2], 0))
    key, value = torch.cat([key, kv.key], dim=2), torch.cat([value, kv.value], dim=2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def _text(attn: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The text stream's query, key and value under the base's norms, ``(B, H, T, D)``."""
    query, key, value = (split_heads(part, attn.heads) for part in text_query_key_value(attn, text))
    query = query if attn.norm_added_q is None else attn.norm_added_q(query)
    return query, key if attn.norm_added_k is None else attn.norm_added_k(key), value


def attention_sites(transformer: Any) -> tuple[Site, ...]:
    """Every block's joint attention, followed by its image-only ``attn2`` where it has one."""
    names = [
        (i, f"transformer_blocks.{i}.{part}")
        for i, block in enumerate(transformer.transformer_blocks)
        for part in ("attn", "attn2")
        if getattr(block, part, None) is not None
    ]
    return tuple(
        Site(
            name=name,
            index=index,
            block_index=block,
            kind="joint",
            level=0,
            width=transformer.inner_dim,
            cross_dim=transformer.inner_dim,
        )
        for index, (block, name) in enumerate(names)
    )


def _recognises(model: object) -> bool:
    return isinstance(model, nn.Module) and type(model).__name__ == "SD3Transformer2DModel"


def _inputs(given: Mapping[str, Any]) -> Inputs:
    return Inputs(given["hidden_states"], given["encoder_hidden_states"], given["timestep"])


def _grid(model: Any, inputs: Inputs, given: Mapping[str, Any]) -> Grid:
    patch = model.config.patch_size
    height, width = inputs.latents.shape[-2:]
    return Grid(height // patch, width // patch)


SD3 = Backbone(
    name="sd3",
    component="transformer",
    noun="SD3 transformer",
    recognises=_recognises,
    sites=attention_sites,
    inputs=_inputs,
    grid=_grid,
    branches=batched_branches,
    processor=JointProcessor,
    wraps=(JointAttnProcessor2_0, FusedJointAttnProcessor2_0),
)
