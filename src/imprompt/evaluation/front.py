"""Text and picture fidelity of drawings, and the settings that keep most of both.

A measure gives each drawing a text fidelity and a picture fidelity. They are normalised between two ends
drawn with the same seeds, from the text alone and from the picture alone, so that "0.8 of the text, 0.6 of
the picture" means the same for every base. The default measure is the adapter's own image encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from imprompt.encoders.clip import ImageEncoder
from imprompt.errors import InputError, UsageError
from imprompt.evaluation.metrics import cosine

_LEAST = 0.02
"""Smallest difference between the two ends to normalise by."""


class Measure(Protocol):
    """Scores drawings: text and picture fidelity of each, ``B`` and ``B``."""

    @property
    def name(self) -> str:
        """Its name in tables and plots."""

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class EncoderMeasure:
    """Cosine of image embeddings to drawings from the text alone, and to the references."""

    encoder: ImageEncoder
    text: Tensor
    picture: Tensor
    name: str = "image encoder"

    @classmethod
    def between(
        cls, encoder: ImageEncoder, text_alone: Sequence[Image.Image], references: Sequence[Image.Image]
    ) -> "EncoderMeasure":
        """Measure against the mean embedding of either set."""
        text, picture = (
            encoder.encode(list(some)).pooled.float().mean(0) for some in (text_alone, references)
        )
        return cls(encoder, text, picture)

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        seen = self.encoder.encode(list(images)).pooled.float()
        text, picture = (cosine(seen, end[None].expand_as(seen)) for end in (self.text, self.picture))
        return text, picture


@dataclass(frozen=True)
class Fidelity:
    """Normalised fidelity: text is 0 for the picture alone and 1 for the text alone; picture the reverse."""

    text: float
    picture: float


@dataclass(frozen=True)
class NormalizedScore:
    """A measure, normalised between its two ends (text alone, picture alone)."""

    measure: Measure
    text: tuple[float, float]
    """Text fidelity of the picture alone, and of the text alone."""
    picture: tuple[float, float]
    """Picture fidelity of the text alone, and of the picture alone."""

    @classmethod
    def between(
        cls, measure: Measure, text_alone: Sequence[Image.Image], picture_alone: Sequence[Image.Image]
    ) -> "NormalizedScore":
        """Raises :class:`InputError` when the two ends differ too little under the measure."""
        ends = [measure(end) for end in (text_alone, picture_alone)]
        (high_text, low_picture), (low_text, high_picture) = ([float(v.mean()) for v in end] for end in ends)
        if high_text - low_text < _LEAST or high_picture - low_picture < _LEAST:
            raise InputError(
                f"the {measure.name} finds no difference to weigh: text alone and picture alone differ by "
                f"{high_text - low_text:.2f} (text) and {high_picture - low_picture:.2f} (picture), {_LEAST} "
                "is needed. Use another text or picture, or more steps or seeds."
            )
        return cls(measure, (low_text, high_text), (low_picture, high_picture))

    def __call__(self, images: Sequence[Image.Image]) -> Fidelity:
        """Mean fidelity of some drawings."""
        text, picture = (
            (float(values.mean()) - low) / (high - low)
            for values, (low, high) in zip(self.measure(images), (self.text, self.picture), strict=True)
        )
        return Fidelity(text, picture)


def pareto_front(points: Sequence[Fidelity]) -> list[int]:
    """Indices of the points that no other point beats in both, from most text to most picture."""
    best = [
        i
        for i, mine in enumerate(points)
        if not any(
            other.text >= mine.text
            and other.picture >= mine.picture
            and (other.text, other.picture) != (mine.text, mine.picture)
            for other in points
        )
    ]
    return sorted(best, key=lambda i: (-points[i].text, points[i].picture))


def choose(points: Sequence[Fidelity], prefer: float = 0.5) -> int:
    """Index of the point with the largest ``text^(1−prefer) · picture^prefer``; it lies on the front.

    ``prefer`` 0 is text alone, 1 picture alone. Fidelities below 0 count as 0. Raises :class:`UsageError` for
    other values of ``prefer``.
    """
    if not 0 <= prefer <= 1:
        raise UsageError(f"prefer is {prefer}; from 0 (the text) to 1 (the picture) is expected.")
    shares = torch.tensor([(one.text, one.picture) for one in points], dtype=torch.float64).clamp(min=0)
    value = shares[:, 0] ** (1 - prefer) * shares[:, 1] ** prefer
    return max(pareto_front(points), key=lambda i: (float(value[i]), points[i].text + points[i].picture))
