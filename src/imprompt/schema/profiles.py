"""Layer profiles: a weight for each cross-attention layer, from a name, a list, or block-name patterns.

Tables and arithmetic, no torch. A block is known by its position ``t`` in execution order, as in ComfyUI; a
UNet has ``count`` attention blocks: SD1.5 and SD2 have 16, SDXL has 11. Roles of blocks in UNets of another
shape follow from where the blocks are (:func:`roles`).

Sources: ComfyUI_IPAdapter_plus's weight types; InstantStyle (Wang et al. 2024) for ``style`` and ``layout``.
The two call different layers of SD1.5 "style", so they have different names here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from imprompt.errors import UsageError
from imprompt.io import read_json
from imprompt.schema.options import canonical, is_finite

if TYPE_CHECKING:
    from imprompt.adapter.backbones.base import Site

Profile = str | Sequence[float | int] | Mapping[str, object]
"""A profile's name, with ``:FACTOR`` for some; a list of weights in execution order, one for each block or
each layer; or a mapping from block-name patterns to weights. As text: ``1,0.5,0`` or
``up_blocks.1:1,default:0``."""


@dataclass(frozen=True)
class LayerWeights:
    """A profile's weight for each layer, in published order."""

    weights: tuple[float, ...]
    negated: tuple[bool, ...]
    """Layers in which the image tokens replace the negative tokens, and the positive branch gets none."""


@dataclass(frozen=True)
class Roles:
    """The roles of a UNet's attention blocks, each known by its position in execution order."""

    count: int
    """Number of attention blocks."""
    composition: Mapping[int, float]
    """Blocks that decide where things are, with their weight in ``composition``."""
    style: frozenset[int]
    """Blocks of ComfyUI's ``style transfer``."""
    instant_style: frozenset[int]
    """Blocks of InstantStyle's style."""
    layout: frozenset[int]
    """Blocks of InstantStyle's layout."""
    precise: Mapping[int, float]
    """Weights of ``composition-precise`` outside the composition blocks; 1 where not listed."""
    known: bool = True
    """False for transformers: nobody has measured what their blocks do."""


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
# Measured on the bundled model (16 validation pairs): the palette's distance to the picture is 32 without a
# picture and 12 with it; with the last block alone 16, with the one before it 21, with any other 29 to 32. No
# block decides where things are.
_EMOJI = Roles(
    count=7,
    composition={0: 1.0},
    style=frozenset({4, 5, 6}),
    instant_style=frozenset({6}),
    layout=frozenset({0, 1, 2, 3}),
    precise={1: 0.1, 2: 0.1, 3: 0.1},
)
_FAMILIES = {(6, 1, 9): _SD15, (4, 1, 6): _SDXL, (2, 1, 4): _EMOJI}

BlockWeight = Callable[[int, str, Roles], float]
"""(position, kind of block, roles) → weight of the block."""


def _away_from_middle(t: int, roles: Roles) -> float:
    half = roles.count / 2
    return abs(t - half) / half


def _ramp(x: float) -> float:
    return 0.05 + 0.95 * x


# As published, the ramps divide by the number of blocks, so they stop short of their far end.
PROFILES: dict[str, BlockWeight] = {
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
"""Profile name → weight of a block, to be multiplied by the prompt's scale."""

_NEGATED = {"style-transfer-precise": True, "composition-precise": False}
"""Profile → whether the image acts as a negative prompt in the composition blocks (True) or in the others."""
_SECOND = {"style-and-composition": True, "strong-style-and-composition": True, **_NEGATED}
"""Profile → whether ``NAME:FACTOR`` multiplies the composition blocks (True) or the others: ComfyUI's
weight_composition and boosts."""
_STAGES = ("down", "mid", "up", "transformer_blocks", "single_transformer_blocks")
POSITIONAL = ("linear", "ease-in", "ease-out", "ease-in-out", "reverse-in-out")
"""Profiles that work without roles, so on transformers too."""


def layer_weights(profile: Profile, layers: Sequence[Site]) -> LayerWeights:
    """Weights of a profile for ``layers`` (in published order), to be multiplied by the prompt's scale.

    A name is one of :data:`PROFILES`; case, spaces, ``_`` and ``-`` do not matter. A sequence is in execution
    order, with one number for each block or each layer. A mapping takes block-name prefixes or shell patterns
    (``{"up_blocks.0.attentions.1": 1.0, "default": 0.0}``; the longest match wins) or diffusers' nested form
    (``{"down": {"block_2": [0, 1]}, "default": 0.0}``); without ``default`` every layer must match.
    Raises :class:`UsageError` for unknown names, a wrong length, patterns that match nothing, and numbers
    that are not finite.
    """
    profile = read_profile(profile)
    if isinstance(profile, str):
        return _by_name(profile, layers)
    weights = _by_pattern(profile, layers) if isinstance(profile, Mapping) else _in_order(profile, layers)
    return LayerWeights(weights, (False,) * len(layers))


def _by_name(profile: str, layers: Sequence[Site]) -> LayerWeights:
    name, _, factor = profile.partition(":")
    found = roles(layers)
    if not found.known and name not in POSITIONAL:
        raise UsageError(
            f"profile {name!r} needs the measured roles of UNet blocks; a transformer base has none. Use "
            f"{', '.join(POSITIONAL)}, a list of weights, or block patterns."
        )

    def chosen(table: Mapping[str, bool]) -> tuple[bool, ...]:
        inside = [layer.block_index in found.composition for layer in layers]
        return tuple(name in table and each == table[name] for each in inside)

    weights = [PROFILES[name](layer.block_index, layer.kind, found) for layer in layers]
    if factor:
        multiplied = zip(weights, chosen(_SECOND), strict=True)
        weights = [weight * float(factor) if second else weight for weight, second in multiplied]
    return LayerWeights(tuple(weights), chosen(_NEGATED))


def read_profile(profile: Profile) -> Profile:
    """Normalise a profile to a name (with ``:FACTOR`` if given), a tuple of numbers, or a mapping.

    Text may be any of them; a mapping as ``pattern:weight,…`` or JSON. Raises :class:`UsageError` for what
    can be told without layers: unknown names, a factor for a profile that takes none, and weights that are
    not finite numbers.
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
        return read_profile(read_json(text, "profile", error=UsageError))
    parts = [part.rpartition(":") for part in text.split(",")]
    names = [name.strip() for name, _, _ in parts]
    if len(parts) == 1 and not _is_pattern(names[0]):
        return _name_from_text(text)
    weights = [_number_from_text(weight, text) for _, _, weight in parts]
    if not any(names):
        return read_profile(weights)
    _check_patterns(names, text)
    return read_profile(dict(zip(names, weights, strict=True)))


def _check_patterns(names: Sequence[str], text: str) -> None:
    for name in names:
        if not _is_pattern(name):
            raise UsageError(
                f"profile {text!r}: {name!r} names no blocks; patterns start with down, mid, up or "
                "transformer_blocks, contain a '*', or are 'default'."
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"profile {text!r}: {twice!r} is given twice; give one weight for it.")


def _name_from_text(text: str) -> str:
    """``NAME`` or ``NAME:FACTOR`` with the canonical name."""
    given, sign, factor = text.partition(":")
    name = canonical("profile", given, PROFILES)
    if not sign:
        return name
    if name not in _SECOND:
        raise UsageError(f"profile {name!r} takes no factor; only {', '.join(_SECOND)} do.")
    return f"{name}:{_number(_number_from_text(factor, text), 'factor'):g}"


def _number_from_text(number: str, text: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise UsageError(
            f"profile {text!r}: {number.strip()!r} is not a number. Write a name, weights such as 1,0.5,0, "
            "or patterns such as up_blocks.1:1,default:0."
        ) from None


def _is_pattern(name: str) -> bool:
    return name == "default" or "*" in name or name.startswith(_STAGES)


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


def roles(layers: Sequence[Site]) -> Roles:
    """Roles of the blocks: the published ones for SD1.5 and SDXL, measured ones for the bundled model.

    On other UNets they follow SD1.5's pattern. Composition: the last two blocks of the deepest down stage
    (0.25 and 1). InstantStyle's style: the first up stage; its layout: the deepest down stage and the middle.
    Style transfer: all the rest. Without down and up blocks there are no roles.
    """
    blocks = {layer.block_index: layer for layer in sorted(layers, key=lambda layer: layer.block_index)}
    kinds = [block.kind for block in blocks.values()]
    published = _FAMILIES.get((kinds.count("input"), kinds.count("middle"), kinds.count("output")))
    if published is not None:
        return published
    stages: dict[tuple[str, str], list[int]] = {}
    for t, block in blocks.items():
        stages.setdefault((block.kind, block.block.rsplit(".attentions.", 1)[0]), []).append(t)
    down, middle, up = (
        [some for (kind, _), some in stages.items() if kind == part] for part in ("input", "middle", "output")
    )
    if not down or not up:
        none: frozenset[int] = frozenset()
        return Roles(len(blocks), {}, none, none, none, {}, known=False)
    deepest, centre, first_up = frozenset(down[-1]), frozenset().union(*middle), frozenset(up[0])
    return Roles(
        count=len(blocks),
        composition=dict(zip(down[-1][::-1], (1.0, 0.25), strict=False)),
        style=frozenset(blocks) - deepest - centre - first_up or first_up,
        instant_style=first_up,
        layout=deepest | centre,
        precise=dict.fromkeys(centre | first_up, 0.1),
    )


def _in_order(weights: Sequence[float], layers: Sequence[Site]) -> tuple[float, ...]:
    blocks = 1 + max(layer.block_index for layer in layers)
    if len(weights) == blocks:
        return tuple(weights[layer.block_index] for layer in layers)
    if len(weights) == len(layers):  # sorting is stable: layers inside a block keep their order
        order = sorted(range(len(layers)), key=lambda i: layers[i].block_index)
        return tuple(weight for _, weight in sorted(zip(order, weights, strict=True)))
    raise UsageError(
        f"profile has {len(weights)} weights; this base takes {blocks} (one for each block)"
        + (f" or {len(layers)} (one for each layer)" if len(layers) != blocks else "")
        + ", in execution order (UNets: down, middle, up)."
    )


def _by_pattern(table: Mapping[str, object], layers: Sequence[Site]) -> tuple[float, ...]:
    patterns = {name: _number(value, name) for name, value in _flat(table, layers).items()}
    default = patterns.pop("default", None)
    weights: list[float] = []
    used: set[str] = set()
    for layer in layers:
        matching = [pattern for pattern in patterns if _covers(pattern, layer.name)]
        used.update(matching)
        if matching:
            weights.append(patterns[max(matching, key=len)])
        elif default is not None:
            weights.append(default)
        else:
            raise UsageError(f"profile gives no weight for layer {layer.block}; name it, or add a 'default'.")
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused:
        raise UsageError(
            f"profile names {unused[0]!r}, which no attention layer of this base matches; "
            f"its blocks are {', '.join(dict.fromkeys(layer.block for layer in layers))}."
        )
    return tuple(weights)


def _flat(table: Mapping[str, object], layers: Sequence[Site]) -> dict[str, object]:
    """diffusers' nested form (``down`` → ``block_2`` → number or list) as block-name patterns."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        stage = {"down": "down_blocks", "up": "up_blocks", "mid": "mid_block"}.get(key)
        if stage is None:
            found = {key: value}
        elif isinstance(value, Mapping):
            found = {}
            for block, inner in value.items():
                found |= _per_block(f"{stage}.{str(block).removeprefix('block_')}", inner, layers)
        else:
            found = _per_block(stage, value, layers)
        if twice := flat.keys() & found.keys():
            raise UsageError(f"profile gives {min(twice)!r} twice, also as {key!r}; give one weight for it.")
        flat |= found
    return flat


def _per_block(name: str, value: object, layers: Sequence[Site]) -> dict[str, object]:
    """``name`` with its number, or each attention block inside it with its number of a list."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return {name: value}
    blocks = list(dict.fromkeys(layer.block for layer in layers if _covers(name, layer.name)))
    if len(value) != len(blocks):
        raise UsageError(
            f"profile gives {len(value)} weights for {name}, which has {len(blocks)} attentions."
        )
    return dict(zip(blocks, value, strict=True))


def _covers(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def _number(value: object, name: str) -> float:
    if not is_finite(value):
        raise UsageError(f"profile: {name} is {value!r}; a finite number is expected.")
    return float(value)
