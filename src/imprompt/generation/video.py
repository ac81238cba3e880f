"""Clips: AnimateDiff's motion adapters around a base, and frames out of diffusers' pipelines chunk by chunk.

``find_motion`` says what a name stands for, ``moving`` builds the pipeline of a base and a motion adapter,
``draw`` runs it. Clips longer than what the motion adapter saw are drawn in sliding windows (FreeNoise). The
image prompts are none of this module's business: to the adapter frames are rows of its table.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imprompt import catalog, hub
from imprompt.catalog import MotionRow
from imprompt.catalog.resolve import resolve
from imprompt.encoders.images import Budget, frame_count, load_frames
from imprompt.encoders.video import SUFFIXES, read_video
from imprompt.errors import AdapterMismatch, InputError, ModelError, UsageError, first_line
from imprompt.generation.families import Base
from imprompt.schema.request import Request
from imprompt.weights import silence_library_logging

_CHUNK = 4  # frames that are decoded or encoded at a time
_PIPELINES = {
    "StableDiffusionPipeline": "AnimateDiffPipeline",
    "StableDiffusionXLPipeline": "AnimateDiffSDXLPipeline",
}
_PARTS = (
    "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor",
)  # fmt: skip


@dataclass(frozen=True)
class Motion:
    """A motion adapter by where it is."""

    name: str
    """As it was asked for."""
    source: str
    """Folder or hub repository."""
    row: MotionRow | None = None

    @cached_property
    def likes(self) -> Mapping[str, Any]:
        """What ``imprompt.json`` beside its weights says: shared_noise, noise_path, frames, fps."""
        try:
            said = json.loads((Path(self.source) / "imprompt.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that differ when the weights differ; of a repository, of its name."""
        files = sorted(Path(self.source).glob("*.safetensors"))
        digest = hashlib.sha256(self.source.encode() if not files else b"")
        for file in files:
            digest.update(file.read_bytes())
        return digest.hexdigest()[:12]


def find_motion(name: str | None, base: Base) -> Motion:
    """The motion adapter a request means: its own word, or the default of the base.

    Raises :class:`UsageError` for an unknown alias or a base without a default, :class:`ModelError` for a
    folder that holds none, :class:`AdapterMismatch` for one of another family of bases.
    """
    if name is None:
        name = catalog.families()[base.family].motion if base.family is not None else None
        if name is None:
            raise UsageError(
                f"motion: base '{base.name}' has no default motion adapter; name one that was made for it."
            )
    source = resolve(name, "motion adapter", catalog.motions(), "a folder or a hub id (owner/name)")
    row = source.row if isinstance(source.row, MotionRow) else None
    if row is not None and base.family is not None and row.family != base.family:
        raise AdapterMismatch(
            f"motion adapter '{name}' is for {row.family} bases; base '{base.name}' is of the family "
            f"{base.family}. See imprompt models."
        )
    if source.path is not None and not (source.path / "config.json").is_file():
        raise ModelError(f"'{name}' is no motion adapter: a diffusers folder of one has a config.json.")
    return Motion(name, source.folder, row)


def completed(request: Request, base: Base) -> dict[str, object]:
    """The fields of a clip that a request leaves open, as far as they follow from the motion adapter."""
    motion = find_motion(request.motion, base)
    row = motion.row
    changes: dict[str, object] = {"motion": motion.name}
    if request.shared_noise is None:
        changes["shared_noise"] = float(motion.likes.get("shared_noise", 0.0))
    if request.noise_path is None:
        changes["noise_path"] = str(motion.likes.get("noise_path", "apart"))
    if request.scheduler is None and row is not None and row.scheduler is not None:
        changes["scheduler"] = row.scheduler
    if request.video is None:
        changes["frames"] = request.frames or int(motion.likes.get("frames", 16))
        changes["fps"] = request.fps or float(motion.likes.get("fps", 8))
    elif request.strength is None:
        changes["strength"] = 0.6
    return changes


# ---- frames in


def read_film(source: Any, name: str, budget: Budget | None = None) -> tuple[list[Image.Image], float | None]:
    """All frames of a video, an animated picture, a folder or a list of pictures, and how many a second.

    Raises :class:`InputError` for what cannot be read, and for a still.
    """
    if isinstance(source, list | tuple):
        return [frame.convert("RGB") for frame in source], None
    if isinstance(source, Path) and source.suffix.lower() in SUFFIXES:
        return read_video(source, budget=budget)
    frames, fps = load_frames(source, budget=budget)
    if len(frames) == 1:
        raise InputError(
            f"'{name}' is a still, and frames are needed here; give an animated picture, a folder or a "
            "video, or show a still with --image."
        )
    return frames, fps


def moves(source: Any) -> bool:
    """Whether :func:`read_film` would find frames: no still, nor what only looks like a picture."""
    if isinstance(source, list | tuple):
        return True
    if isinstance(source, Path) and (source.is_dir() or source.suffix.lower() in SUFFIXES):
        return True
    return frame_count(source) > 1


def fitted(
    film: Sequence[Image.Image], own: float | None, request: Request
) -> tuple[list[Image.Image], float]:
    """The frames of a video that a request redraws: from its start, at the request's pace or its ``own``.

    Raises :class:`InputError` when it is shorter than asked for.
    """
    fps = request.fps or own or 8.0
    step = max(1e-6, own / fps) if own else 1.0
    shown = [film[place] for i in range(len(film)) if (place := int(i * step + 1e-6)) < len(film)]
    wanted = request.frames or len(shown)
    if wanted > len(shown):
        raise InputError(
            f"video '{request.video}' has {len(shown)} frames at {fps:g} a second, not {wanted}; ask for "
            "fewer --frames, or another --fps."
        )
    return shown[:wanted], fps


# ---- the pipeline


def moving(pipe: Any, motion: Motion, base: Base, dtype: torch.dtype) -> Any:
    """The text-to-video pipeline of a base's text-to-image ``pipe`` and a motion adapter.

    Raises :class:`ModelError` when the motion adapter cannot be had, :class:`AdapterMismatch` when it was
    made for another base.
    """
    import diffusers

    adapter = _load(motion, dtype)
    mine, theirs = tuple(adapter.config.block_out_channels), tuple(pipe.unet.config.block_out_channels)
    if mine != theirs:
        raise AdapterMismatch(
            f"motion adapter '{motion.name}' was made for a UNet of widths {mine}, base '{base.name}' has "
            f"{theirs}. Use one trained for this base."
        )
    name = _PIPELINES.get(type(pipe).__name__)
    if name is None:
        raise UsageError(f"animate: base '{base.name}' is a {type(pipe).__name__}, which cannot move.")
    parts = {part: pipe.components[part] for part in _PARTS if part in pipe.components}
    try:
        unet = diffusers.UNetMotionModel.from_unet2d(pipe.unet, adapter)
    except (ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise AdapterMismatch(
            f"motion adapter '{motion.name}' does not fit base '{base.name}': {reason}"
        ) from error
    if getattr(pipe.unet, "add_embedding", None) is not None:
        # SDXL's, which diffusers (0.42) leaves as made at random.
        unet.add_embedding.load_state_dict(pipe.unet.add_embedding.state_dict())
    made = getattr(diffusers, name)(**parts, unet=unet, motion_adapter=adapter, scheduler=pipe.scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def from_video(pipe: Any, base: Base) -> Any:
    """The video-to-video pipeline around the same weights. Raises :class:`UsageError` where diffusers has
    none."""
    import diffusers

    if type(pipe).__name__ != "AnimateDiffPipeline":
        raise UsageError(f"video: base '{base.name}' cannot start from a video; SD1.5 models and emoji can.")
    made: Any = diffusers.AnimateDiffVideoToVideoPipeline(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made


def window(pipe: Any, request: Request) -> int:
    """How many frames are drawn in one window. Raises :class:`UsageError` for more than the motion adapter
    can tell apart, and for a long clip where diffusers has no sliding windows."""
    known = int(pipe.motion_adapter.config.motion_max_seq_length)
    context = min(known, 16 if request.frames is not None and request.frames > known else known)
    if request.context is not None:
        context = request.context
        if context > known:
            raise UsageError(
                f"context: motion adapter '{request.motion}' tells {known} frames apart, not {context}."
            )
    if request.frames is not None and request.frames > context and not hasattr(pipe, "enable_free_noise"):
        raise UsageError(
            f"frames: with base '{request.base}' a clip has at most {context} frames; diffusers has no "
            "sliding windows for it."
        )
    return context


def draw(
    pipe: Any,
    call: Mapping[str, Any],
    request: Request,
    film: Sequence[Image.Image] | None,
    generator: torch.Generator,
) -> Iterator[np.ndarray]:
    """The clip's frames, (height, width, 3) in [0, 1], decoded a few at a time.

    ``film`` are the frames of the video to start from, of the size that is drawn.
    """
    assert request.frames is not None
    call = dict(call)
    if film is None:
        call["num_frames"] = request.frames
    else:
        call |= {"video": list(film), "strength": request.strength}
    long = request.context is not None and request.frames > request.context
    if long:
        assert request.context is not None
        pipe.enable_free_noise(context_length=request.context, context_stride=max(1, request.context // 4))
    try:
        with torch.inference_mode():
            if request.shared_noise or request.noise_path == "loop":
                noise = _noise(pipe, call, request, generator)
                if film is None:
                    call["latents"] = noise
                else:
                    call["latents"] = _noisy(pipe, call, noise)
                    del call["video"]
            with torch.random.fork_rng():  # SparseCtrl's pipeline encodes pictures by torch's own randomness
                torch.manual_seed(generator.initial_seed())
                latents = pipe(**call, generator=generator, output_type="latent").frames
            yield from _decoded(pipe, latents)
    finally:
        if long:
            pipe.disable_free_noise()


# ---- private


def _load(motion: Motion, dtype: torch.dtype) -> Any:
    import diffusers

    half = motion.row is not None and motion.row.half and dtype == torch.float16
    try:
        with silence_library_logging():
            return diffusers.MotionAdapter.from_pretrained(
                motion.source, torch_dtype=dtype, use_safetensors=True, variant="fp16" if half else None
            )
    except Exception as error:  # loaders raise nearly anything on damaged or absent files
        what = f"motion adapter '{motion.name}'"
        if Path(motion.source).exists():
            raise ModelError(f"{what} cannot be loaded: {first_line(error)}") from error
        raise hub.failure(what, motion.source, error) from error


def _noise(pipe: Any, call: Mapping[str, Any], request: Request, generator: torch.Generator) -> Tensor:
    """Noise of which all frames share a part of the variance (Ge et al. 2023, §3.1), "1 C F h w".

    The rest is of unit variance in every frame; on a loop, a circle through two independent noises.
    """
    assert request.frames is not None
    assert request.shared_noise is not None
    size = call["height"] // pipe.vae_scale_factor, call["width"] // pipe.vae_scale_factor
    channels = pipe.unet.config.in_channels
    common = torch.randn(1, channels, 1, *size, generator=generator)
    if request.noise_path == "loop":
        turn = 2 * math.pi * torch.arange(request.frames).view(1, 1, -1, 1, 1) / request.frames
        here, there = torch.randn(2, 1, channels, 1, *size, generator=generator)
        own = turn.cos() * here + turn.sin() * there
    else:
        own = torch.randn(1, channels, request.frames, *size, generator=generator)
    part = request.shared_noise
    return (part**0.5 * common + (1 - part) ** 0.5 * own).to(pipe._execution_device, pipe.unet.dtype)


def _noisy(pipe: Any, call: Mapping[str, Any], noise: Tensor) -> Tensor:
    """The video's latents with ``noise`` where the schedule begins, as diffusers adds its own."""
    pixels = pipe.video_processor.preprocess_video(
        call["video"], height=call["height"], width=call["width"]
    )  # 1 3 F H W
    latents = [
        pipe.vae.encode(chunk.to(noise.device, pipe.vae.dtype)).latent_dist.mode()
        for chunk in pixels[0].transpose(0, 1).split(_CHUNK)
    ]
    start = torch.cat(latents).transpose(0, 1)[None].to(noise.dtype) * pipe.vae.config.scaling_factor
    pipe.scheduler.set_timesteps(call["num_inference_steps"], device=noise.device)
    steps, _ = pipe.get_timesteps(
        call["num_inference_steps"], pipe.scheduler.timesteps, call["strength"], noise.device
    )
    mixed: Tensor = pipe.scheduler.add_noise(start, noise, steps[:1])
    return mixed


def _decoded(pipe: Any, latents: Tensor) -> Iterator[np.ndarray]:
    vae, before = pipe.vae, pipe.vae.dtype
    if before == torch.float16 and vae.config.force_upcast:  # SDXL's overflows in float16
        vae.to(torch.float32)
    try:
        for chunk in (latents[0].transpose(0, 1) / vae.config.scaling_factor).split(_CHUNK):
            pixels = vae.decode(chunk.to(vae.dtype)).sample / 2 + 0.5
            yield from pixels.clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    finally:
        vae.to(before)
        pipe.maybe_free_model_hooks()
