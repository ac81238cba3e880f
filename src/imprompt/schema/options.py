"""Options of an image prompt: the known names, and how weights, curves and token selections are read.

No torch and no pictures, so that a request can be checked before anything heavy is loaded. What the options
do is in ``adapter.combine``, ``encoders.framing``, ``adapter.batch`` and ``adapter.schedule``.
"""

import difflib
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import TypeAlias, TypeGuard

from imprompt.errors import UsageError

COMBINES = ("concat", "add", "subtract", "average", "norm-average", "max", "min", "slerp")
"""Rules that combine several pictures into one prompt."""
FRAMINGS = ("crop", "top", "bottom", "left", "right", "pad", "squash", "tile")
"""Ways to fit a picture that is not square into the encoder's square input."""
SCALINGS = ("v-only", "k+v", "k+v-penalty", "k+mean-v-penalty")
"""Whether the strength scales the attention values only, or the keys too."""

NOISES = ("fade", "dissolve", "gaussian", "shuffle")
"""Ways to destroy a picture's content, for a negative that has its colours and textures only."""

_ALIASES = {
    "center": "crop",
    "centre": "crop",
    "letterbox": "pad",
    "stretch": "squash",
    "v": "v-only",
    "kv": "k+v",
    "k+v-w/-c-penalty": "k+v-penalty",
    "k+mean(v)-w/-c-penalty": "k+mean-v-penalty",
    "normal": "linear",
    "standard": "linear",
    "prompt-is-more-important": "ease-out",
    "style-comfy": "style-transfer",
    "composition-comfy": "composition",
}
"""Other spellings of names, and ComfyUI_IPAdapter_plus's; a profile's among them."""

Points: TypeAlias = tuple[tuple[float, float], ...]
"""(fraction of the schedule, factor), ascending; two points at one fraction are a step to the later
factor."""
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
"""Named curves of strength over the schedule; ``smooth-in`` and ``smooth-out`` are smoothsteps, 3x² − 2x³."""


def canonical(field: str, name: object, known: Iterable[str]) -> str:
    """The entry of ``known`` that ``name`` spells, ignoring case, spaces, ``_`` and ``-``.

    Raises :class:`UsageError` with the field and the known names.
    """
    listed = tuple(known)
    key = "-".join(str(name).lower().replace("_", " ").replace("-", " ").split())
    key = key if key in listed else _ALIASES.get(key, key)
    if key not in listed:
        near = difflib.get_close_matches(key, listed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UsageError(f"{field} {name!r} is unknown{hint} Known: {', '.join(listed)}.")
    return key


def is_finite(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number, not a bool, NaN, infinite or beyond what a float can hold."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def is_whole(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer, not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


# ---- weights of pictures


def read_weights(combine: str, count: int, weights: Sequence[float] | None = None) -> tuple[float, ...]:
    """Check the weights of ``count`` pictures under a rule of :data:`COMBINES`; ``None`` means all 1.

    Raises :class:`UsageError` for a number of pictures or weights that the rule cannot take.
    """
    if combine == "subtract" and count < 2:
        raise UsageError(
            f"combine: 'subtract' takes the first picture minus the others, two at least; got {count}."
        )
    if combine == "slerp" and count != 2:
        raise UsageError(f"combine: 'slerp' takes exactly two pictures; got {count}.")
    if weights is None:
        return (1.0,) * count
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise UsageError(f"weights: {weights!r} is not a list; give one number for each picture.")
    if len(weights) != count:
        raise UsageError(f"weights: {len(weights)} are given for {count} pictures; give one for each.")
    for number, weight in enumerate(weights, 1):
        if not is_finite(weight):
            raise UsageError(f"weights: number {number} is {weight!r}; a finite number is expected.")
    _check_shares(combine, weights)
    return tuple(float(weight) for weight in weights)


def _check_shares(combine: str, weights: Sequence[float]) -> None:
    """Refuse weights that leave nothing under the rule, or have no effect."""
    if combine in ("concat", "slerp") and min(weights) < 0:
        raise UsageError(
            f"weights: {min(weights)} is negative; with {combine!r} a weight is a share, 0 or more. "
            "To push away from a picture use a negative scale, or combine=subtract."
        )
    if combine in ("concat", "slerp", "average") and sum(weights) == 0:
        raise UsageError(f"weights: they add up to 0, so {combine!r} leaves nothing; to switch off: scale=0.")
    if combine == "concat" and len(weights) == 1 and weights[0] != 1:
        raise UsageError(f"weights: {weights[0]:g} has no effect on a single picture; use scale.")


# ---- curves


def read_curve(curve: Curve) -> Points:
    """The control points of ``curve``, a name or points.

    Raises :class:`UsageError` for an unknown name, no points, fractions outside 0 to 1 or not in ascending
    order, and factors outside -10 to 10.
    """
    if isinstance(curve, str):
        if ":" not in curve:
            return _named_curve(curve)
        curve = [_point_from_text(part) for part in re.split(r"[,\s]+", curve.strip())]
    if not isinstance(curve, Sequence) or not curve:
        raise UsageError(f"curve: {curve!r}; points (fraction of the schedule, factor) are expected.")
    points = tuple(map(_checked_point, curve))
    if any(after[0] < before[0] for before, after in pairwise(points)):
        fractions = ", ".join(f"{x:g}" for x, _ in points)
        raise UsageError(f"curve: fractions {fractions} are not in ascending order.")
    return points


def _named_curve(name: str) -> Points:
    try:
        return CURVES[canonical("curve", name, CURVES)]
    except UsageError as error:
        raise UsageError(f"{error} Or give points: 0:1,0.5:0.2,1:0 (fraction:factor).") from None


def _point_from_text(text: str) -> tuple[float, float]:
    x, _, y = text.partition(":")
    try:
        return float(x), float(y)
    except ValueError:
        raise UsageError(
            f"curve: '{text}' is not a point; write FRACTION:FACTOR, such as 0:1,0.5:0.2,1:0."
        ) from None


def _checked_point(point: object) -> tuple[float, float]:
    if not isinstance(point, Sequence) or isinstance(point, str) or len(point) != 2:
        raise UsageError(f"curve: {point!r} is not a point (fraction of the schedule, factor).")
    for value in point:
        if not is_finite(value):
            raise UsageError(f"curve: {value!r} in point {tuple(point)} is not a finite number.")
    x, y = map(float, point)
    if not 0 <= x <= 1:
        raise UsageError(f"curve: fraction {x:g} of point {tuple(point)} lies outside 0 to 1.")
    if abs(y) > 10:
        raise UsageError(f"curve: factor {y:g} of point {tuple(point)} lies outside -10 to 10.")
    return x, y


# ---- the others


def read_noise(noise: str) -> tuple[str, float]:
    """Kind and strength from ``KIND[:STRENGTH]``; the strength is 0 to 1, by default 0.5.

    Raises :class:`UsageError`.
    """
    if not isinstance(noise, str):
        raise UsageError(f"noise {noise!r}: KIND or KIND:STRENGTH is expected; kinds: {', '.join(NOISES)}.")
    kind, sign, given = noise.partition(":")
    try:
        strength = float(given) if sign else 0.5
    except ValueError:
        strength = math.nan
    if not 0 <= strength <= 1:
        raise UsageError(f"noise {noise!r}: strength {given!r} is not a number from 0 to 1.")
    return canonical("noise", kind, NOISES), strength


def read_face(face: str | int) -> int:
    """Index of a face in a picture, the largest first: ``largest`` (0) or a number from 0.

    Raises :class:`UsageError` for anything else.
    """
    text = str(face).strip().lower()
    if isinstance(face, bool) or not (text == "largest" or re.fullmatch(r"\d{1,3}", text)):
        raise UsageError(f"face {face!r}; 'largest' is expected, or a number from 0 (the largest first).")
    return 0 if text == "largest" else int(text)


def read_selection(selection: str | int | Sequence[int], tokens: int | None = None) -> tuple[int, ...]:
    """Indices of the tokens to keep: numbers from 0, or text such as ``0-3,8``.

    Raises :class:`UsageError` for anything else, for a token selected twice, for none, and for indices from
    ``tokens`` on, the number of tokens of a picture.
    """
    chosen = _listed(selection)
    if not chosen:
        raise UsageError(f"select {selection!r} names no token; leave it out to keep all.")
    for index in chosen:
        if not is_whole(index) or index < 0:
            raise UsageError(f"select: {index!r} is not a token; they are numbered from 0.")
    if tokens is not None and max(chosen) >= tokens:
        raise UsageError(
            f"select: there is no token {max(chosen)}; a picture has {tokens}, 0 to {tokens - 1}, here."
        )
    if len(set(chosen)) != len(chosen):
        raise UsageError(f"select {selection!r} names a token twice.")
    return tuple(chosen)


def _listed(selection: str | int | Sequence[int]) -> list[int]:
    if not isinstance(selection, str | int | Sequence):
        raise UsageError(f"select: {selection!r} is no list of tokens; write numbers from 0, or 0-3,8.")
    if isinstance(selection, str):
        return [i for part in re.split(r"[,\s]+", selection.strip()) for i in _token_range(part)]
    return [selection] if isinstance(selection, int) else list(selection)


def _token_range(text: str) -> range:
    span = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    if span is None:
        raise UsageError(f"select: '{text}' is not a token or range; write 0-3,8.")
    return range(int(span[1]), int(span[2] or span[1]) + 1)
