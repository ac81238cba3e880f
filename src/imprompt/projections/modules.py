"""Projections from image features to image tokens, one module for each published kind.

Parameters have their published names, so that ``state_dict()`` is a checkpoint's ``image_proj``. Those with a
resampler are in :mod:`imprompt.projections.resamplers`; :mod:`imprompt.projections` builds them.

Dimensions: ``N`` pictures, ``P`` patches (all tokens of the encoder), ``E`` width of a pooled or face
embedding, ``W`` of hidden states, ``T`` tokens, ``C`` cross-attention width, ``F`` photos of one person.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from imprompt.catalog.variants import Feature, Variant
from imprompt.errors import EncoderMismatch, UsageError
from imprompt.projections.shapes import Sizes

_SHAPES: dict[Feature, tuple[str, tuple[int, ...]]] = {
    "pooled": ("N E", (2,)),
    "hidden": ("N P W", (3,)),
    "last": ("N P W", (3,)),
    "face": ("N E or N F E", (2, 3)),
    "face+hidden": ("N E or N F E", (2, 3)),
}
"""Feature → its shape in words, and numbers of dimensions."""


class ImageProjection(nn.Module):
    """Base class of projections."""

    patch_width: int | None = None
    """Width of the second input of FaceID-Plus, hidden states of the face crop; else ``None``."""
    s_scale: float = 1.0
    """FaceID-PlusV2: weight of the face crop; no effect on other kinds."""

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        super().__init__()
        self.variant = variant
        self.tokens = sizes.tokens
        """Tokens of one picture; nominal for kinds that make one per patch."""
        self.cross_dim = sizes.cross_dim
        self.feature_width = sizes.feature_width
        self.execution_device: torch.device | None = None
        """Where pictures are projected, with copies of the weights; ``None``: where they are."""

    @property
    def feature(self) -> Feature:
        """The features that it reads, see :class:`~imprompt.catalog.variants.Variant`."""
        return self.variant.feature

    def forward(
        self, features: Tensor, patches: Tensor | None = None, timestep: Tensor | None = None
    ) -> Float[Tensor, "N T C"]:
        """Project features to image tokens.

        ``features`` is ``N E`` (pooled), ``N P W`` (hidden, last) or ``N E`` / ``N F E`` (face), where the
        tokens of the ``F`` photos of a person follow one another: ``N F·T C``. ``patches`` (``N P W``, or
        ``N F P W``) is FaceID-Plus's second input. ``timestep`` (0 to 1000) is read by timed kinds. Raises
        :class:`EncoderMismatch` for features of another width or kind.
        """
        self._check(features, patches)
        return self._tokens(features)

    def _tokens(self, features: Tensor) -> Float[Tensor, "N T C"]:
        """Project features that have been checked."""
        raise NotImplementedError

    def negative(self, features: Tensor | None = None) -> Float[Tensor, "1 T C"]:
        """Tokens of the uncond rows, by the variant's rule.

        ``features`` are the encoder's hidden states of an all-zero preprocessed tensor (``encoded_zeros``),
        its pooled features of a black picture (``black_picture``), or, for ``zero_features`` of hidden
        states, any of the same shape. Raises :class:`UsageError` if they are needed and missing, and for a
        variant without negative tokens.
        """
        rule = self.variant.negative
        if rule == "none":
            raise UsageError(
                f"a {self.variant.name} projection has no negative tokens: rows without a picture get none."
            )
        if rule == "zero_features" and self.feature in ("pooled", "face"):
            return self(self._zeros())
        if features is None:
            source = {"black_picture": "a black picture", "zero_features": "any picture (for their shape)"}
            raise UsageError(
                f"negative tokens of a {self.variant.name} projection are made of the encoder's features of "
                f"{source.get(rule, 'an all-zero preprocessed tensor: pass Features.negative_hidden')}."
            )
        return self(torch.zeros_like(features) if rule == "zero_features" else features)

    def reset_parameters(self) -> None:
        """Random weights for training: torch's defaults."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.LayerNorm):
                part.reset_parameters()

    def _zeros(self) -> Tensor:
        return next(self.parameters()).new_zeros(1, self.feature_width)

    def _check(self, features: Tensor, patches: Tensor | None) -> None:
        if patches is not None and self.patch_width is None:
            raise EncoderMismatch(
                f"a {self.variant.name} projection has no second input; got patches as well."
            )
        layout, dims = _SHAPES[self.feature]
        if features.ndim not in dims or features.shape[-1] != self.feature_width:
            raise EncoderMismatch(
                f"this {self.variant.name} projection reads {self.feature} features shaped {layout} of width "
                f"{self.feature_width}, got shape {tuple(features.shape)}"
                f"{_hint(features, max(dims), self.feature_width)}."
            )


def _hint(features: Tensor, dims: int, width: int) -> str:
    """What to give instead of features of a wrong shape, where it can be told what they are."""
    if features.ndim == dims + 1 and features.shape[-1] == width:
        return (
            "; of what diffusers prepared for a call, give embeds.chunk(2)[-1][0], the part without negatives"
        )
    if features.ndim > 2 and 3 in (features.shape[-3], features.shape[-1]):
        return "; give a picture as a path or PIL image"
    return ""


class LinearProjection(ImageProjection):
    """``LayerNorm(reshape(W·e + b))``: pooled embedding to ``T`` tokens (Ye et al. 2023, §3.2; XLabs)."""

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        super().__init__(variant, sizes)
        self.proj: nn.Module = nn.Linear(sizes.feature_width, sizes.tokens * sizes.cross_dim)
        self.norm = nn.LayerNorm(sizes.cross_dim)

    def _tokens(self, features: Tensor) -> Float[Tensor, "N T C"]:
        tokens: Tensor = self.norm(self.proj(features).unflatten(-1, (self.tokens, self.cross_dim)))
        return tokens.flatten(1, -2)


class PatchMLPProjection(ImageProjection):
    """``LayerNorm(MLP(patch))``: each of the encoder's tokens becomes one (full-face)."""

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        super().__init__(variant, sizes)
        layers = mlp(sizes.feature_width, sizes.inner, sizes.cross_dim)
        self.proj = layers.append(nn.LayerNorm(sizes.cross_dim))

    def _tokens(self, features: Tensor) -> Float[Tensor, "N T C"]:
        return self.proj(features)


class MLPProjection(LinearProjection):
    """``LayerNorm(reshape(MLP(e)))``: an embedding to ``T`` tokens (FaceID, portrait, FLUX InstantX)."""

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        super().__init__(variant, sizes)
        self.proj = mlp(sizes.feature_width, sizes.inner, sizes.tokens * sizes.cross_dim)


class ReduxProjection(ImageProjection):
    """``W₂·SiLU(W₁·patch)``: each of SigLIP's tokens becomes one of FLUX's text (FLUX.1 Redux)."""

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        super().__init__(variant, sizes)
        self.redux_up = nn.Linear(sizes.feature_width, sizes.inner)
        self.redux_down = nn.Linear(sizes.inner, sizes.cross_dim)

    def _tokens(self, features: Tensor) -> Float[Tensor, "N T C"]:
        return self.redux_down(functional.silu(self.redux_up(features)))


def mlp(width: int, inner: int, out: int) -> nn.Sequential:
    """Two linear layers with a GELU between them."""
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, out))
