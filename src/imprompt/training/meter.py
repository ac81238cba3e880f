"""Counters between two log lines: losses by band of the schedule, and gradients that are not finite.

Everything is summed on the device and read only when a line is written, so that no step waits for it.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

BANDS = 4
"""Number of equal bands of the schedule; losses are reported for each, and validation tests one timestep
of each."""


class Meter:
    """Counts forward passes and steps; ``length`` is that of the base's schedule."""

    def __init__(self, accelerator: Accelerator, length: int) -> None:
        self.accelerator, self.length = accelerator, length
        self.skipped = 0
        """Forward passes without a finite loss so far, over all processes."""
        self._sums = torch.zeros(2, BANDS + 1, device=accelerator.device)
        self._streak = torch.zeros((), device=accelerator.device)
        self._passes, self._clock = 0, time.monotonic()

    def start(self) -> None:
        """Start the clock."""
        self._clock = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training."""
        self._clock += seconds

    def add(self, error: Tensor, loss: Tensor, steps: Tensor) -> None:
        """One forward pass: each picture's error ``B`` at its timestep ``B``, and the pass's loss."""
        finite = error.isfinite()
        band = steps * BANDS // self.length
        self._sums[0].index_add_(0, band, torch.where(finite, error, 0.0))
        self._sums[1].index_add_(0, band, finite.float())
        good = loss.isfinite().float()
        self._sums[0, BANDS] += torch.nan_to_num(loss, 0.0, 0.0, 0.0)
        self._sums[1, BANDS] += good
        self._passes += 1

    def gradient(self, norm: Tensor) -> Tensor:
        """Count a step by its gradient's norm; 1 on the device where it is not finite, else 0."""
        bad = (~norm.isfinite()).float().to(self._streak.device)
        self._streak = (self._streak + bad) * bad
        return bad

    @property
    def streak(self) -> int:
        """Steps in a row, up to the last one, without a finite gradient. Waits for the device."""
        return int(self._streak)

    def read(self, batch: int) -> tuple[dict[str, Any], int]:
        """Means since the last reading, and how many passes were not finite; starts anew."""
        total = self.accelerator.reduce(self._sums, "sum")
        *bands, loss = torch.where(total[1] > 0, total[0] / total[1].clamp(min=1), math.nan).tolist()
        passes = self._passes * self.accelerator.num_processes
        failed = passes - int(total[1, BANDS])
        self.skipped += failed
        pace = passes * batch / max(time.monotonic() - self._clock, 1e-9)
        self._sums = torch.zeros_like(self._sums)
        self._passes, self._clock = 0, time.monotonic()
        values = {
            "loss": loss,
            "loss_by_band": bands,
            "pictures_per_s": round(pace, 2),
            "skipped": self.skipped,
        }
        return values, failed
