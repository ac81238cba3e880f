"""Video files (MP4, MOV, Matroska, WebM) as frames, decoded by PyAV.

Only these container formats are opened, and only the file itself is read, so that a playlist with the name of
a video cannot open other files. :mod:`imprompt.encoders.images` reads animated pictures.
"""

from pathlib import Path
from typing import TypeAlias

import av
from PIL import Image

from imprompt.encoders.images import (
    MAX_FRAMES,
    MAX_PIXELS,
    Budget,
    container_of,
    frame_count,
    load_frames,
)
from imprompt.errors import InputError, first_line
from imprompt.io import check_file, printable

Clip: TypeAlias = Path | bytes | Image.Image | list[Image.Image] | tuple[Image.Image, ...]
"""A file, a folder, the bytes of a picture, or frames."""

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm")
"""Endings of video files."""


def read_video(
    path: str | Path, *, max_frames: int = MAX_FRAMES, budget: Budget | None = None
) -> tuple[list[Image.Image], float]:
    """Read all frames of a video file, upright and in RGB, and the frames per second.

    Raises :class:`InputError` when it is missing, no video, longer than ``max_frames``, or larger than what
    is left of ``budget``.
    """
    place, name, budget = check_file(path), f"'{printable(str(path))}'", budget or Budget()
    try:
        with place.open("rb") as stream:
            container_format = container_of(stream.read(12))
            if container_format is None:
                raise InputError(f"{name} is not an MP4, MOV, MKV or WebM video.")
            stream.seek(0)
            with av.open(stream, "r", format=container_format) as container:
                return _frames(container, name, max_frames, budget)
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{name} does not fit into memory; scale it down or cut it first.") from error
    except Exception as error:  # FFmpeg reports damaged data by nearly any error
        reason = printable(first_line(error))
        raise InputError(f"{name} is damaged, or no video that can be read here ({reason}).") from error


def read_clip(
    source: Clip, name: str, budget: Budget | None = None
) -> tuple[list[Image.Image], float | None]:
    """Read all frames of a video, an animated picture, a folder or a list of pictures, and the frames per
    second, if known.

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


def is_clip(source: Clip) -> bool:
    """Whether :func:`read_clip` can read it: no still, and nothing unreadable."""
    if isinstance(source, Path) and (source.is_dir() or source.suffix.lower() in SUFFIXES):
        return True
    return isinstance(source, list | tuple) or frame_count(source) > 1


def _frames(
    container: av.container.InputContainer, name: str, max_frames: int, budget: Budget
) -> tuple[list[Image.Image], float]:
    if not container.streams.video:
        raise InputError(f"{name} holds no video.")
    stream = container.streams.video[0]
    context = stream.codec_context
    context.thread_count = 1  # each thread keeps frames of its own in memory
    context.options = {"max_pixels": str(MAX_PIXELS)}
    rate = stream.average_rate or stream.guessed_rate
    _check_claims(stream, name, max_frames, budget)
    frames: list[Image.Image] = []
    for frame in container.decode(stream):
        if len(frames) == max_frames:
            raise InputError(f"{name} has more than {max_frames} frames. Cut it first.")
        budget.take(3 * frame.width * frame.height, name)
        image = frame.to_image()
        frames.append(image.rotate(frame.rotation, expand=True) if frame.rotation else image)
    if not frames or not rate:
        raise InputError(f"{name} holds no frames, or does not say how many there are a second.")
    if len({frame.size for frame in frames}) > 1:
        raise InputError(f"the frames of {name} have different sizes; one is expected.")
    return frames, float(rate)


def _check_claims(stream: av.VideoStream, name: str, max_frames: int, budget: Budget) -> None:
    """Raise by the header what decoding would raise later."""
    width, height, count = stream.codec_context.width, stream.codec_context.height, stream.frames
    if count > max_frames:
        raise InputError(f"{name} has {count} frames; at most {max_frames} are read. Cut it first.")
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} has frames of {width}×{height} pixels; scale it down first.")
    size = 3 * width * height * count
    if size > budget.left:
        budget.take(size, name)
