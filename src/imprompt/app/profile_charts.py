"""``imprompt profiles``: what each named profile does, as small bar charts; no weights are loaded.

A base's attention blocks are told from its UNet's configuration alone, hence also for a folder of the user's.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from imprompt.adapter.backbones.unet import BlockKind, CrossLayer
from imprompt.errors import ModelError
from imprompt.schema.profiles import PROFILES, LayerWeights, Profile, layer_weights, read_profile

_BARS = " ▁▂▃▄▅▆▇█"
_EMOJI = Path(__file__).parents[1] / "assets" / "emoji"
_DOWN, _UP, _MIDDLE = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn"
_PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "sd15": {
        "down_block_types": (_DOWN, _DOWN, _DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", _UP, _UP, _UP),
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", _DOWN, _DOWN),
        "up_block_types": (_UP, _UP, "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
    },
}
"""What the families' UNet configurations say of their blocks."""
_ATTENDING = (_DOWN, _UP)


def charts(base: str, profile: str | None = None) -> str:
    """One line a profile: a bar for each attention block in execution order, down │ middle │ up.

    Bars reach from 0 to the profile's scale, or to its largest weight above that; ``-`` is a negative weight,
    ``!`` under a bar a block where the picture acts as what to avoid. Raises :class:`UsageError` for an
    unknown profile, :class:`ModelError` for an unknown base.
    """
    layers = layers_of(base)
    named = {name: layer_weights(said, layers) for name, said in _chosen(profile).items()}
    top = max(1.0, *(abs(share) for spread in named.values() for share in spread.weights))
    width = max(map(len, named))
    lines = [f"{'':<{width}}  {_by_part(layers, _labels(layers))}"]
    for name, spread in named.items():
        shares, negated = _by_block(layers, spread)
        lines.append(f"{name:<{width}}  {_by_part(layers, [_bar(share / top) for share in shares])}")
        if any(negated):
            lines.append(f"{'':<{width}}  {_by_part(layers, ['!' if n else ' ' for n in negated])}".rstrip())
    blocks = list(
        dict.fromkeys((x.block_index, x.block) for x in sorted(layers, key=lambda x: x.block_index))
    )
    if profile is not None:
        ((shares, negated),) = (_by_block(layers, spread) for spread in named.values())
        lines += [
            f"  {t:>2}  {share:5.2f} {_bar(share / top)}{' as what to avoid' if not_ else ''}  {block}"
            for (t, block), share, not_ in zip(blocks, shares, negated, strict=True)
        ]
    lines.append(
        f"blocks of {base} as they run, down │ middle │ up; a full bar is {top:g} of the scale, none is 0"
    )
    if any(any(spread.negated) for spread in named.values()):
        lines.append("!: there the picture is what to avoid")
    return "\n".join(lines)


def tables(base: str, profile: str | None = None) -> dict[str, dict[str, object]]:
    """Profile → its weight for each block, and the blocks where it is negated; for machines."""
    layers = layers_of(base)
    found: dict[str, dict[str, object]] = {}
    for name, said in _chosen(profile).items():
        shares, negated = _by_block(layers, layer_weights(said, layers))
        found[name] = {"weights": shares, "negated": [t for t, not_ in enumerate(negated) if not_]}
    return found


def layers_of(base: str) -> tuple[CrossLayer, ...]:
    """The cross-attentions of a base in published order, from its UNet's configuration.

    ``base`` is a name of the catalogue, or a model's folder. Raises :class:`ModelError`.
    """
    from imprompt.catalog.entries import BASES

    family = BASES[base].family if base in BASES else base
    if family in _PUBLISHED:
        return layers_from(_PUBLISHED[family])
    folder = _EMOJI if base == "emoji" else Path(base).expanduser()
    path = folder / "unet" / "config.json"
    if not path.is_file():
        raise ModelError(
            f"base '{base}': there is no '{path}' to read its layers from; give a folder, or a name: "
            f"{', '.join(BASES)}."
        )
    return layers_from(json.loads(path.read_text(encoding="utf-8")))


def layers_from(config: Mapping[str, Any]) -> tuple[CrossLayer, ...]:
    """The cross-attentions that a ``UNet2DConditionModel``'s configuration describes. Raises
    :class:`ModelError` for blocks that are unknown here."""
    down, up = config["down_block_types"], config["up_block_types"]
    each, widths = config.get("layers_per_block", 2), config["block_out_channels"]
    if not set(down) | set(up) <= {*_ATTENDING, "DownBlock2D", "UpBlock2D"} or not isinstance(each, int):
        raise ModelError(
            f"a UNet of blocks {', '.join(dict.fromkeys((*down, *up)))} with {each} layers each is unknown."
        )
    deep = config.get("transformer_layers_per_block", 1)
    deep = [deep] * len(down) if isinstance(deep, int) else list(deep)
    blocks: list[tuple[str, BlockKind, int, int]] = []  # name, kind, level, layers; in execution order
    for level, kind in enumerate(down):
        if kind in _ATTENDING:
            blocks += [
                (f"down_blocks.{level}.attentions.{i}", "input", level, deep[level]) for i in range(each)
            ]
    if config.get("mid_block_type", _MIDDLE) == _MIDDLE:
        blocks.append(("mid_block.attentions.0", "middle", len(down) - 1, deep[-1]))
    for place, kind in enumerate(up):
        level = len(up) - 1 - place
        if kind in _ATTENDING:
            blocks += [
                (f"up_blocks.{place}.attentions.{i}", "output", level, deep[level]) for i in range(each + 1)
            ]
    running = [(t, *block) for t, block in enumerate(blocks)]
    published = [b for b in running if b[2] != "middle"] + [b for b in running if b[2] == "middle"]
    layers: list[CrossLayer] = []
    for t, name, part, level, depth in published:
        for k in range(depth):
            path = f"{name}.transformer_blocks.{k}.attn2"
            number = 2 * len(layers) + 1
            layers.append(
                CrossLayer(path, number, t, part, level, widths[level], config["cross_attention_dim"])
            )
    return tuple(layers)


def _chosen(profile: str | None) -> dict[str, Profile]:
    if profile is None:
        return {name: name for name in PROFILES}
    read = read_profile(profile)
    return {read if isinstance(read, str) else profile: read}


def _by_block(layers: Sequence[CrossLayer], spread: LayerWeights) -> tuple[list[float], list[bool]]:
    """Share and negation of each block in execution order: the mean of its layers, where they differ."""
    rows: dict[int, list[tuple[float, bool]]] = {}
    for layer, share, not_ in zip(layers, spread.weights, spread.negated, strict=True):
        rows.setdefault(layer.block_index, []).append((share, not_))
    blocks = [rows[t] for t in sorted(rows)]
    return [mean(share for share, _ in block) for block in blocks], [block[0][1] for block in blocks]


def _labels(layers: Sequence[CrossLayer]) -> list[str]:
    return [str(t % 10) for t in sorted({layer.block_index for layer in layers})]


def _by_part(layers: Sequence[CrossLayer], cells: Sequence[str]) -> str:
    kinds = {layer.block_index: layer.kind for layer in layers}
    parts = [
        "".join(cell for t, cell in enumerate(cells) if kinds[t] == kind)
        for kind in ("input", "middle", "output")
    ]
    return "│".join(parts)


def _bar(share: float) -> str:
    if share < 0:
        return "-"
    return _BARS[0 if share == 0 else max(1, round(share * 8))]
