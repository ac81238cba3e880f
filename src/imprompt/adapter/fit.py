"""Check that an adapter fits a model: architecture, base family, and shapes of the attention sites."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from imprompt.adapter.backbones.base import Backbone
from imprompt.catalog import families
from imprompt.checkpoints.checkpoint import Checkpoint
from imprompt.errors import AdapterMismatch


def check_fits(
    checkpoint: Checkpoint,
    keys: Mapping[int, tuple[int, ...]],
    token_width: int,
    backbone: Backbone,
    model: nn.Module,
    name: str,
) -> None:
    """Raise :class:`AdapterMismatch` if the adapter was made for another model.

    ``keys`` are the shapes of its ``to_k_ip`` by number of the site; on a UNet they must cover all sites.
    ``name`` is the model's name in messages.
    """
    mine = f"adapter '{checkpoint.name}'"
    if checkpoint.backbone != backbone.name:
        made_for = checkpoint.base_title or checkpoint.backbone
        raise AdapterMismatch(
            f"{mine} was made for {made_for}, {name} has a {backbone.noun}. Use an adapter trained for this "
            "base."
        )
    if checkpoint.variant.beside_text:
        _check_reads_tokens(checkpoint, model, mine, name)
        return
    sites = backbone.sites(model)
    theirs = {site.index: (site.width, site.cross_dim) for site in sites}
    if keys != theirs if backbone.name == "unet" else not keys.items() <= theirs.items():
        where = next((n for n in sorted(keys.keys() & theirs.keys()) if keys[n] != theirs[n]), None)
        detail = (
            f"; first differing layer {where}: {keys[where]}, not {theirs[where]}"
            if where is not None
            else ""
        )
        raise AdapterMismatch(
            f"{mine} was made for a {backbone.noun} with "
            f"{backbone.describe(len(keys), checkpoint.cross_dim)}, {name} has "
            f"{backbone.describe(len(theirs), sites[0].cross_dim if sites else 0)}{detail}. Use an adapter "
            "trained for this base."
        )
    _check_text(checkpoint, token_width, backbone.text_projection(model), mine, name)


def _check_reads_tokens(checkpoint: Checkpoint, model: Any, mine: str, name: str) -> None:
    """Check that a model reads an adapter's tokens among its text: FLUX of that width; Chroma masks text."""
    width, kind = model.config.joint_attention_dim, type(model).__name__
    if kind != "FluxTransformer2DModel":
        raise AdapterMismatch(
            f"{mine} was made for FLUX, which reads its tokens among the text's; {name} has a {kind}, which "
            "was not trained to. Use an adapter trained for this base."
        )
    if width != checkpoint.cross_dim:
        raise AdapterMismatch(
            f"{mine} makes tokens of width {checkpoint.cross_dim} that FLUX reads among its text's; {name} "
            f"has text of width {width}. Use an adapter trained for this base."
        )


def _check_text(checkpoint: Checkpoint, token_width: int, projection: Any, mine: str, name: str) -> None:
    """Tell SDXL's UNets from Kolors', whose layers have the same shapes, by the projection of the text."""
    family = "sdxl" if projection is None else "kolors"
    if checkpoint.base in ("kolors", "sdxl") and checkpoint.base != family:
        raise AdapterMismatch(
            f"{mine} was made for a UNet of {checkpoint.base_title}, {name} has one of "
            f"{families()[family].title}, whose layers have the same shapes but other weights. Use an "
            "adapter trained for this base."
        )
    reads_text = checkpoint.variant.uses_text_projection
    if reads_text and (projection is None or projection.in_features != token_width):
        raise AdapterMismatch(
            f"{mine} makes tokens of width {token_width} that go through a Kolors UNet's projection of its "
            f"text; {name} has none of that width."
        )
