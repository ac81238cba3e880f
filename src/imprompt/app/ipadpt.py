"""Read ``.ipadpt`` files, in which ComfyUI and diffusers save features, and write them as safetensors."""

from pathlib import Path

import torch

from imprompt.catalog import encoder_with
from imprompt.encoders import face
from imprompt.encoders.clip import Features
from imprompt.encoders.features import Saved, check_target, save
from imprompt.errors import ModelError
from imprompt.io import check_path
from imprompt.weights import unpickle

_FACE_WIDTH = 512


def convert_ipadpt(source: str | Path, target: str | Path, *, overwrite: bool = False) -> Path:
    """Convert saved features or faces; the pickle is read as data only. Returns the path of ``target``.

    ComfyUI saves a tensor: face embeddings (width 512), or an encoder's pooled ``(N, E)`` or hidden
    ``(N, P, W)`` features. diffusers saves a list of one tensor, with the negative half in front. Features
    that the file lacks get width 0. Raises :class:`ModelError` for anything else, and
    :class:`InputError` for a target that is there and holds no saved features, without ``overwrite``.
    """
    check_target(target, overwrite=overwrite, reads=[source])
    found, negative = _read(source)
    width = found.shape[-1]
    if width == _FACE_WIDTH:
        return face.save(face.Faces(found.reshape(-1, width), "unknown"), target, overwrite=overwrite)
    if found.ndim == 3 and found.shape[1] > 1:
        encoder, pooled, hidden = encoder_with("hidden", width), found.new_zeros(len(found), 0), found
        zeros = found.new_zeros(1, 0, 0) if negative is None else negative.float()
    else:
        encoder, pooled = encoder_with("pooled", width), found.reshape(-1, width)
        hidden, zeros = found.new_zeros(len(pooled), 0, 0), found.new_zeros(1, 0, 0)
    encoder = encoder or f"of {Path(source).name}"
    return save(Saved(Features(pooled, hidden, zeros), encoder, "", (), "crop"), target, overwrite=overwrite)


def _read(source: str | Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The features in a file, and the negative half where diffusers saved one."""
    content, negative = unpickle(check_path(source)), None
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], torch.Tensor):
        halves = content[0]
        if halves.ndim in (3, 4) and len(halves) in (1, 2):
            content, negative = halves[-1], halves[0, :1] if len(halves) == 2 else None
    if not isinstance(content, torch.Tensor) or not _could_be_features(content):
        what = list(content.shape) if isinstance(content, torch.Tensor) else type(content).__name__
        raise ModelError(
            f"'{source}' holds neither faces nor an image encoder's features ({what}); embed the picture "
            "itself with imprompt embed."
        )
    if not bool(torch.isfinite(content).all()):
        raise ModelError(f"'{source}' contains NaN or infinite values; make it again.")
    return content.float(), negative


def _could_be_features(content: torch.Tensor) -> bool:
    return content.is_floating_point() and content.ndim in (1, 2, 3) and content.numel() > 0
