"""The LoRA of a FaceID adapter, active while a face prompt is set.

Published FaceID files hold ``N.to_{q,k,v,out}_lora.{down,up}.weight`` for every attention ``N``
(self-attention even, cross-attention odd): ``y = W·x + up(down(x))``. Forward hooks on the four linear layers
add it. Unlike a LoRA installed by peft, this leaves the user's own LoRAs and quantised layers alone, replaces
no module, and removing the hooks restores the UNet exactly. Without a prompt, or with one of scale 0, the
base draws the same picture bit for bit.

Dimensions: B rows of the UNet's batch, L tokens, I and O widths of a layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapter.backbones.base import Call, Site
from imprompt.adapter.key_value import linear_of
from imprompt.adapter.prompt import CompiledPrompt
from imprompt.errors import AdapterMismatch, UsageError

PARTS = ("q", "k", "v", "out")
_HALVES = ("down", "up")


class LowRank(nn.Module):
    """One LoRA, ``up(down(x))``; parameters have their published names."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """``up(down(x))`` on the device and in the dtype of ``x``."""
        for half in (self.down, self.up):
            x = nn.functional.linear(x, half.weight.to(x.device, x.dtype))
        return x


class FaceLora:
    """All LoRAs of one adapter; :meth:`into` puts them on a UNet, :meth:`remove` takes them off."""

    def __init__(self, layers: Mapping[int, Mapping[str, LowRank]]) -> None:
        self.layers = layers
        """Published number of an attention → ``q``, ``k``, ``v`` or ``out`` → LoRA."""
        self.scale = 1.0
        """Strength, read at every call; published adapters were trained with 1."""
        self._factor: float | Tensor = 0.0
        self._handles: list[Any] = []
        self._name = ""

    @classmethod
    def among(cls, numbered: nn.ModuleDict, weights: Mapping[str, Tensor]) -> "FaceLora":
        """A checkpoint's LoRA, whose modules join the ``numbered`` attentions under their published names."""
        layers: dict[int, dict[str, LowRank]] = {}
        for number in sorted({int(key.partition(".")[0]) for key in weights}):
            if str(number) not in numbered:
                numbered[str(number)] = nn.Module()
            prefix = f"{number}.to_{{part}}_lora.{{half}}"
            layers[number] = {
                part: LowRank(*(linear_of(weights, prefix.format(part=part, half=half)) for half in _HALVES))
                for part in PARTS
            }
            for part, low in layers[number].items():
                numbered[str(number)].add_module(f"to_{part}_lora", low)
        return cls(layers)

    def check(self, unet: Any, layers: Sequence[Site], name: str) -> None:
        """Raise :class:`AdapterMismatch` unless the UNet has a layer of the same widths for each LoRA."""
        _refuse_fused(unet, layers, name)
        found = {}
        for number, attention in _attentions(unet, layers):
            found[number] = {part: _widths(_linear(attention, part)) for part in PARTS}
        mine = {
            number: {part: (low.down.in_features, low.up.out_features) for part, low in parts.items()}
            for number, parts in self.layers.items()
        }
        if mine != found:
            where = next((n for n in sorted(mine.keys() | found.keys()) if mine.get(n) != found.get(n)), 0)
            raise AdapterMismatch(
                f"adapter '{name}' has a LoRA for {len(mine)} attentions, the UNet has {len(found)}; the "
                f"first that differs is {where}: {mine.get(where)}, not {found.get(where)} (widths in and "
                "out). Use an adapter trained for this base."
            )

    def into(self, unet: Any, layers: Sequence[Site], name: str) -> None:
        """Add hooks to the UNet's layers, inactive until :meth:`show`; a second call does nothing. ``name``
        is the adapter's, for messages."""
        if self._handles:
            return
        self._name = name
        for number, attention in _attentions(unet, layers):
            for part in PARTS:
                hook = partial(self._add, self.layers[number][part])
                self._handles.append(_linear(attention, part).register_forward_hook(hook))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.rest()

    def rest(self) -> None:
        """Be inactive until :meth:`show`."""
        self._factor = 0.0

    def show(self, samples: Sequence[Sequence[CompiledPrompt]] | None, call: Call) -> None:
        """Be active in the rows whose sample has a prompt that acts; ``None``: in all rows."""
        acting = [True] if samples is None else [any(row.acts for row in rows) for rows in samples]
        if len(set(acting)) < 2:
            self._factor = float(any(acting))
            return
        each = call.samples // len(acting)
        rows = [float(acts) for acts in acting for _ in range(each * call.frames)] * len(call.branches)
        self._factor = torch.tensor(rows, device=call.device).reshape(-1, 1, 1)

    def check_unfused(self, unet: Any, layers: Sequence[Site]) -> None:
        """Raise :class:`AdapterMismatch` if it is active on attentions that were fused after :meth:`into`:
        they do not call the layers with the hooks."""
        if isinstance(self._factor, Tensor) or self._factor:
            _refuse_fused(unet, layers, self._name)

    def _add(self, low: LowRank, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The hook of a linear layer: its output with the LoRA's, ``None`` where that is inactive."""
        factor = self._factor
        if isinstance(factor, float):
            if factor == 0.0 or self.scale == 0.0:
                return None
        elif len(factor) != len(output):
            raise UsageError(
                f"some samples have a face prompt and some none, but an attention is called with "
                f"{len(output)} of {len(factor)} rows, so that the LoRA cannot tell which; give all "
                "samples a face prompt."
            )
        else:
            factor = factor.to(output.dtype)
        return output + self.scale * factor * low(args[0]).to(output.dtype)


def new_lora(unet: Any, layers: Sequence[Site], rank: int) -> dict[str, Tensor]:
    """Weights of a new LoRA of every attention, as the reference trains it: down normal with deviation
    1/rank, up zero."""
    weights = {}
    for number, attention in _attentions(unet, layers):
        for part in PARTS:
            width, out = _widths(_linear(attention, part))
            weights[f"{number}.to_{part}_lora.down.weight"] = torch.randn(rank, width) / rank
            weights[f"{number}.to_{part}_lora.up.weight"] = torch.zeros(out, rank)
    return weights


def _refuse_fused(unet: Any, layers: Sequence[Site], name: str) -> None:
    # The flag `fused_projections` stays on after unfusing; the processor tells.
    processors = (attention.processor for _, attention in _attentions(unet, layers))
    if any(isinstance(getattr(p, "previous", p), FusedAttnProcessor2_0) for p in processors):
        raise AdapterMismatch(
            f"adapter '{name}' has a LoRA for q, k and v of each attention, which are fused in this UNet; "
            "call pipe.unfuse_qkv_projections() first."
        )


def _attentions(unet: Any, layers: Sequence[Site]) -> Iterator[tuple[int, Any]]:
    """(published number, attention): each cross-attention and the self-attention before it."""
    for layer in layers:
        yield layer.index - 1, unet.get_submodule(layer.name.removesuffix("attn2") + "attn1")
        yield layer.index, unet.get_submodule(layer.name)


def _linear(attention: Any, part: str) -> Any:
    """The layer that a LoRA hooks: the one inside the user's own LoRA wrappers, which may come and go."""
    layer = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def _widths(layer: Any) -> tuple[int, int]:
    return layer.in_features, layer.out_features
