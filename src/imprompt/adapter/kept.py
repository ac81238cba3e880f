"""Remember what was made of tensors: a prompt that is set again with another strength, mask or window needs
neither its tokens nor their keys and values anew."""

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from imprompt.weights import times_written

T = TypeVar("T")


class _Made(NamedTuple, Generic[T]):
    tensors: tuple[Tensor | None, ...]
    """Kept, so that their memory stays theirs."""
    values: tuple[Tensor | None, ...]
    """Copies of those on the CPU."""
    made: T


class Kept(Generic[T]):
    """What was made of the same tensors with the same settings for the latest prompt, or for the one before.

    Tensors are told apart by their memory and the number of times that they were written to. That number does
    not count who writes through numpy, ``.data`` or in inference mode: on the CPU values are compared as
    well, and those of inference mode elsewhere are never the same.
    """

    def __init__(self) -> None:
        self._new: dict[Hashable, _Made[T]] = {}
        self._old: dict[Hashable, _Made[T]] = {}

    def next(self) -> None:
        """Another prompt begins."""
        self._old, self._new = self._new, {}

    def clear(self) -> None:
        """Forget all."""
        self._old, self._new = {}, {}

    def get(self, tensors: Sequence[Tensor | None], settings: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned for these tensors and settings, or returns now."""
        if any(map(_changes_unseen, tensors)):
            return make()
        key = settings, *map(_place, tensors)
        found = self._new.get(key) or self._old.get(key)
        if found is None or not all(map(_same, tensors, found.values)):
            found = _Made(tuple(tensors), tuple(map(_value, tensors)), make())
        self._new[key] = found
        return found.made


def _changes_unseen(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_inference() and tensor.device.type != "cpu"


def _place(tensor: Tensor | None) -> tuple[object, ...]:
    if tensor is None:
        return ()
    layout = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return tensor.data_ptr(), *layout, times_written(tensor)


def _value(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None or tensor.device.type != "cpu" else tensor.clone()


def _same(tensor: Tensor | None, value: Tensor | None) -> bool:
    return tensor is None or value is None or torch.equal(tensor, value)
