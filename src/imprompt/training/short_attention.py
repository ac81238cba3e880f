"""Attention over short sequences as plain products, for training in half precision on a CPU.

PyTorch's fused kernel takes 0.3 ms for each head of each picture in its backward pass there, however short
the sequences are: two fifths of a training step of the bundled base. Plain products take a tenth of that, and
half of its time where a long sequence reads a text or an image prompt. They keep ``B·H·L·T`` numbers for the
backward pass.

Dimensions: B batch rows, H heads, L queries, T keys, D head width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MOST_KEYS, _MOST_SCORES = 128, 1024 * 512
"""Keys, or queries times keys, up to which they are faster."""


class ShortAttention(TorchFunctionMode):
    """While entered, ``scaled_dot_product_attention`` of short sequences under autograd is two products."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and torch.is_grad_enabled() and len(args) == 3:
            query, key, value = args
            bias = options.pop("attn_mask", None)
            known = not any(options.values()) and (bias is None or bias.is_floating_point())
            queries, keys = query.shape[-2], key.shape[-2]
            if known and (keys <= _MOST_KEYS or queries * keys <= _MOST_SCORES):
                return attention(query, key, value, bias)
        return func(*args, **(kwargs or {}))


def attention(
    query: Float[Tensor, "B H L D"],
    key: Float[Tensor, "B H T D"],
    value: Float[Tensor, "B H T D"],
    bias: Tensor | None = None,
) -> Float[Tensor, "B H L D"]:
    """``softmax(q·kᵀ/√D + bias)·v``."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    return (scores if bias is None else scores + bias).softmax(-1) @ value
