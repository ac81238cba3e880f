"""Scaling modes: how a prompt's strength is split into factors of the keys, of the values' mean, and of the
output.

Dimensions: S token sequences, H heads, T tokens, D head width.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_PENALTY_WIDTH = 1280  # of the widest layers of SD1.5 and SDXL: there the penalty modes act in full


def split_strength(mode: str, strength: float, width: int) -> tuple[float, float, float]:
    """A strength ``w`` at a site of ``width`` as factors of keys, of the values' mean over tokens, and of the
    output, by a canonical name of ``options.SCALINGS`` (ComfyUI_IPAdapter_plus's "embeds scaling").

    ``v-only``: (K, wV). ``k+v``: (wK, wV). ``k+v-penalty``: the same with w' = w·C/1280.
    ``k+mean-v-penalty``: (w'K, V − V̄ + w'V̄), V̄ the mean over tokens; nothing at w = 0.
    """
    if mode == "v-only":
        return 1.0, 1.0, strength
    if mode == "k+v":
        return strength, 1.0, strength
    less = strength * (width / _PENALTY_WIDTH)
    if mode == "k+v-penalty":
        return less, 1.0, less
    return less, less, float(strength != 0)


def with_strength(
    key: Float[Tensor, "S H T D"],
    value: Float[Tensor, "S H T D"],
    modes: Sequence[str],
    strengths: Sequence[float],
    width: int,
    present: Bool[Tensor, "S 1 T 1"] | None,
) -> tuple[Float[Tensor, "S H T D"], Float[Tensor, "S H T D"]]:
    """Keys and values with the part of the strength that acts inside the softmax, each in its own mode."""
    pairs = [split_strength(mode, w, width)[:2] for mode, w in zip(modes, strengths, strict=True)]
    in_key, in_mean = key.new_tensor(pairs).unbind(1)
    there = torch.ones_like(value[:, :1, :, :1]) if present is None else present.to(value.dtype)
    mean = (value * there).sum(-2, keepdim=True) / there.sum(-2, keepdim=True).clamp_min(1)
    return key * in_key[:, None, None, None], value + (in_mean - 1)[:, None, None, None] * mean
