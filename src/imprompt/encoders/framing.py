"""Fit a picture to the square input of an image encoder: crop, pad, squash, or encode in tiles.

``crop`` is the encoder's own centre crop, with which adapters were trained. Tiles are encoded one by one and
their features merged. Sharpening and noise for image prompts are here as well.

Dimensions: ``N`` pictures, ``P`` patches and class token, ``G`` patches along a side (``P = 1 + G·G``), ``W``
and ``E`` widths of features.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from imprompt.encoders.clip import Features, ImageEncoder
from imprompt.encoders.images import MAX_PIXELS
from imprompt.errors import InputError
from imprompt.schema.options import FRAMINGS, NOISES, canonical

MEAN_COLOUR = (123, 117, 104)
"""Mean of CLIP's training pictures, which the encoder normalises to 0."""

_MAX_TILES = 16


def encode(
    encoder: ImageEncoder,
    pictures: Sequence[Image.Image],
    framing: str = "crop",
    *,
    detail: float = 0.5,
    sharpen: float = 0.0,
) -> Features:
    """Encode ``pictures``, framed by one of :data:`imprompt.schema.options.FRAMINGS`.

    In ``tile``, ``detail`` (0 to 1) is the weight of the tiles against the whole picture. ``sharpen`` (0 to
    1) sharpens each picture at the encoder's size, see :func:`sharpened`. A square picture (for tiles: of
    less than twice the encoder's size) has the same features in every framing, up to rounding. Raises
    :class:`UsageError` for an unknown framing, :class:`InputError` for a picture that is too long for tiles.
    """
    framing = canonical("framing", framing, FRAMINGS)
    if framing == "crop" and not sharpen:
        return encoder.encode(pictures)
    side = encoder.size

    def encode_sharpened(squares: Sequence[Image.Image]) -> Features:
        return encoder.encode(
            [sharpened(square, sharpen, side) for square in squares] if sharpen else squares
        )

    whole = encode_sharpened([frame(p, "squash" if framing == "tile" else framing, side) for p in pictures])
    if framing != "tile":
        return whole
    pooled, hidden = list(whole.pooled), list(whole.hidden)
    last = [] if whole.last is None else list(whole.last)
    for n, picture in enumerate(pictures):
        cuts, rows, columns = tiles(picture, side)
        if len(cuts) == 1:
            continue
        parts = encode_sharpened(cuts)
        pooled[n] = torch.lerp(pooled[n], parts.pooled.mean(0), detail)
        hidden[n] = torch.lerp(hidden[n], merge_hidden(parts.hidden, rows, columns), detail)
        if parts.last is not None:
            last[n] = torch.lerp(last[n], merge_hidden(parts.last, rows, columns), detail)
    lasts = torch.stack(last) if last else None
    return Features(torch.stack(pooled), torch.stack(hidden), whole.negative_hidden, lasts)


def frame(image: Image.Image, framing: str, side: int) -> Image.Image:
    """Make a picture square.

    ``crop`` keeps the centre, ``top``, ``bottom``, ``left`` and ``right`` keep that end of the longer side
    (an end of the shorter side means the centre), ``pad`` adds a border of :data:`MEAN_COLOUR`, ``squash``
    scales to ``side`` × ``side`` pixels. All but ``squash`` leave the scaling to the encoder.
    """
    framing = canonical("framing", framing, FRAMINGS)
    width, height = image.size
    if framing == "squash":
        return image if width == height else image.resize((side, side), Image.Resampling.BICUBIC)
    if width == height:
        return image
    if framing == "pad":
        long = max(width, height)
        if long * long > MAX_PIXELS:  # only a very long picture: its square would not fit into memory
            long = math.isqrt(MAX_PIXELS)
            shrink = long / max(width, height)
            width, height = max(1, round(width * shrink)), max(1, round(height * shrink))
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (long, long), MEAN_COLOUR)
        square.paste(image, ((long - width) // 2, (long - height) // 2))
        return square
    short = min(width, height)
    left = {"left": 0, "right": width - short}.get(framing, (width - short) // 2)
    top = {"top": 0, "bottom": height - short}.get(framing, (height - short) // 2)
    return image.crop((left, top, left + short, top + short))


def tiles(image: Image.Image, side: int) -> tuple[list[Image.Image], int, int]:
    """Cut a picture into square tiles; returns them row by row, and the numbers of rows and columns.

    A tile's side is the short side of the picture, or half of it if that is at least ``side``, the encoder's
    size. Tiles are spaced evenly and may overlap; together they cover every pixel. Raises
    :class:`InputError` when more than 16 are needed.
    """
    short = min(image.size)
    tile = -(-short // 2) if short >= 2 * side else short
    columns, rows = (math.ceil(length / tile) for length in image.size)
    if rows * columns > _MAX_TILES and tile < short:
        tile = short
        columns, rows = (math.ceil(length / tile) for length in image.size)
    if rows * columns > _MAX_TILES:
        raise InputError(
            f"a picture of {image.width}×{image.height} needs {rows * columns} tiles; {_MAX_TILES} "
            "are the most. Crop it, or choose framing 'pad' or 'squash'."
        )
    cuts = []
    for top in _starts(image.height, tile, rows):
        for left in _starts(image.width, tile, columns):
            cuts.append(image.crop((left, top, left + tile, top + tile)))
    return cuts, rows, columns


def merge_hidden(hidden: Float[Tensor, "N P W"], rows: int, columns: int) -> Float[Tensor, "P W"]:
    """Merge the hidden states of tiles: the grids of patches are joined and averaged down to one grid, the
    class tokens are averaged (ComfyUI_IPAdapter_plus, vision enhancer). SigLIP has no class token.

    ``N`` is ``rows·columns``, row by row. Raises :class:`InputError` for another number of tiles, and for
    states that are not a square grid, perhaps behind a class token.
    """
    grid = math.isqrt(hidden.shape[1])
    first = hidden.shape[1] - grid * grid  # of the patches
    if first > 1 or hidden.shape[0] != rows * columns:
        raise InputError(
            f"hidden states of shape {tuple(hidden.shape)} are not {rows * columns} tiles, each a square "
            "grid of patches, perhaps behind a class token."
        )
    exact = hidden.float()
    patches = exact[:, first:].reshape(rows, columns, grid, grid, -1)
    joined = patches.permute(4, 0, 2, 1, 3).reshape(1, -1, rows * grid, columns * grid)
    back = F.adaptive_avg_pool2d(joined, grid)[0].flatten(1).T
    return torch.cat((exact[:, :first].mean(0), back)).to(hidden.dtype)


def sharpened(image: Image.Image, amount: float, side: int) -> Image.Image:
    """Resize a square picture to ``side`` pixels and sharpen it by AMD's FidelityFX
    contrast adaptive sharpening: ``(x + w·Σ neighbours) / (1 + 4w)`` with ``w = −amount/5 · √(min(m, 1 − M) /
    M)``, ``m`` and ``M`` the least and the largest of the pixel and its four neighbours, for each colour.

    ``amount`` is 0 (unchanged) to 1. Flat areas are unchanged, hard edges change least. Raises
    :class:`InputError` for another amount.
    """
    if not 0 <= amount <= 1:
        raise InputError(f"sharpen: {amount} is given; a number from 0 to 1 is expected.")
    small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    x = _values(small).permute(2, 0, 1)
    wide = F.pad(x[None], (1, 1, 1, 1), mode="replicate")[0]
    beside = torch.stack((wide[:, :-2, 1:-1], wide[:, 2:, 1:-1], wide[:, 1:-1, :-2], wide[:, 1:-1, 2:]))
    least, most = (torch.cat((beside, x[None])).amin(0), torch.cat((beside, x[None])).amax(0))
    room = (torch.minimum(least, 1 - most) / most.clamp_min(1e-6)).clamp(0, 1)
    w = -amount / 5 * room.sqrt()
    sharp = ((x + w * beside.sum(0)) / (1 + 4 * w)).clamp(0, 1)
    return _picture(sharp.permute(1, 2, 0))


def noisy(image: Image.Image, kind: str, strength: float, seed: int = 0) -> Image.Image:
    """Add noise of ``strength`` 0 to 1; equal seeds give equal noise.

    ``fade``: (1−s)x + sU; ``dissolve``: a share s of the pixels replaced by U; ``gaussian``: x + sN;
    ``shuffle``: displaced smoothly, flipped both ways, and x(1−n) + n with n = 0.75s·N, all clamped to 0–1
    (U uniform, N normal; formulas of ComfyUI_IPAdapter_plus). The global random state is not used.
    Raises :class:`UsageError` for another kind, :class:`InputError` for another strength.
    """
    kind = canonical("noise", kind, NOISES)
    if not 0 <= strength <= 1:
        raise InputError(f"noise: strength {strength} is expected from 0 to 1.")
    random = torch.Generator().manual_seed(seed)
    x = _values(image.convert("RGB"))
    if kind == "fade":
        x = (1 - strength) * x + strength * torch.rand(x.shape, generator=random)
    elif kind == "dissolve":
        replaced = torch.rand(*x.shape[:2], 1, generator=random) < strength
        x = torch.where(replaced, torch.rand(x.shape, generator=random), x)
    elif kind == "gaussian":
        x = x + strength * torch.randn(x.shape, generator=random)
    else:
        x = _displaced(x, 75.0, (1 - strength) * 3.5, random).flip(0, 1)
        n = 0.75 * strength * torch.randn(x.shape, generator=random)
        x = x * (1 - n) + n
    return _picture(x.clamp(0, 1))


def _values(image: Image.Image) -> Float[Tensor, "h w 3"]:
    """An RGB picture as floats from 0 to 1."""
    return torch.from_numpy(np.array(image)).float() / 255


def _picture(values: Float[Tensor, "h w 3"]) -> Image.Image:
    return Image.fromarray((values * 255).round().to(torch.uint8).numpy())


def _starts(length: int, tile: int, count: int) -> list[int]:
    """Starts of ``count`` tiles that cover ``length`` evenly from end to end."""
    return [round(i * (length - tile) / (count - 1)) if count > 1 else 0 for i in range(count)]


def _displaced(
    x: Float[Tensor, "h w 3"], alpha: float, sigma: float, random: torch.Generator
) -> Float[Tensor, "h w 3"]:
    """Elastic deformation (Simard et al. 2003): a random field blurred by ``sigma`` and scaled by ``alpha``
    pixels; beyond the border is black."""
    height, width = x.shape[:2]
    field = torch.rand(1, 2, height, width, generator=random) * 2 - 1
    if sigma > 0:
        radius = min(int(4 * sigma), min(height, width) - 1)
        bell = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
        bell = (bell / bell.sum()).view(1, 1, 1, -1)
        for kernel, pad in ((bell, (radius, radius, 0, 0)), (bell.mT, (0, 0, radius, radius))):
            field = F.conv2d(F.pad(field, pad, mode="reflect").transpose(0, 1), kernel).transpose(0, 1)
    shift = field[0].permute(1, 2, 0) * alpha * 2 / torch.tensor([width, height])
    across, down = ((2 * torch.arange(n) + 1) / n - 1 for n in (width, height))
    place = torch.stack((across.expand(height, width), down[:, None].expand(height, width)), -1)
    moved = F.grid_sample(x.permute(2, 0, 1)[None], (place + shift)[None], align_corners=False)
    return moved[0].permute(1, 2, 0)
