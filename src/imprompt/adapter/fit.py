"""Check that an adapter fits a model: architecture, base family, and shapes of the attention sites."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from imprompt.adapter.backbones.base import Backbone
from imprompt.catalog import families
from imprompt.checkpoints.checkpoint import Checkpoint
from imprompt.errors import AdapterMismatch


def check_family(
    checkpoint: Checkpoint, token_width: int, backbone: Backbone, model: nn.Module, name: str
) -> None:
    """Raise :class:`AdapterMismatch` for an adapter of another family whose layers have the same shapes (SDXL
    and Kolors), and for tokens that the model's text projection cannot read. ``name`` is the model's name in
    messages."""
    mine = f"adapter '{checkpoint.name}'"
    text: Any = backbone.text_projection(model)
    family = "kolors" if text is not None else "sdxl"
    if checkpoint.base in ("kolors", "sdxl") and checkpoint.base != family:
        raise AdapterMismatch(
            f"{mine} was made for a UNet of {checkpoint.base_title}, {name} has one of "
            f"{families()[family].title}, whose layers have the same shapes but other weights. Use an "
            "adapter trained for this base."
        )
    reads_text = checkpoint.variant.uses_text_projection
    if reads_text and (text is None or text.in_features != token_width):
        raise AdapterMismatch(
            f"{mine} makes tokens of width {token_width} that go through a Kolors UNet's projection of its "
            f"text; {name} has none of that width."
        )


def check_sites(
    checkpoint: Checkpoint,
    mine: Mapping[int, tuple[int, ...]],
    backbone: Backbone,
    model: nn.Module,
    name: str,
) -> None:
    """Raise :class:`AdapterMismatch` if the model has another architecture, or other attention sites than the
    adapter.

    ``mine``: number of a site → shape of the adapter's ``to_k_ip``. On a UNet they must cover all sites.
    """
    if checkpoint.backbone != backbone.name:
        made_for = checkpoint.base_title or checkpoint.backbone
        raise AdapterMismatch(
            f"adapter '{checkpoint.name}' was made for {made_for}, {name} has a {backbone.noun}. Use an "
            "adapter trained for this base."
        )
    sites = backbone.sites(model)
    theirs = {site.index: (site.width, site.cross_dim) for site in sites}
    if mine == theirs if backbone.name == "unet" else mine.items() <= theirs.items():
        return
    where = next((n for n in sorted(mine.keys() & theirs.keys()) if mine[n] != theirs[n]), None)
    detail = f"; first differing layer {where}: {mine[where]}, not {theirs[where]}" if where else ""
    raise AdapterMismatch(
        f"adapter '{checkpoint.name}' was made for a {backbone.noun} with "
        f"{backbone.describe(len(mine), checkpoint.cross_dim)}, {name} has "
        f"{backbone.describe(len(theirs), sites[0].cross_dim if sites else 0)}{detail}. Use an adapter "
        "trained for this base."
    )
