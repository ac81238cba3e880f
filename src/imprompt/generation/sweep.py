"""Sweeps: a request for every combination of several fields' values. Text in, requests out, no torch.

``scale=0.2,0.5,1`` sweeps a field of the request; a field that only images have (``profile``, ``end``, …), or
``image.scale``, is set on every image, ``image2.scale`` on the second; ``region.text``, ``control.scale``,
``lora2.weight`` and ``embedding.token`` likewise. Values that contain commas are separated by ``|``. A
request for several pictures gets their seeds as a last axis.
"""

import math
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from imprompt.errors import UsageError
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.request import ControlRef, EmbeddingRef, LoraRef, Request

MOST = 256
"""Most pictures of a sweep."""
_LISTS: dict[str, type[ImagePrompt | TextRegion | ControlRef | LoraRef | EmbeddingRef]] = {
    "image": ImagePrompt,
    "region": TextRegion,
    "control": ControlRef,
    "lora": LoraRef,
    "embedding": EmbeddingRef,
}
"""Name in a sweep → record of which a request may have several."""
_OF_TASKS = ("image", "mask")
"""Fields of a request that image prompts have as well, meaning something else."""
_FIXED = ("task", "count", "hashes", *(f"{kind}s" for kind in _LISTS))


@dataclass(frozen=True)
class Axis:
    """One swept field and its values, as given."""

    field: str
    values: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Each value with the field's name."""
        return tuple(f"{self.field} {value}" for value in self.values)


@dataclass(frozen=True)
class Sweep:
    """The requests of a sweep, each for one picture; the first axis turns fastest."""

    axes: tuple[Axis, ...]
    requests: tuple[Request, ...]

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """Labels of each request, one for each axis."""
        turned = product(*(axis.labels for axis in reversed(self.axes)))
        return tuple(labels[::-1] for labels in turned)


def read_axis(text: str) -> Axis:
    """Read an axis from ``FIELD=VALUE,VALUE,…``. Raises :class:`UsageError`."""
    field, sign, said = (part.strip() for part in text.partition("="))
    values = tuple(value.strip() for value in re.split(r"\|" if "|" in said else ",", said))
    if not sign or not re.fullmatch(r"([a-z]+\d*\.)?[a-z_-]+", field) or "" in values:
        raise UsageError(f"--sweep '{text}': write FIELD=VALUE,VALUE,… (values with commas: FIELD=A|B).")
    if len(set(values)) != len(values):
        raise UsageError(f"--sweep '{text}': a value is given twice.")
    return Axis(field.replace("-", "_"), values)


def expand(request: Request, axes: Sequence[Axis]) -> Sweep:
    """All combinations of the axes' values in ``request``, validated before any is drawn.

    A request without a seed gets one that all of them share; several pictures of a request become a last
    axis, their seeds. Raises :class:`UsageError` for unknown fields, a field that is swept twice, values that
    a field cannot have, and more than :data:`MOST` pictures.
    """
    fields = [axis.field for axis in axes]
    if len(set(fields)) != len(fields):
        raise UsageError(f"--sweep: a field is swept twice ({', '.join(fields)}).")
    if request.seed is None and "seed" not in fields:
        request = request.replace(seed=secrets.randbelow(2**32))
    if request.count > 1:
        axes = (*axes, _seeds(request, fields))
    if math.prod(len(axis.values) for axis in axes) > MOST:
        raise UsageError(f"--sweep: {MOST} pictures at most; use fewer values, or several sweeps.")
    requests: list[Request] = []
    for values in product(*(axis.values for axis in reversed(axes))):
        one = request.replace(count=1)
        for axis, value in zip(axes, reversed(values), strict=True):
            one = _with(one, axis.field, value)
        requests.append(one)
    return Sweep(tuple(axes), tuple(requests))


def _seeds(request: Request, fields: Sequence[str]) -> Axis:
    if "seed" in fields:
        raise UsageError("--sweep seed=…: gives the seeds already; leave --count out.")
    assert request.seed is not None
    return Axis("seed", tuple(str(request.seed + index) for index in range(request.count)))


def _with(request: Request, field: str, value: str) -> Request:
    """The request with one field, or one field of its images, regions, …, changed."""
    place, _, name = field.rpartition(".")
    if not place and name in Request.model_fields and name not in _FIXED:
        return _with_own(request, name, value)
    kind, number = place.rstrip("0123456789") or "image", place.lstrip("abcdefghijklmnopqrstuvwxyz")
    refs = list(_refs(request, field, kind, name))
    if number and not 1 <= int(number) <= len(refs):
        raise UsageError(f"--sweep {field}: there are {len(refs)} {kind}s, from {kind}1.")
    for index in [int(number) - 1] if number else range(len(refs)):
        refs[index] = refs[index].replace(**{name: value})
    return request.replace(**{f"{kind}s": tuple(refs)})


def _with_own(request: Request, name: str, value: str) -> Request:
    if name == "scale" and request.images and all(prompt.scale is not None for prompt in request.images):
        raise UsageError("--sweep scale: every image has its own; sweep image.scale.")
    try:
        return request.replace(**{name: value})
    except UsageError as error:
        if name in _OF_TASKS and request.images:
            raise UsageError(f"{error} To change that of the image prompts, sweep image.{name}.") from error
        raise


def _refs(request: Request, field: str, kind: str, name: str) -> tuple[Any, ...]:
    """The request's images, regions, …, whose field ``name`` is to be changed. Raises :class:`UsageError`."""
    if kind not in _LISTS or name not in _LISTS[kind].model_fields:
        if field.removesuffix("s") in _LISTS:
            one = field.removesuffix("s")
            example = next(iter(_LISTS[one].model_fields))
            raise UsageError(f"--sweep {field}: sweep a field of each {one}, such as {one}.{example}=A,B.")
        known = [name for name in Request.model_fields if name not in _FIXED]
        known += [f"{kind}.{name}" for kind, record in _LISTS.items() for name in record.model_fields]
        raise UsageError(f"--sweep: no field '{field}'; known are {', '.join(known)}.")
    refs: tuple[Any, ...] = getattr(request, f"{kind}s")
    if not refs:
        raise UsageError(f"--sweep {field}: there is no {kind} to change; give one.")
    return refs
