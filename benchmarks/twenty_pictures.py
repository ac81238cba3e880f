"""Twenty pictures, one command: is the adapter that `imprompt train` leaves better than its start?

Draws badges, a look that the bundled model does not know: twenty to train on with captions beside them, and
others of the same things in other colours, held out. Trains on the twenty with all defaults and
compares the result with its start on those held out, on the same seeds. What counts is the interval of each
difference. Of a picture shown alone, its likeness to the drawing (CLIP-I, copy) should rise; beside another
text it should not fall, and neither should the share of drawings that show what the text says (text found).
"text kept" falls wherever a look is taken over.

    python benchmarks/twenty_pictures.py [--samples N] [--out FOLDER] [--seeds N N] [imprompt train's flags …]
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from imprompt.app.cli import main as imprompt

SIDE = 256
Shape = Callable[[ImageDraw.ImageDraw, Sequence[str]], object]
COLOURS = {
    "red": "#e03131", "orange": "#f76707", "yellow": "#ffd43b", "green": "#37b24d", "teal": "#0ca678",
    "blue": "#228be6", "purple": "#7950f2", "pink": "#f783ac", "brown": "#8d5524", "white": "#f8f9fa",
}  # fmt: skip
GROUNDS = {"black": "#16161d", "navy": "#14213d", "cream": "#fff3d6", "grey": "#868e96"}
RIBBON = "#c2255c"


def _star(pen: ImageDraw.ImageDraw, colour: str, inner: float = 0.45, points: int = 5) -> None:
    corners = [
        (128 + 100 * r * math.sin(a), 132 - 100 * r * math.cos(a))
        for n in range(2 * points)
        for r, a in [(1 if n % 2 == 0 else inner, n * math.pi / points)]
    ]
    pen.polygon(corners, colour)


def _heart(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.ellipse((34, 44, 136, 146), c[0])
    pen.ellipse((120, 44, 222, 146), c[0])
    pen.polygon(((42, 120), (214, 120), (128, 226)), c[0])


def _sun(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    _star(pen, c[0], 0.62, 8)
    pen.ellipse((82, 86, 174, 178), c[1])


def _tree(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.rectangle((110, 150, 146, 232), c[1])
    pen.ellipse((44, 26, 212, 174), c[0])


def _fir(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.rectangle((112, 190, 144, 236), c[1])
    for top, wide in ((22, 50), (76, 70), (130, 92)):
        pen.polygon(((128, top), (128 - wide, top + 74), (128 + wide, top + 74)), c[0])


def _house(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.rectangle((56, 116, 200, 228), c[0])
    pen.polygon(((34, 120), (222, 120), (128, 30)), c[1])
    pen.rectangle((110, 164, 146, 228), c[2])


def _balloon(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.ellipse((58, 20, 198, 180), c[0])
    pen.rectangle((120, 178, 136, 240), c[1])


def _fish(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.polygon(((150, 128), (236, 66), (236, 190)), c[1])
    pen.ellipse((22, 66, 184, 190), c[0])
    pen.ellipse((58, 104, 78, 124), c[2])


def _cloud(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    for box in ((22, 104, 120, 196), (72, 58, 184, 180), (136, 98, 236, 196)):
        pen.ellipse(box, c[0])


def _mushroom(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.rectangle((98, 120, 158, 226), c[1])
    pen.pieslice((28, 30, 228, 230), 180, 360, c[0])


def _umbrella(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.rectangle((120, 120, 136, 228), c[1])
    pen.pieslice((24, 28, 232, 236), 180, 360, c[0])
    pen.pieslice((88, 28, 168, 236), 180, 360, c[2])


def _snowman(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.ellipse((66, 110, 190, 234), c[0])
    pen.ellipse((84, 42, 172, 130), c[0])
    pen.rectangle((96, 16, 160, 54), c[1])


def _sailboat(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.polygon(((34, 178), (222, 178), (184, 228), (72, 228)), c[1])
    pen.polygon(((120, 24), (120, 166), (44, 166)), c[0])
    pen.polygon(((136, 52), (136, 166), (206, 166)), c[2])


def _rocket(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.polygon(((64, 206), (192, 206), (128, 110)), c[1])
    pen.ellipse((92, 16, 164, 212), c[0])
    pen.ellipse((112, 76, 144, 108), c[2])


def _blossom(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    for n in range(6):
        x, y = 128 + 62 * math.cos(n * math.pi / 3), 128 + 62 * math.sin(n * math.pi / 3)
        pen.ellipse((x - 38, y - 38, x + 38, y + 38), c[0])
    pen.ellipse((96, 96, 160, 160), c[1])


def _crown(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.polygon(((36, 64), (84, 128), (128, 44), (172, 128), (220, 64), (204, 200), (52, 200)), c[0])
    pen.rectangle((52, 180, 204, 214), c[1])


def _key(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.ellipse((80, 18, 176, 114), c[0])
    pen.rectangle((116, 100, 140, 236), c[0])
    for y in (176, 212):
        pen.rectangle((140, y, 180, y + 20), c[0])


def _gift(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.rectangle((48, 84, 208, 224), c[0])
    pen.rectangle((112, 84, 144, 224), c[1])
    pen.rectangle((36, 60, 220, 100), c[1])


def _apple(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.ellipse((40, 64, 152, 226), c[0])
    pen.ellipse((104, 64, 216, 226), c[0])
    pen.rectangle((120, 24, 136, 84), c[1])


def _doughnut(pen: ImageDraw.ImageDraw, c: Sequence[str]) -> None:
    pen.ellipse((28, 28, 228, 228), c[1])
    pen.ellipse((44, 44, 212, 212), c[0])


SHAPES: dict[str, Shape] = {
    "star": lambda pen, c: _star(pen, c[0]), "heart": _heart, "sun": _sun, "tree": _tree,
    "christmas tree": _fir, "house": _house, "balloon": _balloon, "fish": _fish, "cloud": _cloud,
    "mushroom": _mushroom, "umbrella": _umbrella, "snowman": _snowman, "sailboat": _sailboat,
    "rocket": _rocket, "blossom": _blossom, "crown": _crown, "key": _key, "gift": _gift, "apple": _apple,
    "doughnut": _doughnut,
}  # fmt: skip


def badge(shape: Shape, colours: Sequence[str], ground: str) -> Image.Image:
    """A thing on a disc with a white ring and two ribbons, on a ground."""
    board = Image.new(
        "RGB", (2 * SIDE, 2 * SIDE), GROUNDS[ground]
    )  # twice the size, so that edges are smooth
    pen = ImageDraw.Draw(board)
    for left in (110, 290):
        pen.polygon(
            ((left, 330), (left + 112, 330), (left + 112, 506), (left + 56, 462), (left, 506)), RIBBON
        )
    pen.ellipse((36, 4, 476, 444), "#f8f9fa")
    pen.ellipse((74, 42, 438, 406), COLOURS[colours[-1]])
    thing = Image.new("L", (SIDE, SIDE), 0)
    plan = Image.new("RGB", (SIDE, SIDE))
    for picture, paint in ((thing, ["#ffffff"] * 3), (plan, [COLOURS[colour] for colour in colours])):
        shape(ImageDraw.Draw(picture), paint)
    board.paste(plan, (128, 96), thing)
    return board.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def make(folder: Path, seed: int) -> None:
    """One captioned picture of each shape, with its colours and ground by ``seed``."""
    folder.mkdir(parents=True)
    luck = random.Random(seed)
    for name, shape in SHAPES.items():
        colours, ground = luck.sample(list(COLOURS), 4), luck.choice(list(GROUNDS))
        file = folder / f"{name.replace(' ', '-')}.png"
        badge(shape, colours, ground).save(file)
        file.with_suffix(".txt").write_text(f"a badge with a {colours[0]} {name} on a {ground} background")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--seeds",
        type=int,
        nargs=2,
        default=(1, 2),
        help="of the pictures to train on, and of those held out",
    )
    parser.add_argument("--start", default="emoji-plus")
    args, flags = parser.parse_known_args()
    place = args.out or Path(tempfile.mkdtemp())
    make(place / "pictures", args.seeds[0])
    make(place / "held-out", args.seeds[1])
    wall, cpu = time.monotonic(), time.process_time()
    if code := imprompt(["train", str(place / "pictures"), "--out", str(place / "run"), *flags]):
        return code
    spent = time.process_time() - cpu
    print(f"training: {spent / 60:.1f} CPU minutes, {(time.monotonic() - wall) / 60:.1f} by the clock")
    contenders = ["--adapter", f"{args.start},label=start", "--adapter", f"{place / 'run'},label=trained"]
    settings = ["--samples", str(args.samples), "--json", str(place / "report.json"), "--scales", ""]
    code = imprompt(["evaluate", str(place / "held-out"), *contenders, *settings])
    found = json.loads((place / "report.json").read_text())
    gained = {
        each["name"]: each["value"] for each in found["differences"] if each["second"] == "start"
    }  # a difference is first minus second, and the first is the trained one
    print(json.dumps({"cpu_minutes": round(spent / 60, 2), "trained - start": gained}, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
