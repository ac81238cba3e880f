"""Projections with a perceiver resampler: queries that gather all patches (plus, FaceID-Plus, SD3.5).

Dimensions as in :mod:`imprompt.projections.modules`; ``D`` is the resampler's width.
"""

from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from imprompt.catalog.variants import Variant
from imprompt.errors import EncoderMismatch, UsageError
from imprompt.projections.modules import ImageProjection, mlp
from imprompt.projections.shapes import HEAD_WIDTH, Sizes


class ResamplerProjection(ImageProjection):
    """Learned queries that gather all patches (plus; Alayrac et al. 2022), or one raw face embedding."""

    proj_in: nn.Linear
    layers: nn.ModuleList
    proj_out: nn.Linear
    norm_out: nn.LayerNorm

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        super().__init__(variant, sizes)
        self.latents = nn.Parameter(torch.empty(1, sizes.tokens, sizes.resampler.width))
        _add_resampler(self, sizes.feature_width, sizes)

    def _tokens(self, features: Tensor) -> Float[Tensor, "N T C"]:
        # Each face embedding is a sequence of one.
        sequence = features.reshape(-1, 1, self.feature_width) if self.feature == "face" else features
        tokens = _resample(self, self.latents.expand(len(sequence), -1, -1), sequence)
        return tokens.reshape(len(features), -1, self.cross_dim)

    def reset_parameters(self) -> None:
        """Random weights for training: torch's defaults, and the reference's for the queries."""
        super().reset_parameters()
        nn.init.normal_(self.latents, std=self.latents.shape[-1] ** -0.5)


class TimedResamplerProjection(ResamplerProjection):
    """A resampler whose tokens depend on the timestep (InstantX's for SD3.5).

    ``temb`` is the embedded timestep, ``b1, g1, b2, g2`` four parts of each block's linear map of
    ``SiLU(temb)``: features get ``temb`` added, queries are modulated by ``·(1 + g) + b`` before attention
    and before the feed-forward.
    """

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        super().__init__(variant, sizes)
        width = sizes.time_width
        self.time_embedding = TimestepEmbedding(sizes.frequencies, width)
        for block in self.layers:
            assert isinstance(block, nn.ModuleList)
            block.append(nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width)))

    def embed_time(self, timestep: Float[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """The embedded timestep, which the adapter's layers read as well; ``timestep`` is in 0 to 1000."""
        layer = self.time_embedding.linear_1
        waves = get_timestep_embedding(timestep, layer.in_features, True, downscale_freq_shift=0)
        return self.time_embedding(waves.to(layer.weight.dtype))

    def forward(
        self, features: Tensor, patches: Tensor | None = None, timestep: Tensor | None = None
    ) -> Float[Tensor, "N T C"]:
        """Tokens of hidden states ``N P W`` at ``timestep`` (one, or ``N``; 0 to 1000).

        Raises :class:`UsageError` without a timestep.
        """
        self._check(features, patches)
        if timestep is None:
            raise UsageError(
                f"a {self.variant.name} projection makes other tokens at each step: pass timestep=."
            )
        temb = self.embed_time(timestep.reshape(-1).expand(len(features)))
        sequence = self.proj_in(features) + temb[:, None]
        latents = self.latents.expand(len(features), -1, -1)
        for block in self.layers:
            assert isinstance(block, nn.ModuleList)
            attention, feed_forward, modulation = block
            assert isinstance(feed_forward, nn.Sequential)
            shift, scale, shift_2, scale_2 = modulation(temb)[:, None].chunk(4, dim=-1)
            latents = attention(latents, sequence, shift, scale) + latents
            inner = feed_forward[0](latents) * (1 + scale_2) + shift_2
            latents = feed_forward[1:](inner) + latents
        return self.norm_out(self.proj_out(latents))


class FaceResamplerProjection(ImageProjection):
    """Face tokens that gather the face crop's patches (FaceID-Plus), added to themselves in PlusV2."""

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        super().__init__(variant, sizes)
        assert sizes.patch_width is not None
        width = sizes.resampler.width
        self.patch_width = sizes.patch_width
        self.proj = mlp(sizes.feature_width, sizes.inner, sizes.tokens * width)
        self.norm = nn.LayerNorm(width)
        self.perceiver_resampler = nn.Module()
        _add_resampler(self.perceiver_resampler, sizes.patch_width, sizes)

    def forward(
        self, features: Tensor, patches: Tensor | None = None, timestep: Tensor | None = None
    ) -> Float[Tensor, "N T C"]:
        """Tokens of face embeddings ``N E`` (or ``N F E``) and their crops' hidden states ``N P W``.

        Raises :class:`EncoderMismatch` without the crops, or for shapes that do not fit.
        """
        self._check(features, patches)
        if patches is None:
            raise EncoderMismatch(
                f"a {self.variant.name} projection needs the face crop's hidden states (width "
                f"{self.patch_width}) beside the face embedding: pass patches=."
            )
        of_faces = (features.shape[:-1], (1,) * (features.ndim - 1))
        if patches.shape[-1] != self.patch_width or patches.shape[:-2] not in of_faces:
            raise EncoderMismatch(
                f"{tuple(features.shape[:-1])} face embeddings need as many crops, each with features of "
                f"width {self.patch_width}, got shape {tuple(patches.shape)}."
            )
        faces = self.norm(self.proj(features).reshape(-1, self.tokens, self.norm.normalized_shape[0]))
        sequence = patches.flatten(0, -3).expand(len(faces), -1, -1)
        tokens = _resample(self.perceiver_resampler, faces, sequence)
        if self.variant.shortcut:
            tokens = faces + self.s_scale * tokens
        return tokens.reshape(len(features), -1, self.cross_dim)

    def negative(self, features: Tensor | None = None) -> Float[Tensor, "1 T C"]:
        """Tokens of a zero face embedding and ``features``, the encoder's of an all-zero tensor.

        Raises :class:`UsageError` without them.
        """
        if features is None:
            raise UsageError(
                "negative tokens of FaceID-Plus are made of a zero face embedding and the encoder's features "
                "of an all-zero preprocessed tensor (Kolors': zeros of their shape): pass them."
            )
        return self(self._zeros(), features)


class _Attention(nn.Module):
    """Latents attend to the features and to themselves; keys and values are stacked in ``to_kv``."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(
        self,
        latents: Float[Tensor, "N T D"],
        features: Float[Tensor, "N P D"],
        shift: Float[Tensor, "N 1 D"] | None = None,
        scale: Float[Tensor, "N 1 D"] | None = None,
    ) -> Float[Tensor, "N T D"]:
        latents = self.norm2(latents)
        if shift is not None and scale is not None:
            latents = latents * (1 + scale) + shift
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([self.norm1(features), latents], dim=1)).chunk(2, dim=-1)
        heads = (x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for x in (query, key, value))
        # The published d^(-1/4) on both q and k is this scale, kept apart there for the range of fp16.
        gathered = functional.scaled_dot_product_attention(*heads)
        return self.to_out(gathered.transpose(1, 2).flatten(2))


def _add_resampler(owner: Any, feature_width: int, sizes: Sizes) -> None:
    widths = sizes.resampler
    width, hidden = widths.width, widths.hidden
    owner.proj_in = nn.Linear(feature_width, width)
    owner.layers = nn.ModuleList(
        nn.ModuleList(
            [
                _Attention(width, widths.inner),
                nn.Sequential(
                    nn.LayerNorm(width),
                    nn.Linear(width, hidden, bias=False),
                    nn.GELU(),
                    nn.Linear(hidden, width, bias=False),
                ),
            ]
        )
        for _ in range(widths.depth)
    )
    owner.proj_out = nn.Linear(width, sizes.cross_dim)
    owner.norm_out = nn.LayerNorm(sizes.cross_dim)


def _resample(
    owner: Any, latents: Float[Tensor, "N T D"], features: Float[Tensor, "N P W"]
) -> Float[Tensor, "N T C"]:
    features = owner.proj_in(features)
    for attention, feed_forward in owner.layers:
        latents = attention(latents, features) + latents
        latents = feed_forward(latents) + latents
    return owner.norm_out(owner.proj_out(latents))
