"""Regional text: inside a mask, another text is read instead of the pipeline's prompt.

At every query, ``text = (1 − Σ sᵢ) · A(q, prompt) + Σ sᵢ · A(q, textᵢ)`` with ``sᵢ = mᵢ / max(1, Σ m)``: the
masks' shares, made to add up to 1 where masks overlap, and 0 in the uncond rows. Outside all masks the
prompt's own attention is kept bit for bit. All of it happens before the layer's output projection.

Dimensions: B batch rows, H heads, L queries, D head width, T tokens, C token width.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.attention import cross_key_value
from imprompt.adapter.backbones.base import Caller
from imprompt.adapter.key_value import placement
from imprompt.adapter.slots import Slot, padded
from imprompt.errors import InputError, UsageError

_COUNTS = {"num_images_per_prompt", "num_videos_per_prompt"}  # one of them, by pipeline


@dataclass(frozen=True, eq=False)
class Regional:
    """The regional texts of one layer, and the share of each at every query."""

    texts: tuple[Float[Tensor, "B _ C"], ...]
    biases: tuple[Float[Tensor, "B 1 1 _"] | None, ...]
    shares: tuple[Float[Tensor, "B 1 L 1"], ...]
    rest: Float[Tensor, "B 1 L 1"]
    """The share of the pipeline's prompt."""

    def read(
        self, attn: Attention, query: Float[Tensor, "B H L D"], prompt: Float[Tensor, "B H L D"]
    ) -> Float[Tensor, "B H L D"]:
        """The text attention, given that of the pipeline's prompt."""
        out = prompt * self.rest
        for text, bias, share in zip(self.texts, self.biases, self.shares, strict=True):
            key, value = cross_key_value(attn, text)
            out = out + share * F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return out


class Regions:
    """All regional texts of one call; layers of one size share their :class:`Regional`."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots: list[tuple[Slot, Float[Tensor, "B 1 1 1"]]] = []
        """The slots with texts, and the rows of the batch that read them."""
        self._texts: list[Tensor] = []
        self._biases: list[Tensor | None] = []
        self._made: dict[tuple[int, int], Regional] = {}
        for slot in slots:
            given = [prompt.text for prompt in slot.prompts if prompt.text is not None]
            if given:
                self._add(slot, torch.zeros_like(max(given, key=len)))

    def _add(self, slot: Slot, blank: Float[Tensor, "T C"]) -> None:
        """Add the texts of a slot; the uncond rows read none. ``blank`` stands in for those without."""
        call, texts = slot.call, [prompt.text for prompt in slot.prompts]
        sequences = [(blank if text is None else text).to(call.device, call.dtype) for text in texts]
        stack, bias = padded(sequences, [None] * len(texts))
        cond = torch.tensor([branch != "uncond" for branch in call.branches])
        spoken = torch.tensor([text is not None for text in texts])[slot.rows]
        reads = spoken & cond.repeat_interleave(len(slot.rows) // len(cond))
        self._texts.append(slot.of_prompts(stack))
        self._biases.append(None if bias is None else slot.of_prompts(bias).to(call.dtype))
        self._slots.append((slot, reads.to(call.device, call.dtype)[:, None, None, None]))

    def at(self, size: tuple[int, int]) -> Regional | None:
        """The regional texts for a layer of ``size`` (height, width); ``None`` when there are none."""
        if not self._slots:
            return None
        if size not in self._made:
            placed = [grid * reads for slot, reads in self._slots if (grid := slot.mask(size)) is not None]
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
    device, dtype = placement(projection)
    return projection(states.to(device=device, dtype=dtype))


def call_encode_prompt(pipe: Any, **arguments: Any) -> Any:
    """The states that the pipeline's ``encode_prompt`` returns for one picture or clip, ``None`` for some."""
    known = inspect.signature(pipe.encode_prompt).parameters
    counts = dict.fromkeys(_COUNTS & known.keys(), 1)
    return pipe.encode_prompt(device=execution_device(pipe), **counts, **arguments)


def execution_device(pipe: Any) -> torch.device:
    """The device on which a pipeline computes, wherever its weights wait. Looked up once: diffusers walks
    through all modules for it."""
    found = getattr(pipe, "_execution_device", None)
    return pipe.device if found is None else found


def text_options(caller: Caller) -> dict[str, Any]:
    """The options of the pipeline's call that its ``encode_prompt`` takes: ``clip_skip`` and
    ``lora_scale``."""
    known = inspect.signature(caller.pipe.encode_prompt).parameters
    of_layers = caller.value("cross_attention_kwargs") or {}
    stated = {"clip_skip": caller.value("clip_skip"), "lora_scale": of_layers.get("scale")}
    return {option: value for option, value in stated.items() if option in known}


def encode_text(pipe: Any, text: str | Tensor, width: int, **options: Any) -> Float[Tensor, "T C"]:
    """Encode a text with the pipeline's ``encode_prompt``; embeddings are checked and returned.

    Embeddings are ``(T, C)`` or ``(1, T, C)`` with ``C`` equal to ``width``. Raises :class:`UsageError` for a
    text without a pipeline, :class:`InputError` for embeddings of another shape or with NaN.
    """
    if isinstance(text, Tensor):
        states = text
    else:
        if not hasattr(pipe, "encode_prompt"):
            raise UsageError(
                "text as words is encoded by the pipeline: attach the adapter to one before, or give the "
                "words' embeddings (T, C)."
            )
        states = call_encode_prompt(pipe, prompt=text, do_classifier_free_guidance=False, **options)[0]
    states = states[0] if states.ndim == 3 and len(states) == 1 else states
    if states.ndim != 2 or states.shape[-1] != width or not bool(torch.isfinite(states).all()):
        raise InputError(
            f"text has shape {tuple(states.shape)}; finite embeddings (tokens, {width}) are expected."
        )
    return states.detach()
