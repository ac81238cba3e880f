"""What a face adapter reads: photos, embeddings or saved faces become its features, or are refused.

An adapter understands only the embeddings it was trained on: those of one face model, normalised or raw.
That is checked here as far as the input tells. :mod:`imprompt.encoders.face` finds the faces.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from imprompt.checkpoints.checkpoint import Checkpoint
from imprompt.encoders import face as faces
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.face import FaceEmbedder, Faces, OnnxFaces
from imprompt.errors import EncoderMismatch, UsageError
from imprompt.schema import options
from imprompt.schema.prompt import ImagePrompt

FaceReaderLike: TypeAlias = FaceEmbedder | str | Path | None

_UNIT = 0.02  # how far from 1 a normalised embedding's length may be: fp16 and rounding


class FaceInput:
    """The way into one face adapter."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._name, self._variant = checkpoint.name, checkpoint.variant
        self._width = checkpoint.feature_width
        published = checkpoint.published
        self._pack = None if published is None else published.face_pack
        self._reader: FaceEmbedder | None = None

    @property
    def crop(self) -> Literal["aligned", "square"]:
        """The picture beside an embedding: the upright face, or the square around its box."""
        return self._variant.crop

    @property
    def reader(self) -> FaceEmbedder | None:
        """The given one, else the pack that the adapter was trained with, if InsightFace keeps it here."""
        if self._reader is None:
            self._reader = faces.installed(self._packs())
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
        """The face in each picture; with ``encoder`` the features of its crop too.

        Raises :class:`EncoderMismatch` without a face model, :class:`InputError` where there is no such face.
        """
        if self.reader is None:
            raise EncoderMismatch(
                f"adapter '{self._name}' reads faces: {faces.how_to_get(self._packs())} Or give embeddings "
                "made elsewhere as features."
            )
        number = options.read_face(face)
        return faces.joined(
            [
                faces.read(self.reader, image, number, encoder, name, self._variant.crop)
                for image, name in zip(images, names, strict=True)
            ]
        )

    def features(self, found: Faces) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(embeddings as the adapter was trained on them, crops' patches, those of a zero picture)."""
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
        """Raises :class:`UsageError` for what has no effect on a face."""
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

    def _packs(self) -> tuple[str, ...]:
        """Face packs whose embeddings it was trained on, as far as that is known."""
        if self._pack is not None:
            return (self._pack,)
        return ("buffalo_l",) if self._variant.embedding == "normed" else ()

    def _check_space(self, space: str) -> None:
        """Refuse embeddings of another face model: their numbers mean other things."""
        if self._pack is not None and space not in ("unknown", self._pack):
            raise EncoderMismatch(
                f"adapter '{self._name}' was trained on face embeddings of {self._pack}; those of {space} "
                f"mean other things, though they may have the same width. Use {self._pack}."
            )
