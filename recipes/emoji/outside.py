"""Pictures from outside the recipe to try the model with: made here, so nobody else's.

``OUTSIDE`` names them: discs, a painted sunset, a child's drawing, a logo, a tartan, a night sky. No stage
saw them, and none is drawn with the recipe's own renderer.

    python recipes/emoji/outside.py --out folder
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 256


def disc(colour: str, ground: str) -> Image.Image:
    image = Image.new("RGB", (SIDE * 2, SIDE * 2), ground)
    ImageDraw.Draw(image).ellipse((110, 110, 402, 402), fill=colour)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def sunset() -> Image.Image:
    stops = np.float32([[48, 24, 92], [150, 50, 120], [240, 110, 70], [255, 196, 92]])
    y = np.linspace(0, 3, 170)
    sky = np.stack([np.interp(y, range(4), stops[:, c]) for c in range(3)], -1)[:, None].repeat(SIDE, 1)
    sea = sky[::-1][: SIDE - 170] * 0.55
    noise = np.random.default_rng(4).normal(0, 5, (SIDE, SIDE, 1))
    image = Image.fromarray(np.clip(np.concatenate([sky, sea]) + noise, 0, 255).astype(np.uint8))
    paint = ImageDraw.Draw(image)
    paint.pieslice((94, 120, 162, 220), 180, 360, fill=(255, 236, 170))
    for i in range(7):
        paint.line(
            (128 - 40 + 4 * i, 178 + 10 * i, 128 + 40 - 4 * i, 178 + 10 * i), fill=(255, 190, 110), width=3
        )
    return image.filter(ImageFilter.GaussianBlur(1.2))


def child() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), (252, 250, 244))
    paint, rng = ImageDraw.Draw(image), np.random.default_rng(7)

    def stroke(points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        for _ in range(3):
            wobbly = [(x + rng.normal(0, 2), y + rng.normal(0, 2)) for x, y in points]
            paint.line(wobbly, fill=colour, width=4, joint="curve")

    stroke([(60, 220), (60, 130), (150, 130), (150, 220), (60, 220)], (40, 90, 200))
    stroke([(50, 132), (105, 70), (160, 132)], (210, 50, 50))
    stroke([(95, 220), (95, 175), (118, 175), (118, 220)], (120, 70, 30))
    for i in range(8):
        a = i * np.pi / 4
        stroke([(205, 55), (205 + 38 * np.cos(a), 55 + 38 * np.sin(a))], (245, 190, 30))
    for x in range(10, 250, 16):
        stroke([(x, 245), (x + 4, 226)], (50, 160, 60))
    return image


def logo() -> Image.Image:
    image = Image.new("RGB", (SIDE * 2, SIDE * 2), "white")
    paint = ImageDraw.Draw(image)
    paint.ellipse((96, 96, 416, 416), outline=(0, 128, 128), width=56)
    paint.rectangle((230, 60, 282, 452), fill=(255, 120, 30))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def tartan() -> Image.Image:
    base = np.full((SIDE, SIDE, 3), (150, 22, 34), np.float32)
    stripes = ((0, 30, (20, 60, 40)), (44, 6, (240, 220, 120)), (70, 18, (20, 30, 90)))
    for start, width, colour in stripes:
        for at in range(start, SIDE, 100):
            base[at : at + width] = base[at : at + width] * 0.45 + np.float32(colour) * 0.55
            base[:, at : at + width] = base[:, at : at + width] * 0.45 + np.float32(colour) * 0.55
    return Image.fromarray(base.astype(np.uint8))


def night() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), (14, 18, 48))
    paint, rng = ImageDraw.Draw(image), np.random.default_rng(2)
    for _ in range(60):
        x, y, r = *rng.uniform(0, SIDE, 2), rng.uniform(0.5, 2.2)
        paint.ellipse((x - r, y - r, x + r, y + r), fill=(255, 250, 210))
    paint.ellipse((150, 40, 220, 110), fill=(250, 240, 190))
    paint.ellipse((132, 30, 202, 100), fill=(14, 18, 48))
    return image


OUTSIDE: dict[str, Callable[[], Image.Image]] = {
    "red disc": lambda: disc("#d62728", "white"), "blue disc": lambda: disc("#1f4fd6", "white"),
    "yellow disc on navy": lambda: disc("#ffd23a", "#14204f"), "sunset": sunset, "child's drawing": child,
    "logo": logo, "tartan": tartan, "night": night,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outside"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, make in OUTSIDE.items():
        make().save(args.out / f"{name.replace(' ', '-')}.png")


if __name__ == "__main__":
    main()
