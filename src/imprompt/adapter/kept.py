"""Remember what was made of tensors: a prompt that is set again with another strength, mask or window needs
neither its tokens nor their keys and values anew."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """What was made of the same tensors with the same settings for the latest prompt, or for the one before.

    Tensors are told apart by their memory, which stays theirs because they are kept, and by the number of
    times that they were written to. Those made in inference mode do not count that, and are never the same.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Any, T]] = {}
        self._before: dict[Hashable, tuple[Any, T]] = {}

    def next(self) -> None:
        """Another prompt begins."""
        self._before, self._made = self._made, {}

    def clear(self) -> None:
        """Forget all."""
        self._before, self._made = {}, {}

    def get(self, tensors: Sequence[Tensor | None], settings: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned for these tensors and settings, or returns now."""
        if any(each is not None and each.is_inference() for each in tensors):
            return make()
        key = settings, *(None if each is None else _place(each) for each in tensors)
        found = self._made.get(key) or self._before.get(key) or (tensors, make())
        self._made[key] = found
        return found[1]


def _place(tensor: Tensor) -> tuple[object, ...]:
    place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return *place, tensor._version
