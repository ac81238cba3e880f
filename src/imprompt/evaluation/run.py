"""Measure adapters on anyone's pictures: draw with each, look at what was drawn, compare on the same seeds.

Three tasks, each with the same pictures and seeds for every contender:

- *picture*: drawn from the picture alone, at the contender's scale: the paper's protocol (Ye et al. 2023,
  §4.2: four samples a picture; CLIP-I with the picture, CLIP-T with its own caption);
- *both*: drawn from the picture with the text of another: whether the text still counts;
- *text*: the bare base with that text and seed: where CLIP-I starts, and what CLIP-T can reach.

The independent unit is the picture: its samples are averaged first, so more samples narrow no interval that
only more pictures could. Drawings go into the output folder and are found there again by a hash of everything
they depend on, so an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imprompt.data.rows import Row, read_dataset
from imprompt.encoders.images import content_hash, load_image
from imprompt.errors import ImpromptError, InputError
from imprompt.evaluation.config import Contender, EvaluateConfig
from imprompt.evaluation.metrics import Interval, bootstrap, copy_score, cosine, diversity, paired
from imprompt.evaluation.scorers import (
    Scorer,
    encoder_scorer,
    load_clip,
    load_dino,
    load_faces,
    load_own,
    tells_texts,
)
from imprompt.generation.engine import Engine
from imprompt.generation.families import Base, find_base, load_adapter
from imprompt.io import write_atomic
from imprompt.schema.request import Request

BARE = "bare base"
BATCH = 8
Values = dict[str, Tensor]
"""A figure's name to its value for each picture, ``N``."""


@dataclass(frozen=True)
class Case:
    """One reference picture with its own caption and the text it is drawn with."""

    name: str
    image: Image.Image
    caption: str
    text: str


@dataclass(frozen=True)
class Figure:
    """One measured value of one contender."""

    name: str
    contender: str
    value: Interval


@dataclass(frozen=True)
class Difference:
    """How much more of a figure one contender has than another, picture by picture on the same seeds."""

    name: str
    first: str
    second: str
    value: Interval

    @property
    def real(self) -> bool | None:
        """Whether the interval leaves zero out; ``None`` where one picture gives no interval."""
        if self.value.low is None or self.value.high is None:
            return None
        return self.value.low > 0 or self.value.high < 0


@dataclass(frozen=True)
class Report:
    """All figures and differences, the front, the settings, and the drawings to look at."""

    figures: tuple[Figure, ...]
    differences: tuple[Difference, ...]
    front: tuple[dict[str, Any], ...]
    """``contender``, ``scale``, ``text`` and ``picture`` (means) for each scale of each contender."""
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    cases: tuple[Case, ...] = field(default=(), repr=False)
    drawn: dict[str, list[list[Image.Image]]] = field(default_factory=dict, repr=False)
    """``contender task`` to the samples of each picture."""
    by_case: dict[str, Values] = field(default_factory=dict, repr=False)
    """Contender to its figures, picture by picture."""


def evaluate(
    config: EvaluateConfig, *, engine: Engine | None = None, say: Callable[[str], None] | None = None
) -> Report:
    """Draw and measure what ``config`` says.

    Raises :class:`InputError` without usable pictures, :class:`ModelError` for a model that cannot be loaded,
    :class:`UsageError` for what does not fit together; all before the first drawing.
    """
    say = say or (lambda line: print(line, file=sys.stderr) if not config.quiet else None)
    started = time.monotonic()
    base = find_base(config.base)
    contenders = config.named(base.defaults.adapter)
    _check_request(config)
    cases, notes = read_cases(config, base)
    scorers, face = _scorers(config, base, contenders[0][1])
    artist = _Artist(config, base, engine or Engine(), cases)
    with_text = tells_texts(
        scorers[0], scorers[0].images([c.image for c in cases]), [c.caption for c in cases]
    )
    if not with_text:
        notes.append(
            f"no CLIP-T: '{scorers[0].name}' does not tell these captions apart on the true pictures; name a "
            "CLIP with --clip"
        )
    look = _Look(cases, scorers, face, with_text)
    say(f"{len(cases)} pictures, {config.samples} samples each: {', '.join(name for name, _ in contenders)}")
    bare = artist.draw(BARE, None, "text")
    by_case = {BARE: look.both(bare, bare)}
    drawn = {f"{BARE} text": bare}
    front: list[dict[str, Any]] = []
    for name, contender in contenders:
        alone, both = artist.draw(name, contender, "picture"), artist.draw(name, contender, "both")
        drawn |= {f"{name} picture": alone, f"{name} both": both}
        by_case[name] = look.alone(alone) | look.both(both, bare)
        front += _front(name, contender, config.scales, artist, look, bare)
    figures = [
        Figure(figure, name, bootstrap(values))
        for name, found in by_case.items()
        for figure, values in found.items()
    ]
    settings = {
        "base": config.base, "pictures": len(cases), "samples": config.samples, "seed": config.seed,
        "contenders": {name: each.model_dump() for name, each in contenders},
        "scorers": [scorer.name for scorer in scorers], "clip_t": with_text,
        "seconds": round(time.monotonic() - started), "scoring_seconds": round(look.seconds, 1),
    }  # fmt: skip
    return Report(
        tuple(figures), tuple(_differences([BARE, *(name for name, _ in contenders)], by_case)), tuple(front),
        settings, tuple(notes), tuple(cases), drawn, by_case,
    )  # fmt: skip


def _front(
    name: str,
    contender: Contender,
    scales: Sequence[float],
    artist: _Artist,
    look: _Look,
    bare: Sequence[Sequence[Image.Image]],
) -> list[dict[str, Any]]:
    """Text and picture fidelity at each scale, of what picture and text draw together."""
    points = []
    for scale in scales:
        at = contender.model_copy(update={"scale": scale})
        found = look.both(artist.draw(f"{name} at {scale:g}", at, "both"), bare)
        text = found.get("both CLIP-T", found["both text kept"])
        picture = float(found["both CLIP-I"].mean())
        points.append({"contender": name, "scale": scale, "text": float(text.mean()), "picture": picture})
    return points


def read_cases(config: EvaluateConfig, base: Base) -> tuple[list[Case], list[str]]:
    """The pictures to measure on, spread evenly over the source, and what was left out.

    Each is drawn with a line of ``config.prompts``, else with the caption of another picture whose groups are
    all others. Raises :class:`InputError` when nothing can be read."""
    source = config.source
    if source is None:
        place = base.path / "eval" if base.path is not None else None
        if place is None or not place.is_dir():
            raise InputError(
                f"base '{config.base}' brings no pictures to measure on; give a folder of yours."
            )
        source = str(place)
    data = read_dataset(source, only=config.only, captions="optional")
    notes = [*data.notes, *(str(item) for item in data.rejected[:5])]
    picked = _decoded(data.rows, config.n, notes)
    if not picked:
        raise InputError(f"no picture of '{source}' can be read ({notes[-1]}).")
    texts = _prompts(config.prompts)
    rows = [row for row, _ in picked]
    cases = []
    for number, (row, image) in enumerate(picked):
        text = texts[number % len(texts)] if texts else _other_caption(rows, number)
        cases.append(Case(row.name, image, row.caption, text))
    return cases, notes


def _decoded(rows: Sequence[Row], most: int, notes: list[str]) -> list[tuple[Row, Image.Image]]:
    """At most so many rows, spread evenly, with their pictures; what cannot be read is noted."""
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
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompts '{path}' cannot be read: {error}.") from error
    found = [line for line in lines if line]
    if not found:
        raise InputError(f"'{path}' holds no text; one a line is expected.")
    return found


def _other_caption(rows: Sequence[Row], number: int) -> str:
    """A caption of another picture; of what it is where captions have kinds, so that the style is free."""
    mine = rows[number]
    order = [rows[(number + step) % len(rows)] for step in range(1, len(rows))]
    others = [row for row in order if not mine.groups.items() & row.groups.items()] or order
    row = others[0] if others else mine
    return next(iter(row.captions.get("concept", ())), row.caption)


def _scorers(
    config: EvaluateConfig, base: Base, contender: Contender
) -> tuple[list[Scorer], Callable[[Image.Image], Tensor | None] | None]:
    """CLIP (or what stands in for it), DINO if named, and a reader of faces if named."""
    clip = load_clip(config.clip) if config.clip else None
    if clip is None and base.path is not None and base.path.is_dir():
        clip = load_own(base.path)
    if clip is None:
        encoder: Any = load_adapter(contender.adapter).image_encoder
        if encoder is None:
            raise InputError("no model to score with: name a CLIP (--clip FOLDER or hub id).")
        clip = encoder_scorer(encoder)
    scorers = [clip] + ([load_dino(config.dino)] if config.dino else [])
    return scorers, load_faces(config.face_model) if config.face_model else None


class _Artist:
    """Draws the tasks through one engine, and keeps drawings in the output folder."""

    def __init__(self, config: EvaluateConfig, base: Base, engine: Engine, cases: Sequence[Case]) -> None:
        self.config, self.base, self.engine, self.cases = config, base, engine, cases
        self.pictures = {f"case-{number}": case.image for number, case in enumerate(cases)}
        self.hashes = [content_hash(case.image) for case in cases]

    def draw(self, name: str, contender: Contender | None, task: str) -> list[list[Image.Image]]:
        """The samples of each case; those in the output folder are not drawn again."""
        jobs = list(product(range(len(self.cases)), range(self.config.samples)))
        requests = {job: self._request(*job, contender, task) for job in jobs}
        places = {job: self._place(job[0], request, contender) for job, request in requests.items()}
        stored = {job: _stored(place) for job, place in places.items()}
        found = {job: image for job, image in stored.items() if image is not None}
        missing = [job for job in jobs if job not in found]
        with tqdm(total=len(missing), desc=f"{name} {task}", disable=self.config.quiet, leave=False) as bar:
            for start in range(0, len(missing), BATCH):
                part = missing[start : start + BATCH]
                results = self.engine.run_batch([requests[job] for job in part], pictures=self.pictures)
                for job, result in zip(part, results, strict=True):
                    found[job] = result.images[0]
                    _store(places[job], result.images[0])
                bar.update(len(part))
        samples = range(self.config.samples)
        return [[found[case, sample] for sample in samples] for case in range(len(self.cases))]

    def _request(self, case: int, sample: int, contender: Contender | None, task: str) -> Request:
        """Seeds depend on picture and sample alone, so all contenders draw from the same noise."""
        config = self.config
        fields: dict[str, Any] = {
            "base": config.base, "seed": config.seed + case * 1000 + sample, "steps": config.steps,
            "guidance": config.guidance, "device": config.device,
            "prompt": "" if task == "picture" else self.cases[case].text,
        }  # fmt: skip
        if contender is not None:
            shown: dict[str, Any] = {"image": f"case-{case}"}
            if contender.profile is not None:
                shown["profile"] = contender.profile
            fields |= {"images": [shown], "adapter": contender.adapter, "scale": contender.scale}
        return Request.from_mapping({name: value for name, value in fields.items() if value is not None})

    def _place(self, case: int, request: Request, contender: Contender | None) -> Path | None:
        if self.config.output is None:
            return None
        weights = "" if contender is None else _weights(contender.adapter)
        about = [request.to_json(), self.hashes[case], self.base.fingerprint, weights]
        key = hashlib.blake2b(json.dumps(about).encode(), digest_size=12).hexdigest()
        return self.config.output / "drawings" / f"{key}.png"


def _check_request(config: EvaluateConfig) -> None:
    """Raise what a request of these settings would, before an encoder is loaded."""
    fields = {"steps": config.steps, "guidance": config.guidance, "device": config.device}
    known = {name: each for name, each in fields.items() if each is not None}
    Request.from_mapping({"prompt": "x", **known})


def _weights(adapter: str) -> str:
    """A local adapter file's size and time: another file under the old name is drawn anew."""
    path = Path(adapter).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return " ".join(f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def _stored(place: Path | None) -> Image.Image | None:
    if place is None or not place.is_file():
        return None
    try:
        with Image.open(place) as image:
            return image.convert("RGB")
    except OSError:  # half-written by a crash: drawn again
        return None


def _store(place: Path | None, image: Image.Image) -> None:
    if place is None:
        return
    write_atomic(place, lambda stream: image.save(stream, "PNG"), overwrite=True)


class _Look:
    """Measures drawings, picture by picture."""

    def __init__(
        self,
        cases: Sequence[Case],
        scorers: Sequence[Scorer],
        face: Callable[[Image.Image], Tensor | None] | None,
        with_text: bool,
    ) -> None:
        self.cases, self.scorers, self.face = cases, scorers, face
        self.references = [scorer.images([case.image for case in cases]) for scorer in scorers]
        self.own = self.other = None
        if with_text:
            self.own = scorers[0].texts([case.caption for case in cases])
            self.other = scorers[0].texts([case.text for case in cases])
        self.faces = None if face is None else [face(case.image) for case in cases]
        self.seconds = 0.0

    def alone(self, drawn: Sequence[Sequence[Image.Image]]) -> Values:
        """Figures of what the picture alone drew."""
        started = time.monotonic()
        seen = self._seen(drawn)
        values = self._near("", seen)
        if self.own is not None:
            values["CLIP-T"] = _mean(seen[0], self.own)
        copies = [
            [copy_score(image, case.image) for image in some]
            for some, case in zip(drawn, self.cases, strict=True)
        ]
        values["copy"] = torch.tensor(copies).mean(1)
        if len(drawn[0]) > 1:
            values["diversity"] = torch.tensor([diversity(some) for some in seen[0]])
        if self.faces is not None:
            values |= self._identity(drawn)
        self.seconds += time.monotonic() - started
        return values

    def both(self, drawn: Sequence[Sequence[Image.Image]], bare: Sequence[Sequence[Image.Image]]) -> Values:
        """Figures of what picture and text drew, beside what the text alone drew from the same noise."""
        started = time.monotonic()
        seen = self._seen(drawn)
        values = self._near("both ", seen)
        if self.other is not None:
            values["both CLIP-T"] = _mean(seen[0], self.other)
        alone = self._seen(bare)[0] if drawn is not bare else seen[0]
        values["both text kept"] = torch.stack(
            [cosine(mine, text).mean() for mine, text in zip(seen[0], alone, strict=True)]
        )
        self.seconds += time.monotonic() - started
        return values

    def _seen(self, drawn: Sequence[Sequence[Image.Image]]) -> list[Tensor]:
        """Each scorer's embeddings, ``N K E``."""
        flat = [image for some in drawn for image in some]
        return [scorer.images(flat).unflatten(0, (len(drawn), -1)) for scorer in self.scorers]

    def _near(self, task: str, seen: Sequence[Tensor]) -> Values:
        names = ("CLIP-I", "DINO")
        return {
            task + names[place]: _mean(embeddings, self.references[place])
            for place, embeddings in enumerate(seen)
        }

    def _identity(self, drawn: Sequence[Sequence[Image.Image]]) -> Values:
        """Cosine of the largest faces; a drawing without a face has none of the identity."""
        assert self.face is not None
        assert self.faces is not None
        likeness, there = [], []
        for some, own in zip(drawn, self.faces, strict=True):
            if own is None:
                continue
            found = [self.face(image) for image in some]
            likeness.append([0.0 if face is None else float(face @ own) for face in found])
            there.append([float(face is not None) for face in found])
        if not likeness:
            return {}
        return {"face identity": torch.tensor(likeness).mean(1), "face found": torch.tensor(there).mean(1)}


def _mean(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Mean cosine of each picture's samples (``N K E``) to its target (``N E``), ``N``."""
    return (embeddings.double() * targets.double()[:, None]).sum(-1).mean(1)


def _differences(names: Sequence[str], by_case: dict[str, Values]) -> list[Difference]:
    """Every two contenders in every figure they share."""
    return [
        Difference(figure, second, first, paired(by_case[second][figure], values))
        for place, first in enumerate(names)
        for second in names[place + 1 :]
        for figure, values in by_case[first].items()
        if figure in by_case[second] and len(values) == len(by_case[second][figure])
    ]
