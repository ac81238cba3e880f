"""When an image prompt acts: windows and curves over the noise schedule.

A position in the schedule is a share from 0 (pure noise) to 1 (finished picture). :class:`Clock` turns a
timestep into a position, whatever the scheduler counts in; :class:`Gate` turns a position into one factor per
batch row, in a tensor that stays the same object.

Dimensions: R rows, K control points, N timesteps of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.schema.options import Points

_TRAINING_STEPS = 1000  # where there is no scheduler to ask


@dataclass(frozen=True)
class When:
    """One row's place in time: the window [start, end) and the factor inside it."""

    start: float = 0.0
    end: float = 1.0
    curve: Points = ((0.0, 1.0),)

    @property
    def always(self) -> bool:
        """Whether it acts with its full strength throughout."""
        return self.start == 0 and self.end == 1 and all(factor == 1 for _, factor in self.curve)

    @property
    def never(self) -> bool:
        """Whether there is no time at which it acts."""
        return self.start == self.end or not any(factor for _, factor in self.curve)


@dataclass(frozen=True, eq=False)
class Clock:
    """Positions of timesteps, counted from pure noise in units of which the schedule has :attr:`length`.

    Schedulers that count training steps (DDIM, DPM++, Euler, UniPC, LCM, …) give ``T - t`` of ``T``, hence
    the same for any number of steps. For all others (EDM, continuous, flow matching, with any shift)
    timesteps are no shares of anything: the position is the number of the nearest entry in the run's own
    table, so that ``end=0.5`` is half of the steps.
    """

    length: int
    table: Float[Tensor, "N"] | None = None

    @classmethod
    def of(cls, scheduler: Any | None, device: torch.device) -> "Clock":
        """The clock of a scheduler whose timesteps are set; ``None``: 1000 training steps."""
        config = getattr(scheduler, "config", None) or {}
        timesteps = getattr(scheduler, "timesteps", None)
        if scheduler is None or _counts_training_steps(scheduler) or timesteps is None or not len(timesteps):
            return cls(config.get("num_train_timesteps", _TRAINING_STEPS))
        steps = list(dict.fromkeys(torch.as_tensor(timesteps).tolist()))  # second-order ones repeat theirs
        return cls(len(steps), torch.tensor(steps, device=device, dtype=torch.float32))

    def position(self, timestep: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Position of ``timestep``, from 0 to :attr:`length`. No synchronisation with the device."""
        if self.table is None:
            return self.length - timestep
        # Nearest, not equal: FLUX is given t/1000 in the latents' precision (bf16 keeps 8 bits).
        return (self.table - timestep[..., None]).abs().argmin(-1).to(torch.float32)


def _counts_training_steps(scheduler: Any) -> bool:
    config = scheduler.config
    return (
        hasattr(scheduler, "alphas_cumprod")
        and config.get("timestep_type", "discrete") == "discrete"
        and not config.get("use_flow_sigmas", False)
        and config.get("prediction_type") != "flow_prediction"
    )


class Gate:
    """The factors of a batch's rows at the present step."""

    def __init__(self, rows: Sequence[When], device: torch.device, dtype: torch.dtype) -> None:
        self.factor: Float[Tensor, R] = torch.ones(len(rows), device=device, dtype=dtype)
        self._rows = tuple(rows)
        self._length: int | None = None

    def update(self, clock: Clock, timestep: Float[Tensor, "*B"]) -> None:
        """Write :attr:`factor` for ``timestep``, one number or one for each of equally many rows."""
        if clock.length != self._length:
            self._measure(clock.length)
        position = clock.position(timestep).reshape(-1)
        if len(position) > 1:
            position = position.repeat_interleave(len(self._rows) // len(position))
        factor = ((position >= self._first) & (position < self._last)).to(torch.float32)
        if self._curves is not None:
            factor = factor * evaluate(*self._curves, position.expand(len(self._rows)))
        self.factor.copy_(factor)

    def _measure(self, length: int) -> None:
        """Windows and curves in units of the clock, where float32 holds their edges exactly."""

        def table(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
            return torch.tensor(values, device=self.factor.device, dtype=torch.float32)

        infinity = float("inf")
        self._first = table([-infinity if row.start == 0 else length * row.start for row in self._rows])
        self._last = table([infinity if row.end == 1 else length * row.end for row in self._rows])
        self._curves: tuple[Tensor, Tensor] | None = None
        if any(factor != 1 for row in self._rows for _, factor in row.curve):
            longest = max(len(row.curve) for row in self._rows)
            curves = [[*row.curve, *[row.curve[-1]] * (longest - len(row.curve))] for row in self._rows]
            self._curves = (
                table([[length * x for x, _ in points] for points in curves]),
                table([[y for _, y in points] for points in curves]),
            )
        self._length = length


def evaluate(
    places: Float[Tensor, "R K"], factors: Float[Tensor, "R K"], at: Float[Tensor, "R"]
) -> Float[Tensor, "R"]:
    """Each row's curve at its own place: straight between control points, constant beyond the ends.

    Of two points at one place the later holds from there on. No branch on values, no synchronisation.
    """
    passed = (at[:, None] >= places).sum(1, keepdim=True)
    before, after = (passed - 1).clamp_min(0), passed.clamp_max(places.shape[1] - 1)
    x0, x1 = places.gather(1, before), places.gather(1, after)
    span = x1 - x0
    along = ((at[:, None] - x0) / torch.where(span > 0, span, 1)).clamp(0, 1)
    return factors.gather(1, before).lerp(factors.gather(1, after), along)[:, 0]
