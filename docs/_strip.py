"""Draw docs/strip.png, the README's first picture: references (framed), and drawings from each with two
texts.

Run from the repository's root: ``python docs/_strip.py``. The references are held-out pictures.
"""

from pathlib import Path

from imprompt import Engine, Request
from imprompt.catalog import ASSETS
from imprompt.data.read import read_dataset
from imprompt.encoders.images import load_image
from imprompt.evaluation.charts import grid
from imprompt.output import save_page

REFERENCES = (("sunset", "outside"), ("cactus", "neon"), ("tulip", "blueprint"))
TEXTS = ("a heart", "a mushroom")


def main() -> None:
    engine = Engine()
    rows = {(row.groups["concept"], row.groups["style"]): row for row in read_dataset(ASSETS / "eval").rows}
    cells = []
    for name in REFERENCES:
        reference = load_image(rows[name].read())
        cells.append(reference)
        for text in TEXTS:
            request = Request(prompt=text, images=("reference",), steps=16, seed=2)
            cells += engine.run(request, pictures={"reference": reference}).images
    columns = ["picture", *(f"“{text}”" for text in TEXTS)] * len(REFERENCES)
    save_page(grid(cells, columns, marked=range(0, len(cells), 3)), Path("docs/strip.png"), overwrite=True)


if __name__ == "__main__":
    main()
