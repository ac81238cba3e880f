"""Clips on disk: GIF, animated WebP, MP4, and folders of frames, each with the request inside.

All frames of a GIF share one palette, so that colours do not flicker from frame to frame, and times are
rounded so that the whole lasts as long as it should. Files are written whole or not at all by
:mod:`imprompt.output.stills`, which calls this; the texts come from there too.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imprompt.errors import UsageError

SUFFIXES = (".gif", ".webp", ".mp4", "")
"""Endings of clips; none is a folder of numbered PNG."""

_FASTEST = 50
"""Frames a second that a GIF can hold: viewers slow down what is shown for less than 20 ms."""
_BAYER = np.array([[0, 2], [3, 1]])
for _ in range(2):
    _BAYER = np.block([[4 * _BAYER, 4 * _BAYER + 2], [4 * _BAYER + 3, 4 * _BAYER + 1]])


def write_clip(frames: Sequence[Image.Image], path: Path, suffix: str, fps: float, record: str) -> None:
    """Write ``frames`` to ``path`` in the format of ``suffix``, with ``record`` (JSON in ASCII) inside.

    Raises :class:`UsageError` for a pace the format cannot hold, :class:`ModelError` without a video encoder.
    """
    _WRITERS[suffix](frames, path, fps, record)


def write_frames(frames: Sequence[Image.Image], path: Path, info: PngInfo) -> None:
    """Write ``frames`` as numbered PNG into the new folder ``path``, with the texts of ``info`` in each."""
    path.mkdir()
    for number, frame in enumerate(frames, 1):
        frame.save(path / f"{number:04}.png", "PNG", pnginfo=info)


def check_pace(suffix: str, fps: float) -> None:
    """Raises :class:`UsageError` when the format cannot show so many frames a second."""
    if suffix == ".gif" and fps > _FASTEST:
        raise UsageError(
            f"fps: a GIF shows at most {_FASTEST} frames a second, not {fps:g}; use .webp or .mp4."
        )


def read_text(path: Path, key: str) -> str | None:
    """The record that a GIF, an MP4 or a folder of frames carries, ``None`` for other files and without one.

    ``key`` is the first name in it.
    """
    if path.is_dir():
        first = min((file for file in path.glob("*.png")), default=None)
        if first is None:
            return None
        with Image.open(first, formats=("PNG",)) as image:
            return image.info.get(key)
    with path.open("rb") as stream:
        start = stream.read(12)
    if start[:6] in (b"GIF89a", b"GIF87a"):
        with Image.open(path, formats=("GIF",)) as image:
            comment = image.info.get("comment", b"")
        return comment.decode("ascii", "replace") if comment.startswith(b"{") else None
    if start[4:8] == b"ftyp":
        content = path.read_bytes()
        at = content.find(f'{{"{key}":'.encode())
        if at < 0:
            return ""
        try:
            found, _ = json.JSONDecoder().raw_decode(content[at:].decode("utf-8", "replace"))
        except ValueError:
            return ""
        return json.dumps(found)
    return None


def _gif(frames: Sequence[Image.Image], path: Path, fps: float, record: str) -> None:
    check_pace(".gif", fps)
    indexed = _one_palette(frames)
    with path.open("xb") as stream:
        indexed[0].save(
            stream, "GIF", save_all=True, append_images=indexed[1:], duration=_times(len(frames), fps, 10),
            loop=0, optimize=False, comment=record.encode("ascii"),
        )  # fmt: skip


def _webp(frames: Sequence[Image.Image], path: Path, fps: float, record: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = record
    with path.open("xb") as stream:
        frames[0].save(
            stream, "WEBP", save_all=True, append_images=frames[1:], duration=_times(len(frames), fps, 1),
            loop=0, lossless=True, exif=exif,
        )  # fmt: skip


def _mp4(frames: Sequence[Image.Image], path: Path, fps: float, record: str) -> None:
    from imprompt.encoders.video import write_video

    write_video(frames, path, fps, record)


def _folder(frames: Sequence[Image.Image], path: Path, fps: float, record: str) -> None:
    info = PngInfo()
    info.add_itxt("imprompt", record)
    write_frames(frames, path, info)


_WRITERS: dict[str, Callable[[Sequence[Image.Image], Path, float, str], None]] = {
    ".gif": _gif,
    ".webp": _webp,
    ".mp4": _mp4,
    "": _folder,
}


def _times(count: int, fps: float, unit: int) -> list[int]:
    """How long each frame is shown, in ms and multiples of ``unit``; sums never stray by more than half."""
    ends = [round(1000 * number / fps / unit) * unit for number in range(count + 1)]
    return [after - before for before, after in pairwise(ends)]


def _one_palette(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """The frames in 256 colours chosen for all of them; where they do not suffice, an ordered dither, which
    stands still where the picture does."""
    width, height = frames[0].size
    shown = frames[:: max(1, len(frames) // 32)]
    sheet = Image.new("RGB", (width, height * len(shown)))
    for row, frame in enumerate(shown):
        sheet.paste(frame, (0, row * height))
    palette = sheet.quantize(256, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    flat = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    pairs = zip(frames, flat, strict=True)
    error = np.mean([np.abs(_array(frame) - _array(one.convert("RGB"))).mean() for frame, one in pairs])
    if error < 1:
        return flat
    tiles = np.tile(_BAYER, (height // 8 + 1, width // 8 + 1))[:height, :width, None]
    offset = (tiles / 64 - 0.5) * min(4 * float(error), 24)
    return [
        Image.fromarray((_array(frame) + offset).clip(0, 255).astype(np.uint8)).quantize(
            palette=palette, dither=Image.Dither.NONE
        )
        for frame in frames
    ]


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)
