"""Measure where, in which layers and at which steps each image prompt acts while a picture is drawn.

Measured at every query: the norm of the prompt's contribution to the residual stream (with strength, window,
curve and mask), relative to the mean norm of the base's own attention output. Recording does not change the
picture.

Dimensions: B batch rows, H heads, L queries, D head width, C stream width; G prompts, S calls, N sites.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.attention import ImageKV, JointKV, merge_heads
from imprompt.adapter.backbones.base import Call, Site
from imprompt.errors import UsageError


@dataclass(frozen=True, eq=False)
class Attribution:
    """The measurements; prompts in the order in which they were set, layers in execution order."""

    layers: tuple[Site, ...]
    steps: tuple[float, ...]
    """Position in the schedule at each call of the denoiser, from 0 (pure noise) to 1."""
    strength: Float[Tensor, "G S N"]
    """Mean norm of the prompt's contribution over that of the base's; 0 where it does not act."""
    maps: Float[Tensor, "G h w"]
    """The same for each position of the latent, averaged over steps and layers."""


@dataclass(eq=False)
class Recorder:
    """Measures all prompts while it is :attr:`imprompt.adapter.injection.Injection.recorder`.

    With guidance, only cond rows are measured. Draw, then call :meth:`result`.
    """

    _call: Call | None = None
    _layers: tuple[Site, ...] = ()
    _steps: list[Tensor] = field(default_factory=list)
    _strength: dict[tuple[int, int, str], Tensor] = field(default_factory=dict)
    _maps: dict[int, Tensor] = field(default_factory=dict)

    def step(self, position: Tensor, call: Call, layers: Sequence[Site]) -> None:
        """Begin a call of the denoiser at ``position`` of the schedule (0 to 1). Raises :class:`UsageError`
        if the size has changed."""
        if self._call is not None and self._size(call) != self._size(self._call):
            raise UsageError("the size of what is drawn changed; explain one picture at a time.")
        self._call, self._layers = call, tuple(layers)
        self._steps.append(position)

    @torch.no_grad()
    def note(
        self,
        site: Site,
        kvs: Sequence[ImageKV | JointKV],
        attend: Callable[[ImageKV], Tensor],
        out: Float[Tensor, "B H L D"],
        project: Callable[[Tensor], Tensor] | None,
        beside: Float[Tensor, "B L C"] | None,
    ) -> None:
        """Measure the prompts, one by one, that are about to be added to ``out``."""
        own = self._length(merge_heads(out), project) if beside is None else self._length(beside, None)
        for prompt in (part for kv in kvs for part in kv.parts):
            image, gain = attend(prompt), prompt.gain
            acting = image if gain is None else image * gain
            lengths = self._length(merge_heads(acting), project)
            self._add(site, prompt.prompt, lengths / own.mean().clamp_min(1e-12))

    def result(self) -> Attribution:
        """The measurements so far. Raises :class:`UsageError` if no prompt acted."""
        if self._call is None or not self._maps:
            raise UsageError("there is nothing to explain: no image prompt acted while this was recorded.")
        layers = tuple(sorted(self._layers, key=lambda layer: layer.block_index))
        numbers = {layer.name: n for n, layer in enumerate(layers)}
        prompts, steps = 1 + max(self._maps), tuple(map(float, self._steps))
        strength = torch.zeros(prompts, len(steps), len(layers))
        for (prompt, step, name), value in self._strength.items():
            strength[prompt, step, numbers[name]] = value.cpu()
        maps = torch.zeros(prompts, *self._size(self._call))
        for prompt, value in self._maps.items():
            maps[prompt] = value.cpu() / (len(steps) * len(layers))
        return Attribution(layers, steps, strength, maps)

    @staticmethod
    def _size(call: Call) -> tuple[int, int]:
        return call.grid.height, call.grid.width

    def _length(
        self, values: Float[Tensor, "B L C"], project: Callable[[Tensor], Tensor] | None
    ) -> Float[Tensor, " L"]:
        """Norms after the output projection (without its bias), averaged over the cond rows."""
        assert self._call is not None
        branches = self._call.branches
        cond = [i for i, branch in enumerate(branches) if branch == "cond"] or list(range(len(branches)))
        rows = values.unflatten(0, (len(branches), -1))[cond].flatten(0, 1)
        if project is not None:  # called, not read: its weights may be elsewhere until then
            rows = project(rows) - project(torch.zeros_like(rows[:1, :1]))
        return rows.float().norm(dim=-1).mean(0)

    def _add(self, site: Site, prompt: int, lengths: Float[Tensor, " L"]) -> None:
        assert self._call is not None
        grid = self._call.grid
        before = grid.text_tokens if site.kind == "single" else 0
        lengths = lengths[before : len(lengths) - grid.reference_tokens]
        key = (prompt, len(self._steps) - 1, site.name)
        self._strength[key] = self._strength.get(key, lengths.new_zeros(())) + lengths.mean()
        placed = lengths.reshape(1, 1, *site.size(grid.height, grid.width))
        place = F.interpolate(placed, (grid.height, grid.width), mode="bilinear", align_corners=False)[0, 0]
        self._maps[prompt] = self._maps[prompt] + place if prompt in self._maps else place
