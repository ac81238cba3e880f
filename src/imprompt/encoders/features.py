"""Save and load features of pictures, which can then be used in place of the pictures.

A safetensors file with ``pooled``, ``hidden`` and ``negative_hidden`` (of width 0 if another program left one
out), and ``last`` of SigLIP. Its metadata name the encoder, so that features of another encoder are refused
with a clear message.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprompt.encoders.clip import Features
from imprompt.errors import InputError
from imprompt.io import check_path, read_json
from imprompt.places import check_place, identities
from imprompt.schema.values import is_saved
from imprompt.tensorfile import metadata_of, open_tensors
from imprompt.weights import not_finite, save_tensors

_FORMAT = "imprompt-features-1"
_PARTS = ("pooled", "hidden", "negative_hidden")


@dataclass(frozen=True)
class Saved:
    """The content of a file of features."""

    features: Features
    encoder: str
    """Name of the encoder."""
    fingerprint: str
    """Fingerprint of the encoder's weights, see :func:`fingerprint`."""
    pictures: tuple[str, ...]
    """SHA-256 of each picture's pixels."""
    framing: str


def shown_name(encoder: str) -> str:
    """An encoder's name for files that are passed on: of an absolute path only the last two parts, since the
    others may name the user."""
    return "/".join(Path(encoder).parts[-2:]) if Path(encoder).is_absolute() else encoder


def check_target(
    path: str | Path, *, overwrite: bool = False, reads: Iterable[str | Path | None] = ()
) -> Path:
    """``path``, if features can be written there: saved features are replaced, other files only with
    ``overwrite``, and the files ``reads`` never. Raises :class:`InputError`."""
    path = check_path(path)
    if not is_saved(str(path)):
        raise InputError(f"'{path}': features are written as .safetensors.")
    check_place(
        path,
        overwrite=overwrite,
        is_ours=lambda there: metadata_of(there).get("format", "").startswith("imprompt-"),
        reads=identities(reads, folders=False),
        said="the file that is there holds no saved features",
    )
    return path


def save(saved: Saved, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write features; the file appears whole or not at all. Raises as :func:`check_target`."""
    metadata = {
        "format": _FORMAT,
        "encoder": shown_name(saved.encoder),
        "fingerprint": saved.fingerprint,
        "pictures": json.dumps(saved.pictures),
        "framing": saved.framing,
    }
    tensors = {name: getattr(saved.features, name) for name in _PARTS}
    if saved.features.last is not None:
        tensors["last"] = saved.features.last
    return write_file(path, tensors, metadata, overwrite=overwrite)


def load(path: str | Path) -> Saved:
    """Read what :func:`save` wrote. Raises :class:`InputError` for anything else, damaged files and NaN."""
    tensors, metadata = read_file(path)
    names = set(_PARTS)
    if metadata.get("format") != _FORMAT or not names <= tensors.keys() <= names | {"last"}:
        kind = "faces" if "faces" in metadata.get("format", "") else "no picture's features"
        raise InputError(
            f"'{path}' holds {kind}; features of pictures are expected, as 'imprompt embed' makes them with "
            "this adapter."
        )
    _check_shapes(tensors, Path(path))
    pictures = read_json(metadata.get("pictures", "[]"), f"'{path}', pictures", expect=list)
    return Saved(
        Features(**tensors),
        metadata.get("encoder", "unknown"),
        metadata.get("fingerprint", ""),
        tuple(str(each) for each in pictures),
        metadata.get("framing", "crop"),
    )


def write_file(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], *, overwrite: bool
) -> Path:
    """Write a ``.safetensors`` file whole or not at all. Raises as :func:`check_target`."""
    path = check_target(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, metadata, path, error=InputError)
    return path


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, in own memory, and metadata of a ``.safetensors`` file. Raises :class:`InputError`, also for
    NaN and infinity."""
    path = check_path(path)
    with open_tensors(path, InputError) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no mapping
    if any(not tensor.is_floating_point() for tensor in tensors.values()):
        raise InputError(f"'{path}' holds whole numbers; features are floating-point ones. Make it again.")
    if any(not_finite(tensor) for tensor in tensors.values()):
        raise InputError(f"'{path}' contains NaN or infinite values; make it again.")
    return tensors, metadata


def joined(parts: Sequence[Features]) -> Features:
    """Several pictures' features as one. Raises :class:`InputError` when their widths differ, as those of
    different encoders do."""
    shapes = {tuple(part.hidden.shape[1:]) + tuple(part.pooled.shape[1:]) for part in parts}
    if len(shapes) != 1:
        raise InputError("the pictures of one prompt have features of different encoders; use one for all.")
    like = parts[0].pooled
    last = [part.last.to(like) for part in parts if part.last is not None]
    return Features(
        torch.cat([part.pooled.to(like) for part in parts]),
        torch.cat([part.hidden.to(like) for part in parts]),
        parts[0].negative_hidden,
        torch.cat(last) if len(last) == len(parts) else None,
    )


def fingerprint(model: Any) -> str:
    """Identify an encoder: SHA-256 of each weight's name, shape and first 16 values in half precision, so
    that it does not depend on the dtype of the loaded weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().flatten()[:16].cpu().to(torch.float16).numpy().tobytes())
    return digest.hexdigest()


def _check_shapes(tensors: dict[str, Tensor], path: Path) -> None:
    pooled, hidden, negative = (tuple(tensors[name].shape) for name in _PARTS)
    last = tuple(tensors["last"].shape) if "last" in tensors else hidden
    fitting = negative[-1:] == (0,) or negative == (1, *hidden[1:])
    alike = (len(pooled), len(hidden), len(negative), len(last)) == (2, 3, 3, 3)
    if not alike or not (pooled[0] == hidden[0] == last[0] > 0) or not fitting:
        raise InputError(
            f"'{path}': features of shapes {', '.join(str(tuple(each.shape)) for each in tensors.values())} "
            "do not belong together. Make it again."
        )
