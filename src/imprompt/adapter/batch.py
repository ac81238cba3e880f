"""Rows side by side: the tokens of a whole batch in one tensor, and its masks on each layer's grid.

Dimensions: S token sequences, T tokens (of the longest), C token width, L queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from imprompt.adapter.prompt import CompiledPrompt, resize_mask


@dataclass(frozen=True, eq=False)
class PaddedTokens:
    """Token sequences side by side: first all samples of one kind, then of the other."""

    tokens: Float[Tensor, "S T C"]
    bias: Float[Tensor, "S 1 1 T"] | None
    """Added to the logits: -inf where no token is, else the log of a picture's share."""
    present: Bool[Tensor, "S 1 T 1"] | None
    """Which tokens are there; ``None`` when all are."""

    @classmethod
    def of(
        cls,
        rows: Sequence[CompiledPrompt | None],
        kinds: Sequence[str],
        negated: Sequence[bool],
        device: torch.device,
    ) -> "PaddedTokens":
        """``rows`` for each of ``kinds``; where ``negated``, a row's tokens serve the negative kind."""
        sequences: list[Tensor | None] = []
        shares: list[Tensor | None] = []
        for kind in kinds:
            for row, not_ in zip(rows, negated, strict=True):
                swapped = kind == "uncond" and not not_
                sequences.append(None if row is None else row.negative if swapped else row.tokens)
                shares.append(None if row is None or swapped else row.log_weight_bias)
        shown = [sequence for sequence in sequences if sequence is not None]
        longest, width = max(len(sequence) for sequence in shown), shown[0].shape[-1]
        dtype = shown[0].dtype
        tokens = torch.zeros(len(sequences), longest, width, device=device, dtype=dtype)
        present: Bool[Tensor, "S T"] = torch.ones(len(sequences), longest, device=device, dtype=torch.bool)
        bias = torch.zeros(len(sequences), longest, device=device)
        for i, (sequence, share) in enumerate(zip(sequences, shares, strict=True)):
            if sequence is not None:  # an absent prompt keeps zero tokens, and has strength 0
                tokens[i, : len(sequence)] = sequence.to(device, dtype)
                present[i, len(sequence) :] = False
                if share is not None:
                    bias[i, : len(sequence)] = share.to(device)
        whole = bool(present.all())
        if whole and all(share is None for share in shares):
            return cls(tokens, None, None)
        bias = bias.masked_fill(~present, float("-inf"))[:, None, None, :]
        return cls(tokens, bias, None if whole else present[:, None, :, None])


class MaskGrids:
    """The masks of one softmax on each resolution's grid, made once for each."""

    def __init__(
        self,
        rows: Sequence[CompiledPrompt | None],
        order: list[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._masks = [None if row is None else row.mask for row in rows]
        self._order, self.device, self.dtype = order, device, dtype
        self._made: dict[tuple[int, int], Tensor] = {}

    def at(self, size: tuple[int, int]) -> Float[Tensor, "_ 1 L 1"] | None:
        """The masks on a layer's grid of ``size`` (height, width); ``None`` when there are none."""
        if all(mask is None for mask in self._masks):
            return None
        if size not in self._made:
            whole = torch.ones(1, 1, *size)
            grids = [whole if mask is None else resize_mask(mask.cpu(), size) for mask in self._masks]
            stack = torch.cat(grids).flatten(2)[..., None].to(self.device, self.dtype)
            self._made[size] = stack[self._order] if len(grids) > 1 else stack
        return self._made[size]
