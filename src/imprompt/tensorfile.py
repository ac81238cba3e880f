"""Open ``.safetensors`` files with every check, and read what their headers say; without torch.

A file is checked before a tensor is read: that it is no pickle, web page or pointer, that its header is small
and agrees with the file's size. :mod:`imprompt.weights` reads the tensors.
"""

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from imprompt.errors import ImpromptError, ModelError, first_line

Header: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]
"""Key → (dtype as safetensors names it, shape)."""

MAX_HEADER = 4 * 1024 * 1024
"""Largest header that is read, in bytes; that of SDXL's UNet has 0.2 MB."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".ipadpt")
_NO_WEIGHTS = {
    b"version https://git-lfs": "is a Git LFS pointer; the weights behind it were never fetched",
    b"<!doctype": "is a web page; the download gave an error page or a login form",
    b"<html": "is a web page; the download gave an error page or a login form",
    b"gguf": "is a GGUF file",
    **dict.fromkeys((b"\x89png", b"\xff\xd8\xff", b"gif8", b"riff"), "is a picture, not weights"),
}
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's name of a floating-point dtype → that of safetensors."""
PIECE = 1 << 18
"""Bytes that are looked at together for NaN and infinity: they fit a processor's cache."""
EXPONENTS = {
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F32": (4, 0x7F80_0000),
    "F64": (8, 0x7FF0_0000_0000_0000),
}
"""dtype → its bytes, and the bits of infinity. Without the sign, all that is not finite is at least that."""


def read_header(path: Path) -> tuple[Header, dict[str, str]]:
    """Dtypes and shapes of a ``.safetensors`` file's tensors, and its metadata; no tensor is read.

    Raises :class:`ModelError` for what is missing, a folder, empty, a pickle by whatever name, truncated or
    damaged.
    """
    with open_tensors(path, framework="np") as file:
        header: Header = {}
        for key in file.keys():  # noqa: SIM118  # no mapping
            part = file.get_slice(key)
            header[key] = part.get_dtype(), tuple(part.get_shape())
        return header, file.metadata() or {}


def metadata_of(path: Path) -> dict[str, str]:
    """What a ``.safetensors`` file's header says of it; nothing for a link, and for what is no such file."""
    if path.is_symlink():
        return {}
    try:
        return read_header(path)[1]
    except ModelError:
        return {}


def not_finite_tensors(path: Path) -> tuple[str, ...]:
    """Keys of the floating-point tensors (of 16 bits and more) that hold NaN or infinity.

    The file is read once, in pieces; nothing is kept. Raises as :func:`read_header` does.
    """
    import numpy as np

    bad = []
    with open_tensors(path, framework="np"), path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        piece = np.empty(PIECE, np.uint8)
        for key, about in header.items():
            if about["dtype"] in EXPONENTS:
                width, infinity = EXPONENTS[about["dtype"]]
                start, end = (8 + length + offset for offset in about["data_offsets"])
                file.seek(start)
                if _largest(file, end - start, piece.view(f"<u{width}")) >= infinity:
                    bad.append(key)
    return tuple(bad)


@contextlib.contextmanager
def open_tensors(
    path: Path, error: type[ImpromptError] = ModelError, *, framework: Literal["pt", "np"] = "pt"
) -> Iterator[Any]:
    """A ``.safetensors`` file, checked and open (safetensors' ``safe_open`` for torch, or for numpy).

    Whatever is wrong with it, also while it is read, is raised as ``error``, in one line.
    """
    from safetensors import SafetensorError, safe_open

    check_start(path, error)
    try:
        with safe_open(path, framework) as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as wrong:
        if isinstance(wrong, ImpromptError):
            raise
        raise error(f"'{path}' is truncated or damaged ({_fault(wrong)}). Get it again.") from wrong


def check_start(path: Path, error: type[ImpromptError] = ModelError) -> None:
    """Raise ``error`` for a file that is not there or empty, or whose first bytes are not those of a
    ``.safetensors`` file with a header of at most :data:`MAX_HEADER` bytes."""
    size = file_size(path, error)
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as wrong:
        raise error(f"'{path}' cannot be read: {wrong.strerror or wrong}.") from wrong
    _check_kind(path, start, error)
    if size < 8:
        raise error(f"'{path}' is truncated: {size} bytes cannot hold a safetensors file.")
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER:
        raise error(
            f"'{path}' is not a readable safetensors file: it would have a header of {length:,} bytes."
        )
    if length > size - 8:
        raise error(
            f"'{path}' is truncated: its header alone takes {length:,} bytes, the file has {size:,}. "
            "Get it again."
        )


def file_size(path: Path, error: type[ImpromptError] = ModelError) -> int:
    """Bytes of a file. Raises ``error`` for one that is missing or empty, and for a folder."""
    if path.is_dir():
        raise error(f"'{path}' is a folder; the weights' file is expected.")
    if not path.is_file():
        raise error(f"there is no file '{path}'.")
    size = path.stat().st_size
    if not size:
        raise error(f"'{path}' is empty. Get it again.")
    return size


# ---- private


def _largest(file: Any, size: int, piece: Any) -> int:
    """The largest of the next ``size`` bytes of a file, as bits of numbers without signs; read into
    ``piece``."""
    import numpy as np

    largest, without_sign = 0, np.iinfo(piece.dtype).max >> 1
    while size > 0:
        some = piece[: min(size, piece.nbytes) // piece.itemsize]
        if file.readinto(memoryview(some).cast("B")) != some.nbytes:
            raise OSError("it ends early")
        largest = max(largest, int(np.bitwise_and(some, without_sign, out=some).max()))
        size -= some.nbytes
    return largest


def _check_kind(path: Path, start: bytes, error: type[ImpromptError]) -> None:
    # No safetensors file with a header of at most 4 MB begins like a zip archive or a pickle's protocol.
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[8:9] != b"{"):
        renamed = path.suffix not in _PICKLES
        named = f" under the name of a {path.suffix or 'file'}" if renamed else ""
        target = f"{path.stem}{'.converted' if renamed else ''}.safetensors"
        raise error(
            f"'{path}' is a pickle{named}, and unpickling can run code. Make it safe first: "
            f"imprompt convert {path.name} {target}"
        )
    for mark, reason in _NO_WEIGHTS.items():
        if start.lstrip().lower().startswith(mark):
            raise error(f"'{path}' {reason}.")
    if path.suffix in _PICKLES:
        raise error(
            f"'{path}' is named as a pickle, which is not opened here: imprompt convert makes a .safetensors "
            "of it."
        )


def _fault(error: BaseException) -> str:
    return first_line(error).removeprefix("Error while deserializing header: ").rstrip(".")
