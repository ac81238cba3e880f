"""Where, in which layers and at which steps each image prompt acts, measured while a picture is drawn.

At every query: the length of what the prompt adds to the residual stream (strength, window, curve and mask
inside), relative to the mean length of what the base's own attention adds there. The picture is bit for bit
the one drawn without recording.

Dimensions: B batch rows, H heads, L queries, D head width, C stream width; G prompts, S calls, N sites.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.attention import ImageKV, merge_heads
from imprompt.adapter.backbones.base import Call, Site
from imprompt.errors import UsageError


@dataclass(frozen=True, eq=False)
class Attribution:
    """What was measured; prompts in the order in which they were set, layers in execution order."""

    layers: tuple[Site, ...]
    steps: tuple[float, ...]
    """The share of the schedule at each call of the denoiser, 0 for pure noise."""
    strength: Float[Tensor, "G S N"]
    """Mean length of the prompt's contribution over the base's; 0 where it does not act."""
    maps: Float[Tensor, "G h w"]
    """The same at each place of the latent, averaged over steps and layers."""


@dataclass(eq=False)
class Recorder:
    """Measures every prompt while it is :attr:`imprompt.adapter.injection.Injection.recorder`.

    Of guided batches the cond rows count. Draw, then ask for :meth:`result`.
    """

    _call: Call | None = None
    _layers: tuple[Site, ...] = ()
    _steps: list[Tensor] = field(default_factory=list)
    _strength: dict[tuple[int, int, str], Tensor] = field(default_factory=dict)
    _maps: dict[int, Tensor] = field(default_factory=dict)

    def step(self, position: Tensor, call: Call, layers: Sequence[Site]) -> None:
        """The denoiser is about to run at ``position``, a share of the schedule. Raises :class:`UsageError`
        when the drawn size changed meanwhile."""
        if self._call is not None and self._size(call) != self._size(self._call):
            raise UsageError("the size of what is drawn changed; explain one picture at a time.")
        self._call, self._layers = call, tuple(layers)
        self._steps.append(position)

    @torch.no_grad()
    def add_images(
        self,
        site: Site,
        kvs: Sequence[ImageKV],
        attend: Callable[[ImageKV], Tensor],
        out: Float[Tensor, "B H L D"],
        project: Callable[[Tensor], Tensor] | None,
        beside: Float[Tensor, "B L C"] | None,
    ) -> Float[Tensor, "B H L D"]:
        """``out`` plus what the prompts contribute, in the order in which it is always added up."""
        own = self._length(merge_heads(out), project) if beside is None else self._length(beside, None)
        for kv in kvs:
            image = attend(kv)
            acting = image if kv.factor is None else image * kv.factor
            self._note(
                site, kv.prompt, self._length(merge_heads(acting), project) / own.mean().clamp_min(1e-12)
            )
            out = kv.add_to(out, image)
        return out

    def result(self) -> Attribution:
        """What was measured until now. Raises :class:`UsageError` when nothing was drawn with a prompt."""
        if self._call is None or not self._maps:
            raise UsageError("there is nothing to explain: no image prompt acted while this was recorded.")
        layers = tuple(sorted(self._layers, key=lambda layer: layer.block_index))
        prompts = range(1 + max(self._maps))
        zero = torch.zeros(())
        strength = [
            [
                [self._strength.get((g, s, x.name), zero).cpu() for x in layers]
                for s in range(len(self._steps))
            ]
            for g in prompts
        ]
        blank = torch.zeros(self._size(self._call))
        maps = [self._maps.get(g, blank).cpu() / (len(self._steps) * len(layers)) for g in prompts]
        return Attribution(
            layers,
            tuple(float(step) for step in self._steps),
            torch.stack([torch.stack([torch.stack(row) for row in table]) for table in strength]),
            torch.stack(maps),
        )

    @staticmethod
    def _size(call: Call) -> tuple[int, int]:
        return call.grid.height, call.grid.width

    def _length(
        self, values: Float[Tensor, "B L C"], project: Callable[[Tensor], Tensor] | None
    ) -> Float[Tensor, "L"]:
        """Lengths behind the output projection (without its bias), averaged over the cond rows."""
        assert self._call is not None
        branches = self._call.branches
        cond = [i for i, branch in enumerate(branches) if branch == "cond"] or list(range(len(branches)))
        rows = values.unflatten(0, (len(branches), -1))[cond].flatten(0, 1)
        if project is not None:  # called, not read: its weights may be elsewhere until then
            rows = project(rows) - project(torch.zeros_like(rows[:1, :1]))
        return rows.float().norm(dim=-1).mean(0)

    def _note(self, site: Site, prompt: int, lengths: Float[Tensor, "L"]) -> None:
        assert self._call is not None
        grid = self._call.grid
        before = grid.text_tokens if site.kind == "single" else 0
        lengths = lengths[before : len(lengths) - grid.reference_tokens]
        key = (prompt, len(self._steps) - 1, site.name)
        self._strength[key] = self._strength.get(key, lengths.new_zeros(())) + lengths.mean()
        placed = lengths.reshape(1, 1, *site.size(grid.height, grid.width))
        place = F.interpolate(placed, (grid.height, grid.width), mode="bilinear", align_corners=False)[0, 0]
        self._maps[prompt] = self._maps[prompt] + place if prompt in self._maps else place
