"""The pictures that an evaluation draws from, each with its own caption and the text it is drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from imprompt.data.read import read_dataset
from imprompt.data.rows import Row
from imprompt.encoders.images import load_image
from imprompt.errors import ImpromptError, InputError
from imprompt.evaluation.config import EvaluateConfig
from imprompt.generation.families import Base

_SHOWN = 5  # of what is left out, by name


@dataclass(frozen=True)
class Case:
    """One reference picture with its own caption and the text it is drawn with; either text may be empty."""

    name: str
    image: Image.Image
    caption: str
    text: str


def read_cases(config: EvaluateConfig, base: Base) -> tuple[list[Case], list[str]]:
    """The pictures to measure on, spread evenly over the source, and notes on what was left out.

    Each is drawn with a line of ``config.prompts``, else with the caption of a picture of other groups.
    Raises :class:`InputError` when no picture can be read."""
    source = _own_source(config, base) if config.source is None else config.source
    data = read_dataset(source, only=config.only, ignore=config.ignore, captions="optional")
    notes = [*data.notes, *(str(item) for item in data.rejected[:_SHOWN])]
    if len(data.rejected) > _SHOWN:
        notes.append(f"and {len(data.rejected) - _SHOWN} more records are left out")
    picked = _decoded(data.rows, config.n, notes)
    if not picked:
        raise InputError(f"no picture of '{source}' can be read ({notes[-1]}).")
    prompts = _prompts(config.prompts)
    rows = [row for row, _ in picked]
    texts = [prompts[n % len(prompts)] if prompts else _other_caption(rows, n) for n in range(len(rows))]
    own = sum(text == row.caption != "" for text, row in zip(texts, rows, strict=True))
    if own and not prompts:
        notes.append(
            f"pictures drawn with their own caption, since no other picture has another: {own}; "
            "--prompts gives texts"
        )
    cases = [
        Case(row.name, image, row.caption, text) for (row, image), text in zip(picked, texts, strict=True)
    ]
    return cases, notes


def with_faces(cases: Sequence[Case], faces: Sequence[Tensor | None], notes: list[str]) -> list[int]:
    """The places of the cases in which a face was found; the others become a note.

    ``faces`` are the embeddings (E) of each case's largest face. Raises :class:`InputError` if none has
    one."""
    kept = [place for place, face in enumerate(faces) if face is not None]
    without = [case.name for case, face in zip(cases, faces, strict=True) if face is None]
    if not kept:
        raise InputError(
            f"no face was found in any of the {len(cases)} pictures, and an adapter reads faces; give "
            "pictures in which a face is seen."
        )
    if without:
        named = ", ".join(without[:_SHOWN]) + ", …" * (len(without) > _SHOWN)
        notes.append(f"left out, since no face was found: {len(without)} ({named})")
    return kept


def _own_source(config: EvaluateConfig, base: Base) -> str:
    """The folder of pictures that comes with a base."""
    place = base.path / "eval" if base.path is not None else None
    if place is None or not place.is_dir():
        raise InputError(
            f"base '{config.base}' comes without pictures to measure on; give a folder of pictures."
        )
    return str(place)


def _decoded(rows: Sequence[Row], most: int, notes: list[str]) -> list[tuple[Row, Image.Image]]:
    """At most ``most`` rows, spread evenly, with their pictures; those that cannot be read become notes."""
    count = min(most, len(rows))
    picked = []
    for row in (rows[place * len(rows) // count] for place in range(count)):
        try:
            picked.append((row, load_image(row.read())))
        except (ImpromptError, OSError) as error:
            notes.append(f"{row.name} is left out: {error}")
    return picked


def _prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompts '{path}' cannot be read: {error}.") from error
    found = [line for line in lines if line]
    if not found:
        raise InputError(f"'{path}' holds no text; a prompt on each line is expected.")
    return found


def _other_caption(rows: Sequence[Row], number: int) -> str:
    """A caption of another picture that differs, its concept where captions have kinds; the own one where
    none does; empty when no picture has any."""
    mine = rows[number]
    others = [row for row in (*rows[number + 1 :], *rows[:number]) if row.caption]
    differ = [row for row in others if row.caption != mine.caption] or others or [mine]
    row = next((row for row in differ if not mine.groups.items() & row.groups.items()), differ[0])
    return next(iter(row.captions.get("concept", ())), row.caption)
