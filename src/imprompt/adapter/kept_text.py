"""Keys and values of the base's own text, computed once for all steps of a generation.

A UNet's cross-attentions read the same text at every step. They are kept only where nothing can change them
unseen: while one run of a diffusers pipeline without a step callback passes the very same text states, in
plain linear layers (no LoRA, no offloading hook, no GGUF), without gradients, not compiled. Elsewhere they
are computed at each step, as diffusers does; the numbers are the same either way.

Dimensions: B batch rows, T tokens, C token width, H heads, D head width.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapter.backbones.base import Call, Caller
from imprompt.packed import is_plain
from imprompt.weights import times_written

_MOST_BYTES = 128 * 2**20  # SDXL in float32, one guided picture, has 102 MB; layers beyond are not kept


class _Kept(NamedTuple):
    """Keys and values of one site, and the layers, weights and versions of weights that computed them."""

    key: Tensor
    value: Tensor
    layers: tuple[nn.Linear, nn.Linear]
    weights: tuple[Tensor, Tensor]
    versions: tuple[int | None, int | None]

    @classmethod
    def of(cls, attn: Any, key: Tensor, value: Tensor) -> "_Kept":
        weights = attn.to_k.weight, attn.to_v.weight
        versions = times_written(weights[0]), times_written(weights[1])
        return cls(key, value, (attn.to_k, attn.to_v), weights, versions)

    def computed_by(self, attn: Any) -> bool:
        """Whether the attention still has these layers and weights, unchanged."""
        (to_k, to_v), (key, value) = self.layers, self.weights
        if attn.to_k is not to_k or attn.to_v is not to_v:
            return False
        same = to_k.weight is key and to_v.weight is value
        return same and self.versions == (times_written(key), times_written(value))


class KeptText:
    """The keys and values of one text, by attention site."""

    def __init__(self) -> None:
        self._text: weakref.ref[Tensor] | None = None
        self._rest: tuple[object, ...] = ()
        self._sites: dict[str, _Kept] = {}
        self._bytes = 0

    def show(self, text: Float[Tensor, "B T C"], call: Call) -> None:
        """Say that the coming call of the denoiser reads ``text``: another object, one that was written to
        since, or another layout of the batch, forgets what is kept. So does the end of the text's life."""
        rest = (times_written(text), call)
        if self._text is None or self._text() is not text or self._rest != rest:
            self.forget()
            self._text, self._rest = weakref.ref(text, self._gone), rest

    def forget(self) -> None:
        """Free what is kept."""
        self._text, self._rest, self._bytes = None, (), 0
        self._sites.clear()

    def key_value(
        self, site: str, attn: Any, compute: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
        """Keys and values of the text at a site: kept, or computed."""
        kept = self._sites.get(site)
        if kept is not None and kept.computed_by(attn):
            return kept.key, kept.value
        key, value = compute()
        size = key.nbytes + value.nbytes
        if kept is None and is_plain(attn.to_k) and is_plain(attn.to_v) and self._bytes + size <= _MOST_BYTES:
            self._sites[site] = _Kept.of(attn, key, value)
            self._bytes += size
        return key, value

    def _gone(self, ended: weakref.ref[Tensor]) -> None:
        if ended is self._text:  # not that of a text before
            self.forget()


def stays_the_same(caller: Caller | None) -> bool:
    """Whether nobody can change text or weights between the steps of the run: a pipeline draws, without a
    step callback, and no gradients are recorded."""
    if caller is None or torch.is_grad_enabled():
        return False
    return caller.variables.get("callback_on_step_end", caller) is None
