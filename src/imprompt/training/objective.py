"""The formulas of a training step: what the model should predict, how errors are weighed, how fast it learns.

Plain functions on tensors and numbers; ``B`` pictures, latents ``B C h w``. Nothing here loads a model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imprompt.errors import ModelError
from imprompt.training.config import TrainConfig


def prediction_target(kind: str, clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What a UNet of this ``prediction_type`` should output for ``√ᾱ·clean + √(1-ᾱ)·noise``.

    ``epsilon``: the noise; ``v_prediction``: ``√ᾱ·noise - √(1-ᾱ)·clean`` (Salimans & Ho 2022, §4);
    ``sample``: the clean latents. Latents ``B C h w``, ``alpha_bar`` ``B``. Raises
    :class:`ModelError` for another kind.
    """
    signal_level, noise_level = broadcast(alpha_bar.sqrt()), broadcast((1 - alpha_bar).sqrt())
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return signal_level * noise - noise_level * clean
    if kind == "sample":
        return clean
    raise ModelError(
        f"the base's scheduler has the prediction type '{kind}', for which adapters are not trained here; "
        "use a base of type epsilon, v_prediction or sample."
    )


def loss_weights(kind: str, alpha_bar: Tensor, gamma: float | None) -> Tensor:
    """Min-SNR weights ``B`` for the squared error of what the model predicts (Hang et al. 2023, §3.4).

    ``min(SNR, γ)`` is the weight of the error in the clean picture; divided by SNR for noise prediction and
    by SNR + 1 for v. Ones without ``gamma``.
    """
    if gamma is None:
        return torch.ones_like(alpha_bar)
    # At zero terminal SNR the quotient is 0/0; its limit is 1 for noise prediction.
    snr = (alpha_bar / (1 - alpha_bar)).clamp(min=1e-8)
    capped = snr.clamp(max=gamma)
    return {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[kind]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimizer step ``step`` (from 0)."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def stratified_timesteps(count: int, length: int, generator: torch.Generator) -> Tensor:
    """``count`` timesteps of ``0 … length - 1``, one from each equal part of the schedule.

    Each is uniform over its part, so together they are over the whole; the loss of a batch, which depends on
    the timestep more than on anything else, varies less than with independent draws.
    """
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (places * length).long().clamp_max(length - 1)


def drop_features(features: Tensor, negative: Tensor, dropped: Tensor) -> Tensor:
    """Features ``B …`` with the rows marked in ``dropped`` (bool ``B``) replaced by the negative ``1 …``."""
    mask = dropped.view(-1, *[1] * (features.dim() - 1))
    return torch.where(mask, negative.to(features), features)


def broadcast(values: Tensor) -> Tensor:
    """One number a picture, ``B``, beside latents ``B C h w``."""
    return values.view(-1, 1, 1, 1)
