"""How strongly an image prompt acts in each cross-attention: named profiles, lists and patterns → weights.

Pure tables and arithmetic, no torch. A block's place is its execution position ``t`` (see ``layers``), which
is how the profiles' users know them; ``L`` is the number of blocks: 16 for SD1.5 and SD2, 11 for SDXL. UNets
of another shape get the roles from where their blocks are, by the rules of :func:`roles`.

Numbers: ComfyUI_IPAdapter_plus's weight types (as published formulas) and InstantStyle (Wang et al. 2024) for
``style`` and ``layout``. Two systems use "style" for different layers of SD1.5; both are here under own
names.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from imprompt.errors import UsageError

if TYPE_CHECKING:
    from imprompt.adapter.backbones.base import Site

Profile = str | Sequence[float | int] | Mapping[str, object]
"""A profile's name (``NAME:FACTOR`` where it has a second part); weights in execution order, one a block or
one a layer; or weights by block-name pattern. As text: ``1,0.5,0`` or ``up_blocks.1:1,default:0``."""


@dataclass(frozen=True)
class LayerWeights:
    """What a profile says for each layer, in published order."""

    weights: tuple[float, ...]
    negated: tuple[bool, ...]
    """Where the image acts as what to avoid: its tokens replace the negative ones, and the positive are
    void."""


@dataclass(frozen=True)
class Roles:
    """Which blocks (by ``t``) of a UNet family do what."""

    count: int
    composition: Mapping[int, float]
    """The blocks that decide where things are, with the share of the weight they get."""
    style: frozenset[int]
    """ComfyUI's "style transfer"."""
    instant_style: frozenset[int]
    layout: frozenset[int]
    """InstantStyle's pair."""
    precise: Mapping[int, float]
    """Shares that "composition precise" gives the blocks which are not composition; 1 where not listed."""
    known: bool = True
    """Whether blocks have roles at all; on transformers none are known."""


_SD15 = Roles(
    count=16,
    composition={4: 0.25, 5: 1.0},
    style=frozenset({0, 1, 2, 3, *range(9, 16)}),
    instant_style=frozenset({7, 8, 9}),
    layout=frozenset({4, 5, 6}),
    precise={6: 0.1, 7: 0.1, 8: 0.1},
)
_SDXL = Roles(
    count=11,
    composition={3: 1.0},
    style=frozenset({6}),
    instant_style=frozenset({6}),
    layout=frozenset({3}),
    precise={t: 0.1 for t in range(11) if t not in (3, 6)},
)
# The bundled model's, measured (imprompt.evaluation.layers, 24 pairs): of the style the last two blocks bring
# 0.70 and 0.22, of the likeness the one before 0.37, each with an interval above 0; of the rest only the
# first block's likeness has one. No block decides where things are.
_EMOJI = Roles(
    count=7,
    composition={0: 1.0},
    style=frozenset({4, 5, 6}),
    instant_style=frozenset({6}),
    layout=frozenset({0, 1, 2, 3}),
    precise={1: 0.1, 2: 0.1, 3: 0.1},
)
_FAMILIES = {(6, 1, 9): _SD15, (4, 1, 6): _SDXL, (2, 1, 4): _EMOJI}

Share = Callable[[int, str, Roles], float]
"""(t, block kind, roles) → share of the scale."""


def _away_from_middle(t: int, roles: Roles) -> float:
    half = roles.count / 2
    return abs(t - half) / half


def _ramp(x: float) -> float:
    return 0.05 + 0.95 * x


# The ramps divide by L although t ends at L-1, so they stop short of their far end: published, kept.
PROFILES: dict[str, Share] = {
    "linear": lambda t, kind, r: 1.0,
    "ease-in": lambda t, kind, r: _ramp(1 - t / r.count),
    "ease-out": lambda t, kind, r: _ramp(t / r.count),
    "ease-in-out": lambda t, kind, r: _ramp(1 - _away_from_middle(t, r)),
    "reverse-in-out": lambda t, kind, r: _ramp(_away_from_middle(t, r)),
    "weak-input": lambda t, kind, r: 0.2 if kind == "input" else 1.0,
    "weak-middle": lambda t, kind, r: 0.2 if kind == "middle" else 1.0,
    "weak-output": lambda t, kind, r: 0.2 if kind == "output" else 1.0,
    "strong-middle": lambda t, kind, r: 1.0 if kind == "middle" else 0.2,
    "style-transfer": lambda t, kind, r: float(t in r.style),
    "composition": lambda t, kind, r: r.composition.get(t, 0.0),
    "strong-style-transfer": lambda t, kind, r: float(t not in r.composition),
    "style-and-composition": lambda t, kind, r: r.composition.get(t, float(t in r.style)),
    "strong-style-and-composition": lambda t, kind, r: 1.0,
    "style-transfer-precise": lambda t, kind, r: r.composition.get(t, float(t in r.style)),
    "composition-precise": lambda t, kind, r: r.composition.get(t, r.precise.get(t, 1.0)),
    "style": lambda t, kind, r: float(t in r.instant_style),
    "layout": lambda t, kind, r: float(t in r.layout),
}
"""Share of the scale in each block, by profile name."""

_NEGATED: dict[str, Callable[[int, Roles], bool]] = {
    "style-transfer-precise": lambda t, r: t in r.composition,
    "composition-precise": lambda t, r: t not in r.composition,
}
_SECOND: dict[str, Callable[[int, Roles], bool]] = {
    "style-and-composition": lambda t, r: t in r.composition,
    "strong-style-and-composition": lambda t, r: t in r.composition,
    "style-transfer-precise": lambda t, r: t in r.composition,
    "composition-precise": lambda t, r: t not in r.composition,
}
"""The blocks whose strength ``NAME:FACTOR`` sets apart: the published weight of the composition, or boost."""
_STAGES = ("down", "mid", "up", "transformer_blocks", "single_transformer_blocks")
_POSITIONAL = ("linear", "ease-in", "ease-out", "ease-in-out", "reverse-in-out")
"""Profiles that need no roles of blocks: the ones for transformers, whose blocks have no measured roles."""
_ALIASES = {
    "normal": "linear",
    "standard": "linear",
    "prompt-is-more-important": "ease-out",
    "style-comfy": "style-transfer",
    "composition-comfy": "composition",
}


def layer_weights(profile: Profile, layers: Sequence[Site]) -> LayerWeights:
    """A profile's weight for each of ``layers`` (published order), to be multiplied by the prompt's scale.

    A name is one of :data:`PROFILES` (case, spaces, ``_`` and ``-`` do not matter). A sequence is in
    execution order, one number a block or one a layer. A mapping takes block-name prefixes or shell patterns
    (``{"up_blocks.0.attentions.1": 1.0, "default": 0.0}``; the longest pattern wins) or diffusers' nested
    form (``{"down": {"block_2": [0, 1]}, "default": 0.0}``); without ``default`` every layer must be named.
    Raises :class:`UsageError` for unknown names, a wrong length, patterns without layers and numbers not
    finite.
    """
    profile = read_profile(profile)
    if isinstance(profile, str):
        name, _, factor = profile.partition(":")
        where = roles(layers)
        if not where.known and name not in _POSITIONAL:
            raise UsageError(
                f"profile {name!r} is measured on UNet blocks and means nothing on a transformer base. Use "
                f"{', '.join(_POSITIONAL)}, a list of weights, or block patterns."
            )
        negated = _NEGATED.get(name, lambda t, r: False)
        apart = _SECOND.get(name, lambda t, r: False)
        return LayerWeights(
            tuple(
                PROFILES[name](x.block_index, x.kind, where)
                * (float(factor or 1) if apart(x.block_index, where) else 1.0)
                for x in layers
            ),
            tuple(negated(layer.block_index, where) for layer in layers),
        )
    weights = _by_pattern(profile, layers) if isinstance(profile, Mapping) else _in_order(profile, layers)
    return LayerWeights(weights, (False,) * len(layers))


def read_profile(profile: Profile) -> Profile:
    """A profile in one form, whatever its spelling: a canonical name, with ``:FACTOR`` where it was said; a
    tuple of numbers; or a mapping. Text may be any of them (a mapping as ``pattern:weight,…`` or as JSON).

    Raises :class:`UsageError` for what can be told without layers: unknown names, a factor where there is no
    second part, no numbers or not finite ones.
    """
    if isinstance(profile, str):
        return _from_text(profile)
    if isinstance(profile, Mapping):
        _check_table(profile, "profile")
        return profile
    if not isinstance(profile, Sequence) or not profile:
        raise UsageError(f"profile: {profile!r}; a name, a list of weights or a mapping is expected.")
    return tuple(_number(weight, f"weight {i}") for i, weight in enumerate(profile))


def _from_text(text: str) -> Profile:
    if text.lstrip().startswith("{"):
        try:
            return read_profile(json.loads(text))
        except json.JSONDecodeError as error:
            raise UsageError(f"profile {text!r} is no valid JSON ({error}).") from error
    parts = [part.strip() for part in text.split(",")]
    try:
        if len(parts) > 1:
            if all(":" in part for part in parts):
                pairs = [part.rsplit(":", 1) for part in parts]
                return read_profile({_pattern(name): float(weight) for name, weight in pairs})
            return read_profile([float(part) for part in parts])
        name, sign, factor = text.rpartition(":")
        if not sign:
            return canonical(text)
        if _looks_like_pattern(name):
            return read_profile({name.strip(): float(factor)})
        name = canonical(name)
        if name not in _SECOND:
            raise UsageError(f"profile {name!r} has no second part; only {', '.join(_SECOND)} take a factor.")
        return f"{name}:{_number(float(factor), 'factor'):g}"
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"profile {text!r}: {error}. Write a name, weights as 1,0.5,0, or up_blocks.1:1,default:0."
        ) from error


def _pattern(name: str) -> str:
    if not _looks_like_pattern(name):
        raise UsageError(
            f"profile: {name.strip()!r} names no blocks; patterns start with down, mid, up or "
            "transformer_blocks, hold a '*', or are 'default'."
        )
    return name.strip()


def _looks_like_pattern(name: str) -> bool:
    return name.strip() == "default" or "*" in name or name.strip().startswith(_STAGES)


def _check_table(table: Mapping[str, object], where: str) -> None:
    if not table:
        raise UsageError(f"{where}: no weights; write for instance {{'up_blocks.1': 1, 'default': 0}}.")
    for name, value in table.items():
        if isinstance(value, Mapping):
            _check_table(value, f"{where}: {name}")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for i, weight in enumerate(value):
                _number(weight, f"{name}, number {i}")
        else:
            _number(value, str(name))


def canonical(name: str) -> str:
    """The profile's name as listed in :data:`PROFILES`; raises :class:`UsageError` that lists them all."""
    key = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    key = _ALIASES.get(key, key)
    if key not in PROFILES:
        near = difflib.get_close_matches(key, PROFILES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UsageError(f"profile {name!r} is unknown{hint} Known: {', '.join(PROFILES)}.")
    return key


def roles(layers: Sequence[Site]) -> Roles:
    """The blocks' roles: the published ones for the block structures of SD1.5 and SDXL, else by position.

    By position means SD1.5's roles told structurally: composition is the deepest attending down level (its
    last block fully, the one before by a quarter), InstantStyle's style the first attending up level, its
    layout the deepest down level and the middle, style transfer everything that is neither.
    """
    known = _FAMILIES.get(block_counts(layers))
    if known is not None:
        return known
    blocks = sorted(
        {(layer.block_index, layer.kind, layer.block.rsplit(".attentions.", 1)[0]) for layer in layers}
    )
    inputs = [(t, stage) for t, kind, stage in blocks if kind == "input"]
    outputs = [(t, stage) for t, kind, stage in blocks if kind == "output"]
    if not inputs or not outputs:
        nothing: frozenset[int] = frozenset()
        return Roles(len(blocks), {}, nothing, nothing, nothing, {}, known=False)
    deepest = [t for t, stage in inputs if stage == inputs[-1][1]]
    first_up = frozenset(t for t, stage in outputs if stage == outputs[0][1])
    middle = frozenset(t for t, kind, _ in blocks if kind == "middle")
    rest = frozenset(t for t, _, _ in blocks) - set(deepest) - middle - first_up
    return Roles(
        count=len(blocks),
        composition=dict(zip(deepest[-2:], (0.25, 1.0)[-len(deepest) :], strict=True)),
        style=rest or first_up,
        instant_style=first_up,
        layout=frozenset(deepest) | middle,
        precise=dict.fromkeys(middle | first_up, 0.1),
    )


def _in_order(weights: Sequence[float], layers: Sequence[Site]) -> tuple[float, ...]:
    numbers = [_number(weight, f"weight {i}") for i, weight in enumerate(weights)]
    running = sorted(
        range(len(layers)), key=lambda i: layers[i].block_index
    )  # stable: layers inside a block keep order
    blocks = 1 + max(layer.block_index for layer in layers)
    if len(numbers) == blocks:
        return tuple(numbers[layer.block_index] for layer in layers)
    if len(numbers) == len(layers):
        by_layer = dict(zip(running, numbers, strict=True))
        return tuple(by_layer[i] for i in range(len(layers)))
    raise UsageError(
        f"profile has {len(numbers)} weights; this base takes {blocks} (one a block)"
        + (f" or {len(layers)} (one a layer)" if len(layers) != blocks else "")
        + ", in execution order (UNets: down, middle, up)."
    )


def _by_pattern(table: Mapping[str, object], layers: Sequence[Site]) -> tuple[float, ...]:
    patterns = {name: _number(value, name) for name, value in _flat(table, layers).items()}
    default = patterns.pop("default", None)
    weights: list[float] = []
    used: set[str] = set()
    for layer in layers:
        fitting = [pattern for pattern in patterns if _covers(pattern, layer.name)]
        used.update(fitting)
        if fitting:
            weights.append(patterns[max(fitting, key=len)])
        elif default is not None:
            weights.append(default)
        else:
            raise UsageError(
                f"profile says nothing about layer {layer.block}; name it, or add a 'default' "
                "(0 leaves it alone)."
            )
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused:
        raise UsageError(
            f"profile names {unused[0]!r}, which no attention layer of this base matches; "
            f"its blocks are {', '.join(dict.fromkeys(layer.block for layer in layers))}."
        )
    return tuple(weights)


def _flat(table: Mapping[str, object], layers: Sequence[Site]) -> dict[str, object]:
    """diffusers' nested form (``down``/``mid``/``up`` → ``block_i`` → number or list) as name patterns."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        stage = {"down": "down_blocks", "up": "up_blocks", "mid": "mid_block"}.get(key)
        if stage is None:
            flat[key] = value
        elif isinstance(value, Mapping):
            for block, inner in value.items():
                name = f"{stage}.{str(block).removeprefix('block_')}"
                flat |= _spread(name, inner, layers)
        else:
            flat |= _spread(stage, value, layers)
    return flat


def _spread(name: str, value: object, layers: Sequence[Site]) -> dict[str, object]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return {name: value}
    held = list(dict.fromkeys(layer.block for layer in layers if _covers(name, layer.name)))
    if len(value) != len(held):
        raise UsageError(f"profile gives {len(value)} weights for {name}, which has {len(held)} attentions.")
    return dict(zip(held, value, strict=True))


def _covers(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"profile: {name} is {value!r}; a finite number is expected.")
    return float(value)


def block_counts(layers: Sequence[Site]) -> tuple[int, int, int]:
    """How many attention blocks there are in the input, middle and output part: (6, 1, 9) for SD1.5."""
    blocks = {layer.block_index: layer.kind for layer in layers}
    input_, middle, output = (
        sum(kind == part for kind in blocks.values()) for part in ("input", "middle", "output")
    )
    return input_, middle, output
