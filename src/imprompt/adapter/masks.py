"""Masks of image prompts and text regions: read, feather, and resize them to a layer's grid.

Values are read by :func:`imprompt.encoders.masks.mask_tensor`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from imprompt.encoders.images import Source
from imprompt.encoders.masks import mask_tensor
from imprompt.errors import InputError
from imprompt.weights import moved

MaskLike: TypeAlias = Source | Tensor

_FINE = 256  # pixels that the shorter side of a mask has at least when it is feathered


def read_mask(mask: MaskLike, feather: float = 0.0, *, empty: bool = False) -> Float[Tensor, "1 1 H W"]:
    """Read one mask, with edges feathered to a width of ``feather`` (a fraction of its shorter side).

    Raises :class:`InputError` for what is no mask and, unless ``empty`` is allowed, for one that is 0
    everywhere.
    """
    values = mask_tensor(mask)
    if not empty and not values.any():
        raise InputError(
            "mask is 0 everywhere, so its image prompt could never act; leave the prompt out instead."
        )
    return feathered(values[None, None], feather)


def read_masks(
    mask: MaskLike | Sequence[MaskLike] | None, feather: float = 0.0
) -> tuple[Float[Tensor, "1 1 H W"] | None, tuple[Float[Tensor, "1 1 H W"], ...] | None]:
    """(mask for all frames, ``None``) or (``None``, masks of the frames, some of which may be 0 everywhere).

    Raises :class:`InputError` as :func:`read_mask`.
    """
    if mask is None:
        return None, None
    if isinstance(mask, Tensor) and mask.ndim == 3 and len(mask) > 1:
        mask = tuple(mask)
    if isinstance(mask, str | Path | bytes | Image.Image | Tensor):
        return read_mask(mask, feather), None
    masks = tuple(read_mask(one, feather, empty=True) for one in mask)
    if not any(bool(one.any()) for one in masks):
        raise InputError("the masks are 0 in every frame; leave the prompt out instead.")
    return None, masks


def together(
    masks: Sequence[Float[Tensor, "1 1 _ _"] | None], device: torch.device
) -> list[Float[Tensor, "1 1 _ _"] | None]:
    """The masks on a device; those of one size are copied at once."""
    found, sizes = list(masks), dict[torch.Size, list[int]]()
    for number, mask in enumerate(masks):
        if mask is not None:
            sizes.setdefault(mask.shape, []).append(number)
    for numbers in sizes.values():
        stack = moved(torch.cat([mask for n in numbers if (mask := masks[n]) is not None]), device)
        for number, mask in zip(numbers, stack.split(1), strict=True):
            found[number] = mask
    return found


def feathered(mask: Float[Tensor, "1 1 h w"], width: float) -> Float[Tensor, "1 1 H W"]:
    """Turn each edge into a linear ramp of ``width`` (of the mask's shorter side), centred on the edge.

    A box filter: values half a width away from an edge do not change, complementary masks stay complementary,
    and the border of the picture is no edge. A coarse mask is enlarged first.
    """
    if width == 0:
        return mask
    finer = -(-_FINE // min(mask.shape[-2:]))
    if finer > 1:
        mask = mask.repeat_interleave(finer, -2).repeat_interleave(finer, -1)
    radius = max(1, round(width * min(mask.shape[-2:]) / 2))
    for pad in ((radius, radius, 0, 0), (0, 0, radius, radius)):
        window = (1, 2 * radius + 1) if pad[0] else (2 * radius + 1, 1)
        mask = F.avg_pool2d(F.pad(mask, pad, mode="replicate"), window, stride=1)
    return mask.clamp(0, 1)


def resize_mask(mask: Float[Tensor, "1 1 H W"], size: tuple[int, int]) -> Float[Tensor, "1 1 h w"]:
    """Resize a mask to a layer's grid: area averages to shrink a side, then bilinear to enlarge one.

    With area averages, cells outside the mask are exactly 0, and complementary masks stay complementary.
    """
    height, width = mask.shape[-2:]
    smaller = F.interpolate(mask, (min(size[0], height), min(size[1], width)), mode="area")
    if smaller.shape[-2:] == size:
        return smaller
    return F.interpolate(smaller, size, mode="bilinear", align_corners=False)
