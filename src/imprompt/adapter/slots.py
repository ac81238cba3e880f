"""Arrange the prompts of a batch as rows of its tensors.

A :class:`Slot` has one prompt of every sample; samples with fewer prompts get one of strength 0. Frames of a
clip are rows, like samples.

Dimensions: S token sequences, T tokens of the longest, C token width, L queries, R rows, P prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from imprompt.adapter.backbones.base import Branch, Call, Site
from imprompt.adapter.masks import resize_mask
from imprompt.adapter.prompt import CompiledPrompt
from imprompt.adapter.scaling import with_strength
from imprompt.adapter.source import PromptSource
from imprompt.errors import UsageError
from imprompt.schema.profiles import LayerWeights


def prompt_slots(samples: Sequence[Sequence[CompiledPrompt]]) -> Iterator[list[CompiledPrompt]]:
    """The g-th prompt of every sample, for each g."""
    for g in range(max((len(prompts) for prompts in samples), default=0)):
        present = next(prompts[g] for prompts in samples if g < len(prompts))
        silent = replace(present, scale=0.0, mask=None, text=None, track=None)
        yield [prompts[g] if g < len(prompts) else silent for prompts in samples]


class SlotSite(NamedTuple):
    """A site where a slot acts."""

    site: Site
    negated: tuple[bool, ...]
    """For each token sequence: whether the uncond branch reads the prompt's own tokens at this site."""
    strengths: tuple[float, ...]
    """For each token sequence."""


class Slot:
    """One prompt of every sample: its token sequences, and which of them each row of the batch reads.

    Raises :class:`UsageError` when the batch is no multiple of the samples, or a clip cannot follow a prompt.
    """

    def __init__(self, prompts: Sequence[CompiledPrompt], call: Call) -> None:
        each, rest = divmod(call.samples, len(prompts))
        if rest:
            raise UsageError(
                f"prompts are set for {len(prompts)} samples, but {call.samples} are drawn; the pipeline's "
                "batch must be a multiple of the number of samples that have prompts."
            )
        frames = 1 if all(prompt.track is None for prompt in prompts) else call.frames
        self.prompts = [of_frame for prompt in prompts for of_frame in prompt.over_frames(frames)]
        self._shape = len(prompts), each * call.frames // frames, frames
        picks = self._picks(None).tolist()
        branches: list[Branch] = ["uncond" if branch == "text" else branch for branch in call.branches]
        self.branches = list(dict.fromkeys(branches))
        """The branches that see different tokens."""
        self._starts = [self.branches.index(branch) * len(self.prompts) for branch in branches]
        self.rows = picks * len(branches)
        """The prompt of each row of the batch."""
        self.order = [start + pick for start in self._starts for pick in picks]
        """The token sequence of each row."""
        self.call = call
        self._masks: dict[tuple[int, int], Tensor] = {}

    def _picks(self, device: torch.device | None) -> Tensor:
        """The prompt of each row of one branch."""
        samples, turns, frames = self._shape
        numbers = torch.arange(samples * frames, device=device)
        return numbers.view(samples, 1, frames).expand(-1, turns, -1).flatten()

    # Made on the device, and once: each copy from the host would wait for it.
    @cached_property
    def _rows(self) -> Tensor:
        return self._picks(self.call.device).repeat(len(self._starts))

    @cached_property
    def _order(self) -> Tensor:
        picks = self._picks(self.call.device)
        return torch.cat([start + picks for start in self._starts])

    def of_sequences(self, x: Float[Tensor, "S ..."]) -> Float[Tensor, "R ..."]:
        """Each row's part of ``x``, which has one of every token sequence."""
        return x.index_select(0, self._order)

    def of_prompts(self, x: Float[Tensor, "P ..."]) -> Float[Tensor, "R ..."]:
        """The same of ``x`` with one of every prompt."""
        return x.index_select(0, self._rows)

    @property
    def sequences(self) -> list[tuple[CompiledPrompt, Branch]]:
        """The token sequences: all prompts as one branch sees them, then as the other does."""
        return [(prompt, branch) for branch in self.branches for prompt in self.prompts]

    def acting(self, source: PromptSource, sites: Sequence[Site]) -> Iterator[SlotSite]:
        """The sites at which any sequence has a strength; all of them if the call is to be steady. Others
        keep the base's own processor."""
        weights = [_layer_weights(prompt, branch, source, sites) for prompt, branch in self.sequences]
        strengths = zip(*(each.weights for each in weights), strict=True)
        negated = zip(*(each.negated for each in weights), strict=True)
        for at in map(SlotSite, sites, negated, strengths):
            if any(at.strengths) or self.call.steady:
                yield at

    def scaled(self, key: Tensor, value: Tensor, bias: Tensor | None, at: SlotSite) -> tuple[Tensor, Tensor]:
        """Each row's keys and values with the part of the strength that acts inside the softmax."""
        modes = [self.prompts[row].scaling for row in self.rows]
        if all(mode == "v-only" for mode in modes):
            return key, value
        there = None if bias is None else (bias != float("-inf")).transpose(-1, -2)
        return with_strength(key, value, modes, [at.strengths[i] for i in self.order], at.site.width, there)

    def mask(self, size: tuple[int, int]) -> Float[Tensor, "_ 1 L 1"] | None:
        """The mask of each row on a grid of ``size`` (height, width), cached by size; ``None`` if no prompt
        has one and the call need not be steady."""
        masks = [prompt.mask for prompt in self.prompts]
        if all(mask is None for mask in masks) and not self.call.steady:
            return None
        if size not in self._masks:
            device = self.call.device
            whole = torch.ones(1, 1, *size, device=device)
            grids = [whole if mask is None else resize_mask(mask.to(device), size) for mask in masks]
            stack = torch.cat(grids).flatten(2)[..., None].to(self.call.dtype)
            self._masks[size] = self.of_prompts(stack) if len(grids) > 1 else stack
        return self._masks[size]

    def site_mask(self, site: Site) -> Float[Tensor, "_ 1 L 1"] | None:
        """The masks for the queries of a site, those of text and reference tokens as well."""
        grid = self.call.grid
        mask = self.mask(site.size(grid.height, grid.width))
        text = grid.text_tokens if site.kind == "single" else 0
        return mask if mask is None else surrounded(mask, text, grid.reference_tokens)


def surrounded(mask: Float[Tensor, "_ 1 P 1"], before: int, behind: int) -> Float[Tensor, "_ 1 L 1"]:
    """Masks of the drawn picture, for a sequence with tokens before and behind the picture's.

    Those read as much as where the mask is darkest: nothing if it is black anywhere, so that they do not
    carry the image prompt elsewhere; all if it is white, as without a mask.
    """
    if not before and not behind:
        return mask
    least = mask.amin(2, keepdim=True)
    return torch.cat([least.expand(-1, -1, before, -1), mask, least.expand(-1, -1, behind, -1)], dim=2)


def _layer_weights(
    prompt: CompiledPrompt, branch: Branch, source: PromptSource, sites: Sequence[Site]
) -> LayerWeights:
    """A token sequence's strength at each site. Cond rows get none of an image where it is to be avoided."""
    weights = prompt.layer_weights(sites)
    hidden = weights.negated if branch == "cond" else (not source.shows_uncond,) * len(sites)
    shown = tuple(0.0 if off else w for w, off in zip(weights.weights, hidden, strict=True))
    return replace(weights, weights=shown)


def padded(
    sequences: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Float[Tensor, "S T C"], Float[Tensor, "S 1 1 T"] | None]:
    """Pad token sequences to one length; returns the tokens and the bias of their logits, which is -inf for
    padding, or ``None`` if it is 0 everywhere."""
    device = sequences[0].device
    added = [
        torch.zeros(len(sequence)) if bias is None else bias.float().cpu()
        for sequence, bias in zip(sequences, biases, strict=True)
    ]
    bias = pad_sequence(added, batch_first=True, padding_value=float("-inf"))
    tokens = pad_sequence(list(sequences), batch_first=True)
    return tokens, bias[:, None, None, :].to(device) if bias.any() else None
