"""The contact sheet of ``imprompt demo``: what image prompts do, at a glance, drawn with the bundled model.

Framed cells were shown to the model, and no training saw them; the others are drawn through the engine, as on
the command line. The references are written beside the sheet.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt import output
from imprompt.catalog import ASSETS
from imprompt.data.read import read_dataset
from imprompt.encoders.images import load_image
from imprompt.evaluation.charts import Band, Cell, bands
from imprompt.generation.engine import Engine
from imprompt.io import check_path
from imprompt.schema.request import Request

STEPS = 16
THINGS = ("an owl", "a house", "a star", "a rocket", "a mushroom", "a fish")
OUTSIDE = (
    "red-disc", "blue-disc", "yellow-disc-on-navy", "sunset", "childs-drawing", "logo", "tartan", "night",
)  # fmt: skip
"""References that are made otherwise than anything that the model was trained on."""
LOOKS = ("sunset", "tulip-blueprint", "cactus-neon")
ALONE = ("penguin-flat", "airplane-watercolour")
EDITED = "koala-flat"
SCALES = (0, 0.25, 0.5, 0.75, 1)
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MOVING = {"a heart growing": "cactus-neon", "a star bouncing": "sunset"}
_SIDE = 128
_SHEET = "contact-sheet.png"


@dataclass(frozen=True)
class _Asked:
    """A cell to be drawn: fields of a request."""

    title: str
    fields: dict[str, Any]


_Row = list[Path | _Asked]
"""Pictures that are shown to the model, and cells to be drawn."""


def contact_sheet(
    folder: str | Path, *, seed: int = 7, overwrite: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Draw the sheet and return its path, ``folder/contact-sheet.png``.

    Raises :class:`~imprompt.errors.ModelError` when the bundled model is missing, and
    :class:`~imprompt.errors.InputError` before anything is written when a file that imprompt did not make is
    in the way, without ``overwrite``.
    """
    folder = check_path(folder)
    references = _references()
    shown = {name: folder / "pictures" / f"{name}.png" for name in references}
    moving = {_clip(folder, prompt): (prompt, shown[name]) for prompt, name in MOVING.items()}
    output.check_together([folder / _SHEET, *shown.values(), *moving], [], overwrite=overwrite)
    output.save_together({shown[name]: image for name, image in references.items()}, overwrite=overwrite)
    draw = _Artist(Engine(), seed, say)
    pages = [draw.band(*band) for band in _bands(shown, seed)]
    if (ASSETS / "motion").is_dir():
        pages.append(draw.clips(moving, overwrite=overwrite))
    title = "imprompt: show a diffusion model a picture and it draws with it"
    note = "Framed: shown to the model, never in its training. The rest: drawn by the bundled model on a CPU."
    return output.save_page(bands(pages, title, note), folder / _SHEET, overwrite=overwrite)


def _bands(shown: dict[str, Path], seed: int) -> list[tuple[str, str, list[_Row]]]:
    """Title, sentence and rows of each band."""
    right, start, sunset = shown["right-half"], shown[EDITED], shown["sunset"]
    seeds = range(seed, seed + 3)
    koala = {"prompt": "a koala", "image": str(start)}
    inpaint = {"task": "inpaint", **koala, "mask": str(right)}
    edges = {"prompt": "a koala", "controls": [{"kind": "canny", "path": str(start)}]}
    halves = [{"image": str(shown[f"{colour}-disc"]), "mask": str(shown[f"{side}-half"])}
              for colour, side in (("red", "left"), ("blue", "right"))]  # fmt: skip
    made: list[tuple[str, str, list[_Row]]] = [
        (
            "One picture, many things",
            "The words say what to draw; the picture says in which look and colours.",
            [[shown[name], *_things(_shown(shown[name]))] for name in LOOKS],
        ),
        (
            "One word, many pictures",
            "“a cat”, each below the picture it was drawn with.",
            [[shown[name] for name in OUTSIDE],
             [_Asked("“a cat”", {"prompt": "a cat", **_shown(shown[name])}) for name in OUTSIDE]],
        ),
        (
            "No words",
            "A picture alone is a prompt, too.",
            [[cell for name in ALONE for cell in (
                shown[name], *_settings("seed", seeds, _shown(shown[name])))]],
        ),
        (
            "How much",
            "The scale says how much the picture counts beside “a house”.",
            [[sunset, *_settings("scale", SCALES, {"prompt": "a house", **_shown(sunset)})]],
        ),
        (
            "Where",
            "Each picture has a mask: one for the left half, one for the right.",
            [[shown["red-disc"], shown["blue-disc"], *_things({"images": halves})]],
        ),
        (
            "Edit",
            "From one picture towards another; the strength says how far.",
            [[start, shown["cactus-neon"], *_settings(
                "strength", STRENGTHS, {"task": "edit", **koala, **_shown(shown["cactus-neon"])})]],
        ),
        (
            "Inpaint",
            "What the mask marks is drawn anew, in the look of another picture; the rest stays as it is.",
            [[start, right, *_koalas(inpaint, shown, LOOKS)]],
        ),
    ]  # fmt: skip
    if find_spec("cv2") is not None and (ASSETS / "controlnet-canny").is_dir():
        row = [start, *_koalas(edges, shown, (*LOOKS, "night"))]
        made.append(("Structure", "The edges of the first picture, the look of the others.", [row]))
    return made


def _things(fields: dict[str, Any]) -> _Row:
    return [_Asked(f"“{thing}”", {"prompt": thing, **fields}) for thing in THINGS]


def _settings(name: str, values: Iterable[float], fields: dict[str, Any]) -> _Row:
    return [_Asked(f"{name} {value:g}", fields | {name: value}) for value in values]


def _koalas(fields: dict[str, Any], shown: dict[str, Path], looks: Iterable[str]) -> _Row:
    """Each reference, and beside it what is drawn with it."""
    pairs = [(shown[name], _Asked("“a koala”", fields | _shown(shown[name]))) for name in looks]
    return [cell for pair in pairs for cell in pair]


def _shown(reference: Path) -> dict[str, Any]:
    return {"images": [str(reference)]}


class _Artist:
    """Draws with one engine and reports progress."""

    def __init__(self, engine: Engine, seed: int, say: Callable[[str], None]) -> None:
        self.engine, self.seed, self.say, self.drawn = engine, seed, say, 0
        self.started = time.monotonic()

    def band(self, title: str, about: str, rows: Sequence[_Row]) -> Band:
        """The rows of a band, drawn as batches where they can be."""
        asked = [cell for row in rows for cell in row if isinstance(cell, _Asked)]
        fixed = {"seed": self.seed, "steps": STEPS}
        requests = [Request.from_mapping({**fixed, **cell.fields}) for cell in asked]
        drawn = iter(self.engine.run_batch(requests))
        self.drawn += len(asked)
        self.say(f"{self.drawn} pictures, {time.monotonic() - self.started:.0f} s: {title}")
        cells = [
            [
                Cell(cell.title, next(drawn).images[0]) if isinstance(cell, _Asked) else _given(cell)
                for cell in row
            ]
            for row in rows
        ]
        return Band(title, about, cells)

    def clips(self, moving: Mapping[Path, tuple[str, Path]], *, overwrite: bool) -> Band:
        """A row for each clip, of a prompt and a reference: every second frame. ``moving`` says where the
        clips are written."""
        cells = []
        for place, (prompt, reference) in moving.items():
            fields = {"task": "animate", "prompt": prompt, "seed": self.seed, "steps": STEPS}
            result = self.engine.run(Request.from_mapping(fields | _shown(reference)))
            output.save(result, place, overwrite=overwrite)
            frames = [Cell(f"frame {n + 1}", result.images[n]) for n in range(0, len(result.images), 2)]
            cells.append([_given(reference), *frames])
        self.say(f"{len(cells)} clips, {time.monotonic() - self.started:.0f} s")
        said = " and ".join(f"“{prompt}”" for prompt, _ in moving.values())
        return Band("In motion", f"{said}: the clips lie beside this sheet as GIFs.", cells)


def _given(path: Path) -> Cell:
    return Cell(path.stem.replace("-", " "), load_image(path), framed=True)


def _clip(folder: Path, prompt: str) -> Path:
    return folder / f"{prompt.replace(' ', '-')}.gif"


def _references() -> dict[str, Image.Image]:
    """The held-out pictures of the sheet by name (``thing-look``, or that of one from outside), and two
    masks, ``left-half`` and ``right-half``."""
    found = {}
    for row in read_dataset(ASSETS / "eval").rows:
        name = "-".join(row.groups.values()).replace(" ", "-").replace("'", "").removesuffix("-outside")
        if name in (*LOOKS, *ALONE, EDITED, *OUTSIDE):
            found[name] = load_image(row.read())
    for side, x in (("left", 0), ("right", _SIDE // 2)):
        mask = Image.new("L", (_SIDE, _SIDE), 0)
        mask.paste(255, (x, 0, x + _SIDE // 2, _SIDE))
        found[f"{side}-half"] = mask
    return found
