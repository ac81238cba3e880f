"""The pictures that come with the package to show and to measure with: no stage has seen one of them.

Test pictures of known things in every look, test pictures of things without a word, and what
``outside.py`` makes; all in one sheet with captions, as ``imprompt evaluate`` and ``imprompt demo`` read it.

    python recipes/emoji/heldout.py --out src/imprompt/assets/emoji/eval
"""

import argparse
import json
from pathlib import Path

import numpy as np
from draw import GROUP, LOOKS, Icons, article, caption, draw
from outside import OUTSIDE
from PIL import Image

TEST, COLUMNS, SIZE = 3, 12, 128
GROUPS = 600
"""Groups of the test seed that are looked through."""
EACH = 6
"""At most so many pictures of known things in each look, each a (thing, look) that only the test has; and a
third as many of things without a word."""


def entry(name: str, style: str, split: str, captions: dict[str, str]) -> dict:
    return {
        "concept": name, "style": style, "split": split,
        "captions": {kind: [text] for kind, text in captions.items()},
    }  # fmt: skip


def of_test(icons: Icons) -> tuple[list[np.ndarray], list[dict]]:
    wanted = {(look, known): EACH if known else EACH // 3 for look in LOOKS for known in (True, False)}
    pictures, entries, seen = [], [], set()
    for group in range(GROUPS):
        picture, fact = draw(icons, TEST, group * GROUP)
        look, known = fact["look"], bool(fact["concept"])
        name = fact["concept"] or icons.rows[fact["icon"]]["slug"].replace("-", " ")
        if not wanted[look, known] or fact["count"] != 1 or (name, look) in seen:
            continue
        wanted[look, known] -= 1
        seen.add((name, look))
        full = caption(fact, np.random.default_rng(0), (True,) * 4)
        said = {"full": full, "style": f"{look} style"} | ({"concept": article(name)} if known else {})
        pictures.append(picture)
        entries.append(entry(name, look, "held_out_pair" if known else "held_out_concept", said))
    return pictures, entries


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pictures, entries = of_test(Icons())
    for name, make in OUTSIDE.items():
        pictures.append(np.asarray(make().resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
        entries.append(entry(name, "outside", "held_out_concept", {"full": ""}))
    rows = -(-len(pictures) // COLUMNS)
    sheet = np.full((rows * SIZE, COLUMNS * SIZE, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // COLUMNS * SIZE, i % COLUMNS * SIZE
        sheet[y : y + SIZE, x : x + SIZE] = picture
    args.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(args.out / "sheet.webp", quality=90, method=6)
    about = {"cell": SIZE, "columns": COLUMNS, "pictures": entries}
    (args.out / "eval.json").write_text(json.dumps(about) + "\n")
    print(f"{len(pictures)} pictures in {args.out}")


if __name__ == "__main__":
    main()
