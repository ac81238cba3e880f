"""The formulas of a training step: noise, target, weight of each error, learning rate.

Plain functions on tensors and numbers; ``B`` pictures, latents ``B C h w``. Nothing here loads a model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imprompt.errors import ModelError


def prediction_target(kind: str, clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The target of a UNet of this ``prediction_type`` for the input ``√ᾱ·clean + √(1-ᾱ)·noise``.

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
        f"the base's scheduler has the prediction type '{kind}'; adapters are trained on bases of type "
        "epsilon, v_prediction or sample."
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


def learning_rate(
    step: int, *, peak: float, steps: int, warmup: int = 0, schedule: str = "constant"
) -> float:
    """The rate of optimizer step ``step`` (from 0): linear warm-up to ``peak``, then constant, or to 0 at
    ``steps`` in a line or half a cosine. A function of the step alone, so a resumed run needs no state."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / max(1, steps - warmup), 1.0)
    return (
        peak * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
    )


def stratified_timesteps(positions: Tensor, luck: Tensor, count: int, length: int) -> Tensor:
    """A timestep of ``0 … length - 1`` for each sample of a step of ``count``: sample ``i`` (``positions``)
    draws from the ``i``-th of ``count`` equal parts by ``luck``, uniform over 0 to 1.

    Together they are uniform over the whole schedule; the loss of a step, which depends on the timestep more
    than on anything else, varies less than with independent draws.
    """
    return ((positions + luck) / count * length).long().clamp_max(length - 1)


def drop_features(features: Tensor, negative: Tensor, dropped: Tensor) -> Tensor:
    """Features ``B …`` with the rows marked in ``dropped`` (bool ``B``) replaced by the negative ``1 …``."""
    mask = dropped.view(-1, *[1] * (features.dim() - 1))
    return torch.where(mask, negative.to(features), features)


def broadcast(values: Tensor) -> Tensor:
    """View ``B`` numbers as ``B 1 1 1``, to multiply latents ``B C h w``."""
    return values.view(-1, 1, 1, 1)
