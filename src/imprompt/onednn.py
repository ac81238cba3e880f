"""Layers whose weights lie in the order in which oneDNN reads them, on CPUs.

oneDNN's kernels read weights in an order of their own. PyTorch keeps them as they were loaded and brings
them into that order in each call of a layer; on small pictures that takes as long as the product itself. The
operators used here are those that torch.compile writes, and not among PyTorch's public ones.

Dimensions: B batch rows, C and E channels in and out, h and w sides, K side of a kernel.
"""

import contextlib
import math
import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

import psutil
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Layer: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
"""A layer with its weight inside: of the states and the bias."""


def convolution(
    weight: Float[Tensor, "E C K K"], stride: tuple[int, ...], padding: tuple[int, ...], shape: Sequence[int]
) -> Layer:
    """A convolution ``B C h w -> B E h w``, in one group, with its weight in oneDNN's order for states of
    this ``shape``. For others it may be a hundred times slower. Raises :class:`RuntimeError` where the dtype
    does not :func:`work <works>`."""
    how = list(padding), list(stride), [1, 1], 1
    weight = weight.detach().contiguous()
    ordered = torch.ops.mkldnn._reorder_convolution_weight(weight, *how, list(shape))

    def run(states: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(states, ordered, bias, *how, "none", [], "")

    return run


def linear(weight: Float[Tensor, "E C"], shape: Sequence[int]) -> Layer:
    """A linear layer ``... C -> ... E`` with its weight in oneDNN's order for states of this ``shape``.
    Raises as :func:`convolution`."""
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), math.prod(shape[:-1]))

    def run(states: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(states, ordered, bias, "none", [], "")

    return run


def gated(weight: Float[Tensor, "two_E C"], shape: Sequence[int]) -> Layer:
    """``value · gelu(gate)`` of a linear layer ``... C -> ... 2·E`` that gives both, value first, with its
    weight in oneDNN's order for states of this ``shape``. Raises as :func:`convolution`."""
    rows = math.prod(shape[:-1])
    value, gate = (
        torch.ops.mkldnn._reorder_linear_weight(half.contiguous(), rows) for half in weight.detach().chunk(2)
    )

    def run(states: Tensor, bias: Tensor | None) -> Tensor:
        of_value, of_gate = (None, None) if bias is None else bias.chunk(2)
        factor = torch.ops.mkldnn._linear_pointwise(states, gate, of_gate, "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(states, factor, value, of_value, "mul")

    return run


def doubled(weight: Float[Tensor, "E C 3 3"], shape: Sequence[int]) -> Layer:
    """Nearest-neighbour doubling ``B C h w -> B C 2·h 2·w`` and a 3x3 convolution with a margin of one, which
    gives ``B E 2·h 2·w``, for states of this ``shape``. Raises as :func:`convolution`.

    Of the nine pixels that a kernel reads of the doubled states only four differ: its weights are added up
    by those, for each of the four places that an output pixel can have in its doubled one. That is 4/9 of
    the products.
    """
    batch, channels, height, width = shape
    sums = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # first or second, near, tap
    places = [(row, column) for row in range(2) for column in range(2)]
    runs = []
    for row, column in places:
        part = torch.einsum("ij, kl, ECjl -> ECik", sums[row], sums[column], weight.detach())
        runs.append(convolution(part, (1, 1), (0, 0), (batch, channels, height + 1, width + 1)))

    def run(states: Tensor, bias: Tensor | None) -> Tensor:
        framed = F.pad(states, (1, 1, 1, 1))
        size = batch, len(weight), 2 * height, 2 * width
        out = torch.empty(size, dtype=states.dtype, memory_format=torch.channels_last)
        for (row, column), convolve in zip(places, runs, strict=True):
            read = framed[:, :, row : row + height + 1, column : column + width + 1]
            read = read.contiguous(memory_format=torch.channels_last)
            out[:, :, row::2, column::2] = convolve(read, bias)
        return out

    return run


@cache
def works(dtype: torch.dtype) -> bool:
    """Whether this processor and this PyTorch have the kernels, which are not among PyTorch's public ones."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    try:
        states, rows = torch.zeros(1, 16, 8, 8, dtype=dtype), torch.zeros(1, 16, dtype=dtype)
        weight = torch.zeros(16, 16, 3, 3, dtype=dtype)
        convolution(weight, (1, 1), (1, 1), states.shape)(states, None)
        linear(weight[..., 0, 0], rows.shape)(rows, None)
        gated(weight[..., 0, 0], rows.shape)(rows, None)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return True


@cache
def budget() -> int:
    """The most bytes that copies of a model's weights may take: an eighth of the memory of the machine, or of
    its container. What is free at the moment has no say, for a request has the same pixels each time."""
    whole = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        whole = min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return whole // 8
