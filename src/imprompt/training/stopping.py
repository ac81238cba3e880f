"""Stopping a run early, by Ctrl-C, SIGTERM, SIGHUP or its time limit, together in all processes."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

AGREE_EVERY = 10
"""Steps between two agreements of several processes on whether to stop."""
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Stopper:
    """Tells when the run should stop: on a signal, or ``minutes`` after it began to listen."""

    def __init__(self, accelerator: Accelerator, minutes: float | None) -> None:
        self.accelerator, self.seconds = accelerator, 60 * (minutes or math.inf)
        self.interrupted = False
        """Whether a signal came; set in all processes once they agreed."""
        self.end = math.inf

    def agree(self, step: int, last: bool) -> bool:
        """Whether to stop after ``step``: every process gives the same answer."""
        wanted = self.interrupted or time.monotonic() >= self.end
        if self.accelerator.num_processes == 1:
            return wanted
        if step % AGREE_EVERY and not last:
            return False
        wish = torch.tensor([float(wanted), float(self.interrupted)], device=self.accelerator.device)
        wishes = self.accelerator.reduce(wish, "sum").tolist()
        self.interrupted = wishes[1] > 0
        return wishes[0] > 0

    @contextlib.contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """The first signal asks for a stop after this step; the second raises ``KeyboardInterrupt``."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            say("stopping after this step (again to stop at once)")

        self.end = time.monotonic() + self.seconds
        before: dict[int, Any] = {}
        for name in SIGNALS:
            number = getattr(signal, name, None)
            with contextlib.suppress(ValueError):  # not the main thread: signals belong to someone else
                if number is not None:
                    before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
