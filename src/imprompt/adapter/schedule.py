"""Windows and curves over the noise schedule: when an image prompt acts.

Positions run from 0 (pure noise) to 1 (finished picture). :class:`Clock` converts a scheduler's timesteps to
positions; :class:`Gate` converts a position to one factor per batch row, in a tensor that is written in
place.

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
    """When a row acts: the window [start, end), and a curve of factors."""

    start: float = 0.0
    end: float = 1.0
    curve: Points = ((0.0, 1.0),)

    @property
    def always(self) -> bool:
        """Whether its factor is always 1."""
        return self.start == 0 and self.end == 1 and not self.curved

    @property
    def curved(self) -> bool:
        """Whether its curve has factors other than 1."""
        return any(factor != 1 for _, factor in self.curve)

    @property
    def never(self) -> bool:
        """Whether its factor is always 0."""
        return self.start == self.end or not any(factor for _, factor in self.curve)


@dataclass(frozen=True, eq=False)
class Clock:
    """Positions of timesteps, from 0 (pure noise) to :attr:`length`.

    For schedulers that count training steps (DDIM, DPM++, Euler, UniPC, LCM, …) the position is ``T - t`` of
    ``T``, independent of the number of steps. For others (EDM, continuous, flow matching, with any shift) it
    is the index of the nearest timestep of the run, so that ``end=0.5`` is half of the steps.
    """

    length: int
    table: Float[Tensor, " N"] | None = None

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
        """Position of ``timestep``, without synchronising with the device."""
        if self.table is None:
            return self.length - timestep
        # Nearest, not equal: FLUX is given t/1000 in the latents' precision (bf16 keeps 8 bits).
        return (self.table - timestep[..., None]).abs().argmin(-1).to(torch.float32)

    def fraction(self, timestep: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Position of ``timestep`` in the schedule, from 0 to 1."""
        return self.position(timestep) / self.length


def _counts_training_steps(scheduler: Any) -> bool:
    config = scheduler.config
    return (
        hasattr(scheduler, "alphas_cumprod")
        and config.get("timestep_type", "discrete") == "discrete"
        and not config.get("use_flow_sigmas", False)
        and config.get("prediction_type") != "flow_prediction"
    )


class Gate:
    """One factor per batch row of each prompt, at the present step; the rows of a prompt in turn."""

    def __init__(
        self, rows: Sequence[When], device: torch.device, dtype: torch.dtype, prompts: int = 1
    ) -> None:
        self._prompts = prompts
        self.factor: Float[Tensor, " R"] = torch.ones(len(rows), device=device, dtype=dtype)
        self._rows = tuple(rows)
        self._length: int | None = None

    def update(self, clock: Clock, timestep: Float[Tensor, "*B"]) -> None:
        """Write :attr:`factor` for ``timestep``, one number or one for each of equally many batch rows."""
        if clock.length != self._length:
            self._measure(clock.length)
        position = clock.position(timestep).reshape(-1)
        if len(position) > 1:
            each = len(self._rows) // self._prompts // len(position)
            position = position.repeat_interleave(each).repeat(self._prompts)
        factor = ((position >= self._first) & (position < self._last)).to(torch.float32)
        if self._curves is not None:
            places, factors = self._curves
            factor = factor * evaluate(places, factors, position.expand(len(self._rows)))
        self.factor.copy_(factor)

    def _measure(self, length: int) -> None:
        """Convert windows and curves to the clock's units, in which float32 holds their edges exactly."""

        def table(values: Sequence[Sequence[object]]) -> Tensor:
            return torch.tensor(values, device=self.factor.device, dtype=torch.float32)

        never, ever = float("-inf"), float("inf")
        self._first, self._last = table(
            [
                (length * row.start if row.start else never, length * row.end if row.end < 1 else ever)
                for row in self._rows
            ]
        ).unbind(1)
        self._curves: tuple[Tensor, ...] | None = None
        if any(row.curved for row in self._rows):
            longest = max(len(row.curve) for row in self._rows)
            curves = [[*row.curve, *[row.curve[-1]] * (longest - len(row.curve))] for row in self._rows]
            self._curves = table([[(length * x, y) for x, y in points] for points in curves]).unbind(-1)
        self._length = length


def curve_at(curve: Points, positions: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Evaluate one curve at several positions."""
    places, factors = torch.tensor(curve).unbind(-1)
    return evaluate(places.expand(len(positions), -1), factors.expand(len(positions), -1), positions)


def evaluate(
    places: Float[Tensor, "R K"], factors: Float[Tensor, "R K"], at: Float[Tensor, " R"]
) -> Float[Tensor, " R"]:
    """Evaluate each row's curve: linear between control points, constant beyond the ends.

    Of two points at one position, the later holds from there on. No branch on values, no synchronisation.
    """
    passed = (at[:, None] >= places).sum(1, keepdim=True)
    before, after = (passed - 1).clamp_min(0), passed.clamp_max(places.shape[1] - 1)
    x0, x1 = places.gather(1, before), places.gather(1, after)
    span = x1 - x0
    along = ((at[:, None] - x0) / torch.where(span > 0, span, 1)).clamp(0, 1)
    return factors.gather(1, before).lerp(factors.gather(1, after), along)[:, 0]
