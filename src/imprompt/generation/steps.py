"""Progress of a drawing: a :class:`Step` after each denoising step, with a cheap preview.

Steps are counted at the scheduler, which every diffusers pipeline calls once for each step, so all tasks
report in the same way. An exception in the caller's function passes through the pipeline as any other would.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from imprompt.weights import in_float32

_SIDE = 16  # latent pixels a side of the pictures that the preview's colours are fitted to
_PICTURES = 24
_NEAR = 7
"""Latent pixels a side from which a preview's colours are made: a VAE spreads what it draws."""
_FINE = 4
"""Pixels a side that a preview has for each latent pixel, where the VAE has so many."""


_KNOWN: "WeakKeyDictionary[Any, Tensor]" = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Step:
    """A finished denoising step. Pictures are counted from 0, steps from 1."""

    index: int
    """Number of steps done, 1 to :attr:`total`."""
    total: int
    picture: int
    """Number of the picture being drawn; for a batch, of its first."""
    pictures: int
    """Number of pictures to draw."""
    _latents: Tensor = field(repr=False)
    _colours: "Float[Tensor, 'N1 3F']" = field(repr=False)
    _factor: int = field(repr=False)

    @property
    def together(self) -> int:
        """How many pictures are drawn at once, from :attr:`picture` on."""
        return len(self._latents)

    def preview(self, which: int = 0) -> Image.Image:
        """Picture ``which`` of the batch as it looks now, at the drawn size; for a clip its middle frame.

        A linear map turns each latent pixel and its neighbours into colours: no decoder runs.
        """
        latents = self._latents[which]
        if latents.ndim == 4:
            latents = latents[:, latents.shape[1] // 2]
        latents = latents.detach().float().cpu()[None]
        pixels = (_neighbourhoods(latents) @ self._colours).mT.unflatten(-1, latents.shape[2:])
        fine = F.pixel_shuffle(pixels, _fineness(self._factor))[0].clamp(0, 1).permute(1, 2, 0)
        size = latents.shape[3] * self._factor, latents.shape[2] * self._factor
        small = Image.fromarray((fine * 255).round().byte().numpy())
        return small.resize(size, Image.Resampling.BILINEAR)


OnStep: TypeAlias = Callable[[Step], None]
"""Called after each step. An exception ends the drawing and leaves nothing attached to the base."""


@contextmanager
def reported(
    pipe: Any, on_step: OnStep | None, picture: int, pictures: int, size: tuple[int, int]
) -> Iterator[None]:
    """While open, each step of ``pipe``'s scheduler is reported to ``on_step``; ``size`` is the drawn width
    and height."""
    if on_step is None:
        yield
        return
    step = pipe.scheduler.step
    colours, factor = latent_colours(pipe.vae), 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    width, height = (side // factor for side in size)
    done = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        output = step(*args, **kwargs)
        done += 1
        latents = output[-1]  # most schedulers also return what they expect the finished latents to be
        if latents.ndim == 3:  # FLUX and Chroma read squares of 2 × 2 latent pixels as tokens
            latents = F.pixel_shuffle(latents.mT.unflatten(-1, (height // 2, width // 2)), 2)
        on_step(Step(done, step_count(pipe), picture, pictures, latents, colours, factor))
        return output

    with stepping(pipe.scheduler, counted):
        yield


@contextmanager
def stepping(scheduler: Any, step: Callable[..., Any]) -> Iterator[None]:
    """While open, a scheduler steps by ``step``, in which pipelines find the parameters of its own."""
    before = vars(scheduler).get("step")
    scheduler.step = wraps(scheduler.step)(step)
    try:
        yield
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


def step_count(pipe: Any) -> int:
    """Number of steps of the drawing that ``pipe`` is at."""
    return getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps)


@torch.no_grad()
def latent_colours(vae: Any) -> Float[Tensor, "N1 3F"]:
    """The linear map from a latent pixel's neighbourhood (last: 1) to the colours in 0 to 1 of its F pixels.

    Fitted by least squares to what the VAE's encoder makes of random discs and rings on even grounds, once
    for each VAE.
    """
    if vae in _KNOWN:
        return _KNOWN[vae]
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pictures = _discs_and_rings(_SIDE * factor)
    weight = next(vae.parameters())
    with in_float32(vae, when=not weight.is_meta):  # float16 overflows in SDXL's
        # An offloading hook moves what comes in.
        shown = 2 * pictures - 1
        shown = shown.to(vae.dtype) if weight.is_meta else shown.to(weight.device)
        latents = vae.encode(shown).latent_dist.mode().float().cpu()
    latents = (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    fine = _fineness(factor)
    colours = F.pixel_unshuffle(F.avg_pool2d(pictures, factor // fine), fine)
    known, wanted = _neighbourhoods(latents).flatten(0, 1), colours.flatten(2).mT.flatten(0, 1)
    _KNOWN[vae] = torch.linalg.lstsq(known, wanted).solution
    return _KNOWN[vae]


def _fineness(factor: int) -> int:
    return min(_FINE, factor)


def _neighbourhoods(latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B HW N1"]:
    """Of each latent pixel, those around it and a last 1; beyond the edge, the edge goes on."""
    near = F.unfold(F.pad(latents, (_NEAR // 2,) * 4, mode="replicate"), _NEAR).mT
    return torch.cat((near, torch.ones(*near.shape[:2], 1)), -1)


def _discs_and_rings(side: int) -> Float[Tensor, "B 3 S S"]:
    """Pictures as drawings are: even areas, pure colours among them, and lines."""
    random = torch.Generator().manual_seed(0)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    pictures = torch.empty(_PICTURES, 3, side, side)
    for picture in pictures:
        colours = (torch.rand(9, 3, generator=random) * 1.6 - 0.3).clamp(0, 1)
        picture[:] = colours[0, :, None, None]
        places = torch.rand(8, 3, generator=random) * torch.tensor([1, 1, 0.3]) * side
        for number, ((y, x, radius), colour) in enumerate(zip(places, colours[1:], strict=True)):
            far = torch.hypot(row - y, column - x) - radius
            inside = (far.abs() - side / 60 if number % 2 else far).neg().add(0.5).clamp(0, 1)
            picture.lerp_(colour[:, None, None].expand_as(picture), inside.expand_as(picture))
    return pictures
