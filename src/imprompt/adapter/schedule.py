"""When an image prompt acts: windows and curves over the noise schedule, as tensors.

The UNet's pre-hook calls :meth:`Gate.update` with the timestep at every step; the attention reads
:attr:`Gate.factor`. The tensor stays the same object, so nothing is recompiled and no value travels to the
host.

Dimensions: B rows of the UNet's batch, F frames, K control points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.schema.options import Points


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


@dataclass(eq=False)
class Gate:
    """The factor of one group's rows at the present step."""

    first: Float[Tensor, "B"]
    last: Float[Tensor, "B"]
    """Open for timesteps in (last, first]; edges are kept in timesteps, which float32 holds exactly."""
    curves: tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]] | None
    """Timesteps left to run (0 at pure noise), and factors; ``None`` when all are 1."""
    schedule: int
    factor: Float[Tensor, "BF 1 1 1"]

    @classmethod
    def of(
        cls, rows: Sequence[When], schedule: int, frames: int, device: torch.device, dtype: torch.dtype
    ) -> "Gate | None":
        """The gate of a batch of ``rows``, or ``None`` when each acts in full throughout."""
        if all(row.always for row in rows):
            return None
        infinity = float("inf")
        first = [infinity if row.start == 0 else schedule * (1 - row.start) for row in rows]
        last = [-infinity if row.end == 1 else schedule * (1 - row.end) for row in rows]

        def table(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
            return torch.tensor(values, device=device, dtype=torch.float32)

        curves = None
        if any(factor != 1 for row in rows for _, factor in row.curve):
            longest = max(len(row.curve) for row in rows)
            filled = [[*row.curve, *[row.curve[-1]] * (longest - len(row.curve))] for row in rows]
            curves = (
                table([[schedule * x for x, _ in points] for points in filled]),
                table([[y for _, y in points] for points in filled]),
            )
        factor = torch.ones(len(rows) * frames, 1, 1, 1, device=device, dtype=dtype)
        return cls(table(first), table(last), curves, schedule, factor)

    def update(self, timestep: Tensor) -> None:
        """Set :attr:`factor` for ``timestep``, one number or one a row."""
        factor = ((timestep <= self.first) & (timestep > self.last)).to(torch.float32)
        if self.curves is not None:
            at = (self.schedule - timestep).expand(self.first.shape)
            factor = factor * evaluate(*self.curves, at)
        factor = factor.repeat_interleave(self.factor.shape[0] // factor.shape[0])
        self.factor.copy_(factor[:, None, None, None])


def evaluate(
    places: Float[Tensor, "B K"], factors: Float[Tensor, "B K"], at: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Each row's curve at its own place: straight between control points, constant beyond the ends.

    Of two points at one place the later holds from there on. No branch on values, no synchronisation.
    """
    passed = (at[:, None] >= places).sum(1, keepdim=True)
    before, after = (passed - 1).clamp_min(0), passed.clamp_max(places.shape[1] - 1)
    x0, x1 = places.gather(1, before), places.gather(1, after)
    span = x1 - x0
    along = ((at[:, None] - x0) / torch.where(span > 0, span, 1)).clamp(0, 1)
    return factors.gather(1, before).lerp(factors.gather(1, after), along)[:, 0]
