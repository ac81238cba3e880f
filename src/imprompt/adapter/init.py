"""Weights of a new adapter for training."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from imprompt.adapter.backbones.base import Site
from imprompt.adapter.injection import denoiser_of
from imprompt.checkpoints.checkpoint import StateDict
from imprompt.encoders.clip import ImageEncoder
from imprompt.errors import UsageError
from imprompt.projections.build import new_linear, new_resampler


def initial_weights(
    model: nn.Module,
    kind: Literal["linear", "resampler"],
    features: int | ImageEncoder | None,
    tokens: int | None,
    depth: int,
    width: int | None,
) -> StateDict:
    """A random projection, and the text's own keys and values for the image.

    ``features`` is the width of the encoder's features, or the encoder. Raises :class:`UsageError` where a
    width cannot be known or does not fit, :class:`AdapterMismatch` for what is no denoiser.
    """
    backbone, model = denoiser_of(model, "a new adapter")
    if features is None:
        raise UsageError("a new adapter needs feature_width= or an image encoder object to read it from.")
    if isinstance(features, ImageEncoder):
        features = features.pooled_width if kind == "linear" else features.hidden_width
    sites = backbone.sites(model)
    cross_dim = sites[0].cross_dim
    if kind == "linear":
        projection = new_linear(features, tokens or 4, cross_dim)
    else:
        projection = new_resampler(
            features, tokens or 16, cross_dim, width or -(-cross_dim // 64) * 64, depth
        )
    return {"image_proj": projection, "ip_adapter": copied_keys_values(model, sites)}


def copied_keys_values(model: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Copies of the text's keys and values at each site, under an adapter's names."""
    weights = {
        f"{site.index}.to_{part}_ip.weight": model.get_parameter(f"{site.name}.to_{part}.weight")
        for site in sites
        for part in "kv"
    }
    return {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in weights.items()}
