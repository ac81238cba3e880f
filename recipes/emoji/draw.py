"""Stage 1b: pictures in which look, palette, background and placement vary independently of the concept.

``draw(icons, seed, index)`` gives one 128×128 picture and what it shows; the same (seed, index) gives the
same picture on every machine. Indices come in groups of four that share look, palette and background, which
is what an adapter learns from: member 1 is another concept than member 0, member 2 the same concept again
placed anew, member 3 another concept or a *scene* (shapes, a landscape, a scribble) without a word for it.
In a quarter of the groups member 0 has its icon's own colours and the others take theirs from it.

Seeds: 1 train, 2 validation, 3 test, 4 train in one plain style (``supply.py``), 5 every pair, for the judge
alone, which is an instrument and has to know all that may be drawn. Other training never sees the
(concept, look) pairs and the wordless icons whose hash says validation or test; palettes are drawn anew for
each group. Things stand upright and fill most of the picture, as those that START's UNet has learned.
"""

import colorsys
import json
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from common import STATE
from icons import split_of
from numpy.random import Generator, default_rng

SIZE = 128
GROUP = 4
LOOKS = (
    "flat", "bold outline", "line drawing", "silhouette", "blueprint", "neon", "pixel art", "striped",
    "sticker", "stained glass", "watercolour", "clay",
)  # fmt: skip
BACKGROUNDS = ("white", "plain", "gradient", "striped", "dotted", "checked")
PLAIN_SEED, JUDGE_SEED = 4, 5
SPLITS = {1: "train", 2: "validation", 3: "test", PLAIN_SEED: "train", JUDGE_SEED: "all"}
COLOURS = {
    "red": (218, 38, 46), "orange": (244, 128, 28), "yellow": (250, 208, 44), "green": (52, 160, 72),
    "teal": (24, 158, 158), "blue": (44, 104, 216), "purple": (126, 62, 186), "pink": (242, 112, 172),
    "brown": (128, 78, 44), "grey": (138, 138, 142), "black": (26, 26, 30), "white": (255, 255, 255),
    "navy": (26, 36, 94), "cream": (250, 236, 206),
}  # fmt: skip
PALETTE_WORDS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "grey")
GROUND_WORDS = (*PALETTE_WORDS, "black", "navy", "cream")
WHITE = np.float32([255, 255, 255])
BLACK = np.float32([18, 16, 24])
cv2.setNumThreads(1)


@dataclass(frozen=True)
class Style:
    """What a group shares. ``ramp``: the palette from dark to light (K, 3), or None for the icon's own."""

    look: str
    ramp: np.ndarray | None
    colours: tuple[str, ...] | None
    ground: str
    ground_colours: np.ndarray
    ground_words: tuple[str, ...] | None
    turn: int
    borrowed: bool


PLAIN = Style("flat", None, None, "white", np.stack([WHITE, WHITE]), ("white",), 0, False)
"""How the model of START draws: icons in their own colours on white."""


class Icons:
    """The cache of ``icons.py`` with the indices a draw chooses from."""

    def __init__(self) -> None:
        self.rgba = np.load(STATE / "icons.npy", mmap_mode="r")
        self.rows = json.loads((STATE / "icons.json").read_text())
        self.words = sorted({row["concept"] for row in self.rows if row["concept"]})
        self.of_word = {w: [i for i, r in enumerate(self.rows) if r["concept"] == w] for w in self.words}
        self.wordless = {
            split: [i for i, r in enumerate(self.rows) if not r["concept"] and r["split"] == split]
            for split in ("train", "validation", "test")
        }
        self.wordless["all"] = sorted(i for rows in self.wordless.values() for i in rows)


def jitter(rng: Generator, colour: tuple[int, int, int], much: float = 1.0) -> np.ndarray:
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    h += much * rng.uniform(-0.018, 0.018)
    s = np.clip(s + much * rng.uniform(-0.1, 0.1) * (s > 0.1), 0, 1)
    v = np.clip(v + much * rng.uniform(-0.07, 0.07) * (v < 0.99), 0, 1)
    return np.float32(colorsys.hsv_to_rgb(h % 1, s, v)) * 255


def mix(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    return a * (1 - t) + b * t


def ramp_of(rng: Generator) -> tuple[np.ndarray, tuple[str, ...] | None]:
    kind = rng.choice(["one", "two", "free"], p=[0.45, 0.3, 0.25])
    if kind == "one":
        word = str(rng.choice(PALETTE_WORDS))
        c = jitter(rng, COLOURS[word])
        return np.stack([c * rng.uniform(0.2, 0.4), c * 0.75, c, mix(c, WHITE, rng.uniform(0.5, 0.85))]), (
            word,
        )
    if kind == "two":
        words = [str(w) for w in rng.choice(PALETTE_WORDS, 2, replace=False)]
        words.sort(key=lambda w: np.dot(COLOURS[w], (0.3, 0.59, 0.11)))
        a, b = (jitter(rng, COLOURS[w]) for w in words)
        return np.stack([a * 0.6, a, b, mix(b, WHITE, 0.35)]), tuple(words)
    base, step = rng.uniform(), rng.choice([0.08, 0.16, 0.33, 0.5])
    colours = []
    for i in range(4):
        hue = (base + step * i + rng.uniform(-0.03, 0.03)) % 1
        value = (0.3, 0.6, 0.85, 1.0)[i]
        colours.append(
            np.float32(colorsys.hsv_to_rgb(hue, rng.uniform(0.35, 0.95) * (1 - 0.5 * (i == 3)), value)) * 255
        )
    return np.stack(colours), None


def borrow(rgba: np.ndarray) -> np.ndarray:
    """An icon's own colours from dark to light: the mean colour of each fifth of its luminances."""
    inside = rgba[..., 3] > 200
    colours = rgba[..., :3][inside].astype(np.float32)
    if len(colours) < 50:
        return np.stack([BLACK, WHITE])
    order = np.argsort(colours @ np.float32([0.3, 0.59, 0.11]))
    return np.stack([colours[part].mean(0) for part in np.array_split(order, 5)])


def ground_of(rng: Generator, ramp: np.ndarray | None) -> tuple[str, np.ndarray, tuple[str, ...] | None]:
    kind = str(rng.choice(BACKGROUNDS, p=[0.25, 0.35, 0.2, 0.08, 0.06, 0.06]))
    if kind == "white":
        return kind, np.stack([WHITE, WHITE]), ("white",)
    for _ in range(8):
        words = [str(w) for w in rng.choice(GROUND_WORDS, 2, replace=False)]
        colours = [jitter(rng, COLOURS[w]) for w in words]
        pale = rng.uniform() < 0.35
        if pale:
            colours = [mix(c, WHITE, 0.62) for c in colours]
        if kind in ("striped", "dotted", "checked") and rng.uniform() < 0.5:
            colours[1], words[1] = mix(colours[0], WHITE, 0.45), ""
        if (
            ramp is None
            or min(np.abs(c - d).sum() for c in colours[: 1 + (kind != "plain")] for d in ramp[1:3]) > 110
        ):
            break
    if pale:
        words = [f"pale {w}" if w not in ("cream", "black", "grey", "") else "" for w in words]
    if kind == "gradient" and rng.uniform() < 0.3:  # a third colour, as skies have
        return (
            kind,
            np.stack([colours[0], jitter(rng, COLOURS[str(rng.choice(GROUND_WORDS))]), colours[1]]),
            None,
        )
    used = words[:1] if kind == "plain" or (kind != "gradient" and not words[1]) else words
    return kind, np.stack(colours), tuple(used) if all(used) else None


def style_of(seed: int, group: int) -> Style:
    rng = default_rng([seed, group])
    look = LOOKS[int(rng.integers(len(LOOKS)))]
    borrowed = rng.uniform() < 0.28
    ramp, colours = (None, None) if borrowed else ramp_of(rng)
    ground, ground_colours, words = ground_of(rng, ramp)
    if look == "neon":  # a dark room, whatever its hue
        ground_colours = np.stack([c * 0.1 + rng.uniform(6, 16) for c in ground_colours])
        ground, words = "plain" if ground == "white" else ground, None
    if look == "blueprint":
        ground_colours = np.stack([jitter(rng, (34, 84, 168)), jitter(rng, (34, 84, 168))])
        ground, words = "plain", None
    return Style(look, ramp, colours, ground, ground_colours, words, int(rng.integers(4)), borrowed)


@lru_cache(maxsize=64)
def _ramp_field(turn: int) -> np.ndarray:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / (SIZE - 1)
    return (y, (x + y) / 2, np.clip(np.hypot(x - 0.5, y - 0.5) * 1.5, 0, 1), 1 - y)[turn]


def paint_ground(style: Style) -> np.ndarray:
    c = style.ground_colours
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    if style.ground in ("white", "plain"):
        return np.broadcast_to(c[0], (SIZE, SIZE, 3)).copy()
    if style.ground == "gradient":
        t = _ramp_field(style.turn) * (len(c) - 1)
        low = np.minimum(t.astype(int), len(c) - 2)
        return c[low] + (t - low)[..., None] * (c[low + 1] - c[low])
    if style.ground == "striped":
        along = (y, x + y, x, x - y)[style.turn]
        which = along // (16 if style.turn % 2 == 0 else 22) % 2
    elif style.ground == "dotted":
        which = np.hypot((x % 32) - 15.5, (y % 32) - 15.5) < 8
    else:
        which = (x // 16 + y // 16) % 2
    return c[which.astype(int)].astype(np.float32)


@lru_cache(maxsize=32)
def _cells(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Cells of a leaded window: their numbers, the leads 0…1, how many."""
    rng = default_rng([77, seed])
    points = np.stack(np.meshgrid(np.arange(-1, 7), np.arange(-1, 7)), -1).reshape(-1, 2) * 25.0 + 6
    points += rng.uniform(-9, 9, points.shape)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    far = np.hypot(x[..., None] - points[:, 0], y[..., None] - points[:, 1])
    two = np.sort(far, -1)[..., :2]
    return (
        far.argmin(-1),
        np.clip(2.2 - (two[..., 1] - two[..., 0]) / 1.6, 0, 1).astype(np.float32),
        len(points),
    )


@lru_cache(maxsize=32)
def _clouds(seed: int) -> np.ndarray:
    """Smooth noise of mean 0 and spread 1, (128, 128, 3)."""
    rng = default_rng([78, seed])
    noise = sum(
        cv2.resize(
            rng.standard_normal((n, n, 3)).astype(np.float32), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC
        )
        * w
        for n, w in ((5, 1.0), (10, 0.7), (20, 0.35))
    )
    return (noise - noise.mean((0, 1))) / noise.std((0, 1))


def lut(ramp: np.ndarray, steps: int | None = None) -> np.ndarray:
    t = np.linspace(0, 1, 256)
    if steps:
        t = np.floor(np.minimum(t, 0.999) * steps) / (steps - 1)
    at = np.linspace(0, 1, len(ramp))
    return np.stack([np.interp(t, at, ramp[:, c]) for c in range(3)], -1).astype(np.float32)


def recolour(colour: np.ndarray, alpha: np.ndarray, ramp: np.ndarray | None, steps: int | None) -> np.ndarray:
    """The picture's colours replaced along ``ramp`` by its luminance, stretched to its own range."""
    if ramp is None:
        return colour
    light = colour @ np.float32([0.3, 0.59, 0.11])
    inside = light[alpha > 0.6]
    if len(inside) < 20:
        return colour
    low, high = np.percentile(inside, (3, 97))
    middle, half = (low + high) / 2, max(high - low, 70) / 2
    place = np.clip((light - middle + half) / (2 * half) * 255, 0, 255).astype(np.uint8)
    return lut(ramp, steps)[place]


def lines(colour: np.ndarray, alpha: np.ndarray, thick: int) -> np.ndarray:
    """Where lines run 0…1: the contour and what is drawn inside it."""
    whole = np.dstack([colour * alpha[..., None] + 128 * (1 - alpha[..., None]), 255 * alpha]).astype(
        np.uint8
    )
    whole = cv2.medianBlur(whole, 3)
    edge = cv2.morphologyEx(whole, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)).max(2).astype(np.float32)
    edge = np.clip((edge - 42) / 40, 0, 1)
    if thick > 1:
        edge = cv2.dilate(edge, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (thick, thick)))
    return cv2.GaussianBlur(edge, (3, 3), 0.6)


def over(ground: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None]
    return ground * (1 - a) + colour * a


def shifted(alpha: np.ndarray, dx: int, dy: int, blur: float) -> np.ndarray:
    return cv2.GaussianBlur(
        cv2.warpAffine(alpha, np.float32([[1, 0, dx], [0, 1, dy]]), (SIZE, SIZE)), (0, 0), blur
    )


def apply_look(
    style: Style, colour: np.ndarray, alpha: np.ndarray, ramp: np.ndarray | None, rng: Generator
) -> np.ndarray:
    """The figure (colours 0…255, alpha 0…1) in the style's look over its background."""
    look, ground = style.look, paint_ground(style)
    own = ramp if ramp is not None else borrow(np.dstack([colour, 255 * alpha]))
    steps = 4 if look in ("flat", "bold outline", "sticker", "pixel art") and ramp is not None else None
    c = recolour(colour, alpha, ramp, steps)
    if look == "flat":
        return over(ground, c, alpha)
    if look == "bold outline":
        rim = cv2.dilate(alpha, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7)))
        inner = lines(colour, alpha, 2) * (alpha > 0.2)
        return over(
            over(over(ground, np.broadcast_to(BLACK, c.shape), rim), c, alpha),
            np.broadcast_to(BLACK, c.shape),
            inner,
        )
    if look == "line drawing":
        ink = mix(own[0], BLACK, 0.25)
        if np.abs(ink - ground.mean((0, 1))).sum() < 170:
            ink = mix(own[-1], WHITE, 0.5)
        return over(ground, np.broadcast_to(ink, c.shape), lines(colour, alpha, 3))
    if look == "silhouette":
        fill = max(
            (own[0], own[len(own) // 2], own[-1]),
            key=lambda f: np.abs(f - ground.mean((0, 1))).sum() - (f is not own[0]) * 90,
        )
        return over(ground, np.broadcast_to(fill, c.shape), np.clip(alpha * 1.4 - 0.2, 0, 1))
    if look == "blueprint":
        grid = np.zeros((SIZE, SIZE), np.float32)
        grid[7::16], grid[:, 7::16] = 0.22, 0.22
        base = over(ground, np.broadcast_to(WHITE, c.shape), grid)
        return over(base, np.broadcast_to(mix(WHITE, own[-1], 0.25), c.shape), lines(colour, alpha, 2))
    if look == "neon":
        edge = lines(colour, alpha, 2)
        bright = cv2.blur(
            cv2.dilate(c.astype(np.float32) * (alpha[..., None] > 0.5), np.ones((7, 7))), (9, 9)
        )
        bright = bright / (bright.max(2, keepdims=True) + 20) * 275
        glow = cv2.GaussianBlur(edge, (0, 0), 4.5) * 1.5
        lit = ground + bright * np.clip(glow, 0, 1)[..., None]
        return over(lit, np.clip(mix(bright, WHITE, 0.35), 0, 255), edge)
    if look == "pixel art":
        small = cv2.resize(
            over(ground, c, (alpha > 0.5).astype(np.float32)), (16, 16), interpolation=cv2.INTER_AREA
        )
        return cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_NEAREST)
    if look == "striped":
        y, x = np.mgrid[0:SIZE, 0:SIZE]
        band = np.clip(np.abs((x + y) % 16 - 8) - 3.5, 0, 1)[..., None].astype(np.float32)
        return over(ground, c * 0.62 * band + mix(c, WHITE, 0.42) * (1 - band), alpha)
    if look == "sticker":
        rim = cv2.GaussianBlur(
            cv2.dilate(alpha, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (13, 13))), (3, 3), 0.7
        )
        under = ground * (1 - 0.55 * shifted(rim, 4, 5, 3.0)[..., None])
        return over(over(under, np.broadcast_to(WHITE, c.shape), rim), c, alpha)
    if look == "stained glass":
        cells, leads, n = _cells(int(rng.integers(32)))
        flat = over(ground, c, alpha)
        # Cells are cut at the figure's contour, or nobody would see what it is.
        cells = (cells + n * (alpha > 0.5)).ravel()
        weight = np.bincount(cells, minlength=2 * n) + 1e-3
        mean = np.stack([np.bincount(cells, flat[..., k].ravel(), 2 * n) / weight for k in range(3)], -1)
        mean *= default_rng([79, int(rng.integers(32))]).uniform(0.78, 1.15, (2 * n, 1))
        glass = np.clip(mean[cells].reshape(SIZE, SIZE, 3).astype(np.float32), 0, 255)
        contour = cv2.dilate(cv2.morphologyEx(alpha, cv2.MORPH_GRADIENT, np.ones((3, 3))), np.ones((2, 2)))
        return over(0.85 * glass + 0.15 * flat, np.broadcast_to(BLACK, c.shape), np.maximum(leads, contour))
    if look == "watercolour":
        noise = _clouds(int(rng.integers(32)))
        y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
        mx, my = x + 1.5 * noise[..., 0], y + 1.5 * noise[..., 1]
        soft = cv2.GaussianBlur(cv2.remap(alpha, mx, my, cv2.INTER_LINEAR), (0, 0), 1.3)
        wet = cv2.GaussianBlur(
            cv2.remap(c.astype(np.float32), mx, my, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE),
            (0, 0),
            2.2,
        )
        rim = np.clip(soft - cv2.GaussianBlur(soft, (0, 0), 4), 0, 1)
        density = np.clip(0.72 + 0.17 * noise[..., 2] + 0.9 * rim, 0.25, 1)
        wash = np.clip(0.62 + 0.13 * noise[..., 1], 0.3, 0.9)[..., None]
        return over(mix(WHITE, ground, wash), wet, soft * density)
    # clay: a rounded body, lit from the upper left, its shadow on the ground
    height = cv2.GaussianBlur(alpha, (0, 0), 5) + 0.5 * cv2.GaussianBlur(alpha, (0, 0), 11)
    light = c @ np.float32([0.3, 0.59, 0.11]) / 255
    height += 0.16 * cv2.GaussianBlur(light * alpha, (0, 0), 2.0)
    gx, gy = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=1.6), cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=1.6)
    lit = (0.6 * gx + 0.75 * gy) / np.sqrt(gx * gx + gy * gy + 0.35)
    body = cv2.GaussianBlur(c.astype(np.float32), (0, 0), 1.2) * (0.92 + 0.55 * lit)[..., None]
    gloss = np.clip(lit - 0.32, 0, 1) * 330
    under = ground * (1 - 0.5 * shifted(alpha, 5, 9, 6.0)[..., None])
    return over(under, np.clip(body + gloss[..., None], 0, 255), alpha)


def warp(
    rgba: np.ndarray, size: float, angle: float, x: float, y: float, mirror: bool
) -> tuple[np.ndarray, np.ndarray]:
    """An icon placed, ``size`` px large, its centre at ``x``, ``y``: colours 0…255 and alpha 0…1."""
    n = rgba.shape[0]
    premultiplied = rgba.astype(np.float32)
    premultiplied[..., :3] *= premultiplied[..., 3:] / 255
    s = size / n
    if s < 0.5:
        premultiplied = cv2.resize(premultiplied, (n // 2, n // 2), interpolation=cv2.INTER_AREA)
        n, s = n // 2, s * 2
    cos, sin = s * np.cos(angle), s * np.sin(angle)
    flip = -1 if mirror else 1
    a = np.float32([[flip * cos, -sin, 0], [flip * sin, cos, 0]])
    a[:, 2] = np.float32([x, y]) - a[:, :2] @ np.float32([(n - 1) / 2, (n - 1) / 2])
    out = cv2.warpAffine(premultiplied, a, (SIZE, SIZE), flags=cv2.INTER_LINEAR)
    alpha = out[..., 3] / 255
    return out[..., :3] / np.maximum(alpha, 1e-3)[..., None].clip(1e-3), alpha


def scene(rng: Generator) -> tuple[np.ndarray, np.ndarray, str]:
    """Shapes in greys (the palette is laid over them), alpha, and what kind: what a picture prompt may be."""
    kind = str(rng.choice(["disc", "shapes", "landscape", "scribble", "textile", "rings"]))
    grey, alpha = np.zeros((SIZE, SIZE), np.float32), np.zeros((SIZE, SIZE), np.float32)

    def fill(points: np.ndarray | tuple, tone: float) -> None:
        mask = np.zeros((SIZE, SIZE), np.uint8)
        if isinstance(points, tuple):
            cv2.circle(mask, (int(points[0]), int(points[1])), int(points[2]), 255, -1, cv2.LINE_AA)
        else:
            cv2.fillPoly(mask, [points.astype(np.int32)], 255, cv2.LINE_AA)
        m = mask.astype(np.float32) / 255
        grey[:] = grey * (1 - m) + tone * m
        alpha[:] = np.maximum(alpha, m)

    if kind == "disc":
        fill((rng.uniform(50, 78), rng.uniform(50, 78), rng.uniform(24, 54)), 0.6)
        if rng.uniform() < 0.4:
            fill((rng.uniform(40, 88), rng.uniform(40, 88), rng.uniform(8, 20)), rng.uniform())
    elif kind == "shapes":
        for _ in range(int(rng.integers(3, 8))):
            x, y, r = *rng.uniform(10, 118, 2).tolist(), rng.uniform(10, 34)
            if rng.uniform() < 0.5:
                fill((x, y, r), rng.uniform())
            else:
                turns = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 6))))
                fill(np.stack([x + r * np.cos(turns), y + r * np.sin(turns)], -1), rng.uniform())
    elif kind == "landscape":
        fill((rng.uniform(25, 103), rng.uniform(25, 60), rng.uniform(9, 24)), 0.95)
        for i in range(int(rng.integers(2, 5))):
            x = np.arange(0, 129, 8)
            level = 62 + 18 * i + rng.uniform(4, 14) * np.sin(x / rng.uniform(12, 30) + rng.uniform(0, 6))
            fill(np.concatenate([np.stack([x, level], -1), [[128, 128], [0, 128]]]), 0.65 - 0.2 * i)
    elif kind == "scribble":
        for _ in range(int(rng.integers(3, 9))):
            points = np.cumsum(rng.normal(0, 14, (7, 2)), 0) + rng.uniform(20, 108, 2)
            mask = np.zeros((SIZE, SIZE), np.uint8)
            cv2.polylines(mask, [points.astype(np.int32)], False, 255, int(rng.integers(3, 8)), cv2.LINE_AA)
            m, tone = mask.astype(np.float32) / 255, rng.uniform()
            grey[:] = grey * (1 - m) + tone * m
            alpha[:] = np.maximum(alpha, m)
    elif kind == "textile":
        y, x = np.mgrid[0:SIZE, 0:SIZE]
        p, q = rng.integers(10, 30, 2)
        grey[:] = 0.2 + 0.4 * (x // p % 2) + 0.4 * (y // q % 2) * rng.integers(0, 2)
        alpha[:] = 1
    else:
        x, y, r = *rng.uniform(54, 74, 2).tolist(), rng.uniform(36, 56)
        for i in range(int(rng.integers(2, 5))):
            fill((x, y, max(4, r - 13 * i)), (0.2, 0.9, 0.55, 0.05)[i])
        if rng.uniform() < 0.5:
            fill(np.float32([[x - r, y - 6], [x + r, y - 6], [x + r, y + 6], [x - r, y + 6]]), 0.75)
    return np.repeat(grey[..., None] * 255, 3, -1), alpha, kind


def choose(icons: Icons, rng: Generator, split: str, look: str, wordless: float) -> int:
    if rng.uniform() < wordless:
        return int(rng.choice(icons.wordless[split]))
    for _ in range(200):
        word = icons.words[int(rng.integers(len(icons.words)))]
        if split in ("all", split_of(f"{word}|{look}")):
            break
    return int(rng.choice(icons.of_word[word]))


def draw(
    icons: Icons, seed: int, index: int, style: Style | None = None, icon: int | None = None
) -> tuple[np.ndarray, dict]:
    """Picture ``index`` of ``seed``: uint8 (128, 128, 3), and what it shows, as JSON can hold it."""
    group, member = divmod(index, GROUP)
    shared = style_of(seed, group)
    style = style or shared
    first = choose(icons, default_rng([seed, group, 1]), SPLITS[seed], style.look, 0.3)
    rng = default_rng([seed, group, 2 + member])
    sceneful = member == 3 and rng.uniform() < 0.55 and icon is None
    other = choose(icons, rng, SPLITS[seed], style.look, 0.3)
    if member == 0:
        other = first
    elif member == 2:
        slug = icons.rows[first]["slug"]
        word = icons.rows[first]["concept"]
        same = icons.of_word[word] if word else [first]
        other = int(rng.choice([i for i in same if icons.rows[i]["slug"] == slug] or same))
    chosen = other if icon is None else icon
    ramp = style.ramp
    if ramp is None and member in (1, 3):
        ramp = borrow(np.asarray(icons.rgba[first]))
    fact: dict = {
        "look": style.look, "ground": style.ground, "ground_words": style.ground_words,
        "ground_colours": np.round(style.ground_colours).tolist(), "colours": style.colours,
        "borrowed": style.borrowed, "count": 1, "concept": None, "code": None, "scene": None,
    }  # fmt: skip
    if sceneful:
        colour, alpha, fact["scene"] = scene(rng)
        places = [[0.5, 0.5, 1.0, 0.0]]
    else:
        row = icons.rows[chosen]
        fact |= {"concept": row["concept"], "code": row["code"], "set": row["set"], "icon": chosen}
        rgba = np.asarray(icons.rgba[chosen])
        count = int(rng.choice([1, 2, 3], p=[0.95, 0.03, 0.02])) if style.look != "pixel art" else 1
        mirror = bool(rng.uniform() < 0.1)
        places = []
        for i in range(count):
            size = (
                rng.uniform(94, 118)
                if count == 1
                else rng.uniform(54, 66)
                if count == 2
                else rng.uniform(44, 54)
            )
            if style.look == "pixel art":
                size = max(size, 102)
            room = max(0.0, (SIZE - size) / 2)
            if count == 1:
                x, y = 63.5 + rng.uniform(-0.5, 0.5) * room, 63.5 + rng.uniform(-0.5, 0.5) * room
            else:
                x = SIZE * (i + 0.5) / count + rng.uniform(-4, 4)
                y = 63.5 + rng.uniform(-1, 1) * (22 if count == 3 else 18)
            angle = float(np.clip(rng.normal(0, 2.5), -7, 7))
            places.append([x / SIZE, y / SIZE, size / SIZE, angle])
        colour, alpha = placed(rgba, places, mirror)
        fact |= {"count": count, "mirror": mirror}
    fact["places"] = np.round(places, 3).tolist()
    used = ramp if ramp is not None else borrow(np.dstack([colour, 255 * alpha]))
    fact["ramp"] = np.round(used[np.linspace(0, len(used) - 1, 4).round().astype(int)]).tolist()
    return finished(style, colour, alpha, ramp, rng), fact


def placed(rgba: np.ndarray, places: list[list[float]], mirror: bool) -> tuple[np.ndarray, np.ndarray]:
    """An icon at its places (x, y, size as parts of the picture; degrees): colours (H, W, 3) and alpha."""
    colour, alpha = np.zeros((SIZE, SIZE, 3), np.float32), np.zeros((SIZE, SIZE), np.float32)
    for x, y, size, angle in places:
        one, a = warp(rgba, size * SIZE, np.deg2rad(angle), x * SIZE, y * SIZE, mirror)
        colour, alpha = colour * (1 - a[..., None]) + one * a[..., None], a + alpha * (1 - a)
    return colour / np.maximum(alpha, 1e-3)[..., None], alpha


def finished(
    style: Style, colour: np.ndarray, alpha: np.ndarray, ramp: np.ndarray | None, rng: Generator
) -> np.ndarray:
    """What was placed in a look: uint8 (128, 128, 3)."""
    shown = np.clip(colour, 0, 255).astype(np.float32)
    picture = apply_look(style, shown, alpha.astype(np.float32), ramp, rng)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def plainly(icons: Icons, fact: dict) -> np.ndarray | None:
    """What a drawn picture shows, at the same places, in the icon's own colours on white; None of a scene."""
    if fact["scene"]:
        return None
    colour, alpha = placed(np.asarray(icons.rgba[fact["icon"]]), fact["places"], fact["mirror"])
    return finished(PLAIN, colour, alpha, None, default_rng(0))


def plural(noun: str) -> str:
    if noun.endswith(("fries", "grapes")):
        return noun
    if noun == "face with sunglasses":
        return "faces with sunglasses"
    irregular = {"fish": "fish", "cactus": "cactuses", "strawberry": "strawberries", "wolf": "wolves",
                 "butterfly": "butterflies"}  # fmt: skip
    if noun in irregular:
        return irregular[noun]
    return noun + ("es" if noun.endswith(("s", "x", "ch")) else "s")


def article(phrase: str) -> str:
    if phrase.endswith(("french fries", "grapes")):
        return phrase
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def look_words(look: str, rng: Generator) -> str:
    word = "watercolor" if look == "watercolour" and rng.uniform() < 0.4 else look
    return word if rng.uniform() < 0.2 else f"{word} style"


def ground_phrase(fact: dict) -> str | None:
    words, kind = fact["ground_words"], fact["ground"]
    if not words:
        return None
    if kind in ("white", "plain"):
        return f"on {article(words[0])} background"
    if kind == "gradient":
        return f"on {article(words[0])} to {words[1]} gradient"
    return f"on {article(' and '.join(words))} {kind} background"


def caption(fact: dict, rng: Generator, say: tuple[bool, bool, bool, bool]) -> str:
    """A caption that says (concept, look, palette, background), each where asked for and known."""
    concept, look, palette, ground = say
    noun = fact["concept"] if concept and fact["concept"] else None
    colours = " and ".join(fact["colours"]) if palette and fact["colours"] else None
    parts = []
    if noun or colours:
        count = fact["count"]
        thing = noun or "picture"
        if count > 1 and noun:
            parts.append(
                f"{('', '', 'two', 'three')[count]} {f'{colours} ' if colours else ''}{plural(thing)}"
            )
        else:
            parts.append(article(f"{colours} {thing}" if colours else thing))
    if look:
        words = look_words(fact["look"], rng)
        parts.insert(0 if rng.uniform() < 0.12 else len(parts), words)
    phrase = ground_phrase(fact) if ground else None
    if phrase:
        if parts and rng.uniform() < 0.7 and not parts[-1].endswith("style"):
            parts[-1] += f" {phrase}"
        else:
            parts.append(phrase)
    return ", ".join(parts)
