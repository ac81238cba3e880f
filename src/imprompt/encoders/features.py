"""Pictures' features as a file: made once, shown wherever a picture is, with no encoder in memory.

A safetensors file with ``pooled``, ``hidden`` and ``negative_hidden`` (of width 0 where another program saved
only some of them); its header says which encoder made them, so that another adapter's encoder is refused by
name instead of failing in a matrix product.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from imprompt.encoders.clip import Features
from imprompt.errors import InputError

_FORMAT = "imprompt-features-1"
_PARTS = ("pooled", "hidden", "negative_hidden")


@dataclass(frozen=True)
class Saved:
    """A file's features and where they come from."""

    features: Features
    encoder: str
    """Its name."""
    fingerprint: str
    """Of the encoder's weights, see :func:`fingerprint`."""
    pictures: tuple[str, ...]
    """sha256 of each picture's pixels."""
    framing: str


def is_saved(picture: object) -> bool:
    """Whether a picture's place is taken by a file of features: a path that ends in ``.safetensors``."""
    return isinstance(picture, str | Path) and str(picture).lower().endswith(".safetensors")


def shown_name(encoder: str) -> str:
    """An encoder's name as files tell it that are passed on: of an absolute path the last two parts alone,
    since the rest is about this machine and its user."""
    return "/".join(Path(encoder).parts[-2:]) if Path(encoder).is_absolute() else encoder


def save(saved: Saved, path: str | Path) -> Path:
    """Write features; the file appears whole or not at all. Raises :class:`InputError`."""
    header = {
        "format": _FORMAT,
        "encoder": shown_name(saved.encoder),
        "fingerprint": saved.fingerprint,
        "pictures": json.dumps(saved.pictures),
        "framing": saved.framing,
    }
    return write_file(path, {name: getattr(saved.features, name) for name in _PARTS}, header)


def write_file(path: str | Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> Path:
    """A ``.safetensors`` of ``tensors``, whole or not at all. Raises :class:`InputError`."""
    from safetensors.torch import save as packed

    path = Path(path)
    if not is_saved(path):
        raise InputError(f"'{path}': features are written as .safetensors.")
    data = packed({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, header)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        raise InputError(f"'{path}' cannot be written ({error.strerror}).") from error
    return path


def load(path: str | Path) -> Saved:
    """Read what :func:`save` wrote. Raises :class:`InputError` for anything else, damaged files and NaN."""
    tensors, header = read_file(path)
    if header.get("format") != _FORMAT or set(tensors) != set(_PARTS):
        kind = "faces" if "faces" in header.get("format", "") else "no picture's features"
        raise InputError(
            f"'{path}' holds {kind}; features of pictures are expected, as 'imprompt embed' makes them with "
            "this adapter."
        )
    _check(tensors, Path(path))
    return Saved(
        Features(**tensors),
        header.get("encoder", "unknown"),
        header.get("fingerprint", ""),
        tuple(json.loads(header.get("pictures", "[]"))),
        header.get("framing", "crop"),
    )


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a ``.safetensors`` file. Raises :class:`InputError`."""
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file '{path}'.")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"'{path}' is no safetensors file, or damaged ({error}).") from error
    return tensors, header


def joined(parts: Sequence["Parts"]) -> Features:
    """Several pictures' features as one. Raises :class:`InputError` when their widths differ, as those of
    different encoders do."""
    shapes = {tuple(part.hidden.shape[1:]) + tuple(part.pooled.shape[1:]) for part in parts}
    if len(shapes) != 1:
        raise InputError("the pictures of one prompt have features of different encoders; use one for all.")
    place = parts[0].pooled
    return Features(
        torch.cat([part.pooled.to(place) for part in parts]),
        torch.cat([part.hidden.to(place) for part in parts]),
        parts[0].negative_hidden,
    )


class Parts(Protocol):
    """Any encoder's features."""

    @property
    def pooled(self) -> Tensor: ...
    @property
    def hidden(self) -> Tensor: ...
    @property
    def negative_hidden(self) -> Tensor: ...


def fingerprint(model: Any) -> str:
    """Tells encoders apart: sha256 of every weight's name, shape and first 16 numbers in half precision.

    Half precision, so that it does not depend on the number format the weights are loaded in.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().flatten()[:16].cpu().to(torch.float16).numpy().tobytes())
    return digest.hexdigest()


def _check(tensors: dict[str, Tensor], path: Path) -> None:
    ranks = tuple(tensors[name].ndim for name in _PARTS)
    pooled, hidden, negative = (tensors[name].shape for name in _PARTS)
    fitting = negative[-1] == 0 or hidden[1:] == negative[1:]
    if ranks != (2, 3, 3) or pooled[0] != hidden[0] or not fitting or not pooled[0]:
        raise InputError(
            f"'{path}': features of shapes {pooled}, {hidden} and {negative} do not belong together."
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise InputError(f"'{path}': features contain NaN or infinite values.")
