"""The tensors of a training step, and the adapter with the UNet as one module.

A sample is a function of the run's seed and its global index, whichever process makes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.training.cache import EncodedSet
from imprompt.training.config import TrainConfig
from imprompt.training.data import Plan, generator_for
from imprompt.training.objective import drop_features, stratified_timesteps
from imprompt.weights import moved


@dataclass(frozen=True)
class Sample:
    """One forward pass's tensors, ready on the CPU."""

    clean: Tensor
    noise: Tensor
    steps: Tensor
    features: dict[str, Tensor]
    states: Tensor
    extra: dict[str, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        groups = self.features.values(), self.extra.values()
        return [self.clean, self.noise, self.steps, self.states, *groups[0], *groups[1]]

    def map(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """The same of changed tensors."""
        features, extra = (
            {name: change(tensor) for name, tensor in group.items()} for group in (self.features, self.extra)
        )
        steps, states = change(self.steps), change(self.states)
        return Sample(change(self.clean), change(self.noise), steps, features, states, extra)

    def to(self, device: torch.device) -> Sample:
        """Copy to the device."""
        return self.map(lambda tensor: moved(tensor, device))


Shown = Literal["picture", "negative", "bare"]
"""Input of the adapter in validation; ``bare``: there is no adapter."""


class Forward(nn.Module):
    """The adapter's weights and the UNet they act in, as one module that accelerate wraps.

    The UNet is no submodule: it is frozen, so processes need not exchange its weights. The tokens stay in
    place until :meth:`release`, because with gradient checkpointing the UNet runs again in the backward pass.
    """

    def __init__(self, adapter: IPAdapter, unet: Any) -> None:
        super().__init__()
        self.weights = adapter.module
        self._outside = (adapter, unet)
        self._held = contextlib.ExitStack()

    def forward(
        self, noisy: Tensor, steps: Tensor, states: Tensor, features: Sequence[Tensor], extra: Any
    ) -> Any:
        """Predicted noise, velocity or picture."""
        adapter, unet = self._outside
        self._held.enter_context(adapter.training_tokens(adapter.projection(*features)))
        return unet(noisy, steps, states, return_dict=False, **extra)[0]

    def release(self) -> None:
        """Take the tokens away."""
        self._held.close()


@dataclass(frozen=True)
class Samples:
    """Makes the forward passes of a run. ``process`` of ``processes`` gets its share of each step."""

    config: TrainConfig
    data: EncodedSet
    plan: Plan
    schedule_length: int
    takes_pooled: bool
    """Whether the UNet reads pooled text and sizes, as SDXL's does."""
    process: int
    processes: int

    def make(self, number: int) -> Sample:
        """The sample of forward pass ``number``, a function of the run's seed and the samples' global
        indices."""
        config, data = self.config, self.data
        first = (number * self.processes + self.process) * config.batch
        indices = range(first, first + config.batch)
        batch = self.plan.samples(indices)
        clean = data.latents.rows("mean", batch.targets, batch.flips)
        sources = [generator_for(config.seed, "sample", index) for index in indices]
        luck = torch.stack([torch.rand((), generator=source) for source in sources])
        noise = torch.stack([torch.randn(clean.shape[1:], generator=source) for source in sources])
        if config.latent == "sample":
            spread = torch.stack([torch.randn(clean.shape[1:], generator=source) for source in sources])
            clean = clean + data.latents.rows("std", batch.targets, batch.flips) * spread
        if config.noise_offset:
            shifts = [torch.randn(clean.shape[1], 1, 1, generator=source) for source in sources]
            noise = noise + config.noise_offset * torch.stack(shifts)
        positions = torch.tensor([index % self.plan.per_step for index in indices])
        steps = stratified_timesteps(positions, luck, self.plan.per_step, self.schedule_length)
        views = [view + config.views * flip for view, flip in zip(batch.views, batch.flips, strict=True)]
        features = {
            name: drop_features(
                data.features.rows(name, batch.references, views), negative, batch.image_dropped
            )
            for name, negative in data.negative.items()
        }
        states, extra = self.texts(batch.captions, batch.targets)
        return Sample(clean, noise, steps, features, states, extra)

    def texts(self, captions: Sequence[str], targets: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Text states and, for SDXL, pooled text and the targets' sizes."""
        states = self.data.text("states", captions)
        if not self.takes_pooled:
            return states, {}
        pooled = self.data.text("pooled", captions)
        return states, {"text_embeds": pooled, "time_ids": self.data.latents.rows("crop", targets)}

    def validation(self, row: int, kind: Shown, bands: int) -> Sample:
        """A held-out picture at one timestep of each of ``bands`` parts of the schedule; noise is the same in
        every run."""
        data = self.data
        clean = data.latents.rows("mean", [row], [0])
        noise = torch.randn(clean.shape[1:], generator=generator_for(0, "validation", row))
        features = {}
        for name, negative in data.negative.items():
            own = data.features.rows(name, [row], [0])
            shown = own if kind == "picture" else negative.expand_as(own)
            features[name] = shown.expand(bands, *own.shape[1:])
        states, extra = self.texts([self.plan.validation_caption(row)] * bands, [row] * bands)
        steps = torch.tensor([int((band + 0.5) / bands * self.schedule_length) for band in range(bands)])
        clean = clean.expand(bands, *clean.shape[1:])
        return Sample(clean, noise.expand_as(clean), steps, features, states, extra)
