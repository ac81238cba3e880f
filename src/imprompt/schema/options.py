"""The words an image prompt is steered with beside its scale, and how they are read: no torch, no pictures.

One home for the names of the combining rules, the framings, the scalings and the curves, so that a request
can be checked before anything heavy is loaded. What they do is in ``adapter.combine``, ``encoders.framing``,
``adapter.batch`` and ``adapter.schedule``.
"""

import difflib
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import TypeAlias

from imprompt.errors import UsageError

COMBINES = ("concat", "add", "subtract", "average", "norm-average", "max", "min", "slerp")
"""How several pictures become one prompt."""
FRAMINGS = ("crop", "top", "bottom", "left", "right", "pad", "squash", "tile")
"""How a picture that is not square becomes the encoder's square."""
SCALINGS = ("v-only", "k+v", "k+v-penalty", "k+mean-v-penalty")
"""Where the strength enters: in the values, or in the keys too."""

NOISES = ("fade", "dissolve", "gaussian", "shuffle")
"""Ways of spoiling a picture, for a negative with its colours and textures but not what it shows."""

_ALIASES = {
    "center": "crop",
    "centre": "crop",
    "letterbox": "pad",
    "stretch": "squash",
    "v": "v-only",
    "kv": "k+v",
    "k+v-w/-c-penalty": "k+v-penalty",
    "k+mean(v)-w/-c-penalty": "k+mean-v-penalty",
}

Points: TypeAlias = tuple[tuple[float, float], ...]
"""(fraction of the schedule, factor), in order; two points at one fraction are a step, at which the later
holds."""
Curve: TypeAlias = str | Sequence[tuple[float, float]]
"""A name of :data:`CURVES`, points, or points as text: ``0:1,0.5:0.2,1:0``."""

_SMOOTH = tuple(i / 16 for i in range(17))  # within 0.003 of the exact curve everywhere

CURVES: Mapping[str, Points] = MappingProxyType(
    {
        "constant": ((0.0, 1.0),),
        "fade-in": ((0.0, 0.0), (1.0, 1.0)),
        "fade-out": ((0.0, 1.0), (1.0, 0.0)),
        "fade-in-out": ((0.0, 0.0), (0.5, 1.0), (1.0, 0.0)),
        "smooth-in": tuple((x, x * x * (3 - 2 * x)) for x in _SMOOTH),
        "smooth-out": tuple((x, 1 - x * x * (3 - 2 * x)) for x in _SMOOTH),
    }
)
"""Named curves of strength over the schedule; ``smooth`` are smoothsteps, 3x² − 2x³."""


def canonical(field: str, name: object, known: Iterable[str]) -> str:
    """``name`` as it is listed in ``known``, whatever its case, spaces and dashes.

    Raises :class:`UsageError` that names the field and lists what is known.
    """
    listed = tuple(known)
    key = _key(str(name))
    key = key if key in listed else _ALIASES.get(key, key)
    if key not in listed:
        near = difflib.get_close_matches(key, listed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UsageError(f"{field} {name!r} is unknown{hint} Known: {', '.join(listed)}.")
    return key


def read_weights(combine: str, count: int, weights: Sequence[float] | None = None) -> tuple[float, ...]:
    """The weights of ``count`` pictures under a rule of :data:`COMBINES` (all 1 when none are given).

    Raises :class:`UsageError` when the rule cannot take them: another number of weights, NaN, ``subtract`` of
    one picture, ``slerp`` of other than two, negative shares, weights without effect.
    """
    if combine == "subtract" and count < 2:
        raise UsageError(
            f"combine: 'subtract' takes the first picture minus the rest, two at least; got {count}."
        )
    if combine == "slerp" and count != 2:
        raise UsageError(f"combine: 'slerp' takes exactly two pictures; got {count}.")
    if weights is None:
        return (1.0,) * count
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise UsageError(f"weights: {weights!r}; a list of numbers is expected, one a picture.")
    if len(weights) != count:
        raise UsageError(f"weights: {len(weights)} are given for {count} pictures; give one a picture.")
    for i, weight in enumerate(weights):
        if not _finite(weight):
            raise UsageError(f"weights: number {i + 1} is {weight!r}; a finite number is expected.")
    if combine in ("concat", "slerp") and min(weights) < 0:
        raise UsageError(
            f"weights: {min(weights)} is negative; with {combine!r} a weight is a share, 0 or more. "
            "A negative scale pushes away, and so does combine 'subtract'."
        )
    if combine in ("concat", "slerp", "average") and sum(weights) == 0:
        raise UsageError(
            f"weights: they add up to 0, so {combine!r} leaves nothing; scale 0 switches a prompt off."
        )
    if combine == "concat" and count == 1 and weights[0] != 1:
        raise UsageError(
            f"weights: {weights[0]:g} has no effect on a picture without others; its strength is scale."
        )
    return tuple(float(weight) for weight in weights)


def read_curve(curve: Curve) -> Points:
    """The control points that ``curve`` names or lists.

    Raises :class:`UsageError` for an unknown name, no points, fractions outside 0 to 1 or not in order, and
    numbers not finite.
    """
    if isinstance(curve, str):
        if ":" not in curve:
            try:
                return CURVES[canonical("curve", curve, CURVES)]
            except UsageError as error:
                raise UsageError(
                    f"{error} Or points: 0:1,0.5:0.2,1:0 (fraction of the schedule, factor)."
                ) from None
        curve = [_point(part, curve) for part in re.split(r"[,\s]+", curve.strip())]
    if not isinstance(curve, Sequence) or not curve:
        raise UsageError(f"curve: {curve!r}; points (fraction of the schedule, factor) are expected.")
    points: list[tuple[float, float]] = []
    for point in curve:
        if not isinstance(point, Sequence) or isinstance(point, str) or len(point) != 2:
            raise UsageError(f"curve: {point!r} is no point (fraction of the schedule, factor).")
        for value in point:
            if not _finite(value):
                raise UsageError(f"curve: {value!r} in point {tuple(point)} is no finite number.")
        if not 0 <= point[0] <= 1:
            raise UsageError(f"curve: fraction {point[0]} of point {tuple(point)} lies outside 0 to 1.")
        if abs(point[1]) > 10:
            raise UsageError(
                f"curve: factor {point[1]:g} of point {tuple(point)}; from -10 to 10 is expected."
            )
        points.append((float(point[0]), float(point[1])))
    if any(after[0] < before[0] for before, after in pairwise(points)):
        raise UsageError(
            f"curve: fractions {', '.join(f'{x:g}' for x, _ in points)} are not in ascending order."
        )
    return tuple(points)


def read_noise(noise: str) -> tuple[str, float]:
    """Kind and strength of ``KIND`` or ``KIND:STRENGTH`` (0 to 1, by default 0.5); raises
    :class:`UsageError`."""
    kind, _, given = noise.partition(":")
    try:
        strength = float(given) if given else 0.5
    except ValueError:
        strength = math.nan
    if not 0 <= strength <= 1:
        raise UsageError(f"noise {noise!r}: strength {given!r} is no number from 0 to 1.")
    return canonical("noise", kind, NOISES), strength


def read_face(face: str | int) -> int:
    """Which face of a picture is meant, counted from 0 with the largest first: ``largest`` or a number.

    Raises :class:`UsageError` for anything else.
    """
    text = str(face).strip().lower()
    if isinstance(face, bool) or not (text == "largest" or re.fullmatch(r"\d{1,3}", text)):
        raise UsageError(f"face {face!r}; 'largest' is expected, or a number from 0 (the largest first).")
    return 0 if text == "largest" else int(text)


def read_selection(selection: str | int | Sequence[int], tokens: int | None = None) -> tuple[int, ...]:
    """Which of a picture's ``tokens`` tokens are kept: numbers from 0, or text such as ``0-3,8``.

    Raises :class:`UsageError` for what is no number, out of range, twice there, or nothing at all. Without
    ``tokens`` the range is not checked.
    """
    chosen: list[int] = []
    if isinstance(selection, str):
        for part in re.split(r"[,\s]+", selection.strip()):
            span = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
            if span is None:
                raise UsageError(f"select {selection!r}: '{part}' is no token or range; write 0-3,8.")
            chosen += range(int(span[1]), int(span[2] or span[1]) + 1)
    else:
        chosen = [selection] if isinstance(selection, int) else list(selection)
    if not chosen:
        raise UsageError(f"select {selection!r} names no token; leave it out to keep all.")
    for number in chosen:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise UsageError(f"select: {number!r} is no token; they are numbered from 0.")
        if tokens is not None and number >= tokens:
            raise UsageError(
                f"select: there is no token {number}; a picture has {tokens}, 0 to {tokens - 1}, here."
            )
    if len(set(chosen)) != len(chosen):
        raise UsageError(f"select {selection!r} names a token twice.")
    return tuple(chosen)


def _key(name: str) -> str:
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())


def _finite(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)


def _point(part: str, curve: str) -> tuple[float, float]:
    x, _, y = part.partition(":")
    try:
        return float(x), float(y)
    except ValueError:
        raise UsageError(
            f"curve {curve!r}: '{part}' is no point; write FRACTION:FACTOR, such as 0:1,0.5:0.2,1:0."
        ) from None
