"""Features of faces: the largest face of each picture, as FaceID adapters read it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from imprompt.encoders import face as faces
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.face_geometry import TEMPLATE, Face
from imprompt.training.cache import fingerprint

_WHOLE = Face((0.0, 0.0, 112.0, 112.0), 1.0, TEMPLATE.astype(np.float32))
"""A face that fills its picture; used to find the width of embeddings."""


class FaceFeatures:
    """A recogniser's embedding, of length 1; with ``encoder`` also its hidden states of the aligned crop.

    See :class:`imprompt.training.cache.FeatureEncoder`. The negative is a zero embedding and, with an
    encoder, its hidden states of a zero input.
    """

    def __init__(self, reader: faces.FaceEmbedder, encoder: ImageEncoder | None = None) -> None:
        self.reader, self.encoder = reader, encoder
        self.feature: tuple[str, ...] = ("face",) if encoder is None else ("face", "hidden")
        self.identity = f"{reader.name} {reader.space}"
        if encoder is not None:
            self.identity += f" {fingerprint(encoder.model)}"

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Raises :class:`InputError` for a picture without a face."""
        found = faces.joined([faces.read(self.reader, image, encoder=self.encoder) for image in images])
        features = {"face": functional.normalize(found.embedding.float(), dim=-1)}
        if found.patches is not None:
            features["hidden"] = found.patches.float().cpu()
        return features

    def negative(self) -> dict[str, Tensor]:
        """The features for no face."""
        width = self.reader.embed(Image.new("RGB", (112, 112)), _WHOLE).shape[-1]
        zero = {"face": torch.zeros(1, int(width))}
        if self.encoder is not None:
            zero["hidden"] = self.encoder.encode([Image.new("RGB", (8, 8))]).negative_hidden.float().cpu()
        return zero
