"""A face adapter's LoRA: low-rank additions to the UNet's own attention while a face is shown.

Published FaceID files hold, for every attention ``N`` (self-attention even, cross-attention odd), the halves
``N.to_{q,k,v,out}_lora.{down,up}.weight``: ``y = W·x + up(down(x))``. They are added by forward hooks on the
four linear layers. Compared with installing them through peft, the user's own LoRAs are never switched or
renamed, no module of the UNet is replaced, quantised layers are left as they are, and taking the hooks off
is exact. What a prompt of scale 0, or none, draws is the base's picture to the bit.

Dimensions: B rows of the UNet's batch, L tokens, I and O widths of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapter.backbones.base import Call, Site
from imprompt.adapter.prompt import CompiledPrompt
from imprompt.errors import AdapterMismatch, UsageError

PARTS = ("q", "k", "v", "out")


class LowRank(nn.Module):
    """``up(down(x))``, under its published names."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """The addition, in ``x``'s place and number format."""
        for half in (self.down, self.up):
            x = nn.functional.linear(x, half.weight.to(x.device, x.dtype))
        return x


class FaceLora:
    """All additions of one adapter; in a UNet between :meth:`into` and :meth:`remove`."""

    def __init__(self, layers: Mapping[int, Mapping[str, LowRank]]) -> None:
        self.layers = layers
        """Published number of an attention → part (``q``, ``k``, ``v``, ``out``) → its addition."""
        self.scale = 1.0
        """Strength, read at every call; published adapters are meant for 1."""
        self._factor: float | Tensor = 0.0
        self._handles: list[Any] = []

    def check(self, unet: Any, layers: Sequence[Site], name: str) -> None:
        """Raise :class:`AdapterMismatch` where an addition has no layer of its widths to add to."""
        found = {}
        for number, attention in _attentions(unet, layers):
            if getattr(attention, "fused_projections", False):
                raise AdapterMismatch(
                    f"adapter '{name}' adds to q, k and v of each attention, which are fused in this UNet; "
                    "call pipe.unfuse_qkv_projections() first."
                )
            found[number] = {part: _widths(_linear(attention, part)) for part in PARTS}
        mine = {
            number: {part: (low.down.in_features, low.up.out_features) for part, low in parts.items()}
            for number, parts in self.layers.items()
        }
        if mine != found:
            where = next((n for n in sorted(mine.keys() | found.keys()) if mine.get(n) != found.get(n)), 0)
            raise AdapterMismatch(
                f"adapter '{name}' brings a LoRA for {len(mine)} attentions, the UNet has {len(found)}; "
                f"first differing {where}: {mine.get(where)}, not {found.get(where)} (widths in and out). "
                "Use an adapter trained for this base."
            )

    def into(self, unet: Any, layers: Sequence[Site]) -> None:
        """Put the additions on the UNet's layers, resting until :meth:`show`; twice is once."""
        if self._handles:
            return
        for number, attention in _attentions(unet, layers):
            for part in PARTS:
                hook = self._hook(self.layers[number][part])
                self._handles.append(_linear(attention, part).register_forward_hook(hook))

    def remove(self) -> None:
        """Take them off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.rest()

    def rest(self) -> None:
        """Add nothing until :meth:`show`."""
        self._factor = 0.0

    def show(self, samples: Sequence[Sequence[CompiledPrompt]] | None, call: Call) -> None:
        """Add in the rows whose sample has a prompt that acts; ``None``: in all."""
        acting = [True] if samples is None else [any(row.acts for row in rows) for rows in samples]
        if len(set(acting)) < 2:
            self._factor = float(any(acting))
            return
        each = call.samples // len(acting)
        rows = [float(acts) for acts in acting for _ in range(each * call.frames)] * len(call.branches)
        self._factor = torch.tensor(rows, device=call.device).reshape(-1, 1, 1)

    def _hook(self, low: LowRank) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            factor = self._factor
            if isinstance(factor, float):
                if factor == 0.0 or self.scale == 0.0:
                    return None
            elif len(factor) != len(output):
                raise UsageError(
                    f"some samples show a face and some none, but an attention gets {len(output)} of "
                    f"{len(factor)} rows, which a LoRA cannot be told apart in; show all samples a face."
                )
            else:
                factor = factor.to(output.dtype)
            return output + self.scale * factor * low(args[0]).to(output.dtype)

        return add


def _attentions(unet: Any, layers: Sequence[Site]) -> list[tuple[int, Any]]:
    """(published number, attention): each cross-attention and the self-attention before it."""
    found = []
    for layer in layers:
        for number, name in (
            (layer.index - 1, layer.name.removesuffix("attn2") + "attn1"),
            (layer.index, layer.name),
        ):
            found.append((number, unet.get_submodule(name)))
    return found


def _linear(attention: Any, part: str) -> Any:
    """The layer an addition goes to: under the user's own LoRA wrappers, which may come and go."""
    layer = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def _widths(layer: Any) -> tuple[int, int]:
    return layer.in_features, layer.out_features
