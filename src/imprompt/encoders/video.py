"""Video files by the program ffmpeg, which is not part of imprompt: found on the PATH, or in imageio-ffmpeg.

Frames go through a pipe as raw pixels; nothing is imported into this process. Pictures that move (GIF, WebP)
need none of this, see :func:`imprompt.encoders.images.load_frames`.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from imprompt.encoders.images import MAX_FRAMES
from imprompt.errors import InputError, ModelError

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm")
"""Endings of files that are read with ffmpeg."""


def find_ffmpeg() -> str:
    """The program. Raises :class:`ModelError` that says how to get it."""
    found = shutil.which("ffmpeg")
    if found is not None:
        return found
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return str(get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        raise ModelError(
            "video files need ffmpeg, which is not here: install it so that it is on the PATH, or "
            "pip install 'imprompt[video]'; .gif, .webp and folders of frames need nothing."
        ) from error


def read_video(path: Path, *, max_frames: int = MAX_FRAMES) -> tuple[list[Image.Image], float]:
    """All frames of a video file and how many there are a second.

    Raises :class:`InputError` when it is missing, no video, or longer than ``max_frames``.
    """
    if not path.is_file():
        raise InputError(f"there is no file '{path}'.")
    command = [
        find_ffmpeg(), "-nostdin", "-v", "info", "-i", str(path), "-frames:v", str(max_frames + 1),
        "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, check=False)
    said = done.stderr.decode(errors="replace")
    frames = _frames(done.stdout)
    pace = re.search(r"Video:.*?([\d.]+) fps", said)
    if done.returncode or not frames or pace is None:
        lines = said.strip().splitlines()
        reason = lines[-1] if lines else "ffmpeg says nothing"
        raise InputError(f"'{path}' is no video that ffmpeg can read ({reason}).")
    if len(frames) > max_frames:
        raise InputError(f"'{path}' has more than {max_frames} frames; cut it first.")
    return frames, float(pace[1])


def write_video(frames: Sequence[Image.Image], path: Path, fps: float, comment: str) -> None:
    """H.264 in MP4, yuv420p, with ``comment`` in its metadata. All frames must have one even size.

    Raises :class:`ModelError` without ffmpeg or its encoder, :class:`InputError` when it cannot write.
    """
    width, height = frames[0].size
    command = [
        find_ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
        "-r", f"{fps:g}", "-i", "-", "-an", "-c:v", "libx264", "-crf", "14", "-pix_fmt", "yuv420p",
        "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709",
        "-vf", "scale=out_color_matrix=bt709", "-movflags", "+faststart", "-metadata", f"comment={comment}",
        "-f", "mp4", str(path),
    ]  # fmt: skip
    done = subprocess.run(
        command, input=b"".join(frame.tobytes() for frame in frames), capture_output=True, check=False
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[0] if lines else f"ffmpeg ended with {done.returncode}"
        if "libx264" in reason or "Unknown encoder" in reason:
            raise ModelError(f"this ffmpeg has no H.264 encoder ({reason}); write .gif or .webp instead.")
        raise InputError(f"ffmpeg cannot write '{path}' ({reason}).")


def _frames(stream: bytes) -> list[Image.Image]:
    """The pictures of a stream of binary PPMs as ffmpeg writes them, ``P6\\nW H\\n255\\n`` each."""
    frames, at = [], 0
    while header := re.compile(rb"P6\s+(\d+)\s+(\d+)\s+255\s").match(stream, at):
        width, height = int(header[1]), int(header[2])
        end = header.end() + 3 * width * height
        frames.append(Image.frombytes("RGB", (width, height), stream[header.end() : end]))
        at = end
    return frames
