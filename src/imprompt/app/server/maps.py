"""Maps of pictures that need no model of their own, drawn while the client waits."""

from pathlib import Path
from typing import Literal, TypeAlias

from imprompt.encoders.images import as_bytes, load_image
from imprompt.generation.annotate import annotate

MapKind: TypeAlias = Literal["canny", "lineart", "scribble", "tile", "none"]
"""Kinds of control whose maps are drawn without a model."""


def drawn_map(kind: MapKind, path: Path) -> bytes:
    """A control's map as PNG, at most 1024 pixels wide or high. Raises :class:`ImpromptError`."""
    image = load_image(path)
    image.thumbnail((1024, 1024))
    return as_bytes(annotate(kind, image))
