"""Guidance of its own for the picture: ``e = e∅ + s_text (e_text − e∅) + s_image (e_both − e_text)``.

Ordinary guidance pulls towards text and picture together, ``e∅ + s (e_both − e∅)``; this is the same when
both scales are equal (Brooks et al. 2023, eq. 3, with the text first). The UNet is called with one part more,
``e_text``, in which the text is read beside the adapter's *negative* tokens, and what it gives for the
positive rows becomes ``e_text + (s_image / s_text)(e_both − e_text)``. A pipeline, which then does
``e∅ + s_text (positive − e∅)``, needs to know nothing of it; without guidance of its own s_text is 1.

Dimensions: B rows of the UNet's batch.
"""

from collections.abc import Collection
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Branch: TypeAlias = Literal["uncond", "cond", "text"]
"""What a stretch of the UNet's batch is: guidance runs the unconditional (negative) samples first. ``text``
is the positive text beside negative image tokens."""

WIDENED: dict[tuple[Branch, ...], tuple[Branch, ...]] = {
    ("uncond", "cond"): ("uncond", "text", "cond"),
    ("cond",): ("text", "cond"),
}
"""The batch's layout → that with the text alone, just before what it is compared with."""


def widened(value: Any, rows: Collection[int], parts: int) -> Any:
    """``value`` with the last of ``parts`` equal stretches doubled, in all tensors that have one of ``rows``
    rows, inside lists, tuples and mappings too; anything else as it is."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] not in rows:
            return value
        return torch.cat((value, value[-(value.shape[0] // parts) :]))
    if isinstance(value, tuple | list):
        return type(value)(widened(item, rows, parts) for item in value)
    if isinstance(value, dict):
        return {name: widened(item, rows, parts) for name, item in value.items()}
    return value


def merged(output: Any, parts: int, ratio: float) -> Any:
    """The UNet's output for a batch widened to ``parts``, brought back: the last two stretches become
    ``text + ratio (both − text)``. ``output`` is a tuple or diffusers' record with ``sample``."""
    sample = output[0]
    *before, text, both = sample.chunk(parts)
    guided = torch.lerp(text, both, ratio)  # exactly `both` at 1
    sample = torch.cat((*before, guided))
    return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)
