"""Profiles as bar charts in text, one bar for each attention block. No weights are loaded.

A base's attention blocks are derived from its UNet's ``config.json`` alone, so any diffusers folder works.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from imprompt.adapter.backbones.base import BlockKind, Site
from imprompt.catalog import bases
from imprompt.errors import ModelError
from imprompt.schema.profiles import PROFILES, Profile, layer_weights, read_profile

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
"""Family → the part of its published UNet configuration that describes the blocks."""


@dataclass(frozen=True)
class Block:
    """One attention block and what a profile does there."""

    name: str
    kind: BlockKind
    weight: float
    """Mean over its layers."""
    negated: bool
    """Whether the picture acts as a negative prompt there."""


def charts(base: str, profile: str | None = None) -> str:
    """All profiles, or one: a bar for each attention block in execution order, down │ middle │ up.

    A full bar is weight 1, or the largest weight above that; ``-`` is a negative weight; ``!`` below a bar
    is a block where the picture acts as a negative prompt. Raises :class:`UsageError` for an unknown profile
    and :class:`ModelError` for an unknown base.
    """
    rows = _rows(base, profile)
    top = max(1.0, *(abs(block.weight) for blocks in rows.values() for block in blocks))
    width = max(map(len, rows))
    first = next(iter(rows.values()))
    lines = [f"{'':<{width}}  {_by_kind(first, [str(i % 10) for i in range(len(first))])}"]
    for name, blocks in rows.items():
        lines += _chart(name, blocks, width, top)
    if profile is not None:
        lines += [_describe(i, block, top) for i, block in enumerate(first)]
    lines.append(f"blocks of {base} in execution order, down │ middle │ up; a full bar is weight {top:g}")
    if any(block.negated for blocks in rows.values() for block in blocks):
        lines.append("!: the picture acts as a negative prompt there")
    return "\n".join(lines)


def tables(base: str, profile: str | None = None) -> dict[str, dict[str, object]]:
    """Profile → its weight for each block, and the indices of the blocks where it is negated."""
    return {
        name: {
            "weights": [block.weight for block in blocks],
            "negated": [i for i, block in enumerate(blocks) if block.negated],
        }
        for name, blocks in _rows(base, profile).items()
    }


def layers_of(base: str) -> tuple[Site, ...]:
    """The cross-attention layers of a base in published order; ``base`` is an alias or a diffusers folder.

    Raises :class:`ModelError` when there is no UNet configuration to read.
    """
    family = bases()[base].family if base in bases() else base
    if family in _PUBLISHED:
        return layers_from(_PUBLISHED[family])
    folder = _EMOJI if base == "emoji" else Path(base).expanduser()
    path = folder / "unet" / "config.json"
    if not path.is_file():
        raise ModelError(
            f"base '{base}': there is no '{path}' to read its layers from; give a diffusers folder or one of "
            f"{', '.join(bases())}."
        )
    return layers_from(json.loads(path.read_text(encoding="utf-8")))


def layers_from(config: Mapping[str, Any]) -> tuple[Site, ...]:
    """The cross-attention layers that the configuration of a ``UNet2DConditionModel`` describes.

    Raises :class:`ModelError` for block types other than those of Stable Diffusion.
    """
    running = list(enumerate(_attention_blocks(config)))
    published = sorted(
        running, key=lambda item: item[1][1] == "middle"
    )  # published files end with the middle
    layers: list[Site] = []
    for index, (name, kind, level, depth) in published:
        width = config["block_out_channels"][level]
        for k in range(depth):
            path = f"{name}.transformer_blocks.{k}.attn2"
            number = 2 * len(layers) + 1
            layers.append(Site(path, number, index, kind, level, width, config["cross_attention_dim"]))
    return tuple(layers)


def _attention_blocks(config: Mapping[str, Any]) -> Iterator[tuple[str, BlockKind, int, int]]:
    """Name, kind, level and depth of each attention block, in execution order."""
    down, up, each = config["down_block_types"], config["up_block_types"], config.get("layers_per_block", 2)
    if not {*down, *up} <= {_DOWN, _UP, "DownBlock2D", "UpBlock2D"} or not isinstance(each, int):
        kinds = ", ".join(dict.fromkeys((*down, *up)))
        raise ModelError(
            f"profiles know UNets of Stable Diffusion's block types, not {kinds} with {each} layers."
        )
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(down) if isinstance(depths, int) else list(depths)
    for level, block in enumerate(down):
        if block == _DOWN:
            for i in range(each):
                yield f"down_blocks.{level}.attentions.{i}", "input", level, depths[level]
    if config.get("mid_block_type", _MIDDLE) == _MIDDLE:
        yield "mid_block.attentions.0", "middle", len(down) - 1, depths[-1]
    for place, block in enumerate(up):
        level = len(up) - 1 - place
        if block == _UP:
            for i in range(each + 1):
                yield f"up_blocks.{place}.attentions.{i}", "output", level, depths[level]


def _rows(base: str, profile: str | None) -> dict[str, list[Block]]:
    """Profile → what it does in each block of the base."""
    layers = layers_of(base)
    chosen: dict[str, Profile] = {name: name for name in PROFILES}
    if profile is not None:
        read = read_profile(profile)
        chosen = {read if isinstance(read, str) else profile: read}
    return {name: _blocks(layers, said) for name, said in chosen.items()}


def _blocks(layers: Sequence[Site], profile: Profile) -> list[Block]:
    found = layer_weights(profile, layers)
    rows: dict[int, list[tuple[Site, float, bool]]] = {}
    for row in zip(layers, found.weights, found.negated, strict=True):
        rows.setdefault(row[0].block_index, []).append(row)
    return [
        Block(part[0][0].block, part[0][0].kind, mean(weight for _, weight, _ in part), part[0][2])
        for _, part in sorted(rows.items())
    ]


def _chart(name: str, blocks: Sequence[Block], width: int, top: float) -> list[str]:
    lines = [f"{name:<{width}}  {_by_kind(blocks, [_bar(block.weight / top) for block in blocks])}"]
    if any(block.negated for block in blocks):
        marks = _by_kind(blocks, ["!" if block.negated else " " for block in blocks])
        lines.append(f"{'':<{width}}  {marks}".rstrip())
    return lines


def _describe(index: int, block: Block, top: float) -> str:
    negated = " as a negative prompt" if block.negated else ""
    return f"  {index:>2}  {block.weight:5.2f} {_bar(block.weight / top)}{negated}  {block.name}"


def _by_kind(blocks: Sequence[Block], cells: Sequence[str]) -> str:
    """One cell a block, with a line between down, middle and up."""
    return "│".join(
        "".join(cell for block, cell in zip(blocks, cells, strict=True) if block.kind == kind)
        for kind in ("input", "middle", "output")
    )


def _bar(share: float) -> str:
    if share < 0:
        return "-"
    return _BARS[0 if share == 0 else max(1, round(share * 8))]
