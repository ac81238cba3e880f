"""Profiles as bar charts in text, one bar for each attention block.

The attention blocks follow from the configuration of the base's UNet; no weights are loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from imprompt.adapter.backbones.base import BlockKind, Site
from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.catalog import ASSETS, bases
from imprompt.errors import ModelError, UsageError
from imprompt.io import check_path, read_json
from imprompt.schema.profiles import POSITIONAL, PROFILES, Profile, layer_weights, read_profile

_BARS = " ▁▂▃▄▅▆▇█"
_PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
    },
    "sd21": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)},
}
_PUBLISHED["kolors"] = _PUBLISHED["sdxl"]  # blocks and width are SDXL's
"""Family → the published UNet configuration, where it differs from diffusers' defaults."""


@dataclass(frozen=True)
class Block:
    """An attention block and its weight under a profile."""

    name: str
    kind: BlockKind
    weight: float
    """Mean over the block's layers."""
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

    Raises :class:`ModelError` when there is no UNet configuration to read, :class:`UsageError` for a
    transformer's alias.
    """
    family = bases()[base].family if base in bases() else base
    config = _PUBLISHED.get(family)
    if config is None:
        folder = ASSETS if base == "emoji" else check_path(base, "--base")
        path = folder / "unet" / "config.json"
        if not path.is_file():
            known = ", ".join(name for name, row in bases().items() if row.family in ("emoji", *_PUBLISHED))
            if base in bases():
                raise UsageError(
                    f"base '{base}' is a transformer, and profiles are drawn of UNets: {known}. It takes "
                    f"{', '.join(POSITIONAL)}, a list of weights, or patterns such as "
                    "transformer_blocks.3:1,default:0."
                )
            raise ModelError(
                f"base '{base}': there is no '{path}' to read its layers from; give a diffusers folder "
                f"with a UNet, or one of {known}."
            )
        config = read_json(path, f"'{path}'", error=ModelError)
    with torch.device("meta"):  # no weights
        return cross_attentions(UNet2DConditionModel.from_config(config))


def _rows(base: str, profile: str | None) -> dict[str, list[Block]]:
    """Profile → the blocks of the base with their weights."""
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
    """One cell for each block, with a line between down, middle and up."""
    return "│".join(
        "".join(cell for block, cell in zip(blocks, cells, strict=True) if block.kind == kind)
        for kind in ("input", "middle", "output")
    )


def _bar(share: float) -> str:
    if share < 0:
        return "-"
    return _BARS[0 if share == 0 else max(1, round(share * 8))]
