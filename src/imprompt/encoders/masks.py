"""Read masks: a file, picture, array or tensor to floats in [0, 1], where 1 is inside.

Pictures are read by :func:`imprompt.encoders.images.load_mask`; arrays and tensors follow the same rules.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.encoders.images import Source, load_mask
from imprompt.errors import InputError


def mask_tensor(
    mask: "Source | Tensor | np.ndarray[Any, Any]", notes: list[str] | None = None
) -> Float[Tensor, "H W"]:
    """Read a mask as float32 in [0, 1].

    Booleans are 0 and 1, floats are unchanged, integers are divided by 255. If no integer is above 1, 1
    counts as inside, and a line that says so is added to ``notes``. Raises :class:`InputError` for other
    shapes than (H, W), values outside the range, NaN, and complex numbers.
    """
    if not isinstance(mask, Tensor | np.ndarray):
        mask = np.array(load_mask(mask, notes=notes))
    values = _plane(mask)
    whole = values.dtype != torch.bool and not values.is_floating_point()
    values = values.to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise InputError("mask has NaN or infinite values; give floats in [0, 1], booleans or bytes.")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > (255 if whole else 1):
        raise InputError(
            f"mask has values outside 0 to 1, from {low:g} to {high:g}; give floats in [0, 1], booleans or "
            "bytes."
        )
    if whole and high > 1:
        return values / 255
    if whole and high == 1 and notes is not None:
        notes.append("mask holds only the values 0 and 1; 1 is read as inside")
    return values


def _plane(mask: "Tensor | np.ndarray[Any, Any]") -> Tensor:
    """Convert to a tensor (H, W), with the dtype kept. Raises :class:`InputError`."""
    try:
        values = torch.as_tensor(mask).detach()
    except TypeError as error:  # a number format that torch lacks, or objects
        raise InputError(f"mask: {error}") from error
    if values.is_complex():
        raise InputError(f"mask has dtype {values.dtype}; floats in [0, 1], booleans or bytes are expected.")
    if values.ndim not in (2, 3, 4) or not values.numel() or values.shape[:-2].numel() != 1:
        raise InputError(f"mask has shape {tuple(values.shape)}; one picture (H, W) is expected.")
    return values.reshape(values.shape[-2:])
