"""The run-time type check of the tests: beartype, where its rules allow, and shapes by jaxtyping.

jaxtyping decorates methods one by one, outside of which beartype knows no ``Self``; such methods stay
unchecked. Functions whose signature has no shape go to beartype alone: jaxtyping would bind their arguments
and check them twice in every call, which took most of the time of the check.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

F = TypeVar("F", bound=Callable[..., object])
_with_shapes = jaxtyping.jaxtyped
_checked = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def install() -> None:
    """Check the signatures of all that is imported of ``imprompt.adapter`` from now on."""
    jaxtyping.jaxtyped = _decorator  # the hook's decorator, found by name
    jaxtyping.install_import_hook("imprompt.adapter", "checked.check")


def check(function: F) -> F:
    try:
        return _checked(function)
    except BeartypeDecorHintPep673Exception:
        return function


def _decorator(*, typechecker: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        if inspect.isfunction(function) and not any(map(_has_shape, function.__annotations__.values())):
            return typechecker(function)
        return _with_shapes(function, typechecker=typechecker)

    return decorate


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, str):  # whatever that names
        return True
    return "jaxtyping" in type(hint).__module__ or any(map(_has_shape, get_args(hint)))
