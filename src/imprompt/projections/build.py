"""Make image projections: from a checkpoint's weights, from shapes alone, or new for training."""

from collections.abc import Mapping

import torch
from torch import Tensor

from imprompt.catalog.variants import VARIANTS, Variant
from imprompt.errors import ModelError, UsageError
from imprompt.projections.modules import (
    ImageProjection,
    LinearProjection,
    MLPProjection,
    PatchMLPProjection,
    ReduxProjection,
)
from imprompt.projections.resamplers import (
    FaceResamplerProjection,
    ResamplerProjection,
    TimedResamplerProjection,
)
from imprompt.projections.shapes import HEAD_WIDTH, Shapes, sizes_of

KINDS: dict[str, type[ImageProjection]] = {
    "linear": LinearProjection,
    "resampler": ResamplerProjection,
    "timed-resampler": TimedResamplerProjection,
    "patch-mlp": PatchMLPProjection,
    "mlp": MLPProjection,
    "face-resampler": FaceResamplerProjection,
    "redux": ReduxProjection,
}
"""``Variant.projection`` → class."""


def build_projection(variant: Variant, weights: Mapping[str, Tensor]) -> ImageProjection:
    """The projection of a variant around a checkpoint's own tensors (its ``image_proj``), without copies.

    Raises :class:`ModelError` when keys or shapes are not the variant's.
    """
    module = skeleton(variant, {key: tuple(tensor.shape) for key, tensor in weights.items()})
    try:
        module.load_state_dict(dict(weights), strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"'image_proj' is no {variant.name} projection: {error}") from error
    return module


def skeleton(variant: Variant, shapes: Shapes) -> ImageProjection:
    """The projection without memory (meta device): its ``state_dict()`` has the keys and shapes to expect.

    Raises :class:`ModelError` when a shape that its widths are read from is missing or cannot be right.
    """
    with torch.device("meta"):
        return KINDS[variant.projection](variant, sizes_of(variant.projection, shapes))


def new_linear(feature_width: int, tokens: int, cross_dim: int) -> dict[str, Tensor]:
    """Random weights of a base adapter's projection: one linear layer on the pooled embedding."""
    shapes = {"proj.weight": (tokens * cross_dim, feature_width), "norm.weight": (cross_dim,)}
    return new_projection("linear", shapes)


def new_resampler(
    feature_width: int, tokens: int, cross_dim: int, width: int, depth: int
) -> dict[str, Tensor]:
    """Random weights of a plus adapter's projection: a resampler of the hidden states.

    Raises :class:`UsageError` for a ``width`` that is not a multiple of 64.
    """
    if width % HEAD_WIDTH:
        raise UsageError(f"a resampler's width is a multiple of {HEAD_WIDTH}, a head's width; got {width}.")
    shapes = {"latents": (1, tokens, width), "proj_in.weight": (width, feature_width)}
    shapes |= {"proj_out.weight": (cross_dim, width), "layers.0.1.1.weight": (4 * width, width)}
    shapes |= {f"layers.{i}.0.to_q.weight": (width, width) for i in range(depth)}
    return new_projection("resampler", shapes)


def new_projection(variant: str, shapes: Shapes) -> dict[str, Tensor]:
    """Random weights of a variant's projection; ``shapes`` are those that :func:`sizes_of` reads."""
    module = skeleton(VARIANTS[variant], shapes).to_empty(device="cpu")
    module.reset_parameters()
    return dict(module.state_dict())
