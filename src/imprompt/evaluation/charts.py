"""Pages to look at: a labelled grid, bands of pictures, a scatter plot. Drawn with Pillow alone."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_GAP, _MARGIN, _LINE = 8, 16, 18
_INK, _PALE, _RULE, _MARK = (24, 24, 27), (113, 113, 122), (228, 228, 231), (220, 38, 38)
COLOURS = ((37, 99, 235), (234, 88, 12), (22, 163, 74), (147, 51, 234), (202, 138, 4), (8, 145, 178))
_LARGEST, _SMALLEST = 256, 128  # sides of a cell, in pixels
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_Point = tuple[float, float]


def grid(
    images: Sequence[Image.Image],
    columns: Sequence[str],
    rows: Sequence[str] = ("",),
    *,
    title: str = "",
    marked: Collection[int] = (),
) -> Image.Image:
    """``len(rows) × len(columns)`` pictures, row by row, with labels above and beside, on one page.

    The pictures numbered in ``marked`` get a frame. Pictures keep their proportions; large ones are shrunk.
    """
    cells = [_fitted(image) for image in images]
    wide, high = (max(image.size[axis] for image in cells) + _GAP for axis in (0, 1))
    font, bold = ImageFont.load_default(13), ImageFont.load_default(16)
    above, beside = (
        [_wrapped(label, width, font) for label in some] for some, width in ((columns, wide), (rows, 160))
    )
    left = _MARGIN + _width(beside, font) + _GAP * any(rows)
    top = _MARGIN + 2 * _LINE * bool(title) + _LINE * (1 + max(label.count("\n") for label in above))
    width = max(left + len(columns) * wide + _MARGIN, _width([title], bold) + 2 * _MARGIN)
    page = Image.new("RGB", (width, top + len(rows) * high + _MARGIN), "white")
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN, _MARGIN), title, _INK, bold)
    for x, label in enumerate(above):
        pen.text((left + x * wide, top - 3), label, _INK, font, anchor="ld")
    for y, label in enumerate(beside):
        pen.text((_MARGIN, top + y * high), label, _INK, font)
    for number, image in enumerate(cells):
        x, y = left + number % len(columns) * wide, top + number // len(columns) * high
        page.paste(image, (x, y))
        if number in marked:
            box = (x - 3, y - 3, x + image.width + 2, y + image.height + 2)
            pen.rectangle(box, outline=_MARK, width=3)
    return page


@dataclass(frozen=True)
class Cell:
    """A picture with its title below; framed where it was shown to the model."""

    title: str
    image: Image.Image
    framed: bool = False


@dataclass(frozen=True)
class Band:
    """Rows of pictures under a title and a sentence."""

    title: str
    about: str
    rows: Sequence[Sequence[Cell]]


def bands(of: Sequence[Band], title: str, note: str) -> Image.Image:
    """Bands below each other under a title and a note, with a line between them."""
    side = _SMALLEST + _GAP
    columns = max(len(row) for band in of for row in band.rows)
    rows = sum(len(band.rows) for band in of)
    head, foot = 3 * _LINE, _LINE + _GAP
    width, y = 2 * _MARGIN + columns * side, 2 * _MARGIN + 3 * _LINE
    page = Image.new("RGB", (width, y + len(of) * (head + _GAP) + rows * (side + foot)), "white")
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN, _MARGIN), title, _INK, ImageFont.load_default(22))
    pen.text((_MARGIN, _MARGIN + 2 * _LINE), note, _PALE, ImageFont.load_default(13))
    for band in of:
        pen.line((_MARGIN, y, width - _MARGIN, y), _RULE)
        pen.text((_MARGIN, y + _GAP), band.title, _INK, ImageFont.load_default(18))
        pen.text((_MARGIN, y + _GAP + 22), band.about, _PALE, ImageFont.load_default(13))
        y += head
        for row in band.rows:
            for x, cell in enumerate(row):
                left = _MARGIN + x * side
                page.paste(cell.image.resize((_SMALLEST, _SMALLEST), Image.Resampling.LANCZOS), (left, y))
                box = (left - 2, y - 2, left + _SMALLEST + 1, y + _SMALLEST + 1)
                pen.rectangle(box, outline=_MARK if cell.framed else _RULE, width=2 if cell.framed else 1)
                pen.text((left, y + _SMALLEST + 3), cell.title, _PALE, ImageFont.load_default(12))
            y += side + foot
        y += _GAP
    return page


# ---- the scatter plot

_SIZE, _LEFT, _TOP, _RIGHT, _BOTTOM = (950, 560), 76, 64, 214, 60  # in pixels


@dataclass(frozen=True)
class _Axes:
    """The ranges of x and y, and where their values lie on the page."""

    spans: tuple[_Point, _Point]

    def place(self, point: _Point) -> _Point:
        x, y = ((v - low) / (high - low) for v, (low, high) in zip(point, self.spans, strict=True))
        wide, high = _SIZE[0] - _RIGHT - _LEFT, _SIZE[1] - _BOTTOM - _TOP
        return _LEFT + x * wide, _TOP + (1 - y) * high

    def draw(self, pen: ImageDraw.ImageDraw, titles: tuple[str, str], font: _Font) -> None:
        """Lines at round numbers, with the numbers and the axes' titles."""
        (low_x, high_x), (low_y, high_y) = self.spans
        for value, said in _ticks(low_x, high_x):
            x, y = self.place((value, low_y))
            pen.line((x, y, x, _TOP), _RULE)
            pen.text((x, y + 6), said, _PALE, font, anchor="ma")
        for value, said in _ticks(low_y, high_y):
            x, y = self.place((low_x, value))
            pen.line((x, y, _SIZE[0] - _RIGHT, y), _RULE)
            pen.text((x - 8, y), said, _PALE, font, anchor="rm")
        pen.text((_LEFT, _SIZE[1] - 30), titles[0], _INK, font)
        pen.text((12, _TOP - 24), titles[1], _INK, font)


def scatter(
    points: Sequence[_Point],
    groups: Sequence[str],
    *,
    titles: tuple[str, str],
    title: str = "",
    lines: Sequence[Sequence[int]] = (),
    marked: int | None = None,
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """Points (x, y) in the colours of their ``groups``, one name for each point.

    Each of ``lines`` joins the points of these numbers, in this order, and names them by their ``labels``.
    Point ``marked`` gets a ring.
    """
    page = Image.new("RGB", _SIZE, "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    axes = _Axes((_span([x for x, _ in points]), _span([y for _, y in points])))
    axes.draw(pen, titles, font)
    pen.text((12, 10), title, _INK, ImageFont.load_default(16))
    for line in lines:
        pen.line([axes.place(points[i]) for i in line], (161, 161, 170), 2)
    names = list(dict.fromkeys(groups))
    for point, group in zip(points, groups, strict=True):
        pen.circle(axes.place(point), 5, COLOURS[names.index(group) % len(COLOURS)])
    for i in (i for line in lines for i in line):
        x, y = axes.place(points[i])
        pen.text((x + 13, y - 16), labels[i] if labels else "", _PALE, font)
    if marked is not None:
        pen.circle(axes.place(points[marked]), 10, outline=_MARK, width=3)
    for i, name in enumerate(names):
        y = 53 + i * 22
        pen.circle((_SIZE[0] - 181, y), 5, COLOURS[i % len(COLOURS)])
        pen.text((_SIZE[0] - 170, y - 8), _cut(name, 160, font), _INK, font)
    return page


def _span(values: Sequence[float], least: float = 0.1) -> _Point:
    """A range that holds all values with some room, at least ``least`` wide, so that chance looks small."""
    low, high = min(values), max(values)
    room = max(0.05 * (high - low), (least - (high - low)) / 2)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About five round numbers in a range, and how they are written."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(n * step, f"{n * step:.{digits}f}") for n in numbers]


# ---- pictures and texts


def _fitted(image: Image.Image) -> Image.Image:
    """Shrunk to the largest side, or enlarged by a whole number towards the smallest."""
    image = image.convert("RGB")
    longest = max(image.size)
    if longest < _SMALLEST:
        factor = _SMALLEST // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    return image


def _width(labels: Sequence[str], font: _Font) -> int:
    """Width of the longest line of ``labels``."""
    return max(int(font.getlength(line)) for label in labels for line in label.split("\n"))


def _wrapped(text: str, width: float, font: _Font) -> str:
    """``text`` wrapped at spaces to ``width`` pixels, at most eight lines; a longer word is cut."""
    lines: list[str] = []
    for part in text.split("\n"):
        lines.append("")
        for word in part.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= width or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(word)
    return "\n".join(_cut(line, width, font) for line in lines[:8])


def _cut(line: str, width: float, font: _Font) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
