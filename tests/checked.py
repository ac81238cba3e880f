"""The run-time type check of the tests: beartype, where its rules allow.

jaxtyping decorates methods one by one, outside of which beartype knows no ``Self``; such methods stay
unchecked.
"""

from collections.abc import Callable
from typing import TypeVar

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception

F = TypeVar("F", bound=Callable[..., object])


def check(function: F) -> F:
    try:
        return beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function
