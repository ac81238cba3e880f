"""What a face adapter reads: photos, embeddings or saved faces become its features, or are refused.

An adapter understands only the embeddings it was trained on: those of one face model, normalised or raw as
its training had them. That is checked here, as far as what is given tells. Finding faces is the business of
:mod:`imprompt.encoders.face`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from imprompt.adapter.prompt import EncodedFaces, FaceReader, ImagePrompt, Picture, PictureEncoder
from imprompt.checkpoints.checkpoint import Checkpoint
from imprompt.errors import EncoderMismatch, UsageError
from imprompt.schema import options

FaceReaderLike: TypeAlias = FaceReader | str | Path | None

_UNIT = 0.02  # how far from 1 a normalised embedding's length may be: fp16 and rounding


class FaceInput:
    """The way into one face adapter."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._name, self._variant = checkpoint.name, checkpoint.variant
        self._width = checkpoint.feature_width
        published = checkpoint.published
        self._pack = None if published is None else published.face_pack
        self._reader: FaceReader | None = None

    @property
    def reader(self) -> FaceReader | None:
        """The given one, else the pack the adapter was trained with, where InsightFace keeps it here."""
        if self._reader is None:
            from imprompt.encoders.face import installed

            self._reader = installed(self._packs())
        return self._reader

    @reader.setter
    def reader(self, reader: FaceReaderLike) -> None:
        if isinstance(reader, str | Path):
            from imprompt.encoders.face import OnnxFaces

            reader = OnnxFaces.from_folder(reader)
        if reader is not None:
            self._check_space(reader.space)
        self._reader = reader

    def encode(
        self,
        pictures: Sequence[Picture],
        face: str | int,
        encoder: Callable[[], PictureEncoder] | None,
    ) -> EncodedFaces:
        """The face in each picture; with ``encoder`` its crop's look too. Raises :class:`EncoderMismatch`
        without a face model, :class:`InputError` where there is no such face."""
        from imprompt.encoders import face as faces
        from imprompt.encoders.features import is_saved
        from imprompt.encoders.images import load_image

        number, parts = options.read_face(face), []
        for picture in pictures:
            if is_saved(picture):
                parts.append(faces.load(str(picture)))
                continue
            if self.reader is None:
                raise EncoderMismatch(
                    f"adapter '{self._name}' reads faces: {faces.how_to_get(self._packs())} Or give "
                    "embeddings made elsewhere as features."
                )
            name = str(picture) if isinstance(picture, str | Path) else "the given picture"
            image = load_image(picture)  # type: ignore[arg-type]  # a PIL image is known here by its shape
            look = None if encoder is None else encoder()
            found = faces.read(self.reader, image, number, look, name, self._variant.crop)  # type: ignore[arg-type]
            parts.append(found)
        return faces.joined(parts)

    def features(self, shown: EncodedFaces) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(embeddings as the adapter was trained on them, crops' patches, those of a zero picture)."""
        self._check_space(shown.space)
        embedding = self.normed(shown.embedding.float())
        if self._variant.feature == "face":
            return embedding, None, None
        if self._variant.negative == "zero_features" and shown.patches is not None:
            return embedding, shown.patches, torch.zeros_like(shown.patches[:1])
        return embedding, shown.patches, shown.negative_patches

    def normed(self, embedding: Tensor) -> Tensor:
        """Of length 1, where the adapter was trained on such."""
        if self._variant.embedding == "raw":
            return embedding
        return torch.nn.functional.normalize(embedding, dim=-1)

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
        if prompt.framing != "crop" or prompt.sharpen:
            raise UsageError(
                f"framing and sharpen have no effect on adapter '{self._name}', which reads the face alone."
            )
        if prompt.s_scale is not None and not self._variant.shortcut:
            raise UsageError(
                f"s_scale has no effect on adapter '{self._name}' ({self._variant.name}); it belongs to "
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


def refuse_face_fields(prompt: ImagePrompt, name: str) -> None:
    """Raises :class:`UsageError` for what only face adapters have, on one that reads whole pictures."""
    for field, usual in (("face", "largest"), ("s_scale", None)):
        if getattr(prompt, field) != usual:
            raise UsageError(
                f"{field} {getattr(prompt, field)!r} has no effect on adapter '{name}', which reads whole "
                "pictures, not faces."
            )
