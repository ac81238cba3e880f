"""Where, in which layers and at which steps each image prompt acted, measured while a picture is drawn.

What is measured is the real thing: at every query the length of what the prompt adds to the layer's output
(strength, window, curve and mask inside, and through the layer's own output projection) relative to the mean
length of what the text gives there. Nothing is computed again afterwards, and the picture is bit for bit the
one drawn without looking.

Dimensions: B rows, H heads, L queries, D head width; G prompts, S calls of the UNet, N layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.attention import Call, ImageKV
from imprompt.adapter.backbones.unet import CrossLayer
from imprompt.errors import UsageError


@dataclass(frozen=True, eq=False)
class Attribution:
    """What was measured; prompts in the order in which they were set, layers in execution order."""

    layers: tuple[CrossLayer, ...]
    steps: tuple[float, ...]
    """The fraction of the schedule at each call of the UNet, 0 for pure noise."""
    strength: Float[Tensor, "G S N"]
    """Mean length of the prompt's contribution over the text's; 0 where it does not act."""
    maps: Float[Tensor, "G h w"]
    """The same at each place of the latent, averaged over steps and layers."""


@dataclass(eq=False)
class Recorder:
    """Measures what each prompt adds while :attr:`Injection.recorder` is set; only cond rows count.

    Put it there before drawing, take it away afterwards, and ask for :meth:`result`.
    """

    _call: Call | None = None
    _layers: tuple[CrossLayer, ...] = ()
    _steps: list[Tensor] = field(default_factory=list)
    _strength: dict[tuple[int, int, str], Tensor] = field(default_factory=dict)
    _maps: dict[int, Tensor] = field(default_factory=dict)

    def step(self, timestep: Tensor, call: Call, layers: Sequence[CrossLayer]) -> None:
        """The UNet is about to run. Raises :class:`UsageError` when the drawn size changed meanwhile."""
        if self._call is not None and (call.height, call.width) != (self._call.height, self._call.width):
            raise UsageError("the size of what is drawn changed; explain one picture at a time.")
        self._call, self._layers = call, tuple(layers)
        self._steps.append(1 - timestep.float().mean() / call.schedule)

    @torch.no_grad()
    def read(
        self,
        layer: CrossLayer,
        attention: Attention,
        groups: Sequence[ImageKV],
        query: Float[Tensor, "B H L D"],
        text: Float[Tensor, "B H L D"],
    ) -> Float[Tensor, "B H L D"]:
        """``text`` plus what the groups contribute, in the order in which it is always added up."""
        out = text
        beside = self._length(attention, text).mean().clamp_min(1e-12)
        for group in groups:
            image = group.read(query)
            out = out + image
            self._note(layer, group.prompt, self._length(attention, image) / beside)
        return out

    def result(self) -> Attribution:
        """What was measured until now. Raises :class:`UsageError` when nothing was drawn with a prompt."""
        if self._call is None or not self._maps:
            raise UsageError("there is nothing to explain: no image prompt acted while this was watched.")
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
        blank = torch.zeros(self._call.height, self._call.width)
        maps = [self._maps.get(g, blank).cpu() / (len(self._steps) * len(layers)) for g in prompts]
        return Attribution(
            layers,
            tuple(float(step) for step in self._steps),
            torch.stack([torch.stack([torch.stack(row) for row in table]) for table in strength]),
            torch.stack(maps),
        )

    def _length(self, attention: Attention, values: Float[Tensor, "B H L D"]) -> Float[Tensor, "L"]:
        """Lengths behind the output projection (without its bias), averaged over the positive rows."""
        assert self._call is not None
        parts = self._call.branches
        rows = values.unflatten(0, (len(parts), -1))[[i for i, part in enumerate(parts) if part == "cond"]]
        flat = rows.flatten(0, 1).transpose(1, 2).flatten(2)
        project = attention.to_out[0]  # called, not read: its weights may be elsewhere until then
        return (project(flat) - project(torch.zeros_like(flat[:1, :1]))).float().norm(dim=-1).mean(0)

    def _note(self, layer: CrossLayer, prompt: int, lengths: Float[Tensor, "L"]) -> None:
        assert self._call is not None
        key = (prompt, len(self._steps) - 1, layer.name)
        self._strength[key] = self._strength.get(key, lengths.new_zeros(())) + lengths.mean()
        height, width = self._call.height, self._call.width
        grid = lengths.reshape(1, 1, *layer.size(height, width))
        place = F.interpolate(grid, (height, width), mode="bilinear", align_corners=False)[0, 0]
        self._maps[prompt] = self._maps[prompt] + place if prompt in self._maps else place
