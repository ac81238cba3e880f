"""Clips as bytes: GIF, animated WebP, MP4, and folders of numbered PNG, each with the record inside.

Durations are whole units of the format's time, rounded so that the clip as a whole has the right length.
"""

import io
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

from imprompt.encoders.images import as_bytes
from imprompt.errors import InputError, UsageError
from imprompt.output.record import KEY
from imprompt.output.stills import encode_png

SUFFIXES = (".gif", ".webp", ".mp4", "")
"""Endings of clips; none is a folder of numbered PNG."""

_GIF_FPS = 50  # browsers slow down frames of less than 20 ms
_BT709 = 1  # FFmpeg's number of the colour primaries and the transfer of ITU-R BT.709
_BAYER = np.array([[0, 2], [3, 1]])
for _ in range(2):
    _BAYER = np.block([[4 * _BAYER, 4 * _BAYER + 2], [4 * _BAYER + 3, 4 * _BAYER + 1]])


def check_fps(suffix: str, fps: float) -> None:
    """Raises :class:`UsageError` when the format cannot show that many frames per second."""
    if suffix == ".gif" and fps > _GIF_FPS:
        raise UsageError(
            f"fps: a GIF shows at most {_GIF_FPS} frames per second, not {fps:g}; use .webp or .mp4."
        )


def encode_clip(
    frames: Sequence[Image.Image], suffix: str, fps: float, record: str
) -> bytes | dict[str, bytes]:
    """RGB frames of one size in the format of ``suffix``, with ``record`` (ASCII) inside; without a suffix,
    the files of a folder by their names.

    Raises :class:`UsageError` for more frames per second than the format can show, :class:`InputError` when
    the format cannot hold them.
    """
    if not suffix:
        return encode_frames(frames, {KEY: record})
    return {".gif": _gif, ".webp": _webp, ".mp4": _mp4}[suffix](frames, fps, record)


def durations(count: int, fps: float, unit: int) -> list[int]:
    """Duration of each frame in milliseconds, a multiple of ``unit``; no frame starts more than half a unit
    early or late."""
    ends = [round(1000 * number / fps / unit) * unit for number in range(count + 1)]
    return [after - before for before, after in pairwise(ends)]


def encode_frames(frames: Sequence[Image.Image], texts: dict[str, str]) -> dict[str, bytes]:
    """Frames as files ``0001.png``, ``0002.png``, …, with ``texts`` in each."""
    return {f"{number:04}.png": encode_png(frame, texts) for number, frame in enumerate(frames, 1)}


def _gif(frames: Sequence[Image.Image], fps: float, record: str) -> bytes:
    check_fps(".gif", fps)
    indexed = quantized(frames)
    return as_bytes(
        indexed[0], "GIF", save_all=True, append_images=indexed[1:], loop=0, optimize=False,
        duration=durations(len(frames), fps, 10), comment=record.encode("ascii"),
    )  # fmt: skip


def _webp(frames: Sequence[Image.Image], fps: float, record: str) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = record
    return as_bytes(
        frames[0], "WEBP", save_all=True, append_images=frames[1:], loop=0, lossless=True,
        duration=durations(len(frames), fps, 1), exif=exif,
    )  # fmt: skip


def _mp4(frames: Sequence[Image.Image], fps: float, record: str) -> bytes:
    """H.264 as yuv420p in BT.709; the index stands in front, so that playing can begin at once."""
    width, height = frames[0].size
    if width % 2 or height % 2:
        raise InputError(f".mp4 needs an even width and height, not {width}×{height}; use .webp.")
    memory = io.BytesIO()
    index = len(record) + 32 * len(frames) + 4096
    with av.open(memory, "w", format="mp4", options={"moov_size": str(index)}) as container:
        container.metadata["comment"] = record
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "14"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace = Colorspace.ITU709
        context.color_primaries = context.color_trc = _BT709
        for image in frames:
            frame = av.VideoFrame.from_image(image.convert("RGB")).reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return memory.getvalue()


def quantized(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Frames in 256 colours chosen for all of them, so that colours do not flicker.

    Where 256 are too few, an ordered dither is added, unless it makes pixels change more from frame to frame
    than the nearest colours do.
    """
    width, height = frames[0].size
    chosen = frames[:: max(1, len(frames) // 32)]
    sheet = Image.new("RGB", (width, height * len(chosen)))
    for row, frame in enumerate(chosen):
        sheet.paste(frame, (0, row * height))
    palette = sheet.quantize(256, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    nearest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    pairs = zip(map(_array, frames), map(_array, nearest), strict=True)
    error = np.mean([np.abs(a - b).mean() for a, b in pairs])
    if error < 1:
        return nearest
    tiles = np.tile(_BAYER, (height // 8 + 1, width // 8 + 1))[:height, :width, None]
    offset = (tiles / 64 - 0.5) * min(4 * float(error), 24)
    dithered = [
        Image.fromarray((_array(frame) + offset).clip(0, 255).astype(np.uint8)).quantize(
            palette=palette, dither=Image.Dither.NONE
        )
        for frame in frames
    ]
    return dithered if _change(dithered) <= _change(nearest) else nearest


def _change(frames: Sequence[Image.Image]) -> float:
    """Mean absolute difference of pixels from frame to frame, 0 for a single frame."""
    arrays = [_array(frame) for frame in frames]
    return float(np.mean([np.abs(b - a).mean() for a, b in pairwise(arrays)])) if len(arrays) > 1 else 0.0


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32)
