"""Regional text: inside a prompt's mask its own text is read instead of the pipeline's prompt.

At every query, ``text = (1 − Σ sᵢ) · A(q, prompt) + Σ sᵢ · A(q, textᵢ)`` with ``sᵢ = mᵢ / max(1, Σ m)``: the
masks' shares, made to add up to 1 where masks overlap, and 0 in the uncond rows. Outside all masks the
prompt's own attention is kept bit for bit. All of it happens before the layer's output projection.

Dimensions: B batch rows, H heads, L queries, D head width, T tokens, C token width.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.attention import split_heads
from imprompt.adapter.backbones.base import Caller
from imprompt.adapter.prompt import CompiledPrompt
from imprompt.errors import InputError, UsageError


@dataclass(frozen=True, eq=False)
class Regional:
    """The regional texts of one layer and how much of each every query reads."""

    texts: tuple[Float[Tensor, "B _ C"], ...]
    biases: tuple[Float[Tensor, "B 1 1 _"] | None, ...]
    shares: tuple[Float[Tensor, "B 1 L 1"], ...]
    rest: Float[Tensor, "B 1 L 1"]
    """What is left to the pipeline's prompt."""

    def read(
        self, attn: Attention, query: Float[Tensor, "B H L D"], prompt: Float[Tensor, "B H L D"]
    ) -> Float[Tensor, "B H L D"]:
        """Text attention, given that of the pipeline's prompt. Keys are the layer's own, made here so that
        LoRAs and offloading act on them as on the prompt's."""
        out = prompt * self.rest
        for text, bias, share in zip(self.texts, self.biases, self.shares, strict=True):
            states = attn.norm_encoder_hidden_states(text) if attn.norm_cross else text
            key, value = (
                split_heads(attn.to_k(states), attn.heads),
                split_heads(attn.to_v(states), attn.heads),
            )
            if attn.norm_k is not None:
                key = attn.norm_k(key)
            out = out + share * F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return out


@dataclass(eq=False)
class Regions:
    """All regional texts of one call; layers of one size share their :class:`Regional`."""

    _texts: list[Tensor] = field(default_factory=list)
    _biases: list[Tensor | None] = field(default_factory=list)
    _grids: list[tuple[Any, Tensor]] = field(default_factory=list)
    _made: dict[tuple[int, int], Regional] = field(default_factory=dict)

    def add(
        self,
        prompts: Sequence[CompiledPrompt | None],
        picks: Sequence[int],
        active: Sequence[bool],
        masks: Any,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Add one slot: batch row ``b`` has prompt ``picks[b]``, and reads its text where ``active[b]``."""
        texts = [None if prompt is None else prompt.text for prompt in prompts]
        given = [text for text in texts if text is not None]
        if not given:
            return
        longest = max(len(text) for text in given)
        stack = torch.zeros(len(prompts), longest, given[0].shape[-1], device=device, dtype=dtype)
        bias = torch.zeros(len(prompts), 1, 1, longest, device=device, dtype=dtype)
        for m, text in enumerate(texts):
            if text is not None:
                stack[m, : len(text)] = text.to(device, dtype)
                bias[m, ..., len(text) :] = float("-inf")
        order = list(picks)
        reads = [on and texts[m] is not None for m, on in zip(picks, active, strict=True)]
        padded = any(text is not None and len(text) < longest for text in texts)
        self._texts.append(stack[order])
        self._biases.append(bias[order] if padded else None)
        self._grids.append((masks, torch.tensor(reads, device=device).to(dtype)[:, None, None, None]))

    def at(self, size: tuple[int, int]) -> Regional | None:
        """The regional texts for a layer of ``size`` (height, width); ``None`` when there are none."""
        if not self._texts:
            return None
        if size not in self._made:
            placed = [grid * reads for masks, reads in self._grids if (grid := masks.at(size)) is not None]
            covered = torch.stack(placed).sum(0)
            shares = tuple(share / covered.clamp_min(1) for share in placed)
            rest = (1 - covered).clamp_min(0)
            self._made[size] = Regional(tuple(self._texts), tuple(self._biases), shares, rest)
        return self._made[size]


def project_text(projection: Any | None, states: Float[Tensor, "*B E"]) -> Float[Tensor, "*B C"]:
    """Apply the UNet's text projection to text states (or image tokens); return them unchanged without
    one."""
    if projection is None:
        return states
    weight = projection.weight
    # A weight on meta belongs to an offloading hook, which moves what comes in itself. Quantised and float8
    # layers compute in the format of the states.
    computes = weight.is_floating_point() and weight.dtype.itemsize > 1
    states = states.to(None if weight.is_meta else weight.device, weight.dtype if computes else None)
    projected: Tensor = projection(states)
    return projected


def text_options(caller: Caller) -> dict[str, Any]:
    """The options of a pipeline's call that change how its prompt is encoded, where it knows them."""
    known = inspect.signature(caller.pipe.encode_prompt).parameters
    of_layers = caller.value("cross_attention_kwargs") or {}
    stated = {"clip_skip": caller.value("clip_skip"), "lora_scale": of_layers.get("scale")}
    return {option: value for option, value in stated.items() if option in known}


def encode_text(pipe: Any, text: str | Tensor, width: int, **options: Any) -> Float[Tensor, "T C"]:
    """A text's embeddings as the pipeline makes them of its prompt, with ``options`` of its own encoding.

    Embeddings are only checked: ``(T, C)`` or ``(1, T, C)``, finite, ``C`` being ``width``. Raises
    :class:`UsageError` for words without a pipeline, :class:`InputError` for other embeddings.
    """
    if isinstance(text, Tensor):
        states = text
    else:
        if not hasattr(pipe, "encode_prompt"):
            raise UsageError(
                "text as words is encoded by the pipeline: attach the adapter to one before, or give the "
                "words' embeddings (T, C)."
            )
        states = pipe.encode_prompt(
            prompt=text,
            device=getattr(pipe, "_execution_device", pipe.device),
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **options,
        )[0]
    states = states[0] if states.ndim == 3 and len(states) == 1 else states
    if states.ndim != 2 or states.shape[-1] != width or not bool(torch.isfinite(states).all()):
        raise InputError(
            f"text has shape {tuple(states.shape)}; finite embeddings (tokens, {width}) are expected."
        )
    return states.detach()
