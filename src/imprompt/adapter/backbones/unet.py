"""Which cross-attentions a UNet has: the one place that knows their order, names and resolutions.

Two orders matter and differ. Published checkpoints number layers as diffusers lists attention processors:
down, up, middle, the ``k``-th cross-attention being ``2k+1``. Named profiles count attention blocks as they
run: down, middle, up. Attention of motion modules (``motion_modules``, ``temporal``) looks along time and is
never counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from imprompt.catalog import family_of

BlockKind = Literal["input", "middle", "output"]
_KINDS: dict[str, BlockKind] = {"down_blocks": "input", "mid_block": "middle", "up_blocks": "output"}
_RANKS = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


@runtime_checkable
class UNet(Protocol):
    """What is read of a diffusers UNet (any of its UNet classes, compiled or not)."""

    @property
    def attn_processors(self) -> Mapping[str, object]: ...
    @property
    def down_blocks(self) -> Any: ...
    @property
    def up_blocks(self) -> Any: ...
    def get_submodule(self, target: str) -> Any: ...
    def register_forward_pre_hook(self, hook: Any, *, with_kwargs: bool) -> Any: ...
    def register_forward_hook(self, hook: Any) -> Any: ...


@dataclass(frozen=True)
class CrossLayer:
    """One cross-attention (``attn2``) of a UNet."""

    name: str
    """Module path, e.g. ``down_blocks.1.attentions.0.transformer_blocks.0.attn2``."""
    index: int
    """Published number ``N`` of ``ip_adapter.N.to_k_ip.weight``: odd, from 1."""
    block_index: int
    """Position of its attention block in execution order, from 0; layers of one block share it."""
    kind: BlockKind
    level: int
    """How often the latent has been halved here (each time rounding up)."""
    width: int
    """Width of its keys and values, ``H·D``."""
    cross_dim: int
    """Width of the tokens it reads."""

    @property
    def block(self) -> str:
        """Module path of the attention block that holds it, e.g. ``down_blocks.1.attentions.0``."""
        return _block_of(self.name)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """This layer's (height, width) for a latent of ``height × width``: halved, rounding up, per level."""
        factor = 2**self.level
        return -(-height // factor), -(-width // factor)


def cross_attentions(unet: UNet) -> tuple[CrossLayer, ...]:
    """All cross-attentions of a diffusers UNet in the order of published checkpoints (down, up, middle)."""
    names = [
        name.removesuffix(".processor")
        for name in unet.attn_processors
        if name.endswith("attn2.processor") and "motion_modules" not in name and "temporal" not in name
    ]
    blocks = list(dict.fromkeys(_block_of(name) for name in names))
    blocks.sort(key=lambda block: _RANKS[block.split(".")[0]])  # stable: keeps the order inside each part
    levels = _levels(unet)
    layers = []
    for position, name in enumerate(names):
        attention, stage = unet.get_submodule(name), name.split(".")[0]
        layers.append(
            CrossLayer(
                name=name,
                index=2 * position + 1,
                block_index=blocks.index(_block_of(name)),
                kind=_KINDS[stage],
                level=levels[stage if stage == "mid_block" else ".".join(name.split(".")[:2])],
                width=attention.to_k.out_features,
                cross_dim=attention.to_k.in_features,
            )
        )
    return tuple(layers)


def text_projection(unet: UNet) -> Any | None:
    """The linear layer with which a Kolors UNet brings text to its own width; ``None`` in other UNets."""
    config = getattr(unet, "config", {})
    return (
        unet.get_submodule("encoder_hid_proj") if config.get("encoder_hid_dim_type") == "text_proj" else None
    )


def describe(count: int, cross_dim: int) -> str:
    """A layer count and token width in words, with the family's name where it is a published one."""
    family = family_of("unet", count, cross_dim)
    return f"{count} cross-attentions of width {cross_dim}" + (f" ({family.title})" if family else "")


def _block_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 3 if parts[0] == "mid_block" else 4])


def _levels(unet: UNet) -> dict[str, int]:
    """Halvings of the latent at each block's attention: a block's own resampler comes after its attention."""
    levels, level = {}, 0
    for i, block in enumerate(unet.down_blocks):
        levels[f"down_blocks.{i}"] = level
        level += getattr(block, "downsamplers", None) is not None
    levels["mid_block"] = level
    for i, block in enumerate(unet.up_blocks):
        levels[f"up_blocks.{i}"] = level
        level -= getattr(block, "upsamplers", None) is not None
    return levels
