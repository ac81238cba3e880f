"""Weights in the order in which oneDNN reads them, for layers that run on a CPU.

oneDNN's kernels read weights in an order of their own. PyTorch keeps them as they were loaded and brings
them into that order in each call of a layer; on small pictures that takes as long as the product itself.
:func:`pack` makes the layers of a model remember it, for a second copy of their weights. The numbers are
PyTorch's own to rounding. Calls with gradients, under autocast or torch.compile are left to PyTorch.

Packed convolutions have their channels last, where PyTorch's group normalization of few channels is slow in
bfloat16: it is done in float32 instead. Of diffusers' blocks, a gated feed-forward layer (GEGLU) takes its
activation and product along in its two linear layers, and a residual block writes its sums in place and
divides nothing by one.

Dimensions: B batch rows, C and E channels in and out, h and w sides, K side of a kernel.
"""

import contextlib
import math
import platform
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.weights import times_written

Layer: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
"""A layer with its weight inside: of the states and the bias."""


_FEW = 8
"""Channels of a group up to which float32 takes a third of the time: 0.1 for 0.6 ms at ``2 128 16 16`` in 32
groups. From 10 on bfloat16 is as fast or faster."""


def pack(model: nn.Module) -> None:
    """Let the convolutions and linear layers of ``model`` remember their weights in oneDNN's order.

    A weight is ordered at the first call of its layer, and again for states of another shape or after it has
    changed (but a write through ``.data`` is not seen). Convolutions come first, and layers whose copies
    would exceed :func:`budget` stay as they are; so does a model on a GPU, or on a processor on which this
    does not work or was not measured.
    """
    layers: list[Any] = [layer for layer in model.modules() if type(layer) in _KINDS and _packable(layer)]
    left, paid = budget(), set[Tensor]()
    for layer in sorted(layers, key=lambda layer: list(_KINDS).index(type(layer))):
        if (weight := _kept(layer)) is not None:
            if weight not in paid and weight.nbytes > left:
                continue
            left -= 0 if weight in paid else weight.nbytes
            paid.add(weight)
            layer.packed = Packed()
        layer.__class__ = _KINDS[type(layer)]


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


class Packed:
    """What a layer remembers of its weight. Copies of the layer remember nothing."""

    def __init__(self) -> None:
        self._of: tuple[object, ...] = ()
        self._run: Layer | None = None

    def __deepcopy__(self, _: object) -> "Packed":
        return Packed()

    def __reduce__(self) -> tuple[type["Packed"], tuple[()]]:
        return Packed, ()

    def layer(self, states: Tensor, weight: Tensor, make: Callable[..., Layer]) -> Layer | None:
        """The layer for these states, by ``make(weight, shape=…)`` if there is none yet; ``None`` where
        PyTorch's own is to run."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or states.dtype != weight.dtype:
            return None
        of = weight.data_ptr(), times_written(weight), weight.dtype, states.shape
        if self._of != of:
            usable = weight.device.type == "cpu" and works(weight.dtype)
            self._run, self._of = make(weight, shape=states.shape) if usable else None, of
        return self._run


class PackedConv2d(nn.Conv2d):
    """A convolution that remembers its weight in oneDNN's order."""

    packed: Packed

    def forward(self, input: Tensor) -> Tensor:
        make = partial(convolution, stride=self.stride, padding=self.padding)  # type: ignore[arg-type]
        run = self.packed.layer(input, self.weight, make) if input.dim() == 4 else None
        return super().forward(input) if run is None else run(input, self.bias)


class PackedLinear(nn.Linear):
    """A linear layer that remembers its weight in oneDNN's order."""

    packed: Packed

    def forward(self, input: Tensor) -> Tensor:
        run = self.packed.layer(input, self.weight, linear)
        return super().forward(input) if run is None else run(input, self.bias)


class PackedGEGLU(GEGLU):
    """A gated linear layer that remembers both halves of its weight in oneDNN's order."""

    packed: Packed

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = None
        if not (args or kwargs) and is_plain(self.proj):
            run = self.packed.layer(hidden_states, self.proj.weight, gated)
        if run is None:
            return super().forward(hidden_states, *args, **kwargs)
        return run(hidden_states, self.proj.bias)


class PackedResnetBlock(ResnetBlock2D):
    """A residual block of the usual kind that writes its sums in place."""

    def forward(self, input_tensor: Tensor, temb: Any, *args: Any, **kwargs: Any) -> Tensor:
        busy = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        odd = args or kwargs or (temb is None) != (self.time_emb_proj is None)
        if busy or odd or any(part._forward_hooks for part in self.children()):
            return super().forward(input_tensor, temb, *args, **kwargs)
        states = self.conv1(F.silu(self.norm1(input_tensor), inplace=True))
        if temb is not None:
            states += self.time_emb_proj(F.silu(temb))[:, :, None, None]
        states = self.conv2(F.silu(self.norm2(states), inplace=True))
        states += input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return states


class PackedGroupNorm(nn.GroupNorm):
    """A group normalization that goes by way of float32 where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        plain = (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or not few_channels(input, self.num_groups)
        )
        run = nn.functional.group_norm if plain else norm_in_float32
        return run(input, self.num_groups, self.weight, self.bias, self.eps)


def few_channels(states: Tensor, groups: int) -> bool:
    """Whether PyTorch's group normalization of these states is slow."""
    last = states.dtype == torch.bfloat16 and states.dim() == 4 and states.stride(1) == 1
    return last and states.shape[1] <= _FEW * groups


def norm_in_float32(
    states: Float[Tensor, "B C h w"], groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Float[Tensor, "B C h w"]:
    """A group normalization of states in any dtype, by way of float32."""
    weight, bias = (None if own is None else own.float() for own in (weight, bias))
    return nn.functional.group_norm(states.float(), groups, weight, bias, eps).to(states.dtype)


_KINDS: dict[type[Any], type[Any]] = {
    nn.GroupNorm: PackedGroupNorm,
    ResnetBlock2D: PackedResnetBlock,
    nn.Conv2d: PackedConv2d,
    GEGLU: PackedGEGLU,
    nn.Linear: PackedLinear,
}
"""In the order in which they are packed."""


def is_plain(layer: Any) -> bool:
    """Whether a layer is PyTorch's own linear one, packed or not, and nothing but its weights decides what it
    computes."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) in (nn.Linear, PackedLinear) and not hooked and not layer.weight.is_meta


def _kept(layer: Any) -> Tensor | None:
    """The weight of which a packed layer keeps a copy."""
    if isinstance(layer, nn.GroupNorm | ResnetBlock2D):
        return None
    weight: Tensor = layer.proj.weight if isinstance(layer, GEGLU) else layer.weight
    return weight


def _packable(layer: Any) -> bool:
    if isinstance(layer, GEGLU):
        return type(layer.proj) is nn.Linear and _ordered(layer.proj.weight)
    if isinstance(layer, ResnetBlock2D):
        return _usual(layer) and _ordered(layer.conv1.weight)
    if not _ordered(layer.weight):
        return False
    if isinstance(layer, nn.GroupNorm | nn.Linear):  # in float32 MKL's products are as fast
        return bool(layer.weight.dtype == torch.bfloat16)
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return plain and not isinstance(layer.padding, str)


def _ordered(weight: Any) -> bool:
    """Whether oneDNN has an order for a weight: it is neither quantized nor on a GPU."""
    if type(weight) is not nn.Parameter or weight.device.type != "cpu":
        return False
    return weight.dtype in (torch.float32, torch.bfloat16) and works(weight.dtype)


def _usual(block: Any) -> bool:
    """Whether a residual block is of the kind that :class:`PackedResnetBlock` computes."""
    resized = block.upsample is not None or block.downsample is not None
    adds = block.time_embedding_norm == "default" and not block.skip_time_act
    return not resized and adds and block.output_scale_factor == 1 and type(block.nonlinearity) is nn.SiLU
