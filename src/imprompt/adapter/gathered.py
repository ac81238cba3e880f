"""Masked image prompts, each read only where its mask is not black.

Eight regions side by side need an eighth of the scores that eight whole pictures need. The queries inside
each mask are copied next to each other, as many for each prompt; what they read is copied back.

Dimensions: B batch rows, H heads, L queries, T tokens of each prompt, D head width, P prompts, N queries
inside the largest mask.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from imprompt.adapter.attention import JointKV, shares_of

_FEWEST_QUERIES = 256
"""Of a site. Copying costs more than it saves where there are fewer."""
_MOST_READ = 0.5
"""Part of all scores that may be left."""
_MOST_OVERLAP = 4
"""Masks at one query; each is one more copy."""


class Places(NamedTuple):
    """Which queries lie inside the masks, and where their sums are."""

    inside: Int[Tensor, " X"]
    """Numbers of the queries, B·P·N of them, counted over all batch rows."""
    back: tuple[Int[Tensor, " Y"], ...]
    """Where each of the B·L queries is in ``inside``: for the first prompt at it, for the second, and so on.
    Where no prompt is left, the place of a query whose mask is 0."""
    mask: Float[Tensor, "1 1 P 1 N"]
    """The masks at ``inside``; 0 where a smaller mask has no more queries."""

    @classmethod
    def of(cls, masks: Float[Tensor, "_ 1 P 1 L"] | None, rows: int) -> "Places | None":
        """The places of masks that are the same in all ``rows``; ``None`` where copying would not pay."""
        if masks is None or len(masks) > 1 or masks.device.type != "cpu" or masks.shape[4] < _FEWEST_QUERIES:
            return None
        values = masks[0, 0, :, 0]
        (prompts, length), shown = values.shape, values != 0
        overlap = shown.sum(0)
        largest, most = int(shown.sum(1).max()), max(1, int(overlap.max()))
        if largest > _MOST_READ * length or most > _MOST_OVERLAP:
            return None
        largest += 1  # so that each prompt has a place whose mask is 0
        queries = torch.zeros(prompts, largest, dtype=torch.long)
        inside = torch.zeros(prompts, largest, dtype=torch.bool)
        back = torch.full((most, length), largest - 1)
        turns = shown.cumsum(0) - 1
        for number, here in enumerate(shown):
            found = here.nonzero().flatten()
            queries[number, : len(found)], inside[number, : len(found)] = found, True
            back[turns[number, found], found] = number * largest + torch.arange(len(found))
        gathered = values.gather(1, queries) * inside
        return cls(
            _of_rows(queries.flatten(), rows, length),
            tuple(_of_rows(turn, rows, prompts * largest) for turn in back),
            gathered[None, None, :, None],
        )


def _of_rows(numbers: Int[Tensor, " N"], rows: int, length: int) -> Int[Tensor, " M"]:
    """The numbers in every batch row of ``length``."""
    return (numbers + length * torch.arange(rows)[:, None]).flatten()


@dataclass(frozen=True, eq=False, slots=True)
class GatheredKV(JointKV):
    """Several masked prompts, read where their masks are not black. ``key`` and ``value`` are
    ``(B·P) H T D``, the mask that of :class:`Places`."""

    places: Places

    def attend(self, query: Float[Tensor, "B H L D"]) -> Tensor:
        """What :meth:`add_to` adds: the sum of all prompts' attention, each times its mask and factor."""
        heads, length, width = query.shape[1:]
        flat = query.transpose(1, 2).reshape(-1, heads * width)
        inside = flat.index_select(0, self.places.inside)
        inside = inside.view(len(self.key), -1, heads, width).transpose(1, 2)
        scores = (self.key @ inside.transpose(-1, -2)).unflatten(0, (-1, len(self.parts)))
        shares = shares_of(scores, self.gain.transpose(1, 2)).flatten(0, 1)
        read = (shares.transpose(-1, -2) @ self.value).transpose(1, 2).reshape(-1, heads * width)
        total = read.index_select(0, self.places.back[0])
        for back in self.places.back[1:]:
            total = total + read.index_select(0, back)
        return total.view(-1, length, heads, width).transpose(1, 2)
