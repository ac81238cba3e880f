"""Pages to look at: pictures in a labelled grid, points with their front, bars. Drawn with Pillow alone."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP, _MARGIN, _LINE = 8, 16, 18
_INK, _PALE, _MARK = (24, 24, 27), (113, 113, 122), (220, 38, 38)
COLOURS = ((37, 99, 235), (234, 88, 12), (22, 163, 74), (147, 51, 234), (202, 138, 4), (8, 145, 178))
_LARGEST, _SMALLEST = 256, 128  # sides of a cell, in pixels
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def grid(
    images: Sequence[Image.Image],
    columns: Sequence[str],
    rows: Sequence[str] = ("",),
    *,
    title: str = "",
    marked: int | None = None,
) -> Image.Image:
    """One page of ``len(rows) × len(columns)`` pictures, row by row, with labels above and beside and a frame
    around number ``marked``. Pictures keep their proportions; large ones are shrunk."""
    shown = [_fitted(image) for image in images]
    wide, high = (max(image.size[axis] for image in shown) for axis in (0, 1))
    font, bold = ImageFont.load_default(13), ImageFont.load_default(16)
    above = [_lines(label, wide, font) for label in columns]
    beside = [_lines(label, 160, font) for label in rows]
    left = _MARGIN + int(max(font.getlength(line) for lines in beside for line in lines))
    left += _GAP if any(rows) else 0
    top = _MARGIN + (2 * _LINE if title else 0) + _LINE * max(len(lines) for lines in above)
    tall = high + _GAP
    width = max(left + len(columns) * (wide + _GAP) + _MARGIN, int(bold.getlength(title)) + 2 * _MARGIN)
    page = Image.new("RGB", (width, top + len(rows) * tall + _MARGIN), "white")
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN, _MARGIN), title, _INK, bold)

    def write(lines: Sequence[str], x: int, y: int) -> None:
        for i, line in enumerate(lines):
            pen.text((x, y + i * _LINE), line, _INK, font)

    for x, lines in enumerate(above):
        write(lines, left + x * (wide + _GAP), top - len(lines) * _LINE)
    for y, lines in enumerate(beside):
        write(lines, _MARGIN, top + y * tall)
    for number, image in enumerate(shown):
        y, x = divmod(number, len(columns))
        place = left + x * (wide + _GAP), top + y * tall
        page.paste(image, place)
        if number == marked:
            box = (place[0] - 3, place[1] - 3, place[0] + image.width + 2, place[1] + image.height + 2)
            pen.rectangle(box, outline=_MARK, width=3)
    return page


def scatter(
    points: Sequence[tuple[float, float]],
    groups: Sequence[str],
    *,
    titles: tuple[str, str],
    title: str = "",
    front: Sequence[int] = (),
    marked: int | None = None,
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """Points (x, y), a colour for each of ``groups`` (one word a point), those of ``front`` joined by a line
    in the order given and named by their ``labels``, and a ring around number ``marked``."""
    width, height, left, top = 760, 560, 76, 64
    page = Image.new("RGB", (width + 190, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    spans = [_span([point[axis] for point in points], 0.1) for axis in (0, 1)]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = ((v - low) / (high - low) for v, (low, high) in zip(point, spans, strict=True))
        return left + x * (width - left - 24), height - 60 - y * (height - 60 - top)

    for axis, span in enumerate(spans):
        for value, said in _ticks(*span):
            x, y = place((value, spans[1][0]) if axis == 0 else (spans[0][0], value))
            end = (x, top) if axis == 0 else (width - 24, y)
            pen.line(((x, y), end), (232, 232, 235))
            at = (x - 12, y + 6) if axis == 0 else (left - 44, y - 8)
            pen.text(at, said, _PALE, font)
    pen.text((12, 10), title, _INK, ImageFont.load_default(16))
    pen.text((left, height - 30), titles[0], _INK, font)
    pen.text((12, top - 24), titles[1], _INK, font)
    if len(front) > 1:
        pen.line([place(points[i]) for i in front], (161, 161, 170), 2)
    names = list(dict.fromkeys(groups))
    for point, group in zip(points, groups, strict=True):
        x, y = place(point)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), COLOURS[names.index(group) % len(COLOURS)])
    if labels is not None:
        for i in front:
            x, y = place(points[i])
            pen.text((x + 13, y - 16), labels[i], _PALE, font)
    if marked is not None:
        x, y = place(points[marked])
        pen.ellipse((x - 10, y - 10, x + 10, y + 10), outline=_MARK, width=3)
    _legend(pen, names, width, font)
    return page


def _legend(pen: ImageDraw.ImageDraw, names: Sequence[str], left: int, font: _Font) -> None:
    for i, name in enumerate(names):
        y = 48 + i * 22
        pen.ellipse((left + 4, y, left + 14, y + 10), COLOURS[i % len(COLOURS)])
        pen.text((left + 20, y - 3), _cut(name, 160, font), _INK, font)


def _span(values: Sequence[float], least: float = 2e-3) -> tuple[float, float]:
    """A range that holds all values, with a little room; ``least`` wide, lest chance look large."""
    low, high = min(values), max(values)
    room = max(0.05 * (high - low), (least - (high - low)) / 2)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers of a range, about five, with how they are written."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(n * step, f"{n * step:.{digits}f}") for n in numbers]


def _fitted(image: Image.Image) -> Image.Image:
    """Shrunk to the largest side, or enlarged by a whole number towards the smallest."""
    image = image.convert("RGB")
    longest = max(image.size)
    if longest < _SMALLEST:
        factor = _SMALLEST // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    return image


def _lines(text: str, width: float, font: _Font) -> list[str]:
    """``text`` broken at its line breaks, and at spaces to ``width`` pixels; a longer word is cut."""
    lines: list[str] = []
    for part in text.split("\n"):
        lines.append("")
        for word in part.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= width or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(word)
    return [_cut(line, width, font) for line in lines[:8]]


def _cut(line: str, width: float, font: _Font) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
