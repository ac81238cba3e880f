"""Choose how the prompts of a site are read: one by one, in joint products, with heads folded, or only by the
queries inside their masks.

All forms give the same sum (:mod:`imprompt.adapter.attention`); which is fastest was measured with
``benchmarks/layers.py``.

Dimensions: B batch rows, H heads, L queries, T tokens of each prompt, D head width, P prompts.
"""

from collections.abc import Sequence
from operator import is_
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.attention import FoldedKV, ImageKV, JointKV
from imprompt.adapter.gathered import GatheredKV

_FEWEST = 3
"""Prompts in a joint product. Of two, each draws its half bit for bit as it does alone."""
_MOST_FOLDED = {2: 160, 4: 40}
"""Rows H·P·T of a folded matrix on a CPU, by the bytes of a number."""
_MOST_NUMBERS = 2**20
"""In a folded matrix, for all batch rows."""


def group_of(kv: ImageKV) -> tuple[bool, int, int]:
    """The same for prompts of a site that may be read together: short, of equal length, without bias or
    norms."""
    tokens, width = kv.key.shape[2:]
    alone = kv.bias is not None or kv.norms is not None or 2 * tokens > width
    return kv.after_block, tokens, kv.prompt if alone else -1


def parties(kvs: Sequence[ImageKV]) -> list[slice]:
    """Divide the prompts of a group into those that are read together."""
    if len(kvs) >= _FEWEST:
        return [slice(0, len(kvs))]
    return [slice(i, i + 1) for i in range(len(kvs))]


def form_of(kvs: Sequence[ImageKV]) -> type[JointKV] | None:
    """How prompts are read together; ``None`` is by :class:`ImageKV`, for one."""
    kv = kvs[0]
    rows, heads, tokens, width = kv.key.shape
    folded = heads * len(kvs) * tokens
    cheap = folded <= _MOST_FOLDED.get(kv.key.itemsize, 0) and rows * folded * heads * width <= _MOST_NUMBERS
    if kv.key.device.type == "cpu" and kv.bias is None and kv.norms is None and cheap:
        return FoldedKV
    return JointKV if len(kvs) >= _FEWEST else None


class JointKeys(NamedTuple):
    """Keys and values of several prompts at one site, and what they were made of."""

    key: Tensor
    value: Tensor
    made_of: Sequence[object]

    @classmethod
    def of(
        cls, form: type[JointKV], kvs: Sequence[ImageKV], made_of: Sequence[object], old: "JointKeys | None"
    ) -> "JointKeys":
        """``old`` if it was made of the same objects, else new ones, in the same memory where they fit."""
        made_of = (form, *made_of)
        if old is not None and same_objects(old.made_of, made_of):
            return old
        key = torch.cat([kv.key for kv in kvs], 2) * kvs[0].key.shape[3] ** -0.5
        value = torch.cat([kv.value for kv in kvs], 2)
        if form is FoldedKV:
            key, value = folded(key), folded(value)
        elif form is GatheredKV:
            key, value = (x.unflatten(2, (len(kvs), -1)).transpose(1, 2).flatten(0, 1) for x in (key, value))
        kept = (None, None) if old is None else (old.key, old.value)
        return cls(written(kept[0], key), written(kept[1], value), made_of)


def folded(x: Float[Tensor, "B H N D"]) -> Float[Tensor, "B HN HD"]:
    """Each head's rows in columns of its own, 0 elsewhere."""
    rows, heads, tokens, width = x.shape
    matrix = x.new_zeros(rows, heads, tokens, heads, width)
    matrix.diagonal(dim1=1, dim2=3).copy_(x.permute(0, 2, 3, 1))
    return matrix.flatten(3).flatten(1, 2)


def joint_mask(masks: Sequence[Float[Tensor, "_ 1 L 1"] | None]) -> Float[Tensor, "_ 1 P 1 L"] | None:
    """The masks of several prompts side by side, white where one has none; ``None`` if none has one."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    rows, white = max(map(len, given)), torch.ones_like(given[0][:1])
    whole = [(white if mask is None else mask)[..., 0].expand(rows, -1, -1) for mask in masks]
    return torch.stack(whole, dim=2)[:, :, :, None]


def same_objects(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether two sequences hold the same objects, never compared by value."""
    return len(one) == len(other) and all(map(is_, one, other))


def written(old: Tensor | None, new: Tensor) -> Tensor:
    """``new``, in the memory of ``old`` where that has its shape: who holds it sees the new values."""
    if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new
    return old.copy_(new)
