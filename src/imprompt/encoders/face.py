"""Faces for face adapters: embed the face of a photo, save and load embeddings.

The embedding identifies the person; image encoder features of the face's crop add the look. An adapter reads
only embeddings of the face model it was trained with, so :class:`Faces` names the model. The models are in
:mod:`imprompt.encoders.face_onnx`.

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
from imprompt.encoders.features import read_file, write_file
from imprompt.errors import InputError

CROP = 224
"""Side of the aligned crop that FaceID-Plus's image encoder sees."""
_FORMAT = "imprompt-faces-1"


@dataclass(frozen=True)
class Faces:
    """Embeddings of ``N`` faces, and features of their crops."""

    embedding: Tensor
    """``N E``, not normalised."""
    space: str
    """The face model: ``buffalo_l``, ``antelopev2``, …, or ``unknown``, which is not checked."""
    patches: Tensor | None = None
    """``N P W``: the image encoder's hidden states of each aligned crop, for FaceID-Plus."""
    negative_patches: Tensor | None = None
    """``1 P W``: the hidden states of an all-zero preprocessed tensor."""


@runtime_checkable
class FaceEmbedder(Protocol):
    """A model that finds and embeds faces: :class:`OnnxFaces`, or the user's own."""

    @property
    def name(self) -> str:
        """Its name in messages and records."""

    @property
    def space(self) -> str:
        """What its embeddings can be compared with, e.g. ``buffalo_l``; an adapter reads one space."""

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
    """Read face ``number`` of a picture (0 is the largest), with ``encoder`` also the features of its crop:
    the aligned face, or the square around its box (black outside of the picture, as Kolors does it).

    Raises :class:`InputError` if there is no such face.
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
    """Join several faces. Raises :class:`InputError` for faces of different models."""
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


def save(faces: Faces, path: str | Path, pictures: Sequence[str] = (), *, overwrite: bool = False) -> Path:
    """Write faces as ``.safetensors``, whole or not at all; ``pictures`` are hashes of their pictures. Raises
    as :func:`~imprompt.encoders.features.check_target`."""
    tensors = {"embedding": faces.embedding}
    if faces.patches is not None and faces.negative_patches is not None:
        tensors |= {"patches": faces.patches, "negative_patches": faces.negative_patches}
    metadata = {"format": _FORMAT, "space": faces.space, "pictures": json.dumps(tuple(pictures))}
    return write_file(path, tensors, metadata, overwrite=overwrite)


def load(path: str | Path) -> Faces:
    """Read what :func:`save` wrote. Raises :class:`InputError` for anything else, damaged files and NaN."""
    tensors, metadata = read_file(path)
    known = {"embedding", "patches", "negative_patches"}
    if metadata.get("format") != _FORMAT or "embedding" not in tensors or not tensors.keys() <= known:
        raise InputError(
            f"'{path}' holds no faces; 'imprompt embed' makes such files of photos with a face adapter."
        )
    if not _fit(**tensors):
        raise InputError(f"'{path}': its tensors do not have the shapes of faces.")
    return Faces(space=metadata.get("space", "unknown"), **tensors)


def _fit(embedding: Tensor, patches: Tensor | None = None, negative_patches: Tensor | None = None) -> bool:
    """Whether tensors have the shapes of :class:`Faces`."""
    if embedding.ndim != 2 or not len(embedding):
        return False
    if patches is None or negative_patches is None:
        return patches is negative_patches
    there = patches.ndim == 3 and len(patches) == len(embedding)
    return there and negative_patches.shape == (1, *patches.shape[1:])
