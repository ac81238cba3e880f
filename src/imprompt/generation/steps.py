"""Progress of a drawing: a :class:`Step` after each denoising step, with a cheap preview.

Steps are counted at the scheduler, which every diffusers pipeline calls once for each step, so all tasks
report in the same way. An exception in the caller's function passes through the pipeline as any other would.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from imprompt.weights import in_float32

_PATCHWORK = 16  # latent pixels a side of the pictures that the preview's colours are fitted to


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
    _colours: "Float[Tensor, 'C1 3']" = field(repr=False)
    _factor: int = field(repr=False)

    @property
    def together(self) -> int:
        """How many pictures are drawn at once, from :attr:`picture` on."""
        return len(self._latents)

    def preview(self, which: int = 0) -> Image.Image:
        """Picture ``which`` of the batch as it looks now, at the drawn size; for a clip its middle frame.

        A linear map turns each latent pixel into a colour: no decoder runs.
        """
        latents = self._latents[which]
        if latents.ndim == 4:
            latents = latents[:, latents.shape[1] // 2]
        flat = latents.detach().float().cpu().permute(1, 2, 0)
        pixels = (flat @ self._colours[:-1] + self._colours[-1]).clamp(0, 1)
        small = Image.fromarray((pixels * 255).round().byte().numpy())
        size = small.width * self._factor, small.height * self._factor
        return small.resize(size, Image.Resampling.BILINEAR)


OnStep: TypeAlias = Callable[[Step], None]
"""Called after each step. An exception ends the drawing and leaves nothing attached to the base."""


@contextmanager
def reported(pipe: Any, on_step: OnStep | None, picture: int, pictures: int) -> Iterator[None]:
    """While open, each step of ``pipe``'s scheduler is reported to ``on_step``."""
    if on_step is None:
        yield
        return
    scheduler, step = pipe.scheduler, pipe.scheduler.step
    colours, factor = latent_colours(pipe.vae), 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    done = 0

    @wraps(step)  # pipelines ask for its parameters
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        output = step(*args, **kwargs)
        done += 1
        # Most schedulers also return what they expect the finished latents to be.
        on_step(Step(done, step_count(pipe), picture, pictures, output[-1], colours, factor))
        return output

    scheduler.step = counted
    try:
        yield
    finally:
        del scheduler.step


def step_count(pipe: Any) -> int:
    """Number of steps of the drawing that ``pipe`` is at."""
    return getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps)


@torch.no_grad()
def latent_colours(vae: Any) -> Float[Tensor, "C1 3"]:
    """The linear map, with a last row of offsets, from scaled latents to colours in 0 to 1.

    Fitted by least squares to what the VAE's encoder makes of random patchworks of 1 to 4×4 colours.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    random = torch.Generator().manual_seed(0)
    sizes = ((32, 1), (8, 2), (4, 4))  # most of a picture is even
    works = [torch.rand(m, 3, n, n, generator=random) * 1.6 - 0.3 for m, n in sizes]  # also pure colours
    colours = torch.cat([F.interpolate(work.clamp(0, 1), _PATCHWORK) for work in works])
    picture = F.interpolate(colours, scale_factor=float(factor)) * 2 - 1
    weight = next(vae.parameters())
    with in_float32(vae, when=not weight.is_meta):  # float16 overflows in SDXL's
        # An offloading hook moves what comes in.
        picture = picture.to(vae.dtype) if weight.is_meta else picture.to(weight.device)
        latents = vae.encode(picture).latent_dist.mode().float().cpu()
    found = (latents * vae.config.scaling_factor).movedim(1, -1).flatten(0, 2)
    known = torch.cat((found, torch.ones(len(found), 1)), 1)
    return torch.linalg.lstsq(known, colours.movedim(1, -1).flatten(0, 2)).solution
