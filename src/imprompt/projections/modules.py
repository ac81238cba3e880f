"""Image features to image tokens: one small module per published kind.

Parameter names are the published ones, so ``state_dict()`` is a checkpoint's ``image_proj``. In: an image
encoder's features, or a face embedding, or both. Out: tokens as wide as the base model's text. Which kind a
file holds is decided in :mod:`imprompt.checkpoints.checkpoint`.

Dimensions: ``N`` images, ``P`` patches (all tokens of the encoder), ``E`` width of a pooled or face
embedding, ``W`` of hidden states, ``T`` tokens, ``C`` cross-attention width, ``F`` photos of one person,
``D`` a resampler's width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from imprompt.catalog.published import Feature, Variant
from imprompt.errors import EncoderMismatch, ModelError, UsageError

HEAD_WIDTH = 64  # of every published resampler; its number of heads follows from to_q
Shapes = Mapping[str, Sequence[int]]


class ImageProjection(nn.Module):
    """Base of all kinds: what goes in, how many tokens come out, and the negative rule."""

    patch_width: int | None = None
    """Width of the second input of FaceID-Plus, the face crop's hidden states; else ``None``."""
    s_scale: float = 1.0
    """FaceID-PlusV2's weight of the face crop's look beside the identity; no effect on other kinds."""

    def __init__(self, variant: Variant, tokens: int, cross_dim: int, feature_width: int) -> None:
        super().__init__()
        self.variant = variant
        self.tokens = tokens
        """Tokens of one image. The patch MLP makes one of each patch: 257 with the published encoder."""
        self.cross_dim = cross_dim
        self.feature_width = feature_width

    @property
    def feature(self) -> Feature:
        """What ``forward`` reads, see :class:`~imprompt.catalog.published.Variant`."""
        return self.variant.feature

    @classmethod
    def from_shapes(cls, variant: Variant, shapes: Shapes) -> Self:
        """The module whose widths a published ``image_proj`` of these shapes has. Raises :class:`ModelError`
        for keys that are missing or do not go together."""
        raise NotImplementedError

    def forward(self, features: Tensor, patches: Tensor | None = None) -> Float[Tensor, "N T C"]:
        """Features to tokens.

        ``features`` is ``N E`` (pooled), ``N P W`` (hidden) or ``N E`` / ``N F E`` (face), where the tokens
        of the ``F`` photos of a person stand side by side: ``N F·T C``. ``patches`` (``N P W``, or
        ``N F P W``) is FaceID-Plus's second input. Raises :class:`EncoderMismatch` for features of another
        width or kind.
        """
        raise NotImplementedError

    def negative(self, features: Float[Tensor, "1 P W"] | None = None) -> Float[Tensor, "1 T C"]:
        """Tokens of the unconditional half, by the variant's published rule.

        ``features`` is the encoder's hidden states of an all-zero preprocessed tensor; kinds that project
        zeros do without, or, with a second input, are given zeros of its shape. Raises
        :class:`UsageError` when they are needed and missing.
        """
        if self.variant.negative == "zero_features" and self.patch_width is None:
            return self(self._zeros())
        if features is None:
            raise UsageError(
                f"negative tokens of a {self.variant.name} projection are made of the encoder's features of "
                "an all-zero preprocessed tensor: pass Features.negative_hidden."
            )
        return self(features)

    def _zeros(self) -> Tensor:
        return next(self.parameters()).new_zeros(1, self.feature_width)

    def _check(
        self, features: Tensor, layout: str, *, dims: tuple[int, ...], width: int | None = None
    ) -> None:
        width = width or self.feature_width
        if features.ndim not in dims or features.shape[-1] != width:
            raise EncoderMismatch(
                f"this {self.variant.name} projection reads {self.feature} features shaped {layout} of width "
                f"{width}, got shape {tuple(features.shape)}."
            )

    def _no_patches(self, patches: Tensor | None) -> None:
        if patches is not None:
            raise EncoderMismatch(
                f"a {self.variant.name} projection has no second input; got patches as well."
            )


class LinearProjection(ImageProjection):
    """``LayerNorm(reshape(W·e + b))``: pooled embedding to ``T`` tokens (Ye et al. 2023, §3.2)."""

    def __init__(self, variant: Variant, tokens: int, cross_dim: int, feature_width: int) -> None:
        super().__init__(variant, tokens, cross_dim, feature_width)
        self.proj = nn.Linear(feature_width, tokens * cross_dim)
        self.norm = nn.LayerNorm(cross_dim)

    @classmethod
    def from_shapes(cls, variant: Variant, shapes: Shapes) -> Self:
        rows, feature_width = _shape(shapes, "proj.weight", 2)
        (cross_dim,) = _shape(shapes, "norm.weight", 1)
        return cls(variant, _ratio(rows, cross_dim, "proj.weight", "norm.weight"), cross_dim, feature_width)

    def forward(self, features: Tensor, patches: Tensor | None = None) -> Float[Tensor, "N T C"]:
        self._no_patches(patches)
        self._check(features, "N E", dims=(2,))
        tokens: Tensor = self.norm(self.proj(features).unflatten(-1, (self.tokens, self.cross_dim)))
        return tokens


class PatchMLPProjection(ImageProjection):
    """``LayerNorm(MLP(patch))``: each of the encoder's tokens becomes one (full-face)."""

    def __init__(self, variant: Variant, cross_dim: int, feature_width: int, inner: int) -> None:
        super().__init__(variant, 257, cross_dim, feature_width)
        self.proj = nn.Sequential(
            nn.Linear(feature_width, inner), nn.GELU(), nn.Linear(inner, cross_dim), nn.LayerNorm(cross_dim)
        )

    @classmethod
    def from_shapes(cls, variant: Variant, shapes: Shapes) -> Self:
        inner, feature_width = _shape(shapes, "proj.0.weight", 2)
        (cross_dim,) = _shape(shapes, "proj.3.weight", 1)
        return cls(variant, cross_dim, feature_width, inner)

    def forward(self, features: Tensor, patches: Tensor | None = None) -> Float[Tensor, "N T C"]:
        self._no_patches(patches)
        self._check(features, "N P W", dims=(3,))
        tokens: Tensor = self.proj(features)
        return tokens


class FaceMLPProjection(ImageProjection):
    """``LayerNorm(reshape(MLP(e)))``: a face embedding to ``T`` tokens (FaceID, portrait)."""

    def __init__(self, variant: Variant, tokens: int, cross_dim: int, feature_width: int, inner: int) -> None:
        super().__init__(variant, tokens, cross_dim, feature_width)
        self.proj = nn.Sequential(
            nn.Linear(feature_width, inner), nn.GELU(), nn.Linear(inner, tokens * cross_dim)
        )
        self.norm = nn.LayerNorm(cross_dim)

    @classmethod
    def from_shapes(cls, variant: Variant, shapes: Shapes) -> Self:
        inner, feature_width = _shape(shapes, "proj.0.weight", 2)
        rows, _ = _shape(shapes, "proj.2.weight", 2)
        (cross_dim,) = _shape(shapes, "norm.weight", 1)
        tokens = _ratio(rows, cross_dim, "proj.2.weight", "norm.weight")
        return cls(variant, tokens, cross_dim, feature_width, inner)

    def forward(self, features: Tensor, patches: Tensor | None = None) -> Float[Tensor, "N T C"]:
        self._no_patches(patches)
        self._check(features, "N E or N F E", dims=(2, 3))
        tokens: Tensor = self.norm(self.proj(features).unflatten(-1, (self.tokens, self.cross_dim)))
        return tokens.flatten(1, -2)


class ResamplerProjection(ImageProjection):
    """Learned queries that gather all patches (plus; Alayrac et al. 2022), or one raw face embedding."""

    def __init__(
        self, variant: Variant, tokens: int, cross_dim: int, feature_width: int, widths: "_Widths"
    ) -> None:
        super().__init__(variant, tokens, cross_dim, feature_width)
        self.latents = nn.Parameter(torch.randn(1, tokens, widths.width) / widths.width**0.5)
        _add_resampler(self, feature_width, cross_dim, widths)

    @classmethod
    def from_shapes(cls, variant: Variant, shapes: Shapes) -> Self:
        _, tokens, _ = _shape(shapes, "latents", 3)
        _, feature_width = _shape(shapes, "proj_in.weight", 2)
        cross_dim, _ = _shape(shapes, "proj_out.weight", 2)
        return cls(variant, tokens, cross_dim, feature_width, _Widths.of(shapes))

    def forward(self, features: Tensor, patches: Tensor | None = None) -> Float[Tensor, "N T C"]:
        self._no_patches(patches)
        if self.feature == "face":  # each embedding is a sequence of one
            self._check(features, "N E or N F E", dims=(2, 3))
            shown = features.reshape(-1, 1, self.feature_width)
        else:
            self._check(features, "N P W", dims=(3,))
            shown = features
        tokens = _resample(self, self.latents.expand(len(shown), -1, -1), shown)
        return tokens.reshape(len(features), -1, self.cross_dim)


class FaceResamplerProjection(ImageProjection):
    """Face tokens that gather the face crop's patches (FaceID-Plus), added to themselves in PlusV2."""

    def __init__(
        self,
        variant: Variant,
        tokens: int,
        feature_width: int,
        inner: int,
        cross_dim: int,
        patch_width: int,
        widths: "_Widths",
    ) -> None:
        super().__init__(variant, tokens, cross_dim, feature_width)
        self.patch_width = patch_width
        self.proj = nn.Sequential(
            nn.Linear(feature_width, inner), nn.GELU(), nn.Linear(inner, tokens * widths.width)
        )
        self.norm = nn.LayerNorm(widths.width)
        self.perceiver_resampler = nn.Module()
        _add_resampler(self.perceiver_resampler, patch_width, cross_dim, widths)

    @classmethod
    def from_shapes(cls, variant: Variant, shapes: Shapes) -> Self:
        resampler = {
            key.removeprefix("perceiver_resampler."): shape
            for key, shape in shapes.items()
            if key.startswith("perceiver_resampler.")
        }
        inner, feature_width = _shape(shapes, "proj.0.weight", 2)
        rows, _ = _shape(shapes, "proj.2.weight", 2)
        (width,) = _shape(shapes, "norm.weight", 1)
        _, patch_width = _shape(resampler, "proj_in.weight", 2)
        cross_dim, _ = _shape(resampler, "proj_out.weight", 2)
        tokens = _ratio(rows, width, "proj.2.weight", "norm.weight")
        return cls(
            variant, tokens, feature_width, inner, cross_dim, patch_width, _Widths.of(resampler, width)
        )

    def forward(self, features: Tensor, patches: Tensor | None = None) -> Float[Tensor, "N T C"]:
        self._check(features, "N E or N F E", dims=(2, 3))
        if patches is None:
            raise EncoderMismatch(
                f"a {self.variant.name} projection needs the face crop's hidden states (width "
                f"{self.patch_width}) beside the face embedding: pass patches=."
            )
        self._check(patches, "N P W or N F P W", dims=(features.ndim + 1,), width=self.patch_width)
        if patches.shape[:-2] not in (features.shape[:-1], (1,) * (features.ndim - 1)):
            raise EncoderMismatch(
                f"{tuple(features.shape[:-1])} face embeddings need as many crops, "
                f"got {tuple(patches.shape[:-2])}."
            )
        faces = self.norm(self.proj(features).reshape(-1, self.tokens, self.norm.normalized_shape[0]))
        shown = patches.flatten(0, -3).expand(len(faces), -1, -1)
        tokens = _resample(self.perceiver_resampler, faces, shown)
        if self.variant.shortcut:
            tokens = faces + self.s_scale * tokens
        return tokens.reshape(len(features), -1, self.cross_dim)

    def negative(self, features: Float[Tensor, "1 P W"] | None = None) -> Float[Tensor, "1 T C"]:
        if features is None:
            raise UsageError(
                "negative tokens of FaceID-Plus are made of a zero face embedding and the encoder's features "
                "of an all-zero preprocessed tensor (Kolors': zeros of their shape): pass them."
            )
        return self(self._zeros(), features)


KINDS: dict[str, type[ImageProjection]] = {
    "linear": LinearProjection,
    "resampler": ResamplerProjection,
    "patch-mlp": PatchMLPProjection,
    "face-mlp": FaceMLPProjection,
    "face-resampler": FaceResamplerProjection,
}
"""``Variant.projection`` → class."""


@runtime_checkable
class _Weights(Protocol):
    """What is read of a :class:`~imprompt.checkpoints.checkpoint.Checkpoint`."""

    variant: Variant
    state: dict[str, dict[str, Tensor]]


def build_projection(checkpoint: _Weights) -> ImageProjection:
    """The projection of a checkpoint, around its own tensors: nothing is copied.

    Raises :class:`ModelError` when keys or shapes are not the variant's.
    """
    weights = checkpoint.state["image_proj"]
    module = skeleton(checkpoint.variant, {key: tuple(tensor.shape) for key, tensor in weights.items()})
    try:
        module.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"'image_proj' is no {checkpoint.variant.name} projection: {error}") from error
    return module


def skeleton(variant: Variant, shapes: Shapes) -> ImageProjection:
    """The projection without memory (meta device): its ``state_dict()`` tells the keys and shapes to expect.

    Raises :class:`ModelError` when a shape that its widths are read from is missing or cannot be right.
    """
    with torch.device("meta"):
        return KINDS[variant.projection].from_shapes(variant, shapes)


class _Widths:
    """Inner sizes of a resampler: width ``D``, depth, heads' total width, and each feed-forward's width."""

    def __init__(self, width: int, depth: int, inner: int, hidden: int) -> None:
        self.width, self.depth, self.inner, self.hidden = width, depth, inner, hidden

    @classmethod
    def of(cls, shapes: Shapes, width: int | None = None) -> Self:
        blocks = {key.split(".")[1] for key in shapes if key.startswith("layers.")}
        depth = 1 + max((int(block) for block in blocks if block.isdecimal()), default=0)
        if depth > len(blocks):
            raise ModelError(
                f"the resampler's blocks are not numbered 0 to {depth - 1}: found {sorted(blocks)}."
            )
        inner, columns = _shape(shapes, "layers.0.0.to_q.weight", 2)
        hidden, _ = _shape(shapes, "layers.0.1.1.weight", 2)
        if inner % HEAD_WIDTH:
            raise ModelError(
                f"'layers.0.0.to_q.weight' has {inner} rows, not a multiple of {HEAD_WIDTH}, a head's width."
            )
        return cls(width or columns, depth, inner, hidden)


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
        self, latents: Float[Tensor, "N T D"], features: Float[Tensor, "N P D"]
    ) -> Float[Tensor, "N T D"]:
        latents = self.norm2(latents)
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([self.norm1(features), latents], dim=1)).chunk(2, dim=-1)
        heads = (x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for x in (query, key, value))
        # The published d^(-1/4) on both q and k is this scale, kept apart there for the range of fp16.
        gathered = functional.scaled_dot_product_attention(*heads)
        out: Tensor = self.to_out(gathered.transpose(1, 2).flatten(2))
        return out


def _add_resampler(owner: Any, feature_width: int, cross_dim: int, widths: _Widths) -> None:
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
    owner.proj_out = nn.Linear(width, cross_dim)
    owner.norm_out = nn.LayerNorm(cross_dim)


def _resample(
    owner: Any, latents: Float[Tensor, "N T D"], features: Float[Tensor, "N P W"]
) -> Float[Tensor, "N T C"]:
    features = owner.proj_in(features)
    for attention, feed_forward in owner.layers:
        latents = attention(latents, features) + latents
        latents = feed_forward(latents) + latents
    tokens: Tensor = owner.norm_out(owner.proj_out(latents))
    return tokens


def _shape(shapes: Shapes, key: str, dims: int) -> tuple[int, ...]:
    if key not in shapes:
        raise ModelError(f"'image_proj' has no '{key}'.")
    shape = tuple(shapes[key])
    if len(shape) != dims or 0 in shape:
        raise ModelError(f"'image_proj.{key}' has shape {shape}; {dims} non-zero dimensions were expected.")
    return shape


def _ratio(rows: int, width: int, of: str, by: str) -> int:
    if rows % width:
        raise ModelError(f"'image_proj.{of}' has {rows} rows, not a multiple of the width {width} of '{by}'.")
    return rows // width
