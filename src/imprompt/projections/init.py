"""New projections for training: random weights under the published names."""

from torch import Tensor, nn

from imprompt.catalog.published import VARIANTS
from imprompt.errors import UsageError
from imprompt.projections.modules import HEAD_WIDTH, skeleton


def fresh_linear(feature_width: int, tokens: int, cross_dim: int) -> dict[str, Tensor]:
    """One linear layer on the pooled embedding, as the base variant's."""
    return _initialised(
        "linear", {"proj.weight": (tokens * cross_dim, feature_width), "norm.weight": (cross_dim,)}
    )


def fresh_resampler(
    feature_width: int, tokens: int, cross_dim: int, width: int, depth: int
) -> dict[str, Tensor]:
    """A perceiver resampler on the hidden states, as the plus variant's. Raises :class:`UsageError`."""
    if width % HEAD_WIDTH:
        raise UsageError(f"a resampler's width is a multiple of {HEAD_WIDTH}, a head's width; got {width}.")
    shapes = {"latents": (1, tokens, width), "proj_in.weight": (width, feature_width)}
    shapes |= {"proj_out.weight": (cross_dim, width), "layers.0.1.1.weight": (4 * width, width)}
    shapes |= {f"layers.{i}.0.to_q.weight": (width, width) for i in range(depth)}
    return _initialised("resampler", shapes)


def _initialised(variant: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random weights of a projection: torch's for each layer, the reference's for a resampler's queries."""
    module = skeleton(VARIANTS[variant], shapes).to_empty(device="cpu")
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.LayerNorm):
            part.reset_parameters()
    weights = dict(module.state_dict())
    if "latents" in weights:
        nn.init.normal_(weights["latents"], std=weights["latents"].shape[-1] ** -0.5)
    return weights
