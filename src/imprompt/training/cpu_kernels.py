"""Faster kernels for training in half precision on a CPU, for three things on which PyTorch's are slow there.

* **Attention over short sequences.** The fused kernel takes 0.3 ms for each head of each picture in its
  backward pass, however short the sequences are: two fifths of a training step of the bundled base. Plain
  products take a tenth of that, and half of its time where a long sequence reads a text or an image prompt.
  They keep ``B·H·L·T`` numbers for the backward pass.
* **Convolutions with frozen weights.** They are kept in oneDNN's order, for the backward pass as well, where
  the gradient of the input is the convolution of the output's with the weights transposed and mirrored. At
  8x8 and 16x16 pixels they take a third of the time, for two more copies of the weights (as far as
  :func:`~imprompt.onednn.budget` allows).
* **Group normalization** of few channels with the channels last, by way of float32.

Dimensions: B batch rows, H heads, L queries, T keys, D head width; C, E channels, K side of a kernel.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from imprompt.onednn import Layer, budget, convolution, works
from imprompt.packed import few_channels, norm_in_float32

_MOST_KEYS, _MOST_SCORES = 128, 1024 * 512
"""Keys, or queries times keys, up to which plain products are faster."""


class CPUKernels(TorchFunctionMode):
    """While entered, operations under autograd for which there is a faster form take it.

    The optimizer must not train the convolutions' weights meanwhile: those that require a gradient keep
    PyTorch's form, and so does whatever else is not known here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept = WeakTensorKeyDictionary()
        self._left = budget()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if torch.is_grad_enabled():
            if func is F.scaled_dot_product_attention and _is_short(args, options):
                query, key, value = args
                return attention(query, key, value, options.get("attn_mask"))
            if func is F.group_norm and len(args) == 2 and few_channels(*args):  # the rest are named
                return norm_in_float32(*args, **options)
            if func is F.conv2d and not options and _is_frozen(args):
                states, weight, bias, _, padding, *_ = args
                if (kept := self._keep(weight, padding)) is not None:
                    return _Convolution.apply(states.to(weight.dtype), kept, bias)
        return func(*args, **options)

    def _keep(self, weight: Tensor, padding: tuple[int, int]) -> "_Kept | None":
        """What is kept of a weight; ``None`` if there is no room for it."""
        kept: _Kept | None = self._kept.get(weight)
        if kept is not None and kept.version == weight._version:
            return kept
        if kept is None:
            if 2 * weight.nbytes > self._left:
                return None
            self._left -= 2 * weight.nbytes
        kept = self._kept[weight] = _Kept(weight, padding)
        return kept


def attention(
    query: Float[Tensor, "B H L D"],
    key: Float[Tensor, "B H T D"],
    value: Float[Tensor, "B H T D"],
    bias: Tensor | None = None,
) -> Float[Tensor, "B H L D"]:
    """``softmax(q·kᵀ/√D + bias)·v``."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    return (scores if bias is None else scores + bias).softmax(-1) @ value


def _is_short(args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether this attention is known, and faster as products."""
    if len(args) != 3 or any(value for name, value in options.items() if name != "attn_mask"):
        return False
    bias = options.get("attn_mask")
    queries, keys = args[0].shape[-2], args[1].shape[-2]
    known = bias is None or bias.is_floating_point()
    return bool(known and (keys <= _MOST_KEYS or queries * keys <= _MOST_SCORES))


def _is_frozen(args: Sequence[Any]) -> bool:
    """Whether these arguments of ``conv2d`` (all seven, as ``nn.Conv2d`` gives them) are of a convolution
    that :class:`_Kept` knows: in half precision, of stride 1, nothing of it trained."""
    if len(args) != 7 or isinstance(args[4], str):
        return False
    states, weight, bias, stride, padding, dilation, groups = args
    sides = {*weight.shape[-2:]}
    plain = (
        {*stride, *dilation, groups} == {1} and len({*padding}) == len(sides) == 1 and padding[0] < max(sides)
    )
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    half = weight.dtype == torch.bfloat16 and weight.dtype in (states.dtype, autocast)
    return bool(plain and frozen and half and works(weight.dtype))


class _Kept:
    """A frozen weight ``E C K K`` in oneDNN's order, for both passes of states of the last shape."""

    def __init__(self, weight: Tensor, padding: tuple[int, int]) -> None:
        self.version, self.weight, self.padding = weight._version, weight.detach(), padding
        self._layers: dict[bool, tuple[torch.Size, Layer]] = {}

    def forward(self, states: Tensor, bias: Tensor | None) -> Tensor:
        return self._layer(states, back=False)(states, bias)

    def backward(self, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        return self._layer(gradient, back=True)(gradient, None)

    def _layer(self, states: Tensor, *, back: bool) -> Layer:
        shape, layer = self._layers.get(back, (None, None))
        if layer is None or shape != states.shape:
            weight, padding = self.weight, self.padding
            if back:
                weight = weight.flip(2, 3).transpose(0, 1)
                padding = (weight.shape[2] - 1 - padding[0], weight.shape[3] - 1 - padding[1])
            layer = convolution(weight, (1, 1), padding, states.shape)
            self._layers[back] = states.shape, layer
        return layer


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, kept: _Kept, bias: Tensor | None) -> Tensor:
        ctx.kept = kept
        return kept.forward(states, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.kept.backward(gradient), None, None
