"""How much of the text and how much of the picture is in what was drawn, and the settings that give most of
both.

Every measure gives two numbers a drawing. They are read between two ends, drawn with the same seeds: the text
alone, where all of the text is there and nothing of the picture, and the picture alone. 0 is the other's end,
1 the own one, so "0.8 of the text, 0.6 of the picture" means the same for every base. The adapter's own image
encoder looks how like a drawing is to what the text alone draws, and to the picture. It needs nothing else
but knows no words, so with the bundled model the judge says whether the text's concept is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from imprompt.encoders.clip import Features
from imprompt.errors import InputError, UsageError
from imprompt.evaluation.judge import Judge
from imprompt.evaluation.metrics import cosine

_APART = 0.02  # what the two ends must differ by


class Measure(Protocol):
    """What looks at drawings: text and picture fidelity of each, in numbers of its own."""

    @property
    def name(self) -> str: ...
    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]: ...


class Encoder(Protocol):
    """See :class:`imprompt.encoders.clip.ImageEncoder`."""

    def encode(self, images: Sequence[Image.Image]) -> Features: ...


@dataclass(frozen=True)
class ByEncoder:
    """Likeness, by the adapter's encoder, to what the text alone draws and to the references."""

    encoder: Encoder
    text: Tensor
    picture: Tensor
    name: str = "image encoder"

    @classmethod
    def of(
        cls, encoder: Encoder, text_alone: Sequence[Image.Image], references: Sequence[Image.Image]
    ) -> "ByEncoder":
        """The mean embedding of either stands for it."""
        text, picture = (
            encoder.encode(list(some)).pooled.float().mean(0) for some in (text_alone, references)
        )
        return cls(encoder, text, picture)

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        seen = self.encoder.encode(list(images)).pooled.float()
        return tuple(cosine(seen, end[None].expand_as(seen)) for end in (self.text, self.picture))  # type: ignore[return-value]


@dataclass(frozen=True)
class ByJudge:
    """The probability of the concept that the text names, and likeness to the references."""

    judge: Judge
    concept: str
    likeness: Measure
    name: str = "judge (text) and image encoder (picture)"

    @classmethod
    def of(cls, judge: Judge, text: str, likeness: Measure) -> "ByJudge | None":
        """``None`` when the text names no concept that the judge knows: then it cannot tell."""
        said = f" {' '.join(text.lower().replace(',', ' ').split())} "
        named = [concept for concept in judge.concepts if f" {concept.lower().replace('-', ' ')} " in said]
        return cls(judge, max(named, key=len), likeness) if named else None

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        concepts = self.judge.concept_scores(images).softmax(1)
        return concepts[:, self.judge.concepts.index(self.concept)], self.likeness(images)[1]


@dataclass(frozen=True)
class Fidelity:
    """Shares of text and picture, means over the seeds; 0 at the other's end, 1 at the own."""

    text: float
    picture: float


@dataclass(frozen=True)
class Between:
    """A measure, read between its two ends."""

    measure: Measure
    text: tuple[float, float]
    """What it gives of the text for the picture alone and for the text alone."""
    picture: tuple[float, float]
    """What it gives of the picture for the text alone and for the picture alone."""

    @classmethod
    def of(
        cls, measure: Measure, text_alone: Sequence[Image.Image], picture_alone: Sequence[Image.Image]
    ) -> "Between":
        """Raises :class:`InputError` when the ends look the same to the measure, or the wrong way round: then
        there is nothing to weigh."""
        ends = [measure(end) for end in (text_alone, picture_alone)]
        (high_text, low_picture), (low_text, high_picture) = ([float(v.mean()) for v in end] for end in ends)
        if high_text - low_text < _APART or high_picture - low_picture < _APART:
            raise InputError(
                f"the {measure.name} finds no difference to weigh: what the text alone draws and what the "
                f"picture alone draws are told apart by {high_text - low_text:.2f} (text) and "
                f"{high_picture - low_picture:.2f} (picture), {_APART} at least is needed. Another text or "
                "picture, or more steps or seeds."
            )
        return cls(measure, (low_text, high_text), (low_picture, high_picture))

    def __call__(self, images: Sequence[Image.Image]) -> Fidelity:
        """The mean shares of some drawings."""
        text, picture = (
            (float(values.mean()) - low) / (high - low)
            for values, (low, high) in zip(self.measure(images), (self.text, self.picture), strict=True)
        )
        return Fidelity(text, picture)


def front(points: Sequence[Fidelity]) -> list[int]:
    """The points that no other beats in both, from most text to most picture."""
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
    """The point with the largest ``text^(1−prefer) · picture^prefer``: 0 is text alone, 1 picture alone; it
    is always on the front, and of equals the first. Shares below 0 count as 0. Raises :class:`UsageError`."""
    if not 0 <= prefer <= 1:
        raise UsageError(f"prefer is {prefer}; from 0 (the text) to 1 (the picture) is expected.")
    shares = torch.tensor([(one.text, one.picture) for one in points], dtype=torch.float64).clamp(min=0)
    value = shares[:, 0] ** (1 - prefer) * shares[:, 1] ** prefer
    ahead = front(points)
    return max(ahead, key=lambda i: (float(value[i]), points[i].text + points[i].picture))
