"""Texts with a place: inside a prompt's mask its own words are read instead of the pipeline's prompt.

At every query, ``text = (1 − Σ sᵢ) · A(q, prompt) + Σ sᵢ · A(q, textᵢ)`` with ``sᵢ = mᵢ / max(1, Σ m)``: the
masks' shares, made to add up to 1 where masks overlap, and 0 in the guidance's negative rows. Where no mask
is, the prompt's own attention is kept bit for bit. All of it happens before the layer's output projection,
in one pass, with the same mask grids as the pictures'.

Dimensions: B rows of the UNet's batch, H heads, L queries, D head width, T tokens, C token width, M samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.batch import MaskGrids
from imprompt.adapter.prompt import CompiledPrompt
from imprompt.errors import InputError, UsageError


@dataclass(frozen=True, eq=False)
class Regional:
    """The texts of one layer and how much of each every query reads."""

    texts: tuple[Float[Tensor, "B _ C"], ...]
    biases: tuple[Float[Tensor, "B 1 1 _"] | None, ...]
    shares: tuple[Float[Tensor, "B 1 L 1"], ...]
    rest: Float[Tensor, "B 1 L 1"]
    """What is left to the pipeline's prompt."""

    def read(
        self, attn: Attention, query: Float[Tensor, "B H L D"], prompt: Float[Tensor, "B H L D"]
    ) -> Float[Tensor, "B H L D"]:
        """The text's attention, given that of the pipeline's prompt. Keys are the layer's own, made here so
        that LoRAs and offloading act on them as on the prompt's."""
        out = prompt * self.rest
        for text, bias, share in zip(self.texts, self.biases, self.shares, strict=True):
            states = attn.norm_encoder_hidden_states(text) if attn.norm_cross else text
            key, value = (
                part(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for part in (attn.to_k, attn.to_v)
            )
            if attn.norm_k is not None:
                key = attn.norm_k(key)
            out = out + share * F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return out


@dataclass(eq=False)
class Regions:
    """All texts with a place of one call of the UNet; layers of one size share their :class:`Regional`."""

    _texts: list[Tensor] = field(default_factory=list)
    _biases: list[Tensor | None] = field(default_factory=list)
    _grids: list[tuple[MaskGrids, Tensor]] = field(default_factory=list)
    _made: dict[tuple[int, int], Regional] = field(default_factory=dict)

    def add(
        self,
        rows: Sequence[CompiledPrompt | None],
        sample_of: Sequence[int],
        active: Sequence[bool],
        masks: MaskGrids,
    ) -> None:
        """One prompt of every sample: row ``b`` of the batch shows sample ``sample_of[b]``, and reads texts
        where ``active``."""
        texts = [None if row is None else row.text for row in rows]
        said = [text for text in texts if text is not None]
        if not said:
            return
        place, dtype, width = masks.device, masks.dtype, said[0].shape[-1]
        longest = max(len(text) for text in said)
        stack = torch.zeros(len(rows), longest, width, device=place, dtype=dtype)
        bias = torch.zeros(len(rows), 1, 1, longest, device=place, dtype=dtype)
        for m, text in enumerate(texts):
            if text is not None:
                stack[m, : len(text)] = text.to(place, dtype)
                bias[m, ..., len(text) :] = float("-inf")
        order = torch.tensor(list(sample_of), device=place)
        speaks = torch.tensor(
            [on and texts[m] is not None for m, on in zip(sample_of, active, strict=True)], device=place
        )
        self._texts.append(stack[order])
        self._biases.append(bias[order] if bool(bias.any()) else None)
        self._grids.append((masks, speaks.to(dtype)[:, None, None, None]))

    def at(self, size: tuple[int, int]) -> Regional | None:
        """The texts for a layer of ``size`` (height, width); ``None`` when there are none."""
        if not self._texts:
            return None
        if size not in self._made:
            placed = [grid * speaks for masks, speaks in self._grids if (grid := masks.at(size)) is not None]
            covered = torch.stack(placed).sum(0)
            shares = tuple(share / covered.clamp_min(1) for share in placed)
            rest = (1 - covered).clamp_min(0)
            self._made[size] = Regional(tuple(self._texts), tuple(self._biases), shares, rest)
        return self._made[size]


def project_text(projection: Any | None, states: Float[Tensor, "*B E"]) -> Float[Tensor, "*B C"]:
    """States as wide as a Kolors UNet's text brought to its cross-attentions' width by its own
    ``projection``; ``None``: they are."""
    if projection is None:
        return states
    weight = projection.weight
    # A weight on meta belongs to an offloading hook, which moves what comes in itself.
    states = states.to(
        device=None if weight.is_meta else weight.device,
        dtype=weight.dtype if weight.is_floating_point() else None,  # quantised layers compute in the states'
    )
    projected: Tensor = projection(states)
    return projected


def encode_text(pipe: Any, text: str | Tensor, width: int) -> Float[Tensor, "T C"]:
    """A text's embeddings as the pipeline makes them of its prompt.

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
        )[0]
    states = states[0] if states.ndim == 3 and len(states) == 1 else states
    if states.ndim != 2 or states.shape[-1] != width or not bool(torch.isfinite(states).all()):
        raise InputError(
            f"text has shape {tuple(states.shape)}; finite embeddings (tokens, {width}) are expected."
        )
    return states.detach()
