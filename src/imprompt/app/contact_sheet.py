"""The contact sheet of ``imprompt demo``: what image prompts do, drawn with the bundled model.

One table for each task, with a row for each reference picture; training never saw these pictures. All is
drawn through the engine, as on the command line, and the references are written beside the sheet.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt import output
from imprompt.catalog import ASSETS
from imprompt.data.rows import Row, read_dataset
from imprompt.encoders.images import load_image
from imprompt.evaluation.charts import grid, stacked
from imprompt.generation.engine import Engine, Result
from imprompt.schema.request import Request

REFERENCES = (
    ("bus", "twemoji"), ("star", "fluent-mono"), ("red-heart", "noto"), ("rainbow", "twemoji"),
    ("frog", "streamline"),
)  # fmt: skip
"""(concept, style) of held-out pictures."""
PROMPTS = ("an owl", "a house")
SCALES = (0.3, 0.6, 1.0)
STRENGTHS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
STEPS = 16
ALONE = "emoji"
"""The adapter for drawings from a picture alone; with text, the base's default."""
_SIDE = 128

Fields = dict[str, Any]
"""Fields of a request."""


def contact_sheet(folder: str | Path, *, seed: int = 7, say: Callable[[str], None] = print) -> Path:
    """Draw the sheet and return its path, ``folder/contact-sheet.png``.

    Raises :class:`~imprompt.errors.ModelError` when the bundled model is missing.
    """
    folder = Path(folder)
    references = _write_references(read_dataset(ASSETS / "eval").rows, folder / "pictures")
    first, second, third, *_ = references
    mask = _write_mask(folder / "pictures" / "right-half.png")
    draw = _Artist(Engine(), seed, say)
    pages = [
        draw.page(
            "generate: from a picture alone, from a text alone, and from both at several scales",
            ("reference",),
            [((reference,), _generate(reference)) for reference in references],
        ),
        draw.page(
            "edit: start from a picture and move towards another; the strength says how far",
            ("picture", "reference"),
            [(pair, _edit(*pair)) for pair in ((first, second), (second, third))],
        ),
        draw.page(
            "inpaint: redraw where the mask is white; the rest stays the same, pixel for pixel",
            ("picture", "mask", "reference"),
            [
                ((start, mask, other), _inpaint(start, mask, other, seed))
                for start, other in ((third, first), (first, second))
            ],
        ),
    ]
    if find_spec("cv2") is not None and (ASSETS / "controlnet-canny").is_dir():
        pairs = [(shape, style) for shape in (first, second) for style in references if style != shape]
        pages.append(
            draw.page(
                "control: the edges of one picture, the style of another, and a text",
                ("edges of", "style of"),
                [(pair, _control(*pair)) for pair in pairs[:4]],
            )
        )
    if (ASSETS / "motion").is_dir():
        pages.append(draw.clips(list(zip(PROMPTS, references[1:3], strict=False)), folder))
    title = "imprompt: image prompts for diffusion models. Framed pictures were shown to the model"
    return output.save_page(stacked(pages, title), folder / "contact-sheet.png")


def _generate(reference: Path) -> dict[str, Fields]:
    settings: dict[str, Fields] = {"no text": {"images": [str(reference)], "adapter": ALONE}}
    for prompt in PROMPTS:
        settings[f"“{prompt}” alone"] = {"prompt": prompt}
        settings |= {
            f"“{prompt}”, scale {scale:g}": {"prompt": prompt, "images": [str(reference)], "scale": scale}
            for scale in SCALES
        }
    return settings


def _edit(start: Path, reference: Path) -> dict[str, Fields]:
    fields = {"task": "edit", "image": start, "images": [str(reference)], "adapter": ALONE, "scale": 1}
    return {f"strength {strength:g}": {**fields, "strength": strength} for strength in STRENGTHS}


def _inpaint(start: Path, mask: Path, reference: Path, seed: int) -> dict[str, Fields]:
    fields = {"task": "inpaint", "image": start, "mask": mask, "images": [str(reference)], "adapter": ALONE}
    scales = {f"scale {scale:g}": {**fields, "scale": scale} for scale in (0.4, 0.7, 1.0)}
    return scales | {f"seed {other}": {**fields, "scale": 1, "seed": other} for other in (seed + 1, seed + 2)}


def _control(shape: Path, style: Path) -> dict[str, Fields]:
    fields = {"images": [str(style)], "controls": [{"kind": "canny", "path": shape}], "scale": 0.8}
    return {f"“{prompt}”": {**fields, "prompt": prompt} for prompt in PROMPTS}


class _Artist:
    """Draws with one engine and reports progress."""

    def __init__(self, engine: Engine, seed: int, say: Callable[[str], None]) -> None:
        self.engine, self.seed, self.say, self.drawn = engine, seed, say, 0
        self.started = time.monotonic()

    def page(
        self, title: str, shown: Sequence[str], rows: Sequence[tuple[Sequence[Path], dict[str, Fields]]]
    ) -> Image.Image:
        """A row for the pictures ``shown`` to the model and a drawing with each of the row's settings."""
        cells: list[Image.Image] = []
        framed: list[int] = []
        for pictures, settings in rows:
            framed += range(len(cells), len(cells) + len(pictures))
            cells += [load_image(path) for path in pictures]
            cells += [result.images[0] for result in self._run(settings)]
        return grid(cells, [*shown, *rows[0][1]], [""] * len(rows), title=title, marked=framed)

    def clips(self, rows: Sequence[tuple[str, Path]], folder: Path) -> Image.Image:
        """A row for each clip: every second frame. The clips are written to ``folder``."""
        cells: list[Image.Image] = []
        for prompt, reference in rows:
            fields = {"task": "animate", "prompt": prompt, "images": [str(reference)]}
            (result,) = self._run({f"clip of “{prompt}”": fields})
            output.save(result, folder / f"{reference.stem}.gif")
            cells += [load_image(reference), *result.images[::2]]
        columns = [
            "reference",
            *(f"frame {number}" for number in range(0, 2 * len(cells) // len(rows) - 2, 2)),
        ]
        title = "animate: a clip from a picture and a text; it also lies beside this sheet as a GIF"
        marked = range(0, len(cells), len(columns))
        return grid(cells, columns, [f"“{prompt}”" for prompt, _ in rows], title=title, marked=marked)

    def _run(self, settings: Mapping[str, Fields]) -> list[Result]:
        """Draw with each of ``settings``, as batches where they can be."""
        fixed = {"seed": self.seed, "steps": STEPS}
        requests = [Request.from_mapping({**fixed, **fields}) for fields in settings.values()]
        results = self.engine.run_batch(requests)
        self.drawn += len(results)
        first, *_, last = [*settings, *settings]
        self.say(f"{self.drawn} drawings, {time.monotonic() - self.started:.0f} s: {first} … {last}")
        return results


def _write_references(held_out: Sequence[Row], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {(row.groups["concept"], row.groups["style"]): row for row in held_out}
    wanted = [key for key in REFERENCES if key in pictures] or list(pictures)[:5]
    return [
        output.save_page(load_image(pictures[key].read()), folder / f"{'-'.join(key)}.png") for key in wanted
    ]


def _write_mask(path: Path) -> Path:
    mask = Image.new("L", (_SIDE, _SIDE), 0)
    mask.paste(255, (_SIDE // 2, 0, _SIDE, _SIDE))
    return output.save_page(mask, path)
