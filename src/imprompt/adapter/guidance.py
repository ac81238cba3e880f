"""Separate guidance scale for the image: ``e = e∅ + s_text (e_text − e∅) + s_image (e_both − e_text)``.

Equal scales give ordinary guidance, ``e∅ + s (e_both − e∅)`` (Brooks et al. 2023, eq. 3, with the text
first). The denoiser is called with one more CFG branch, ``text``, which has the cond text and the uncond
image tokens, and its output for the cond rows becomes ``e_text + (s_image / s_text)(e_both − e_text)``. The
pipeline then computes ``e∅ + s_text (cond − e∅)`` as ever; without guidance of its own s_text is 1.

Dimensions: B batch rows.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from imprompt.adapter.backbones.base import Branch

WIDENED: dict[tuple[Branch, ...], tuple[Branch, ...]] = {
    ("uncond", "cond"): ("uncond", "text", "cond"),
    ("cond",): ("text", "cond"),
}
"""The batch's branches → the same with the branch ``text`` added."""


def of_rows(change: Callable[[Tensor], Tensor], value: Any, rows: Collection[int]) -> Any:
    """``value`` with ``change`` applied to every tensor with a number of rows in ``rows``, also inside lists,
    tuples and dicts. Everything else is returned unchanged."""
    if isinstance(value, Tensor):
        return change(value) if value.ndim and value.shape[0] in rows else value
    if isinstance(value, tuple | list):
        return type(value)(of_rows(change, item, rows) for item in value)
    if isinstance(value, dict):  # diffusers' outputs are such as well
        return type(value)(**{name: of_rows(change, item, rows) for name, item in value.items()})
    return value


def widened(value: Any, rows: Collection[int], branches: int) -> Any:
    """Repeat the last of ``branches`` equal parts in the tensors of :func:`of_rows`."""
    return of_rows(lambda x: torch.cat((x, x[-(x.shape[0] // branches) :])), value, rows)


def merged(output: Any, branches: int, ratio: float) -> Any:
    """Merge the last two of ``branches`` parts of the denoiser's output: ``text + ratio (both − text)``.
    ``output`` is a tuple or a diffusers output with ``sample``."""
    sample = output[0]
    *before, text, both = sample.chunk(branches)
    guided = torch.lerp(text, both, ratio)  # exactly `both` at 1
    sample = torch.cat((*before, guided))
    return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)
