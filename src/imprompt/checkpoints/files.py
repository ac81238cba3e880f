"""Weight files: look at one without loading it, load it, write it whole or not at all.

A ``.safetensors`` file is judged by its header, every size in it checked against the file's own, before a
tensor is touched. Pickles are opened by :func:`load_pickle` alone, as data. What the keys mean is not known
here.
"""

import hashlib
import json
import math
import os
import pickle
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from imprompt.errors import ModelError, first_line

Header: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]
"""Key → (number format as safetensors names it, shape)."""

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".ipadpt")
_NO_WEIGHTS = {
    b"version https://git-lfs": "is a Git LFS pointer; the weights behind it were never fetched",
    b"<!doctype": "is a web page; the download gave an error page or a login form",
    b"<html": "is a web page; the download gave an error page or a login form",
    b"GGUF": "is a GGUF file",
}


def read_header(path: Path) -> tuple[Header, dict[str, str]]:
    """(tensors' formats and shapes, metadata) of a ``.safetensors`` file: only the header is read.

    Raises :class:`ModelError` for what is missing, a folder, empty, a pickle by whatever name, truncated, or
    whose header does not agree with itself and the file's size.
    """
    size = _size(path)
    try:
        with path.open("rb") as file:
            start = file.read(64)
            _check_start(path, start)
            if size < 8:
                raise ModelError(f"'{path}' is truncated: {size} bytes are no safetensors file.")
            (length,) = struct.unpack("<Q", start[:8])
            if length > _MAX_HEADER:
                raise ModelError(
                    f"'{path}' is no safetensors file: it would have a header of {length:,} bytes."
                )
            if length > size - 8:
                raise ModelError(
                    f"'{path}' is truncated: its header alone takes {length:,} bytes, the file has {size:,}. "
                    "Get it again."
                )
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"'{path}' is no safetensors file, or damaged: its header is unreadable.") from error
    if not isinstance(header, dict):
        raise ModelError(f"'{path}' is no safetensors file: its header is no table.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"'{path}' is damaged: its metadata is not text.")
    tensors, spans = {}, []
    for key, entry in header.items():
        kind, shape, begin, end = _entry(path, key, entry)
        tensors[key] = (kind, shape)
        spans.append((begin, end, key))
    _check_spans(path, sorted(spans), size - 8 - length)
    return tensors, metadata


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors`` file, mapped from it. Raises as :func:`read_header` does."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"'{path}' cannot be loaded: {error}") from error


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickled ``.bin``, ``.pt`` or ``.ckpt``, flat, with dots between nested keys.

    Raises :class:`ModelError` as :func:`unpickle` does, and for what holds anything but tensors.
    """
    content = unpickle(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ModelError(f"'{path}' holds a {type(content).__name__}; a table of tensors was expected.")
    return flatten(content, f"'{path}'")


def unpickle(path: Path) -> object:
    """What torch pickled into a file: only data (``weights_only``), never code.

    Raises :class:`ModelError` for what needs more than that, and what is damaged.
    """
    _size(path)
    with path.open("rb") as file:
        start = file.read(64)
    if not start.startswith((b"PK", b"\x80")):
        raise ModelError(f"'{path}' is no pickle of torch; convert reads .bin, .pt and .ckpt files.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"'{path}' holds more than tensors, or is damaged; nothing in it was run. Get the adapter "
            "from its author as .safetensors."
        ) from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"'{path}' is damaged or truncated: {_line(error)} Get it again.") from error


def flatten(nested: Mapping[str, object], what: str) -> dict[str, Tensor]:
    """Nested tables of tensors as one, dots between the keys. Raises :class:`ModelError` for other things."""
    flat: dict[str, Tensor] = {}
    for key, value in _leaves(nested, "", what):
        if not isinstance(value, Tensor):
            raise ModelError(f"{what} has a {type(value).__name__} at '{key}'; only tensors are expected.")
        if value.layout is not torch.strided or value.is_quantized:
            raise ModelError(f"{what} has a sparse or quantised tensor at '{key}'; a plain one is expected.")
        if key in flat:
            raise ModelError(f"{what} has '{key}' twice.")
        flat[key] = value
    return flat


def save_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write ``.safetensors``: beside the target first, then renamed, so that no part of a file ever stays.

    Raises :class:`ModelError` when it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not path.parent.is_dir():
        raise ModelError(f"'{path}' cannot be written: there is no folder '{path.parent}'.")
    seen: set[int] = set()
    plain = {}
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        place = tensor.untyped_storage()
        if place.data_ptr() in seen or place.nbytes() != tensor.nbytes:  # the format knows no shared memory
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[key] = tensor
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        usual = part.stat().st_mode  # safetensors makes files that only their owner reads
        save_file(plain, part, metadata=dict(metadata))
        part.chmod(usual)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"'{path}' cannot be written: {_line(error)}") from error
    finally:
        part.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    if path.is_dir():
        raise ModelError(f"'{path}' is a folder; the weights' file is expected.")
    if not path.is_file():
        raise ModelError(f"there is no file '{path}'.")
    size = path.stat().st_size
    if not size:
        raise ModelError(f"'{path}' is empty. Get it again.")
    return size


def _check_start(path: Path, start: bytes) -> None:
    # A safetensors file of up to 100 MB of header cannot begin like a zip archive or a pickle's protocol.
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[8:9] != b"{"):
        renamed = path.suffix not in _PICKLES
        named = f" under the name of a {path.suffix or 'file'}" if renamed else ""
        target = f"{path.stem}{'.converted' if renamed else ''}.safetensors"
        raise ModelError(
            f"'{path}' is a pickle{named}, and unpickling can run code. Make it safe first: "
            f"imprompt convert {path.name} {target}"
        )
    for mark, reason in _NO_WEIGHTS.items():
        if start.lstrip().lower().startswith(mark.lower()):
            raise ModelError(f"'{path}' {reason}.")
    if path.suffix in _PICKLES:
        raise ModelError(
            f"'{path}' is named as a pickle, which is not opened here: imprompt convert makes a .safetensors "
            "of it."
        )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _entry(path: Path, key: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """Number format, shape, first byte and the byte after the last; each is what the format says it is."""
    if isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}:
        kind, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
        if kind not in _WIDTHS:
            raise ModelError(f"'{path}' has '{key}' in the number format {kind!r}, which is not supported.")
        if _numbers(shape) and _numbers(place) and len(place) == 2:
            begin, end = place
            if end - begin == math.prod(shape) * _WIDTHS[kind]:
                return kind, tuple(shape), begin, end
    raise ModelError(f"'{path}' is damaged: its header contradicts itself at '{key}'. Get it again.")


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _check_spans(path: Path, spans: list[tuple[int, int, str]], room: int) -> None:
    """Tensors lie one after the other and fill the file: no holes, no overlaps, nothing behind."""
    position = 0
    for begin, end, key in spans:
        if begin != position:
            raise ModelError(f"'{path}' is damaged: '{key}' does not begin where the tensor before it ends.")
        position = end
    if position > room:
        raise ModelError(
            f"'{path}' is truncated: its tensors take {position:,} bytes, {room:,} are there. Get it again."
        )
    if position < room:
        raise ModelError(f"'{path}' is damaged: {room - position:,} bytes lie behind its last tensor.")


def _leaves(nested: Mapping[Any, object], prefix: str, what: str) -> Iterator[tuple[str, object]]:
    for key, value in nested.items():
        if not isinstance(key, str):
            raise ModelError(f"{what} has the key {key!r}; keys are text.")
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.", what)
        else:
            yield prefix + key, value


def _line(error: BaseException) -> str:
    return first_line(error).rstrip(".") + "."
