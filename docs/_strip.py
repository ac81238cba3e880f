"""Draw docs/strip.png, the README's first picture: a reference, and what two texts become with it.

Run from the repository's root: ``python docs/_strip.py``. References are held-out pictures.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import imprompt
from imprompt import Engine, Request
from imprompt.data.rows import read_dataset
from imprompt.encoders.images import load_image

EMOJI = Path(imprompt.__file__).parent / "assets" / "emoji"
REFERENCES = (("star", "fluent-mono"), ("red-heart", "noto"), ("frog", "streamline"))
TEXTS = ("an owl", "a house")
CELL, GAP, WIDE, TOP = 128, 10, 34, 30
INK, PALE, FRAME = (24, 24, 27), (82, 82, 91), (234, 88, 12)


def main() -> None:
    engine = Engine()
    rows = {(row.groups["concept"], row.groups["style"]): row for row in read_dataset(EMOJI / "eval").rows}
    width = len(REFERENCES) * (3 * (CELL + GAP) + WIDE) + 2 * GAP - WIDE
    strip = Image.new("RGB", (width, CELL + TOP + 2 * GAP), "white")
    pen = ImageDraw.Draw(strip)
    font = ImageFont.load_default(15)
    x = GAP
    for concept, style in REFERENCES:
        reference = load_image(rows[concept, style].read())
        cells = [("shown", reference)]
        for text in TEXTS:
            request = Request(prompt=text, images=("shown",), scale=0.9, steps=20, seed=7)
            cells.append((f"“{text}”", engine.run(request, pictures={"shown": reference}).images[0]))
        for i, (title, image) in enumerate(cells):
            strip.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, TOP))
            edge = (x - 2, TOP - 2, x + CELL + 1, TOP + CELL + 1)
            pen.rectangle(edge, outline=FRAME if i == 0 else (228, 228, 231), width=2)
            pen.text((x, 6), title, INK if i else FRAME, font)
            x += CELL + GAP
        x += WIDE
    strip.save(Path(__file__).with_name("strip.png"), optimize=True)


if __name__ == "__main__":
    main()
