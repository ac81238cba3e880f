"""Where a prompt's strength enters the attention: in the values, or in the keys too.

Pure functions on the image's keys and values of one layer, by ComfyUI_IPAdapter_plus's published formulas
("embeds scaling"). In the values (the paper's, and the default) strength multiplies what is added; in the
keys it also flattens or sharpens which token is attended to.

Dimensions: ``S`` token sequences, ``H`` heads, ``T`` tokens, ``D`` head width, ``C`` layer width (``H·D``).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_PENALTY_WIDTH = 1280  # of the widest layers of SD1.5 and SDXL: their strength is the whole one


def scaled(
    scaling: str,
    key: Float[Tensor, "S H T D"],
    value: Float[Tensor, "S H T D"],
    strength: Float[Tensor, "S 1 1 1"],
    present: Bool[Tensor, "S 1 T 1"] | None = None,
) -> tuple[Float[Tensor, "S H T D"], Float[Tensor, "S H T D"]]:
    """Keys and values with the strength ``w`` inside, by a canonical name of ``words.SCALINGS``.

    ``v-only``: (K, wV). ``k+v``: (wK, wV). ``k+v-penalty``: the same with w·C/1280.
    ``k+mean-v-penalty``: with w' = w·C/1280, (w'K, V − V̄ + w'V̄), V̄ the mean over tokens. ``present``
    marks the tokens that are there, where sequences differ in length. Strength 0 gives no values at all in
    every mode.
    """
    if scaling == "v-only":
        return key, value * strength
    if scaling == "k+v":
        return key * strength, value * strength
    less = strength * (key.shape[1] * key.shape[3] / _PENALTY_WIDTH)
    if scaling == "k+v-penalty":
        return key * less, value * less
    if present is None:
        mean = value.mean(-2, keepdim=True)
    else:
        there = present.to(value.dtype)
        mean = (value * there).sum(-2, keepdim=True) / there.sum(-2, keepdim=True).clamp_min(1)
    spread = value - mean + less * mean
    return key * less, spread * (strength != 0).to(value.dtype)


def strengthened(
    key: Float[Tensor, "S H T D"],
    value: Float[Tensor, "S H T D"],
    strengths: Sequence[float],
    modes: Sequence[str],
    present: Bool[Tensor, "S 1 T 1"] | None,
) -> tuple[Float[Tensor, "S H T D"], Float[Tensor, "S H T D"]]:
    """Each sequence with its strength inside, in its own mode."""
    strength = value.new_tensor(strengths)[:, None, None, None]
    first, *others = dict.fromkeys(modes)
    made = scaled(first, key, value, strength, present)
    for mode in others:
        mine = torch.tensor([other == mode for other in modes], device=key.device)[:, None, None, None]
        other = scaled(mode, key, value, strength, present)
        made = torch.where(mine, other[0], made[0]), torch.where(mine, other[1], made[1])
    return made
