"""Features for face adapters, from photos, embeddings or saved faces.

A face adapter understands the embeddings of one face model only, normalised or raw. Others are refused as far
as they can be told apart. :mod:`imprompt.encoders.face` finds the faces.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from imprompt.catalog import AdapterRow
from imprompt.catalog.variants import Variant
from imprompt.checkpoints.checkpoint import Checkpoint
from imprompt.encoders import face as faces
from imprompt.encoders.clip import Features, ImageEncoder
from imprompt.encoders.face import FaceEmbedder, Faces
from imprompt.encoders.face_onnx import OnnxFaces, how_to_get, installed
from imprompt.errors import EncoderMismatch, UsageError
from imprompt.schema import options
from imprompt.schema.prompt import ImagePrompt

FaceReaderLike: TypeAlias = FaceEmbedder | str | Path | None

_UNIT = 0.02  # how far from 1 a normalised embedding's length may be: fp16 and rounding


def packs_of(variant: Variant, published: AdapterRow | None) -> tuple[str, ...]:
    """The face packs that an adapter may have been trained with, by its variant and published file."""
    if published is not None and published.face_pack is not None:
        return (published.face_pack,)
    return ("buffalo_l",) if variant.embedding == "normed" else ()


class FaceInput:
    """Reads faces for one face adapter."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._name, self._variant = checkpoint.name, checkpoint.variant
        self._width = checkpoint.feature_width
        published = checkpoint.published
        self._pack = None if published is None else published.face_pack
        self._packs = packs_of(self._variant, published)
        self._reader: FaceEmbedder | None = None

    @property
    def crop(self) -> Literal["aligned", "square"]:
        """The picture beside an embedding: the upright face, or the square around its box."""
        return self._variant.crop

    @property
    def reader(self) -> FaceEmbedder | None:
        """The face model that was given, else the installed InsightFace pack that the adapter was trained
        with, if any."""
        if self._reader is None:
            self._reader = installed(self._packs)
        return self._reader

    @reader.setter
    def reader(self, reader: FaceReaderLike) -> None:
        if isinstance(reader, str | Path):
            reader = OnnxFaces.from_folder(reader)
        if reader is not None:
            self._check_space(reader.space)
        self._reader = reader

    def read(
        self, images: Sequence[Image.Image], names: Sequence[str], face: str, encoder: ImageEncoder | None
    ) -> Faces:
        """The face in each picture; with ``encoder`` also the features of its crop.

        Raises :class:`EncoderMismatch` without a face model, :class:`InputError` where there is no such face.
        """
        if self.reader is None:
            raise EncoderMismatch(
                f"adapter '{self._name}' reads faces: {how_to_get(self._packs)} Or give embeddings "
                "made elsewhere as features."
            )
        number = options.read_face(face)
        return faces.joined(
            [
                faces.read(self.reader, image, number, encoder, name, self._variant.crop)
                for image, name in zip(images, names, strict=True)
            ]
        )

    def features(self, found: Faces | Features) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(embeddings, normalised if the adapter reads them so; patches of the crops; patches of an all-zero
        input).

        Raises :class:`EncoderMismatch` for features of whole pictures, or of another face model.
        """
        if not isinstance(found, Faces):
            raise EncoderMismatch(
                f"adapter '{self._name}' reads a face's embedding, and was given features of whole "
                "pictures. Give a photo, or what 'imprompt embed' made with this adapter."
            )
        self._check_space(found.space)
        embedding = found.embedding.float()
        if self._variant.embedding == "normed":
            embedding = torch.nn.functional.normalize(embedding, dim=-1)
        if self._variant.feature == "face":
            return embedding, None, None
        if self._variant.negative == "zero_features" and found.patches is not None:
            return embedding, found.patches, torch.zeros_like(found.patches[:1])
        return embedding, found.patches, found.negative_patches

    def check_length(self, embedding: Tensor) -> None:
        """Raises :class:`UsageError` for bare embeddings ``(N, E)`` or ``(N, F, E)`` that are normalised
        where raw ones are read, or the other way round."""
        if embedding.shape[-1] != self._width:
            return  # the projection says what is wrong with it
        lengths = embedding.float().norm(dim=-1)
        unit = bool((lengths - 1).abs().max() < _UNIT)
        if unit == (self._variant.embedding == "normed"):
            return
        if unit:
            wanted, cure = (
                "as the face model gives them",
                "InsightFace's face.embedding, not normed_embedding",
            )
        else:
            wanted, cure = "of length 1", "torch.nn.functional.normalize(embedding, dim=-1)"
        raise UsageError(
            f"adapter '{self._name}' reads face embeddings {wanted}; the given ones have length "
            f"{float(lengths.max()):.3g}. Pass {cure}."
        )

    def check_fields(self, prompt: ImagePrompt) -> None:
        """Raise :class:`UsageError` for fields that have no effect on this adapter."""
        for name in ("framing", "sharpen"):
            if getattr(prompt, name) != ImagePrompt.model_fields[name].default:
                raise UsageError(
                    f"{name}: has no effect on adapter '{self._name}', which reads the face alone."
                )
        if prompt.s_scale is not None and not self._variant.shortcut:
            raise UsageError(
                f"s_scale: has no effect on adapter '{self._name}' ({self._variant.name}); it belongs to "
                "FaceID-PlusV2."
            )

    def _check_space(self, space: str) -> None:
        """Raise :class:`EncoderMismatch` for embeddings of another face model."""
        if self._pack is not None and space not in ("unknown", self._pack):
            raise EncoderMismatch(
                f"adapter '{self._name}' was trained on face embeddings of {self._pack} and cannot read "
                f"those of {space}, even if they have the same width. Use {self._pack}."
            )
