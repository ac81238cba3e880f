"""FLUX.1 (dev, schnell, Kontext, Fill) and Chroma: joint attention over text and image tokens.

XLabs' adapters read the image stream's query in the double blocks and add to the stream after the block;
InstantX's read it in all blocks and add inside the attention, before the output projection. Both use the
query after the base's RMS norm and before RoPE. CFG branches are separate calls, cond first.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from imprompt.adapter.attention import SiteProcessor, merge_heads, query_key_value, text_query_key_value
from imprompt.adapter.backbones.base import Backbone, Branch, Caller, Grid, Inputs, LastCall, Site


def _of_previous(name: str) -> property:
    """An attribute of the processor that is wrapped; diffusers also sets it while an adapter is attached."""
    return property(
        lambda self: getattr(self.previous, name), lambda self, value: setattr(self.previous, name, value)
    )


class FluxProcessor(SiteProcessor):
    """A FLUX attention with image prompts; the base's part as ``FluxAttnProcessor`` computes it.

    A double block adds a third output after its MLP (the way of diffusers' own IP-Adapter processor).
    """

    _attention_backend = _of_previous("_attention_backend")
    _parallel_config = _of_previous("_parallel_config")

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        text = encoder_hidden_states
        if self.idle:
            return self.previous(attn, hidden_states, text, attention_mask, image_rotary_emb)
        heads = (-1, attn.head_dim)
        query, key, value = (x.unflatten(-1, heads) for x in query_key_value(attn, hidden_states))
        query, key = attn.norm_q(query), attn.norm_k(key)
        image_query = query.transpose(1, 2)
        if text is not None:
            of_text = text_query_key_value(attn, text)
            text_query, text_key, text_value = (x.unflatten(-1, heads) for x in of_text)
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        if image_rotary_emb is not None:
            rotated = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
            query, key = cast(tuple[Tensor, Tensor], tuple(rotated))
        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return self._with_images(attn, out.to(query.dtype), image_query, text)

    def _with_images(self, attn: Any, out: Tensor, query: Tensor, text: Tensor | None) -> Any:
        """Image prompts inside the attention, the output projections, and those after the block."""
        inside = tuple(kv for kv in self.image_kvs if not kv.after_block)
        after = tuple(kv for kv in self.image_kvs if kv.after_block)
        length = 0 if text is None else text.shape[1]
        image = out[:, length:].transpose(1, 2)
        if inside:
            project = None if text is None else attn.to_out[0]
            image = self.add_images(image, lambda kv: kv.attend(query), project, kvs=inside)
        image = merge_heads(image)
        if text is None:
            return image
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        text_out = attn.to_add_out(out[:, :length].flatten(2).contiguous())
        if not after:
            return image, text_out
        extra = self.add_images(torch.zeros_like(query), lambda kv: kv.attend(query), beside=image, kvs=after)
        return image, text_out, merge_heads(extra)


def attention_sites(transformer: Any) -> tuple[Site, ...]:
    """All attentions: double blocks first, then single blocks, numbered through."""
    names = [f"transformer_blocks.{i}.attn" for i in range(len(transformer.transformer_blocks))]
    doubles = len(names)
    names += [
        f"single_transformer_blocks.{i}.attn" for i in range(len(transformer.single_transformer_blocks))
    ]
    return tuple(
        Site(
            name=name,
            index=i,
            block_index=i,
            kind="double" if i < doubles else "single",
            level=0,
            width=transformer.get_submodule(name).inner_dim,
            cross_dim=transformer.config.joint_attention_dim,
        )
        for i, name in enumerate(names)
    )


def _recognises(model: object) -> bool:
    # Flux-2 has blocks of these names as well, with other attention in them.
    blocks = getattr(model, "single_transformer_blocks", None)
    if not isinstance(model, nn.Module) or not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return False
    attention = getattr(blocks[0], "attn", None)
    return type(attention).__name__ == "FluxAttention" and hasattr(model, "transformer_blocks")


def _inputs(given: Mapping[str, Any]) -> Inputs:
    return Inputs(given["hidden_states"], given["encoder_hidden_states"], given["timestep"].float() * 1000)


def _grid(model: Any, inputs: Inputs, given: Mapping[str, Any]) -> Grid:
    ids: Tensor = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    drawn = ids[ids[:, 0] == 0]  # Kontext marks its reference's tokens with 1
    height, width = (int(side) + 1 for side in drawn[:, 1:].amax(0).tolist())
    text = 0 if inputs.text is None else inputs.text.shape[1]
    return Grid(height, width, text_tokens=text, reference_tokens=len(ids) - len(drawn))


def _branches(inputs: Inputs, caller: Caller, last: LastCall) -> tuple[Branch, ...]:
    """The branch of this call: cond and uncond are separate calls with the same latents, cond first.

    Told by the text, if that is the pipeline's ``prompt_embeds`` or ``negative_prompt_embeds`` itself; where
    these are one object, or unknown, by the order of calls.
    """
    cond, uncond = (caller.variables.get(name) for name in ("prompt_embeds", "negative_prompt_embeds"))
    if cond is not uncond and inputs.text is not None:
        if inputs.text is uncond:
            return ("uncond",)
        if inputs.text is cond:
            return ("cond",)
    if last is None or last[0]() is not inputs.latents:
        return ("cond",)
    one_text = cond is not None and cond is uncond
    return ("uncond",) if one_text or last[1]() is not inputs.text else ("cond",)


FLUX = Backbone(
    name="flux",
    component="transformer",
    noun="FLUX transformer",
    recognises=_recognises,
    sites=attention_sites,
    inputs=_inputs,
    grid=_grid,
    branches=_branches,
    processor=FluxProcessor,
    wraps=(FluxAttnProcessor,),
    unbatched=frozenset({"img_ids", "txt_ids"}),
)
