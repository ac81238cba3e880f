"""Faster layers for drawing on a CPU, put in the place of PyTorch's and diffusers' by :func:`pack`.

* Convolutions, and linear layers in bfloat16, remember their weights in oneDNN's order
  (:mod:`~imprompt.onednn`), for a second copy of them. A gated feed-forward layer (GEGLU) takes its
  activation and product along in its two linear layers; a doubling of the sides is part of the convolution
  behind it.
* Rows that are views of one row are computed once. With classifier-free guidance a UNet is shown a picture
  once a prompt, so all its rows are equal up to the first cross-attention.
* Residual blocks write their sums in place, nothing is divided by one, and pictures keep their channels last
  behind a transformer.
* PyTorch's group normalization of few channels is slow in bfloat16 with the channels last: it is done in
  float32 instead.

The numbers are PyTorch's own to rounding. Calls with gradients, under autocast or torch.compile are left to
PyTorch.

Dimensions: B batch rows, C channels, h and w sides.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.onednn import Layer, budget, convolution, doubled, gated, linear, works
from imprompt.weights import times_written

_FEW = 8
"""Channels of a group up to which float32 takes a third of the time: 0.1 for 0.6 ms at ``2 128 16 16`` in 32
groups. From 10 on bfloat16 is as fast or faster."""


def pack(model: nn.Module) -> None:
    """Replace the layers of ``model`` for which there is a faster form.

    A weight is ordered at the first call of its layer, and again for states of another shape or after it has
    changed (but a write through ``.data`` is not seen). Layers whose copies would exceed
    :func:`~imprompt.onednn.budget` stay as they are, linear ones first; so does a model on a GPU, or on a
    processor on which this does not work or was not measured.
    """
    layers: list[Any] = [
        layer for layer in model.modules() if type(layer) in _KINDS and _KINDS[type(layer)][1](layer)
    ]
    left, paid = budget(), set[Tensor]()
    for layer in sorted(layers, key=lambda layer: list(_KINDS).index(type(layer))):
        if (kept := _kept(layer)) is not None:
            weight, size = kept
            if weight not in paid and size > left:
                continue
            left -= 0 if weight in paid else size
            paid.add(weight)
            layer.packed = Packed()
        layer.__class__ = _KINDS[type(layer)][0]
    if isinstance(model, UNet2DConditionModel) and _reads_early(model):
        model.conv_in.__class__ = PackedFirstConv2d


def is_plain(layer: Any) -> bool:
    """Whether a layer is PyTorch's own linear one, packed or not, and nothing but its weights decides what it
    computes."""
    return type(layer) in (nn.Linear, PackedLinear) and _unhooked(layer)


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
        if _is_watched() or states.dtype != weight.dtype:
            return None
        of = weight.data_ptr(), times_written(weight), weight.dtype, states.shape
        if self._of != of:
            usable = weight.device.type == "cpu" and works(weight.dtype)
            self._run, self._of = make(weight, shape=states.shape) if usable else None, of
        return self._run


class PackedConv2d(nn.Conv2d):
    """A convolution that remembers its weight in oneDNN's order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As PyTorch's: peft makes the layers of a LoRA of the class of the layer to which they are added."""
        super().__init__(*args, **kwargs)
        self.packed = Packed()

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 4 and is_one_row(input):
            return repeated(self.forward(input[:1]), input)
        make = partial(convolution, stride=self.stride, padding=self.padding)  # type: ignore[arg-type]
        run = self.packed.layer(input, self.weight, make) if input.dim() == 4 else None
        return super().forward(input) if run is None else run(input, self.bias)


class PackedFirstConv2d(PackedConv2d):
    """The first convolution of a UNet, which notices when its rows are equal."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(merged(input))


class PackedTimestepEmbedding(TimestepEmbedding):
    """The embedding of a timestep, computed once for all rows that have the same."""

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None or not is_one_row(row := merged(sample)):
            return super().forward(sample, condition)
        return repeated(super().forward(row[:1]), sample)


class PackedLinear(nn.Linear):
    """A linear layer that remembers its weight in oneDNN's order."""

    packed: Packed

    def forward(self, input: Tensor) -> Tensor:
        if is_one_row(input):
            return repeated(self.forward(input[:1]), input)
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


class PackedUpsample(Upsample2D):
    """A doubling of the sides and a convolution in one."""

    packed: Packed

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        run, conv = None, cast(Any, self.conv)
        plain = type(conv) in (nn.Conv2d, PackedConv2d) and _unhooked(conv)
        if plain and not (output_size or args or kwargs):
            run = self.packed.layer(hidden_states, conv.weight, doubled)
        if run is None:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return run(hidden_states, conv.bias)


class PackedResnetBlock(ResnetBlock2D):
    """A residual block of the usual kind that writes its sums in place."""

    def forward(self, input_tensor: Tensor, temb: Any, *args: Any, **kwargs: Any) -> Tensor:
        odd = args or kwargs or (temb is None) != (self.time_emb_proj is None)
        if odd or _is_watched(self):
            return super().forward(input_tensor, temb, *args, **kwargs)
        if temb is not None and is_one_row(temb):
            temb = temb[:1]
        if is_one_row(input_tensor) and (temb is None or len(temb) == 1):
            return repeated(self._added(input_tensor[:1], temb), input_tensor)
        return self._added(input_tensor, temb)

    def _added(self, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        states = self.conv1(F.silu(self.norm1(input_tensor), inplace=True))
        if temb is not None:
            states += self.time_emb_proj(F.silu(temb))[:, :, None, None]
        states = self.conv2(F.silu(self.norm2(states), inplace=True))
        states += input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return states


class PackedTransformer(Transformer2DModel):
    """Transformer blocks over a picture, which keeps its channels last behind them."""

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        shape = batch_size, height, width, inner_dim
        if _is_watched(self):
            return super()._get_output_for_continuous_inputs(hidden_states, residual, *shape)
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        states = hidden_states.reshape(shape).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            states = self.proj_out(states)
        states += residual
        return states


class PackedAttention(Attention):
    """Attention of the plain kind, without what only other kinds need."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        processor: Any = self.processor
        odd = kwargs or attention_mask is not None or type(processor) is not AttnProcessor2_0
        if odd or _is_watched(self):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if encoder_hidden_states is None and is_one_row(hidden_states):
            return repeated(self.forward(hidden_states[:1]), hidden_states)
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            project(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, states in ((self.to_q, hidden_states), (self.to_k, read), (self.to_v, read))
        )
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.to_out[0](out)


class PackedLayerNorm(nn.LayerNorm):
    """A layer normalization that computes rows that are one row once."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() > len(self.normalized_shape) and is_one_row(input):
            return repeated(super().forward(input[:1]), input)
        return super().forward(input)


class PackedGroupNorm(nn.GroupNorm):
    """A group normalization that goes by way of float32 where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        if is_one_row(input):
            return repeated(self.forward(input[:1]), input)
        plain = _is_watched() or not few_channels(input, self.num_groups)
        run = nn.functional.group_norm if plain else norm_in_float32
        return run(input, self.num_groups, self.weight, self.bias, self.eps)


def is_one_row(states: Tensor) -> bool:
    """Whether the rows ``B …`` of ``states`` are more than one, and all views of one."""
    return states.dim() > 1 and states.stride(0) == 0 and len(states) > 1


def repeated(row: Float[Tensor, "1 ..."], states: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    """The row that came of one of ``states``, as a view for each of them."""
    return row.expand(len(states), *row.shape[1:])


def merged(states: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    """``states``, as views of their first row if all rows are equal."""
    several = len(states) > 1 and states.device.type == "cpu"
    if not several or _is_watched() or not torch.equal(states[1:], states[:-1]):
        return states
    return repeated(states[:1], states)


def _is_watched(block: nn.Module | None = None) -> bool:
    """Whether autograd or torch.compile follows what is computed, or a hook what the layers of a block give,
    or the block is being trained."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return True
    return block is not None and (block.training or any(part._forward_hooks for part in block.children()))


def _unhooked(layer: Any) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return not hooked and not layer.weight.is_meta


def _ordered(weight: Any) -> bool:
    """Whether oneDNN has an order for a weight: it is neither quantized nor on a GPU."""
    if type(weight) is not nn.Parameter or weight.device.type != "cpu":
        return False
    return weight.dtype in (torch.float32, torch.bfloat16) and works(weight.dtype)


def _is_half(layer: Any) -> bool:  # in float32 MKL's products are as fast
    return _ordered(layer.weight) and layer.weight.dtype == torch.bfloat16


def _is_convolution(layer: Any) -> bool:
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return plain and not isinstance(layer.padding, str) and _ordered(layer.weight)


def _adds_time(block: Any) -> bool:
    """Whether a residual block is of the kind that :class:`PackedResnetBlock` computes."""
    resized = block.upsample is not None or block.downsample is not None
    adds = block.time_embedding_norm == "default" and not block.skip_time_act
    usual = not resized and adds and block.output_scale_factor == 1 and type(block.nonlinearity) is nn.SiLU
    return usual and _ordered(block.conv1.weight)


def _doubles(layer: Any) -> bool:
    """Whether a doubling is of the kind that :class:`PackedUpsample` computes; measured in float32 only."""
    conv = layer.conv if layer.name == "conv" and layer.use_conv else None
    if type(conv) is not nn.Conv2d or layer.use_conv_transpose or layer.norm or not layer.interpolate:
        return False
    usual = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding == (1, 1)
    return usual and _is_convolution(conv) and conv.weight.dtype == torch.float32


def _attends(layer: Any) -> bool:
    """Whether an attention has nothing but its projections."""
    norms = (layer.spatial_norm, layer.group_norm, layer.norm_q, layer.norm_k, layer.norm_cross)
    added = layer.residual_connection or layer.rescale_output_factor != 1 or layer.fused_projections
    return not any(norms) and not added and layer.to_v is not None and _ordered(layer.to_q.weight)


def _reads_early(unet: Any) -> bool:
    """Whether a UNet has a cross-attention in its first block. Elsewhere a T2I-Adapter's features are written
    into the rows, which therefore may not be views of one."""
    return type(unet.conv_in) is PackedConv2d and hasattr(unet.down_blocks[0], "attentions")


_KINDS: dict[type[Any], tuple[type[Any], Callable[[Any], bool]]] = {
    nn.GroupNorm: (PackedGroupNorm, lambda layer: _ordered(layer.weight)),
    nn.LayerNorm: (PackedLayerNorm, lambda layer: _ordered(layer.weight)),
    TimestepEmbedding: (PackedTimestepEmbedding, lambda layer: _ordered(layer.linear_1.weight)),
    Transformer2DModel: (PackedTransformer, lambda layer: _ordered(layer.proj_out.weight)),
    Attention: (PackedAttention, _attends),
    ResnetBlock2D: (PackedResnetBlock, _adds_time),
    Upsample2D: (PackedUpsample, _doubles),
    nn.Conv2d: (PackedConv2d, _is_convolution),
    GEGLU: (PackedGEGLU, lambda layer: type(layer.proj) is nn.Linear and _ordered(layer.proj.weight)),
    nn.Linear: (PackedLinear, _is_half),
}
"""What a layer becomes, and whether it may; in the order in which they are packed."""


def _kept(layer: Any) -> tuple[Tensor, int] | None:
    """The weight of which a packed layer keeps a copy, and the bytes of the copy."""
    if isinstance(layer, Upsample2D):
        weight: Any = layer.conv and layer.conv.weight
        return weight, 16 * weight.nbytes // 9
    if isinstance(layer, GEGLU):
        return layer.proj.weight, layer.proj.weight.nbytes
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return layer.weight, layer.weight.nbytes
    return None
