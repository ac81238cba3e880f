"""One call of the diffusers pipeline: its arguments, and its pixels as pictures."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imprompt.errors import ModelError, UsageError
from imprompt.generation import video
from imprompt.generation.control import control_call
from imprompt.generation.embedded_maps import embedded_once
from imprompt.generation.families import KINDS
from imprompt.generation.favor import favored
from imprompt.generation.guided import guidance_arguments
from imprompt.generation.identity import face_controls
from imprompt.generation.job import Job, Shot
from imprompt.generation.loading import Loaded
from imprompt.generation.pipelines import scheduler_for
from imprompt.generation.text import chunk_count
from imprompt.io import seed_for


@contextmanager
def fresh_scheduler(pipe: Any, name: str | None) -> Iterator[None]:
    """While this is open, the pipeline has a new scheduler, which :func:`keeps float32 <keep_float32>`."""
    own, pipe.scheduler = pipe.scheduler, scheduler_for(pipe, name)
    keep_float32(pipe.scheduler)
    try:
        yield
    finally:
        pipe.scheduler = own


def keep_float32(scheduler: Any) -> None:
    """Let a scheduler compute in float32, and keep the latents of a pipeline in half precision in float32
    from one step to the next: the model reads them rounded, but the rounding does not add up.

    Latents that the pipeline has changed between two steps are taken as they come.
    """
    step = scheduler.step
    given = exact = torch.empty(0)

    @wraps(step)  # pipelines ask for its parameters
    def stepped(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal given, exact
        if sample.dtype not in (torch.bfloat16, torch.float16):
            return step(model_output, timestep, sample, *args, **kwargs)
        sample, dtype = exact if sample is given else sample.float(), sample.dtype
        output = step(model_output.float(), timestep, sample, *args, **kwargs)
        exact, given = output[0], output[0].to(dtype)
        if isinstance(output, tuple):
            return (given, *output[1:])
        output.prev_sample = given
        return output

    scheduler.step = stepped


def draw(loaded: Loaded, shots: Sequence[Shot]) -> list[list[Image.Image]]:
    """The pictures of one call of the pipeline, or a clip's frames, finished."""
    pipe = loaded.pipe
    job, _ = shots[0]
    request = job.request
    generators = [torch.Generator().manual_seed(_seed(job, index)) for job, index in shots]
    rows = len(shots) * (request.frames or 1)
    faces = face_controls(pipe, job.controls, loaded.adapters, rows)
    maps = embedded_once(pipe) if request.compile == "off" else nullcontext()
    with warnings.catch_warnings(), faces, favored(pipe, job.controls, rows), maps:
        warnings.filterwarnings("ignore", message=".*invalid value encountered in cast.*")
        with torch.inference_mode():
            call = _call(loaded, shots)
        if job.controls:
            call |= control_call(job.controls, job.inputs.maps, request)
        if request.task == "animate":
            frames = video.draw(pipe, call, request, job.inputs.frames, generators[0])
            return [[_checked(frame) for frame in frames]]
        generator = generators[0] if len(shots) == 1 else generators
        with torch.inference_mode(), _own_noise(job, generators[0]):
            pixels = pipe(**call, generator=generator, output_type="np").images
    return [[_finished(job, _checked(one))] for (job, _), one in zip(shots, pixels, strict=True)]


@contextmanager
def _own_noise(job: Job, generator: torch.Generator) -> Iterator[None]:
    """While open, torch's own generator is seeded where a pipeline draws from it: diffusers (0.42) samples
    the latents of an SD3 ControlNet's map without the generator it is given."""
    if not any(control.net == "sd3" for control in job.controls):
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        yield


def _seed(job: Job, index: int) -> int:
    assert job.request.seed is not None
    return seed_for(job.request.seed, index)


def _texts(loaded: Loaded, shots: Sequence[Shot]) -> dict[str, Any]:
    """The arguments of prompt, negative and guidance; CLIP's texts as their states."""
    job, _ = shots[0]
    prompts, negatives = ([getattr(job.request, name) for job, _ in shots] for name in ("prompt", "negative"))
    call = guidance_arguments(job.request, job.base, negatives)
    if video.in_windows(job.request):
        if chunk_count(loaded.pipe, *prompts, *negatives):
            raise UsageError(
                f"prompt: a clip of {job.request.frames} frames is drawn in windows, which read no text with "
                "weights or BREAK, or longer than the encoder reads; change it, or draw at most "
                f"{job.request.context} frames."
            )
        texts = None
    else:
        texts = loaded.texts.arguments(loaded.pipe, prompts, negatives if "negative_prompt" in call else None)
    if texts is None:
        return {"prompt": prompts if len(shots) > 1 else prompts[0]} | call
    return texts | {name: value for name, value in call.items() if name != "negative_prompt"}


def _call(loaded: Loaded, shots: Sequence[Shot]) -> dict[str, Any]:
    """The arguments of the diffusers pipeline, but for the generator and controls."""
    job, _ = shots[0]
    request, inputs = job.request, job.inputs
    assert request.size is not None

    def each(values: list[Any]) -> Any:
        return values if len(shots) > 1 else values[0]

    width, height = request.size
    call = {"num_inference_steps": request.steps} | _texts(loaded, shots)
    if request.task != "edit" or job.base.kind.denoiser == "transformer":  # SD's read it from the picture
        call |= {"width": width, "height": height}
    if job.base.kind is KINDS["flux-kontext"]:  # else it reads and draws a megapixel, whatever the size
        call |= {"max_area": width * height, "_auto_resize": False}
    if any(control.reads_mask for control in job.controls):  # the picture is its map
        return call | {"control_mask": inputs.region}
    if inputs.start is not None:
        call["image"] = each([inputs.start] * len(shots))
        if request.strength is not None:
            call["strength"] = request.strength
    if inputs.region is not None:
        call["mask_image"] = each([inputs.region] * len(shots))
    return call


def _finished(job: Job, image: Image.Image) -> Image.Image:
    """The drawing, with the start's own pixels outside an inpainted region."""
    start, region = job.inputs.start, job.inputs.region
    return image if start is None or region is None else Image.composite(image, start, region)


def _checked(pixels: np.ndarray) -> Image.Image:
    """Pixels (height, width, 3) in [0, 1] as a picture. Raises :class:`ModelError` for NaN and black."""
    if not np.isfinite(pixels).all():
        raise ModelError(
            "the picture came out as NaN. With float16 this is an overflow: try --dtype float32 or bfloat16. "
            "Otherwise the weights of base or adapter are damaged."
        )
    if float(pixels.max()) == 0.0:
        raise ModelError(
            "the picture came out black everywhere, a sign of overflow. Try --dtype float32, or a smaller "
            "scale or guidance."
        )
    return Image.fromarray((pixels * 255).round().astype("uint8"))
