"""The contact sheet of ``imprompt demo``: what image prompts do, at a glance, drawn with the bundled model.

A band a task (generate, edit, inpaint; structure and style; a clip), each row one reference picture that no
training saw. Every cell is drawn by the same engine as the command line, and the references are written
beside the sheet to play with.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from imprompt import output
from imprompt.catalog import ASSETS
from imprompt.data.rows import Row, read_dataset
from imprompt.encoders.images import load_image
from imprompt.generation.engine import Engine
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import ControlRef, Request

CELL, GAP, MARGIN, HEAD = 128, 8, 24, 44
_INK, _PALE, _LINE = (24, 24, 27), (113, 113, 122), (228, 228, 231)

REFERENCES = (
    ("bus", "twemoji"), ("star", "fluent-mono"), ("red-heart", "noto"), ("rainbow", "twemoji"),
    ("frog", "streamline"),
)  # fmt: skip
"""(concept, style) of held-out pictures, a row each."""
PROMPTS = ("an owl", "a house")
SCALES = (0.3, 0.6, 1.0)
STRENGTHS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
STEPS = 16
ALONE = "emoji"
"""The adapter for pictures shown without text; with text, the base's default."""


@dataclass(frozen=True)
class _Cell:
    title: str
    image: Image.Image
    given: bool = False
    """Shown to the model, not drawn by it: framed."""


_Row = Sequence[_Cell | None]


def contact_sheet(folder: str | Path, *, seed: int = 7, say: Callable[[str], None] = print) -> Path:
    """Draw the sheet into ``folder/contact-sheet.png``; returns its path.

    Raises :class:`~imprompt.errors.ModelError` when the bundled model is not there.
    """
    folder = Path(folder)
    held_out = read_dataset(ASSETS / "eval").rows
    references = _write_references(held_out, folder / "pictures")
    draw = _Artist(Engine(), seed, say)
    first, second, third, *_ = references
    bands = [
        (
            "generate",
            "A picture is the prompt; text and picture together; the scale says whose word counts.",
            [_generate(draw, reference) for reference in references],
        ),
        (
            "edit",
            "A picture to start from, a picture to go towards; the strength says how far.",
            [_edit(draw, first, second), _edit(draw, second, third)],
        ),
        (
            "inpaint",
            "Only what the mask marks is drawn anew; all else stays, pixel for pixel.",
            [_inpaint(draw, third, first), _inpaint(draw, first, second)],
        ),
    ]
    if importlib.util.find_spec("cv2") is not None and (ASSETS / "controlnet-canny").is_dir():
        bands.append(
            (
                "structure",
                "Edges of one picture, the style of another, and the words say what it is.",
                [_structure(draw, shape, references) for shape in references[:2]],
            )
        )
    if (ASSETS / "motion").is_dir():
        bands.append(
            (
                "animate",
                "A picture and a word prompt a clip; beside this sheet its 16 frames move.",
                [_clip(draw, *pair, folder) for pair in zip(PROMPTS, references[1:3], strict=False)],
            )
        )
    path = folder / "contact-sheet.png"
    return output.save_page(_compose(bands), path)


class _Artist:
    """Draws single requests and says how far it is."""

    def __init__(self, engine: Engine, seed: int, say: Callable[[str], None]) -> None:
        self.engine, self.seed, self.say, self.drawn = engine, seed, say, 0
        self.started = time.monotonic()

    def __call__(self, title: str, **fields: object) -> _Cell:
        request = Request.from_mapping({"seed": self.seed, "steps": STEPS, **fields})
        image = self.engine.run(request).images[0]
        self.drawn += 1
        self.say(f"{self.drawn} pictures, {time.monotonic() - self.started:.0f} s: {title}")
        return _Cell(title, image)


def _write_references(held_out: Sequence[Row], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {(row.groups["concept"], row.groups["style"]): row for row in held_out}
    wanted = [key for key in REFERENCES if key in pictures] or list(pictures)[:5]
    paths = []
    for concept, style in wanted:
        image = load_image(pictures[concept, style].read())
        paths.append(folder / f"{concept}-{style}.png")
        output.save_page(image, paths[-1])
    return paths


def _given(title: str, path: Path) -> _Cell:
    return _Cell(title, Image.open(path).convert("RGB"), given=True)


def _generate(draw: _Artist, reference: Path) -> _Row:
    cells: list[_Cell | None] = [
        _given("reference", reference),
        draw("no text", images=(str(reference),), adapter=ALONE),
    ]
    for prompt in PROMPTS:
        cells += [None, draw(f"“{prompt}” alone", prompt=prompt)]
        cells += [
            draw(f"“{prompt}”, {scale:g}", prompt=prompt, images=(ImagePrompt(reference, scale=scale),))
            for scale in SCALES
        ]
    return cells


def _edit(draw: _Artist, start: Path, reference: Path) -> _Row:
    shown = {"image": str(start), "images": (str(reference),), "adapter": ALONE}
    asked = {"task": "edit", "scale": 1.0, **shown}
    drawn = [draw(f"strength {strength:g}", **asked, strength=strength) for strength in STRENGTHS]
    return [_given("picture", start), _given("reference", reference), None, *drawn]


def _inpaint(draw: _Artist, start: Path, reference: Path) -> _Row:
    mask = Image.new("L", (CELL, CELL), 0)
    mask.paste(255, (CELL // 2, 0, CELL, CELL))
    place = start.with_name("right-half.png")
    output.save_page(mask, place)
    shown = {"image": str(start), "mask": str(place), "images": (str(reference),), "adapter": ALONE}
    asked = {"task": "inpaint", **shown}
    drawn = [draw(f"scale {scale:g}", **asked, scale=scale) for scale in (0.4, 0.7, 1.0)]
    drawn += [
        draw(f"another seed, {seed}", **asked, scale=1.0, seed=seed)
        for seed in (draw.seed + 1, draw.seed + 2)
    ]
    return [_given("picture", start), _given("mask", place), _given("reference", reference), None, *drawn]


def _structure(draw: _Artist, shape: Path, references: Sequence[Path]) -> _Row:
    cells: list[_Cell | None] = [_given("edges of", shape), None]
    for style in [other for other in references if other != shape][:3]:
        asked = {
            "images": (str(style),),
            "controls": (ControlRef(kind="canny", path=str(shape)),),
        }
        cells += [_given("style of", style)]
        cells += [draw(f"“{prompt}”", prompt=prompt, **asked, scale=0.8) for prompt in PROMPTS]
        cells += [None]
    return cells[:-1]


def _clip(draw: _Artist, prompt: str, reference: Path, folder: Path) -> _Row:
    request = Request.from_mapping(
        {"task": "animate", "prompt": prompt, "images": (str(reference),), "seed": draw.seed, "steps": STEPS}
    )
    result = draw.engine.run(request)
    draw.say(f"a clip, {time.monotonic() - draw.started:.0f} s")
    output.save(result, folder / f"{reference.stem}.gif")
    frames = [
        _Cell(f"“{prompt}”, {number}", result.images[number]) for number in range(0, len(result.images), 2)
    ]
    return [_given("reference", reference), None, *frames]


def _compose(bands: Sequence[tuple[str, str, Sequence[_Row]]]) -> Image.Image:
    columns = max(sum(1 if cell else 0.25 for cell in row) for _, _, rows in bands for row in rows)
    count = sum(len(rows) for _, _, rows in bands)
    width = int(2 * MARGIN + columns * (CELL + GAP))
    height = 2 * MARGIN + 64 + len(bands) * (HEAD + MARGIN) + count * (CELL + GAP + 20)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text(
        (MARGIN, MARGIN), "imprompt: show a diffusion model a picture and it draws with it", _INK, _font(22)
    )
    pen.text(
        (MARGIN, MARGIN + 30),
        "Framed: what the model was shown (training never saw it). The rest: drawn by the bundled model.",
        _PALE,
        _font(13),
    )
    y = MARGIN + 64
    for name, about, rows in bands:
        pen.line((MARGIN, y, width - MARGIN, y), _LINE)
        pen.text((MARGIN, y + 8), name, _INK, _font(18))
        pen.text((MARGIN + 96, y + 12), about, _PALE, _font(13))
        y += HEAD
        for row in rows:
            x = float(MARGIN)
            for cell in row:
                if cell is None:
                    x += 0.25 * (CELL + GAP)
                    continue
                sheet.paste(cell.image.resize((CELL, CELL), Image.Resampling.LANCZOS), (int(x), y))
                frame = (int(x) - 1, y - 1, int(x) + CELL, y + CELL)
                pen.rectangle(frame, outline=_INK if cell.given else _LINE, width=2 if cell.given else 1)
                pen.text((int(x), y + CELL + 3), cell.title, _PALE, _font(12))
                x += CELL + GAP
            y += CELL + GAP + 20
        y += MARGIN
    return sheet.crop((0, 0, width, y))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
