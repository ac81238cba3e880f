"""What a file claims or hides cannot take the machine's memory: each is opened in a child that has little."""

import io
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import pytest
from PIL import Image

from imprompt import output
from imprompt.encoders.video import read_video
from imprompt.errors import InputError
from imprompt.schema.request import Request

ROOM = 200 * 1024 * 1024
PROGRAM = textwrap.dedent(
    """
    import os, resource, sys
    from pathlib import Path
    import torch
    from imprompt.encoders import framing
    from imprompt.encoders.images import frame_count, load_frames, load_image, load_mask
    from imprompt.encoders.video import read_video
    from imprompt.errors import InputError
    from imprompt.output import read_record

    def pad(path):
        return framing.frame(load_image(path), "pad", 224)

    readers = (frame_count, load_frames, load_image, load_mask, read_video, read_record, pad)
    readers = {read.__name__: read for read in readers}
    load_frames(sys.argv[1])  # loads what Pillow loads late
    for line in sys.stdin:
        do, path, room = line.rstrip().split(chr(9))
        if os.fork():
            status = os.wait()[1]
            print("ended", status, flush=True)
            continue
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(room)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            readers[do](path)
            print("read", end=", ", flush=True)
        except InputError as error:
            print("refused:", error, end=", ", flush=True)
        os._exit(0)
    """
)
Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Read a file in a child that may take ``room`` bytes more than it has: what came of it."""
    small = tmp_path_factory.mktemp("warm") / "warm.png"
    Image.new("RGB", (8, 8)).save(small)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, small], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:

        def ask(do: str, path: Path, room: int = ROOM) -> str:
            assert program.stdin is not None
            assert program.stdout is not None
            program.stdin.write(f"{do}\t{path}\t{room}\n")
            program.stdin.flush()
            answer = program.stdout.readline()
            assert answer.endswith(", ended 0\n"), answer
            return answer.removesuffix(", ended 0\n")

        yield ask
        program.communicate()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def black_png(width: int, height: int) -> bytes:
    squeeze = zlib.compressobj(1)
    rows = b"".join(squeeze.compress(bytes(width // 8 + 1)) for _ in range(height)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_in_mov(data: bytes, width: int, height: int, count: int = 1) -> bytes:
    """A video whose frames are PNG files, of the size that its header claims."""
    memory = io.BytesIO()
    with av.open(memory, "w", format="mov") as container:
        stream = container.add_stream("png", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        stream.time_base = Fraction(1, 8)
        for number in range(count):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, 8)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    return memory.getvalue()


def test_a_png_of_huge_claims_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(black_png(30_000, 30_000))
    for do in ("load_image", "load_mask", "load_frames"):
        assert run(do, path).startswith("refused: ")


def test_a_very_long_picture_can_be_padded(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(black_png(60_000, 1))
    assert run("pad", path, 3 * 64 * 2**20 + ROOM) == "read"


@pytest.mark.parametrize("claim", [12_000, 64], ids=["as it is", "as if it were small"])
def test_frames_of_134_million_pixels_are_refused(run: Run, tmp_path: Path, claim: int) -> None:
    path = tmp_path / "a.mov"
    path.write_bytes(png_in_mov(black_png(12_000, 11_200), claim, claim * 11_200 // 12_000))
    assert run("read_video", path).startswith("refused: ")


def test_many_frames_are_refused_before_they_are_decoded(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.mov"
    path.write_bytes(png_in_mov(black_png(2000, 2000), 2000, 2000, count=200))
    assert "once decoded" in run("read_video", path)


def clip(path: Path) -> Path:
    class Drawn:
        request = Request(task="animate", prompt="an owl", seed=3, frames=2, fps=8.0)
        provenance: dict[str, str] = {}  # noqa: RUF012
        images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]  # noqa: RUF012
        maps = ()

    return output.save(Drawn(), path)[0]  # type: ignore[arg-type]


def test_the_record_of_a_video_of_two_gigabytes_is_read_from_its_header(run: Run, tmp_path: Path) -> None:
    for name, index_first in (("front.mp4", True), ("back.mp4", False)):
        small = clip(tmp_path / name).read_bytes()
        large = struct.pack(">I4sQ", 1, b"free", 2**31)
        start = small.index(b"moov") - 4
        with (tmp_path / name).open("wb") as stream:
            stream.write(small if index_first else small[:start])
            stream.write(large)
            stream.seek(2**31 - len(large), io.SEEK_CUR)
            stream.write(small[start:] if not index_first else struct.pack(">I4s", 8, b"free"))
        assert (tmp_path / name).stat().st_size > 2**31
        assert run("read_record", tmp_path / name) == "read"
        assert output.read_request(tmp_path / name).seed == 3


def test_a_playlist_under_the_name_of_a_video_reads_nothing_else(tmp_path: Path) -> None:
    secret = clip(tmp_path / "secret.mp4")
    for text in (
        f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {secret}\n",
    ):
        (tmp_path / "list.mp4").write_text(text)
        with pytest.raises(InputError, match=r"not an MP4, MOV, MKV or WebM"):
            read_video(tmp_path / "list.mp4")


def test_limits_of_the_tests_hold() -> None:
    """The child really runs out of memory: otherwise the tests above say nothing."""
    script = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({ROOM}, {ROOM})); bytes(2 * {ROOM})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "MemoryError" in done.stderr
