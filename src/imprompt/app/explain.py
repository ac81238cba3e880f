"""Attribution as pictures: a heat map over what was drawn, and a chart of layers against steps."""

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from imprompt.adapter.recorder import Attribution

# Dark to bright through one hue after the other, readable in grey and by the colour-blind (as "inferno").
_STOPS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float64)
_CELL = 14


def explain(attribution: "Attribution", image: Image.Image) -> dict[str, Image.Image]:
    """Two pages for each image prompt ``G`` from 1: ``where-G``, a heat map over the picture, and ``when-G``,
    a chart of blocks against steps. All prompts share one colour scale, so that they can be compared."""
    pages = {}
    top_where = max(float(attribution.maps.max()), 1e-9)
    top_when = max(float(attribution.strength.max()), 1e-9)
    for g in range(len(attribution.maps)):
        pages[f"where-{g + 1}"] = overlay(image, attribution.maps[g].numpy() / top_where)
        pages[f"when-{g + 1}"] = chart(attribution, g, top_when)
    return pages


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture in grey under a heat map of values 0 to 1 of any size."""
    small = Image.fromarray((np.clip(heat, 0, 1) * 255).round().astype(np.uint8))
    spread = np.asarray(small.resize(image.size, Image.Resampling.BICUBIC), np.float64) / 255
    grey = np.asarray(image.convert("L"), np.float64)[..., None]
    mixed = 0.45 * grey + 0.55 * colours(spread)
    return Image.fromarray(mixed.round().astype(np.uint8))


def chart(attribution: "Attribution", prompt: int, top: float) -> Image.Image:
    """Blocks (rows, named) against steps (columns, pure noise on the left), bright where it acted most."""
    blocks = list(dict.fromkeys(layer.block for layer in attribution.layers))
    table = attribution.strength[prompt].numpy()
    rows = np.stack(
        [
            table[:, [i for i, x in enumerate(attribution.layers) if x.block == block]].mean(1)
            for block in blocks
        ]
    )
    cells = colours(np.clip(rows / top, 0, 1)).round().astype(np.uint8)
    heat = Image.fromarray(cells).resize(
        (rows.shape[1] * _CELL, rows.shape[0] * _CELL), Image.Resampling.NEAREST
    )
    margin = 200
    page = Image.new("RGB", (margin + max(heat.width, 160) + 10, heat.height + 44), "white")
    page.paste(heat, (margin, 24))
    draw = ImageDraw.Draw(page)
    draw.text((4, 4), f"image prompt {prompt + 1}: added / text, brightest {top:.2f}", fill="black")
    for i, block in enumerate(blocks):
        draw.text((4, 24 + i * _CELL), f"{i:>2} {block}", fill="black")
    ends = f"step 1 to {rows.shape[1]}, schedule {attribution.steps[0]:.2f} to {attribution.steps[-1]:.2f}"
    draw.text((margin, heat.height + 28), ends, fill="black")
    return page


def colours(values: np.ndarray) -> np.ndarray:
    """Values 0 to 1 as RGB of 0 to 255."""
    places = np.linspace(0, 1, len(_STOPS))
    return np.stack([np.interp(values, places, _STOPS[:, channel]) for channel in range(3)], -1)
