"""Videos come back as the frames that went in: upright, in their colours, at their pace."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from imprompt.encoders.images import Budget
from imprompt.encoders.video import read_video
from imprompt.errors import InputError
from imprompt.output.clips import encode_clip


def picture(turn: int = 0) -> Image.Image:
    """Four saturated quarters."""
    image = Image.new("RGB", (64, 48), "red")
    for box, colour in (((32, 0, 64, 24), "lime"), ((0, 24, 32, 48), "blue"), ((32, 24, 64, 48), "white")):
        image.paste(colour, box)
    return image.rotate(turn)


def error(one: Image.Image, other: Image.Image) -> float:
    """Mean difference away from the borders of the quarters, which half the colour resolution blurs."""
    a, b = (np.asarray(image, float)[4:-4, 4:-4] for image in (one, other))
    return float(np.abs(a - b).mean())


def test_what_is_written_as_mp4_is_read_back(tmp_path: Path) -> None:
    frames = [picture(180 * (i % 2)) for i in range(5)]
    path = tmp_path / "a.mp4"
    path.write_bytes(encode_clip(frames, ".mp4", 7.5, "{}"))
    read, fps = read_video(path)
    assert (len(read), fps) == (5, 7.5)
    for one, other in zip(frames, read, strict=True):
        assert error(one, other) < 6


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".webm", "libvpx-vp9"), (".mkv", "mpeg4"), (".mov", "libx264")]
)
def test_other_containers_are_read(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(12))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_image(picture())))
        container.mux(stream.encode(None))
    frames, fps = read_video(path)
    assert (len(frames), frames[0].size, fps) == (3, (64, 48), 12)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_the_rotation_that_a_phone_writes_is_applied(tmp_path: Path, turn: int) -> None:
    """``tkhd`` holds a matrix; FFmpeg shows the frame turned clockwise by it."""
    data = bytearray(encode_clip([picture()] * 2, ".mp4", 8, "{}"))
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    at = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    data[at : at + 36] = struct.pack(">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    frames, _ = read_video(path)
    assert error(frames[0], picture().rotate(-turn, expand=True)) < 6


def test_longer_larger_and_damaged_videos_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    sound = encode_clip([picture()] * 5, ".mp4", 8, "{}")
    path.write_bytes(sound)
    with pytest.raises(InputError, match="5 frames; at most 4"):
        read_video(path, max_frames=4)
    with pytest.raises(InputError, match="once decoded"):
        read_video(path, budget=Budget(4 * 3 * 64 * 48))
    random = np.random.default_rng(0)
    refused = []
    for _ in range(60):
        data = bytearray(sound)
        for _ in range(int(random.integers(1, 8))):
            data[int(random.integers(len(data)))] = int(random.integers(256))
        path.write_bytes(data[: int(random.integers(1, len(data)))] if random.random() < 0.3 else data)
        try:
            read_video(path)
        except InputError as wrong:
            refused.append(str(wrong))
    assert len(refused) > 10
    assert all(message.isprintable() for message in refused)
