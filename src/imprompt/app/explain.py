"""Attribution as pictures: a heat map of where an image prompt acted, and a chart of blocks against steps."""

import numpy as np
from PIL import Image, ImageDraw

from imprompt.adapter.recorder import Attribution

# Dark to bright through one hue after the other: readable in grey and by the colour-blind (as "inferno").
_STOPS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float64)
_CELL, _MARGIN = 14, 200


def explain(attribution: Attribution, image: Image.Image) -> dict[str, Image.Image]:
    """Two pages for each image prompt ``G`` from 1: ``where-G``, a heat map over the picture, and ``when-G``.

    All prompts share one colour scale, so that they can be compared.
    """
    pages = {}
    top_where = max(float(attribution.maps.max()), 1e-9)
    top_when = max(float(attribution.strength.max()), 1e-9)
    for g in range(len(attribution.maps)):
        pages[f"where-{g + 1}"] = overlay(image, attribution.maps[g].numpy() / top_where)
        pages[f"when-{g + 1}"] = chart(attribution, g, top_when)
    return pages


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture in grey under a heat map ``(H, W)`` of values 0 to 1, of any size."""
    small = Image.fromarray((np.clip(heat, 0, 1) * 255).round().astype(np.uint8))
    large = np.asarray(small.resize(image.size, Image.Resampling.BICUBIC), np.float64) / 255
    grey = np.asarray(image.convert("L"), np.float64)[..., None]
    return Image.fromarray((0.45 * grey + 0.55 * colours(large)).round().astype(np.uint8))


def chart(attribution: Attribution, prompt: int, top: float) -> Image.Image:
    """Blocks (rows) against steps (columns, pure noise on the left); brightest is ``top``."""
    blocks = list(dict.fromkeys(layer.block for layer in attribution.layers))
    strength = attribution.strength[prompt].numpy()
    owner = np.array([blocks.index(layer.block) for layer in attribution.layers])
    rows = np.stack([strength[:, owner == i].mean(1) for i in range(len(blocks))])
    cells = Image.fromarray(colours(np.clip(rows / top, 0, 1)).round().astype(np.uint8))
    heat = cells.resize((rows.shape[1] * _CELL, rows.shape[0] * _CELL), Image.Resampling.NEAREST)
    page = Image.new("RGB", (_MARGIN + max(heat.width, 160) + 10, heat.height + 44), "white")
    page.paste(heat, (_MARGIN, 24))
    pen = ImageDraw.Draw(page)
    pen.text((4, 4), f"image prompt {prompt + 1}: added / text, brightest {top:.2f}", fill="black")
    for i, block in enumerate(blocks):
        pen.text((4, 24 + i * _CELL), f"{i:>2} {block}", fill="black")
    ends = f"step 1 to {rows.shape[1]}, schedule {attribution.steps[0]:.2f} to {attribution.steps[-1]:.2f}"
    pen.text((_MARGIN, heat.height + 28), ends, fill="black")
    return page


def colours(values: np.ndarray) -> np.ndarray:
    """Values 0 to 1 as RGB values 0 to 255, in a last axis of 3."""
    places = np.linspace(0, 1, len(_STOPS))
    return np.stack([np.interp(values, places, _STOPS[:, channel]) for channel in range(3)], -1)
