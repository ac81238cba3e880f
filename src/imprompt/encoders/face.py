"""Faces as prompts: a photo's face → what face adapters read, and files of that.

An embedding says who it is, an image encoder's features of the face's crop how it looks. An adapter
understands only the embeddings it was trained on, so these say which model made them. Models that find faces
are in :mod:`imprompt.encoders.face_onnx`.

Dimensions: ``N`` faces, ``E`` embedding, ``P`` patches and class token, ``W`` width of hidden states.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.face_geometry import Array, Face, align
from imprompt.encoders.face_onnx import OnnxFaces, home, how_to_get, installed, licence_note
from imprompt.encoders.features import read_file, write_file
from imprompt.errors import InputError

__all__ = [
    "CROP", "Face", "FaceEmbedder", "Faces", "OnnxFaces", "home", "how_to_get", "installed", "joined",
    "licence_note", "load", "read", "save",
]  # fmt: skip

CROP = 224
"""Side of the aligned crop that FaceID-Plus's image encoder sees."""
_FORMAT = "imprompt-faces-1"


@dataclass(frozen=True)
class Faces:
    """What adapters read of ``N`` faces."""

    embedding: Tensor
    """``N E``, as the recogniser gives it: not normalised."""
    space: str
    """Which model's embedding it is: ``buffalo_l``, ``antelopev2``, …; ``unknown`` is believed to fit."""
    patches: Tensor | None = None
    """``N P W``: the image encoder's hidden states of each aligned crop, for FaceID-Plus."""
    negative_patches: Tensor | None = None
    """``1 P W``: the same of an all-zero preprocessed tensor."""


@runtime_checkable
class FaceEmbedder(Protocol):
    """A model that finds faces in an RGB picture and embeds them: :class:`OnnxFaces`, or the user's own."""

    @property
    def name(self) -> str: ...
    @property
    def space(self) -> str: ...
    def find(self, image: Image.Image) -> list[Face]:
        """All faces, the largest first."""

    def embed(self, image: Image.Image, face: Face) -> Array:
        """``(E,)`` float32, not normalised."""


def read(
    reader: FaceEmbedder,
    image: Image.Image,
    number: int = 0,
    encoder: ImageEncoder | None = None,
    name: str = "the picture",
    crop: Literal["aligned", "square"] = "aligned",
) -> Faces:
    """Face ``number`` of a picture (0 is the largest); with ``encoder`` also the features of its crop: of the
    upright face, or of the square around its box (black where the picture ends, as Kolors has it).

    Raises :class:`InputError` when there is no such face, saying what was tried.
    """
    found = reader.find(image)
    if not found:
        raise InputError(
            f"no face was found in '{name}' ({image.width}×{image.height}), {reader.name} looked "
            f"{getattr(reader, 'tried', 'at it')}. Give a photo with an upright, sharp face that is at least "
            "30 pixels wide and has some room around it, or embeddings made elsewhere."
        )
    if number >= len(found):
        raise InputError(
            f"face {number} of '{name}': {len(found)} were found, numbered from 0 with the largest first."
        )
    face = found[number]
    embedding = torch.from_numpy(np.asarray(reader.embed(image, face), np.float32))[None]
    if encoder is None:
        return Faces(embedding, reader.space)
    cut = align(image, face.landmarks, CROP) if crop == "aligned" else image.crop(face.square)
    features = encoder.encode([cut])
    return Faces(embedding, reader.space, features.hidden, features.negative_hidden)


def joined(parts: Sequence[Faces]) -> Faces:
    """Several faces as one record. Raises :class:`InputError` for those of different models."""
    spaces = {part.space for part in parts}
    if len(spaces) != 1 or len({part.embedding.shape[-1] for part in parts}) != 1:
        raise InputError(f"faces of one prompt are of different face models ({', '.join(sorted(spaces))}).")
    patches = [part.patches for part in parts if part.patches is not None]
    if patches and len(patches) != len(parts):
        raise InputError("some faces of one prompt come with their crop's features and some do not.")
    return Faces(
        torch.cat([part.embedding for part in parts]),
        parts[0].space,
        torch.cat(patches) if patches else None,
        parts[0].negative_patches,
    )


def save(faces: Faces, path: str | Path, pictures: Sequence[str] = ()) -> Path:
    """Write faces as ``.safetensors``; ``pictures`` are hashes of what they were made of. The file appears
    whole or not at all. Raises :class:`InputError`."""
    tensors = {"embedding": faces.embedding}
    if faces.patches is not None and faces.negative_patches is not None:
        tensors |= {"patches": faces.patches, "negative_patches": faces.negative_patches}
    metadata = {"format": _FORMAT, "space": faces.space, "pictures": json.dumps(tuple(pictures))}
    return write_file(path, tensors, metadata)


def load(path: str | Path) -> Faces:
    """Read what :func:`save` wrote. Raises :class:`InputError` for anything else, damaged files and NaN."""
    tensors, metadata = read_file(path)
    known = {"embedding", "patches", "negative_patches"}
    if metadata.get("format") != _FORMAT or "embedding" not in tensors or not tensors.keys() <= known:
        raise InputError(
            f"'{path}' holds no faces; 'imprompt embed' makes such files of photos with a face adapter."
        )
    if tensors["embedding"].ndim != 2 or any(
        tensor.ndim != 3 for name, tensor in tensors.items() if name != "embedding"
    ):
        raise InputError(f"'{path}': its tensors do not have the shapes of faces.")
    return Faces(space=metadata.get("space", "unknown"), **tensors)
