"""Combine the features of several pictures into one prompt: concatenate, average, interpolate, and so on.

Works on features, before the projection. The formulas are those of ComfyUI_IPAdapter_plus, with two
differences: ``average`` divides by the sum of the weights instead of their number (the same for equal
weights), and in ``concat`` a weight is the picture's share of attention: weight 2 equals giving the picture
twice, weight 0 leaves it out. Scaling the features would do almost nothing there, since the projection ends
in a LayerNorm.

Dimensions: N pictures; the rest (E, or P W) are the dimensions of one picture's features.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.errors import InputError, UsageError
from imprompt.schema.options import COMBINES, canonical, read_weights

Rule: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(features "N …", weights "N 1 …") → features "1 …"."""


def _average(x: Tensor, w: Tensor) -> Tensor:
    return (w * x).sum(0, keepdim=True) / w.sum()


def _subtract(x: Tensor, w: Tensor) -> Tensor:
    weighted = w * x
    return weighted[:1] - weighted[1:].mean(0, keepdim=True)


def _norm_average(x: Tensor, w: Tensor) -> Tensor:
    # As published, the norm runs over the pictures, separately for each component. Components that are 0 in
    # all pictures stay 0.
    weighted = w * x
    norm = weighted.norm(dim=0, keepdim=True)
    return torch.where(norm > 0, weighted / norm.clamp_min(torch.finfo(x.dtype).tiny), 0).mean(
        0, keepdim=True
    )


def _slerp(x: Tensor, w: Tensor) -> Tensor:
    first, second = w.flatten().tolist()
    return slerp(x[:1], x[1:], second / (first + second))


_RULES: dict[str, Rule] = {
    "add": lambda x, w: (w * x).sum(0, keepdim=True),
    "subtract": _subtract,
    "average": _average,
    "norm-average": _norm_average,
    "max": lambda x, w: (w * x).amax(0, keepdim=True),
    "min": lambda x, w: (w * x).amin(0, keepdim=True),
    "slerp": _slerp,
}


def combine(
    features: Float[Tensor, "N ..."], rule: str = "concat", weights: Sequence[float] | None = None
) -> Float[Tensor, "M ..."]:
    """Combine the features of ``N`` pictures by one of :data:`imprompt.schema.options.COMBINES`.

    ``concat`` leaves out pictures of weight 0; other weights act in the attention (:func:`log_weight_bias`).

    ``add``: Σwᵢeᵢ; ``subtract``: w₀e₀ minus the mean of the other wᵢeᵢ; ``average``: Σwᵢeᵢ/Σwᵢ;
    ``norm-average``: mean of wᵢeᵢ/‖we‖ with the norm across pictures; ``max``, ``min`` of wᵢeᵢ; ``slerp`` of
    two pictures at w₁/(w₀+w₁). Computed in float32 or finer. Raises :class:`UsageError` for an unknown rule,
    or weights or a number of pictures that the rule does not take, :class:`InputError` for NaN.
    """
    name = canonical("combine", rule, COMBINES)
    count = features.shape[0]
    given = read_weights(name, count, weights)
    if not bool(torch.isfinite(features).all()):
        raise InputError(
            "image features contain NaN or infinite values; encode them again with sound weights."
        )
    if name == "concat":
        kept = [i for i, weight in enumerate(given) if weight > 0]
        return features if len(kept) == count else features[kept]
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    weight = exact.new_tensor(given).reshape(-1, *[1] * (features.ndim - 1))
    return _RULES[name](exact, weight).to(features.dtype)


def log_weight_bias(weights: Sequence[float], tokens: int) -> Float[Tensor, " T"] | None:
    """Bias for the attention logits of concatenated pictures of ``tokens`` tokens each: log wᵢ.

    A softmax in which a key occurs w times equals one with log w added to its logit. Pictures of weight 0 are
    skipped, as in :func:`combine`. ``None`` if all weights are equal, where the bias has no effect.
    """
    kept = [weight for weight in weights if weight > 0]
    if len(set(kept)) <= 1:
        return None
    return torch.tensor([math.log(weight) for weight in kept]).repeat_interleave(tokens)


def slerp(a: Float[Tensor, "..."], b: Float[Tensor, "..."], t: float) -> Float[Tensor, "..."]:
    """Spherical interpolation from ``a`` (``t`` = 0) to ``b`` (``t`` = 1), over the last dimension.

    Directions are interpolated on the great circle (Shoemake 1985), lengths linearly. Vectors less than 0.001
    radians apart are interpolated linearly. Raises :class:`InputError` for different shapes and for opposite
    vectors, :class:`UsageError` for ``t`` outside 0 to 1.
    """
    if not 0 <= t <= 1:
        raise UsageError(f"slerp: t is {t}; a number from 0 (the first) to 1 (the second) is expected.")
    if a.shape != b.shape:
        raise InputError(
            f"slerp: shapes {tuple(a.shape)} and {tuple(b.shape)} differ; give features of one shape."
        )
    x, y = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (a, b))
    long_x, long_y = (v.norm(dim=-1, keepdim=True) for v in (x, y))
    tiny = torch.finfo(x.dtype).tiny
    unit_x, unit_y = x / long_x.clamp_min(tiny), y / long_y.clamp_min(tiny)
    # The angle from both chord lengths is exact near 0 and π, where arccos of the product is not.
    angle = 2 * torch.atan2(
        (unit_x - unit_y).norm(dim=-1, keepdim=True), (unit_x + unit_y).norm(dim=-1, keepdim=True)
    )
    angle = torch.where((long_x > 0) & (long_y > 0), angle, 0)
    if bool((angle > math.pi - 1e-3).any()):
        raise InputError("slerp: the two features point in opposite directions; use average instead.")
    near = angle < 1e-3
    sine = torch.where(near, 1, angle.sin())
    turned = (((1 - t) * angle).sin() * unit_x + (t * angle).sin() * unit_y) / sine
    curved = turned * ((1 - t) * long_x + t * long_y)
    return torch.where(near, (1 - t) * x + t * y, curved).to(a.dtype)
