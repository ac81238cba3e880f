"""Figures with their uncertainty: PSNR, cosine similarity, top-k, and the bootstrap interval of a mean.

Plain functions on tensors. Nothing here loads a model or draws a picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval; ``n`` is how many independent values it rests on."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.n}"


def psnr(first: Tensor, second: Tensor, *, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio per picture in dB, ``10·log10(peak² / MSE)``.

    Both are ``B C H W`` with values in ``[0, peak]``. Equal pictures give ``inf``.
    Raises ``ValueError`` when the shapes differ: broadcasting would average over the wrong pixels.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"pictures of one shape are needed, given {tuple(first.shape)}, {tuple(second.shape)}"
        )
    mse = (first.double() - second.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(peak**2 / mse)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of matching rows, ``B E`` and ``B E`` to ``B``: CLIP-I when both are image embeddings."""
    return functional.cosine_similarity(first.double(), second.double(), dim=-1)


def topk_hits(scores: Tensor, truth: Tensor, k: int = 1) -> Tensor:
    """Whether the true class is among the ``k`` highest scores: ``B K`` and ``B`` to bool ``B``.

    Ties count against the model: a constant scorer gets nothing for free. A row with NaN is a miss.
    """
    own = scores.gather(1, truth[:, None])
    not_below = (scores >= own).sum(1)  # counts itself
    return (not_below >= 1) & (not_below <= k)


def bootstrap(values: Tensor, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean of ``values`` (``N``, one per independent picture).

    Deterministic in ``seed``. NaN values are an error, not a number: raises ``ValueError`` for them and for
    an empty tensor.
    """
    values = values.detach().double().flatten().cpu()
    if not len(values):
        raise ValueError("no values: a mean of nothing has no interval")
    if not values.isfinite().all():
        raise ValueError(f"{int((~values.isfinite()).sum())} of {len(values)} values are not finite")
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[picked].mean(1)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high, len(values))
