"""Clips: a base's pipeline with AnimateDiff's motion adapter, and frames out of diffusers' video pipelines.

:func:`find_motion` resolves a motion adapter, :func:`motion_pipeline` builds the pipeline, :func:`draw` runs
it and decodes a few frames at a time. Clips longer than the motion adapter was trained on are drawn in
sliding windows (FreeNoise, Qiu et al. 2023). Image prompts need no code here: for an adapter, frames are
rows of a batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D as _MotionModule
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from imprompt import catalog
from imprompt.adapter.schedule import Clock
from imprompt.catalog import MotionRow
from imprompt.catalog.resolve import Source, fingerprint_of, resolve
from imprompt.errors import AdapterMismatch, InputError, ModelError, UsageError, first_line
from imprompt.generation.families import Base, check_family
from imprompt.generation.pipelines import load_part
from imprompt.generation.steps import stepping
from imprompt.schema.request import FPS, FRAMES, Request
from imprompt.weights import in_float32, silence_library_logging

# Dimensions: C channels, F frames, h and w of latents.

_CHUNK = 4  # frames that are decoded or encoded at a time
_PIPELINES = {
    "StableDiffusionPipeline": "AnimateDiffPipeline",
    "StableDiffusionXLPipeline": "AnimateDiffSDXLPipeline",
}


@dataclass(frozen=True)
class Motion:
    """A motion adapter that was found, not loaded."""

    place: Source

    @property
    def name(self) -> str:
        """The name that was asked for."""
        return self.place.name

    @property
    def row(self) -> MotionRow | None:
        """Its record in the catalogue, if it has one."""
        return self.place.row if isinstance(self.place.row, MotionRow) else None

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """Fields of a request in ``imprompt.json`` beside the weights: shared_noise, shared_start,
        noise_path, frames, fps.

        Raises :class:`ModelError` for a damaged file.
        """
        return self.place.config("imprompt.json") if self.place.path is not None else {}

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits, see :func:`fingerprint_of`."""
        return fingerprint_of(self.place.weights, self.place.folder)


def find_motion(name: str | None, base: Base) -> Motion:
    """The motion adapter of that name, or the base's default.

    Raises :class:`UsageError` for an unknown alias, a base without a default or with a transformer,
    :class:`ModelError` for a folder that holds none, :class:`AdapterMismatch` for one of another family of
    bases.
    """
    if base.kind.denoiser != "unet":
        raise UsageError(
            f"base: clips are drawn with UNets (SD 1.5, SDXL), and base '{base.name}' has a transformer; "
            "draw a still with it, or take another base."
        )
    if name is None:
        name = catalog.families()[base.family].motion if base.family is not None else None
        if name is None:
            raise UsageError(
                f"motion: base '{base.name}' has no default motion adapter; name one that was made for it."
            )
    motion = Motion(resolve(name, "motion adapter", catalog.motions(), "a folder or a hub id (owner/name)"))
    if motion.row is not None:
        check_family(f"motion adapter '{name}'", motion.row, base)
    if motion.place.path is not None and not (motion.place.path / "config.json").is_file():
        raise ModelError(f"'{name}' is no motion adapter: a diffusers folder of one has a config.json.")
    return motion


def clip_defaults(request: Request, motion: Motion) -> dict[str, object]:
    """Values for the clip fields that are ``None`` in the request."""
    known = motion.defaults
    values: dict[str, object] = {"motion": motion.name}
    if request.shared_noise is None:
        values["shared_noise"] = float(known.get("shared_noise", 0.0))
    if request.shared_start is None:  # a video says itself what moves
        values["shared_start"] = 0.0 if request.video is not None else float(known.get("shared_start", 0.0))
    if request.noise_path is None:
        values["noise_path"] = str(known.get("noise_path", "apart"))
    if request.scheduler is None and motion.row is not None and motion.row.scheduler is not None:
        values["scheduler"] = motion.row.scheduler
    if request.video is None:
        values["frames"] = request.frames or int(known.get("frames", 16))
        values["fps"] = request.fps or float(known.get("fps", 8))
    elif request.strength is None:
        values["strength"] = 0.6
    return values


def at_rate(
    frames: Sequence[Image.Image], fps: float | None, request: Request
) -> tuple[list[Image.Image], float]:
    """The frames of a video that the request redraws, and their rate in frames per second.

    ``fps`` is the video's own rate; if the request has another, frames are left out or repeated. Raises
    :class:`InputError` when the video has too few frames, or more of them, or of them per second, than a clip
    can have.
    """
    rate = request.fps or fps or 8.0
    if not FPS[0] <= rate <= FPS[1]:
        raise InputError(
            f"video '{request.video}' has {rate:g} frames per second, a clip has {FPS[0]:g} to {FPS[1]:g}; "
            "say how many are drawn with --fps, such as --fps 24."
        )
    step = max(1e-6, fps / rate) if fps else 1.0
    count = math.ceil(len(frames) / step - 1e-6)
    taken = [frames[int(number * step + 1e-6)] for number in range(count)]
    wanted = request.frames or len(taken)
    if wanted > len(taken):
        raise InputError(
            f"video '{request.video}' has {len(taken)} frames at {rate:g} per second, not {wanted}; ask for "
            "fewer --frames, or another --fps."
        )
    if not FRAMES[0] <= wanted <= FRAMES[1]:
        raise InputError(
            f"video '{request.video}': at {rate:g} frames per second a clip of all of it has {wanted}, and "
            f"{FRAMES[0]} to {FRAMES[1]} can be drawn; say --frames or another --fps, or take another video."
        )
    return taken[:wanted], rate


# ---- pipelines


def motion_pipeline(pipe: Any, motion: Motion, base: Base, dtype: torch.dtype) -> Any:
    """The text-to-video pipeline of a base's text-to-image ``pipe`` and a motion adapter.

    Raises :class:`ModelError` when the motion adapter cannot be loaded, :class:`AdapterMismatch` when it was
    made for another base.
    """
    adapter = load_part(motion.place, diffusers.MotionAdapter, dtype)
    widths, own = tuple(adapter.config.block_out_channels), tuple(pipe.unet.config.block_out_channels)
    if widths != own:
        raise AdapterMismatch(
            f"motion adapter '{motion.name}' was made for a UNet of widths {widths}, base '{base.name}' has "
            f"{own}. Use one trained for this base."
        )
    name = _PIPELINES.get(type(pipe).__name__)
    if name is None:
        raise UsageError(f"animate: base '{base.name}' is a {type(pipe).__name__}, which cannot move.")
    others = ("unet", "scheduler", "safety_checker")
    parts = {name: part for name, part in pipe.components.items() if name not in others}
    try:
        with silence_library_logging():  # diffusers warns of its own cast
            unet = diffusers.UNetMotionModel.from_unet2d(pipe.unet, adapter)
    except (ValueError, RuntimeError) as error:
        raise AdapterMismatch(
            f"motion adapter '{motion.name}' does not fit base '{base.name}': {first_line(error)}"
        ) from error
    if getattr(pipe.unet, "add_embedding", None) is not None:
        # diffusers (0.42) leaves this layer of SDXL at its random initialisation.
        unet.add_embedding.load_state_dict(pipe.unet.add_embedding.state_dict())
    made = getattr(diffusers, name)(**parts, unet=unet, motion_adapter=adapter, scheduler=pipe.scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def video_pipeline(pipe: Any, base: Base) -> Any:
    """The video-to-video pipeline with the parts of a text-to-video ``pipe``.

    Raises :class:`UsageError` where diffusers has none.
    """
    if type(pipe).__name__ != "AnimateDiffPipeline":
        raise UsageError(f"video: base '{base.name}' cannot start from a video; SD1.5 models and emoji can.")
    made: Any = diffusers.AnimateDiffVideoToVideoPipeline(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made


def window_length(pipe: Any, request: Request) -> int:
    """The number of frames that are drawn in one window.

    Raises :class:`UsageError` for a window longer than the motion adapter can tell frames apart, and for a
    long clip where diffusers has no sliding windows.
    """
    known = int(pipe.motion_adapter.config.motion_max_seq_length)
    frames = request.frames or 0
    if request.context is not None and request.context > known:
        raise UsageError(
            f"context: motion adapter '{request.motion}' tells {known} frames apart, not {request.context}."
        )
    context = request.context or min(known, 16 if frames > known else known)
    if frames > context and not hasattr(pipe, "enable_free_noise"):
        raise UsageError(
            f"frames: with base '{request.base}' a clip has at most {context} frames; diffusers has no "
            "sliding windows for it."
        )
    return context


def in_windows(request: Request) -> bool:
    """Whether a complete request's clip is longer than one window."""
    return request.task == "animate" and (request.frames or 0) > (request.context or math.inf)


def draw(
    pipe: Any,
    call: Mapping[str, Any],
    request: Request,
    start: Sequence[Image.Image] | None,
    generator: torch.Generator,
) -> Iterator[np.ndarray]:
    """The clip's frames, (height, width, 3) in [0, 1], decoded a few at a time.

    ``start`` has the frames of the video to start from, at the size that is drawn.
    """
    shared = _begins_shared(pipe, call, request)
    arguments = {**call, **_start(pipe, call, request, start, shared, generator)}
    own_later = _own_noise_later(pipe, call, request, generator) if shared else nullcontext()
    with _windows(pipe, request), torch.inference_mode(), own_later:
        with torch.random.fork_rng():  # SparseCtrl's pipeline encodes pictures with the global generator
            torch.manual_seed(generator.initial_seed())
            latents = pipe(**arguments, generator=generator, output_type="latent").frames
        yield from _decode(pipe, latents)


# ---- private


@contextmanager
def _windows(pipe: Any, request: Request) -> Iterator[None]:
    """Sliding windows while a clip is drawn that is longer than one window.

    Raises :class:`UsageError` for LoRAs of the motion adapter, which diffusers' windows do not take.
    """
    if not in_windows(request):
        yield
        return
    context = request.context or 0
    lists = [each.transformer_blocks for each in pipe.unet.modules() if isinstance(each, _MotionModule)]
    own = [list(blocks) for blocks in lists]
    if any(hasattr(part, "base_layer") for blocks in lists for part in blocks.modules()):
        raise UsageError(
            f"loras: with one that changes the motion adapter a clip has at most {context} frames; ask for "
            "fewer --frames."
        )
    try:
        pipe.enable_free_noise(context_length=context, context_stride=max(1, context // 4))
        yield
    finally:
        pipe.disable_free_noise()
        for blocks, before in zip(lists, own, strict=True):  # diffusers has made other ones, not packed
            for place, block in enumerate(before):
                blocks[place] = block


def _start(
    pipe: Any,
    call: Mapping[str, Any],
    request: Request,
    start: Sequence[Image.Image] | None,
    shared: bool,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Arguments of the pipeline for its start: noise, shared noise, a video, or a video with shared noise.
    ``shared``: frames share all of it."""
    has_noise = request.shared_noise or request.shared_start or request.noise_path == "loop"
    with torch.inference_mode():
        share = 1.0 if shared else request.shared_noise or 0.0
        noise = _noise(pipe, call, request, share, generator) if has_noise else None
        if start is None:
            found: dict[str, Any] = {"num_frames": request.frames}
            return found if noise is None else found | {"latents": noise}
        if noise is None:
            return {"video": list(start), "strength": request.strength}
        return {"strength": request.strength, "latents": _noisy(pipe, call, request, start, noise)}


@contextmanager
def _own_noise_later(
    pipe: Any, call: Mapping[str, Any], request: Request, generator: torch.Generator
) -> Iterator[None]:
    """For a clip whose frames share all noise at first: after the last such step, add new noise to what the
    clip is expected to be, shared as the request says.

    With shared noise, frames differ by what the text says of their motion alone; if they went on so, that
    first guess would never be refined, since no noise lies on their differences.
    """
    border = request.shared_start or 0.0
    scheduler, step = pipe.scheduler, pipe.scheduler.step
    noise = _noise(pipe, call, request, request.shared_noise or 0.0, generator)
    waiting = True

    def stepped(predicted: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal waiting
        output = step(predicted, timestep, sample, *args, **kwargs)
        if not waiting:
            return output
        following = scheduler.timesteps[scheduler.timesteps < timestep][:1]
        if len(following) and _position(scheduler, following[0]) >= border and _whole(scheduler):
            clean = _expected(scheduler, output, predicted, timestep, sample)
            renewed, waiting = scheduler.add_noise(clean, noise.to(clean), following), False
            if isinstance(output, tuple):  # SDXL's pipeline asks for one
                return (renewed, *output[1:])
            output.prev_sample = renewed
        return output

    with stepping(scheduler, stepped):
        yield


def _begins_shared(pipe: Any, call: Mapping[str, Any], request: Request) -> bool:
    """Whether the first step lies before ``shared_start``; one from a video may lie behind."""
    if not request.shared_start:
        return False
    pipe.scheduler.set_timesteps(call["num_inference_steps"])
    timesteps = pipe.scheduler.timesteps
    if request.video is not None:
        timesteps, _ = pipe.get_timesteps(call["num_inference_steps"], timesteps, request.strength, "cpu")
    return _position(pipe.scheduler, timesteps[0]) < request.shared_start


def _position(scheduler: Any, timestep: Tensor) -> float:
    """Position in the schedule, from 0 to 1."""
    return float(Clock.of(scheduler, timestep.device).fraction(timestep.float()))


def _whole(scheduler: Any) -> bool:
    """Whether the scheduler's last call ended a step: Heun's take two calls, PNDM's first one as well."""
    return getattr(scheduler, "state_in_first_order", True) and getattr(scheduler, "counter", 0) != 1


def _expected(scheduler: Any, output: Any, predicted: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
    """What the finished latents are expected to be after a step; most schedulers return it."""
    if len(output) > 1:
        return output[-1]
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UsageError(
            f"shared_start: {type(scheduler).__name__} does not tell what clips will be; take scheduler ddim."
        )
    if scheduler.config.prediction_type == "sample":
        return predicted
    alpha_bar = scheduler.alphas_cumprod[int(timestep)].to(sample)
    if scheduler.config.prediction_type == "v_prediction":
        return alpha_bar.sqrt() * sample - (1 - alpha_bar).sqrt() * predicted
    return (sample - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()


def _noise(
    pipe: Any, call: Mapping[str, Any], request: Request, share: float, generator: torch.Generator
) -> Float[Tensor, "1 C F h w"]:
    """Noise with a share common to all frames, of unit variance in each (Ge et al. 2023, §3.1).

    The rest is independent for each frame or, for a loop, moves on a circle through two independent noises.
    """
    assert request.frames is not None
    size = call["height"] // pipe.vae_scale_factor, call["width"] // pipe.vae_scale_factor
    channels = pipe.unet.config.in_channels
    common = torch.randn(1, channels, 1, *size, generator=generator)
    if request.noise_path == "loop":
        angle = 2 * math.pi * torch.arange(request.frames).view(1, 1, -1, 1, 1) / request.frames
        one, other = torch.randn(2, 1, channels, 1, *size, generator=generator)
        own = angle.cos() * one + angle.sin() * other
    else:
        own = torch.randn(1, channels, request.frames, *size, generator=generator)
    mixed = share**0.5 * common + (1 - share) ** 0.5 * own
    return mixed.to(pipe._execution_device, pipe.unet.dtype)


def _noisy(
    pipe: Any, call: Mapping[str, Any], request: Request, start: Sequence[Image.Image], noise: Tensor
) -> Float[Tensor, "1 C F h w"]:
    """The video's latents with ``noise`` at the step where drawing begins, as diffusers adds its own."""
    pixels = pipe.video_processor.preprocess_video(list(start), height=call["height"], width=call["width"])
    latents = [
        pipe.vae.encode(chunk.to(noise.device, pipe.vae.dtype)).latent_dist.mode()
        for chunk in pixels[0].transpose(0, 1).split(_CHUNK)
    ]
    clean = torch.cat(latents).transpose(0, 1)[None].to(noise.dtype) * pipe.vae.config.scaling_factor
    pipe.scheduler.set_timesteps(call["num_inference_steps"], device=noise.device)
    timesteps, _ = pipe.get_timesteps(
        call["num_inference_steps"], pipe.scheduler.timesteps, request.strength, noise.device
    )
    return pipe.scheduler.add_noise(clean, noise, timesteps[:1])


def _decode(pipe: Any, latents: Float[Tensor, "1 C F h w"]) -> Iterator[np.ndarray]:
    vae = pipe.vae
    overflows = vae.dtype == torch.float16 and vae.config.force_upcast  # SDXL's
    try:
        with in_float32(vae, when=overflows):
            for chunk in (latents[0].transpose(0, 1) / vae.config.scaling_factor).split(_CHUNK):
                pixels = vae.decode(chunk.to(vae.dtype)).sample / 2 + 0.5
                yield from pixels.clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    finally:
        pipe.maybe_free_model_hooks()
