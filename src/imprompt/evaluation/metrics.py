"""Figures with their uncertainty: cosine, copy score, diversity, and intervals.

Plain functions on tensors and pictures. Nothing here loads a model or draws a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

COPY_SIDE = 32
"""Side in pixels at which copies are sought: larger finds exact copies only, smaller finds mere likeness."""

RESAMPLES = 2000
LEAST_PAIRS = 6
"""With fewer pairs, differences of one sign are no rarer than 1 in 20 by chance."""
SUBSETS = 4096


@dataclass(frozen=True)
class Interval:
    """A mean of ``n`` independent values with its 95 % interval.

    Too few values have no interval: ``low`` and ``high`` are ``None``.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3f} n={self.n}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.n}"


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of matching rows, ``B E`` and ``B E`` to ``B``: CLIP-I when both are image embeddings."""
    return functional.cosine_similarity(first.double(), second.double(), dim=-1)


def found_share(drawn: Tensor, anchors: Tensor, labels: Sequence[str]) -> Tensor:
    """Share of each row's samples that are nearer to the anchors of their own label than to those of any
    other, ``N``; one in the number of labels by chance.

    Unit embeddings: ``drawn`` ``N K E``, ``anchors`` ``N J E``; ``labels`` are the rows' ``N``. The anchors
    of a label are averaged. Raises ``ValueError`` for a single label."""
    names = list(dict.fromkeys(labels))
    if len(names) < 2:
        raise ValueError("two labels are needed at least")
    rows = torch.tensor([names.index(label) for label in labels])
    centres = torch.stack([anchors[rows == n].double().mean((0, 1)) for n in range(len(names))])
    near = drawn.double() @ functional.normalize(centres, dim=-1).T
    return (near.argmax(-1) == rows[:, None]).double().mean(1)


def copy_score(drawn: Image.Image, reference: Image.Image) -> float:
    """The largest correlation of a drawing with any crop of its reference: 1 is a copy of the pixels.

    The crops are the whole and 3 × 3 places at 3/4 and 1/2 of its side, each also mirrored; correlation of
    grey values (-1 to 1) after subtracting the mean. New drawings of the same
    subject reach 0.3 to 0.6. A flat drawing or crop has correlation 0.
    """
    seen = _normalised(drawn)
    best = -1.0
    for crop in _crops(reference):
        for version in (crop, ImageOps.mirror(crop)):
            best = max(best, float((seen * _normalised(version)).sum()))
    return best


def diversity(embeddings: Tensor) -> float:
    """Diversity of the drawings of one prompt: 1 minus the mean cosine of all pairs; ``K E``, K ≥ 2."""
    if len(embeddings) < 2:
        raise ValueError("diversity needs two drawings at least")
    unit = functional.normalize(embeddings.double(), dim=-1)
    near = unit @ unit.T
    count = len(unit)
    return float(1 - (near.sum() - near.diagonal().sum()) / (count * (count - 1)))


def bootstrap(values: Tensor) -> Interval:
    """95 % percentile bootstrap interval of the mean of ``values`` (``N``, one per independent picture).

    Equal values give equal intervals. Raises ``ValueError`` for NaN and for an empty tensor. One value gets
    no interval.
    """
    values = values.detach().double().flatten().cpu()
    if not len(values):
        raise ValueError("no values: a mean of nothing has no interval")
    if not values.isfinite().all():
        raise ValueError(f"{int((~values.isfinite()).sum())} of {len(values)} values are not finite")
    if len(values) == 1:
        return Interval(float(values[0]), None, None, 1)
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(values[picked].mean(1), ends).tolist()
    return Interval(float(values.mean()), low, high, len(values))


def paired(first: Tensor, second: Tensor) -> Interval:
    """The mean of ``first - second``, pair by pair (``N`` each), with the 95 % interval of a sign-flip test.

    The interval holds every difference that the test does not reject, and its ends are order statistics of
    the means of all subsets of the pairs (Hartigan 1969). So it excludes zero by chance in 5 % of cases at
    most, whatever ``N``, where a bootstrap interval of few pairs does far more often. Fewer than
    :data:`LEAST_PAIRS` have no interval. Raises ``ValueError`` for another number of values on one side, for
    NaN and for no pairs."""
    if len(first) != len(second):
        raise ValueError(f"pairs are needed, given {len(first)} and {len(second)} values")
    values = first.detach().double().flatten().cpu() - second.detach().double().flatten().cpu()
    found = bootstrap(values)
    if found.n < LEAST_PAIRS:
        return replace(found, low=None, high=None)
    chosen = _subsets(found.n)
    means = (chosen @ values / chosen.sum(1)).sort().values
    skipped = int(0.025 * (len(means) + 1))
    return replace(found, low=float(means[skipped - 1]), high=float(means[-skipped]))


def _subsets(count: int) -> Tensor:
    """Members of the subsets of ``count`` values that are not empty, ``S count`` of 0 and 1: all of them, or
    some at random where there are more than :data:`SUBSETS`."""
    if 2**count <= SUBSETS:
        return (torch.arange(1, 2**count)[:, None] >> torch.arange(count) & 1).double()
    drawn = torch.randint(2, (SUBSETS, count), generator=torch.Generator().manual_seed(0)).double()
    return drawn[drawn.any(1)]


def _crops(image: Image.Image) -> Sequence[Image.Image]:
    found = [image]
    for share in (0.75, 0.5):
        wide, high = max(1, round(image.width * share)), max(1, round(image.height * share))
        for x in (0.0, 0.5, 1.0):
            for y in (0.0, 0.5, 1.0):
                left, top = round((image.width - wide) * x), round((image.height - high) * y)
                found.append(image.crop((left, top, left + wide, top + high)))
    return found


def _normalised(image: Image.Image) -> np.ndarray:
    small = np.asarray(image.convert("L").resize((COPY_SIDE, COPY_SIDE), Image.Resampling.BOX), np.float64)
    small = small - small.mean()
    length = math.sqrt(float((small * small).sum()))
    return small / length if length > 1e-6 else np.zeros_like(small)
