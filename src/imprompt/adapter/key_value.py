"""The key and value layers of an adapter at one site, under their published names.

:class:`KeyValue` is two linear layers, with biases if the file has them (FLUX, XLabs).
:class:`NormedKeyValue` adds a norm of the keys without weights (FLUX, InstantX); :class:`TimedKeyValue`
modulates tokens by the timestep and has norms of its own (SD3.5, InstantX).

Dimensions: S token sequences, T tokens, C token width, W site width, H heads, D head width, E time width.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapter.attention import JointNorms, split_heads


class KeyValue(nn.Module):
    """``to_k_ip`` and ``to_v_ip`` of one site."""

    def __init__(self, to_k_ip: nn.Linear, to_v_ip: nn.Linear) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = to_k_ip, to_v_ip

    def forward(
        self,
        tokens: Float[Tensor, "S T C"],
        heads: int,
        dtype: torch.dtype,
        temb: Float[Tensor, "1 E"] | None = None,
    ) -> tuple[Float[Tensor, "S H T D"], Float[Tensor, "S H T D"]]:
        """Keys and values on the tokens' device, in the finer of the weights' dtype and ``dtype``."""
        dtype = precise(self.to_k_ip.weight.dtype, dtype)
        tokens = self.modulate(tokens.to(dtype), temb)
        key, value = (split_heads(linear(tokens, layer), heads) for layer in (self.to_k_ip, self.to_v_ip))
        return self.norm_key(key), value

    def modulate(self, tokens: Tensor, temb: Tensor | None) -> Tensor:
        """Modulate the tokens before the linear layers."""
        return tokens

    def norm_key(self, key: Tensor) -> Tensor:
        """Norm the keys after the linear layer."""
        return key

    @property
    def joint_norms(self) -> JointNorms | None:
        """Norms of the queries and image keys at this site (SD3.5)."""
        return None


class NormedKeyValue(KeyValue):
    """Keys RMS-normed over the head width without weights, eps 1e-5; values raw (InstantX FLUX)."""

    def norm_key(self, key: Tensor) -> Tensor:
        """RMS norm of keys ``S H T D`` over ``D``."""
        return F.rms_norm(key, key.shape[-1:], eps=1e-5)


class TimedKeyValue(KeyValue):
    """Tokens under an adaptive LayerNorm of the time embedding, keys under an RMS norm (InstantX SD3.5)."""

    def __init__(
        self, to_k_ip: nn.Linear, to_v_ip: nn.Linear, time: nn.Linear, norms: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        super().__init__(to_k_ip, to_v_ip)
        self.norm_ip = nn.ModuleDict({"linear": time})
        self.norm_q, self.norm_k, self.norm_ip_k = (_Weight(weight) for weight in norms)

    def modulate(self, tokens: Tensor, temb: Tensor | None) -> Tensor:
        """LayerNorm of tokens ``S T C``, shifted and scaled by the time embedding ``1 E``."""
        if temb is None:
            raise ValueError("a timed adapter's keys need the time embedding")
        shift, scale = linear(F.silu(temb.to(tokens.dtype)), self.norm_ip["linear"])[:, None].chunk(2, dim=-1)
        return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def norm_key(self, key: Tensor) -> Tensor:
        """RMS norm of keys ``S H T D`` over ``D``, with the published weight."""
        return rms(key, self.norm_ip_k.weight)

    @property
    def joint_norms(self) -> JointNorms | None:
        """RMS norms of the queries and of the image keys, with the published weights."""
        return JointNorms(self.norm_q.weight, self.norm_k.weight)


def key_value_of(weights: Mapping[str, Tensor], *, normed: bool = False) -> KeyValue:
    """The module for the published weights of one site.

    ``normed`` selects InstantX's norm for FLUX, which has no weights. The tensors become the parameters
    without a copy.
    """
    to_k, to_v = (linear_of(weights, name) for name in ("to_k_ip", "to_v_ip"))
    if "norm_ip.linear.weight" in weights:
        norms = (weights["norm_q.weight"], weights["norm_k.weight"], weights["norm_ip_k.weight"])
        return TimedKeyValue(to_k, to_v, linear_of(weights, "norm_ip.linear"), norms)
    return NormedKeyValue(to_k, to_v) if normed else KeyValue(to_k, to_v)


def linear_of(weights: Mapping[str, Tensor], name: str) -> nn.Linear:
    """A linear layer around the tensors ``name.weight`` and, if there is one, ``name.bias``."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer


class _Weight(nn.Module):
    """A norm's weight under its published name."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach())


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm over the last dimension with ``weight``, eps 1e-6."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.device, x.dtype), eps=1e-6)


def linear(x: Tensor, layer: Any) -> Tensor:
    """``layer(x)`` on the device and in the dtype of ``x``; the weights may be elsewhere."""
    weight, bias = layer.weight, layer.bias
    return F.linear(
        x,
        weight.to(x.device, x.dtype),
        None if bias is None else bias.to(x.device, x.dtype),
    )


def precise(stored: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """The finer of two dtypes; float8 and integers only store weights and do not count."""
    return torch.promote_types(stored, compute) if computes(stored) else compute


def computes(dtype: torch.dtype) -> bool:
    """Whether layers compute in this dtype; quantised and float8 weights are stored in theirs only."""
    return dtype.is_floating_point and dtype.itemsize > 1


def placement(layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype for tensors that work with ``layer``; ``None`` where its weights do not tell: those on
    meta, kept there by an offloading hook that moves its inputs itself, and those that are only stored."""
    weight = next(layer.parameters())
    return None if weight.is_meta else weight.device, weight.dtype if computes(weight.dtype) else None
