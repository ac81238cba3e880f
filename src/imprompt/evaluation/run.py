"""Measure adapters on anyone's pictures: draw with each adapter, score the drawings, compare on the same
seeds.

Three tasks, each with the same pictures and seeds for every contender:

- *picture*: drawn from the picture alone, at the contender's scale: the paper's protocol (Ye et al. 2023,
  §4.2: four samples of each picture; CLIP-I with the picture, CLIP-T with its own caption);
- *both*: drawn from the picture with the text of another: does the text still count?
- *text*: drawn by the bare base from that text: the lower end of CLIP-I, the upper end of CLIP-T.

Without captions and prompts only the task *picture* is measured, and a note says so. The independent unit is
the picture: its samples are averaged first, because more samples say nothing about other pictures. Drawings
are kept in the output folder under a hash of everything they depend on, so an interrupted evaluation
continues.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imprompt.adapter.faces import packs_of
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.checkpoints.contents import Contents
from imprompt.checkpoints.locate import locate
from imprompt.encoders.face_onnx import PACKS, OnnxFaces, how_to_get, installed, is_installed
from imprompt.encoders.images import as_bytes, content_hash, load_image
from imprompt.errors import InputError, UsageError
from imprompt.evaluation.cases import Case, read_cases, with_faces
from imprompt.evaluation.config import BARE, Contender, EvaluateConfig
from imprompt.evaluation.metrics import (
    LEAST_PAIRS,
    Interval,
    bootstrap,
    copy_score,
    cosine,
    diversity,
    found_share,
    paired,
)
from imprompt.evaluation.scorers import (
    FaceReader,
    Scorer,
    encoder_scorer,
    face_reader,
    load_clip,
    load_dino,
    load_own,
    tells_texts,
)
from imprompt.generation.engine import Engine
from imprompt.generation.families import Base, find_base
from imprompt.io import check_path, write_atomic
from imprompt.schema.request import Request

BATCH = 8
_STATED = {"source", "prompts", "only", "ignore", "base", "samples", "steps", "guidance", "seed"}
"""Settings that a report states as they were given."""
ROUNDING = 1e-6
"""Mean differences below this come from the order of sums."""
Values = dict[str, Tensor]
"""A figure's name to its value for each picture, ``N``."""
Drawn = list[list[Image.Image]]
"""The samples of each picture."""


@dataclass(frozen=True)
class Figure:
    """One measured value of one contender."""

    name: str
    contender: str
    value: Interval


@dataclass(frozen=True)
class Difference:
    """The mean of ``first`` minus ``second`` in a figure, picture by picture on the same seeds."""

    name: str
    first: str
    second: str
    value: Interval

    @property
    def real(self) -> bool | None:
        """Whether the interval excludes zero; ``None`` for too few pictures, which have no interval. What
        rounding alone makes is no difference."""
        if abs(self.value.mean) < ROUNDING:
            return False
        if self.value.low is None or self.value.high is None:
            return None
        return self.value.low > 0 or self.value.high < 0

    @property
    def verdict(self) -> str:
        """:attr:`real` in words."""
        if self.real is None:
            return "one picture" if self.value.n == 1 else f"too few pictures ({LEAST_PAIRS} needed)"
        return "yes" if self.real else "no"


@dataclass(frozen=True)
class Report:
    """All figures and drawings of an evaluation, with its settings."""

    by_case: dict[str, Values]
    """Contender to its figures, picture by picture."""
    front: tuple[dict[str, Any], ...]
    """``contender``, ``scale``, ``text`` and ``picture`` (means) for each scale of each contender."""
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    cases: tuple[Case, ...] = field(default=(), repr=False)
    drawn: dict[str, Drawn] = field(default_factory=dict, repr=False)
    """Drawings of ``"CONTENDER TASK"``."""

    @cached_property
    def figures(self) -> tuple[Figure, ...]:
        """The mean of every figure of every contender."""
        return tuple(
            Figure(figure, name, bootstrap(values))
            for name, found in self.by_case.items()
            for figure, values in found.items()
        )

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """Every two contenders in every figure that both have for all pictures."""
        return tuple(
            Difference(figure, second, first, paired(self.by_case[second][figure], values))
            for first, second in combinations(self.by_case, 2)
            for figure, values in self.by_case[first].items()
            if len(self.by_case[second].get(figure, ())) == len(values)
        )


def evaluate(
    config: EvaluateConfig, *, engine: Engine | None = None, say: Callable[[str], None] | None = None
) -> Report:
    """Draw and measure what ``config`` says.

    Raises :class:`InputError` without usable pictures, :class:`ModelError` for a model that cannot be loaded,
    :class:`UsageError` for settings that do not fit together; all before the first drawing, except that an
    adapter made for another base is refused when it is first drawn with.
    """
    say = say or (lambda line: print(line, file=sys.stderr) if not config.quiet else None)
    started = time.monotonic()
    base = find_base(config.base)
    contenders = config.named(base.defaults.adapter)
    _check_request(config)
    look, artist, notes = _prepared(config, base, contenders, engine or Engine())
    cases = look.cases
    say(f"{len(cases)} pictures, {config.samples} samples each: {', '.join(name for name, _ in contenders)}")
    by_case: dict[str, Values] = {}
    drawn: dict[str, Drawn] = {}
    front: list[dict[str, Any]] = []
    with_text = all(case.text for case in cases)
    if with_text:
        drawn[f"{BARE} text"] = bare = artist.draw(BARE, None, "text")
        look.text_alone = look.seen(bare)[0]
        by_case[BARE] = look.both(bare, of_the_base=True)
    else:
        notes.append("no captions: only drawings from the picture alone are measured; --prompts gives texts")
    for name, contender in contenders:
        drawn[f"{name} picture"] = alone = artist.draw(name, contender, "picture")
        by_case[name] = look.alone(alone)
        if with_text:
            drawn[f"{name} both"] = both = artist.draw(name, contender, "both")
            by_case[name] |= look.both(both)
            front += _front(name, contender, config.scales, artist, look, by_case[name])
    settings = config.model_dump(mode="json", include=_STATED) | {
        "pictures": len(cases),
        "contenders": {name: each.model_dump() for name, each in contenders},
        "scorers": [scorer.name for scorer in look.scorers], "clip_t": look.own is not None,
        "seconds": round(time.monotonic() - started), "drawing_seconds": round(artist.seconds, 1),
    }  # fmt: skip
    return Report(by_case, tuple(front), settings, tuple(notes), tuple(cases), drawn)


def _prepared(
    config: EvaluateConfig, base: Base, contenders: Sequence[tuple[str, Contender]], engine: Engine
) -> tuple[_Look, _Artist, list[str]]:
    """What draws and what measures, and notes; raises what :func:`evaluate` says."""
    of_faces = {each.adapter for _, each in contenders if _reads_faces(each.adapter)}
    _check_faces(config, of_faces)
    cases, notes = read_cases(config, base)
    scorers, face = _scorers(config, base, contenders[0][1]), _face_reader(config, of_faces)
    faces = None if face is None else [face(case.image) for case in cases]
    if of_faces and faces is not None:
        kept = with_faces(cases, faces, notes)
        cases, faces = [cases[place] for place in kept], [faces[place] for place in kept]
    elif without := sum(each is None for each in faces or ()):
        notes.append(f"face identity is not measured on pictures in which no face was found ({without})")
    look = _Look(cases, scorers, face, faces)
    return look, _Artist(config, base, engine, cases, of_faces), notes + look.notes


def _front(
    name: str, contender: Contender, scales: Sequence[float], artist: _Artist, look: _Look, own: Values
) -> Iterator[dict[str, Any]]:
    """Text and picture fidelity at each scale, of drawings from picture and text together; ``own`` are the
    figures at the contender's scale."""
    for scale in scales:
        found = own
        if scale != contender.scale:
            found = look.both(artist.draw(f"{name} at {scale:g}", contender.replace(scale=scale), "both"))
        text = found.get("both CLIP-T", found["both text kept"])
        picture = float(found["both CLIP-I"].mean())
        yield {"contender": name, "scale": scale, "text": float(text.mean()), "picture": picture}


def _scorers(config: EvaluateConfig, base: Base, contender: Contender) -> list[Scorer]:
    """CLIP (or what stands in for it), and DINO if named."""
    clip = load_clip(config.clip) if config.clip else None
    if clip is None and base.path is not None and base.path.is_dir():
        clip = load_own(base.path)
    if clip is None:
        encoder: Any = IPAdapter.from_pretrained(contender.adapter).image_encoder
        if encoder is None:
            raise InputError("no model to score with: name a CLIP (--clip FOLDER or hub id).")
        clip = encoder_scorer(encoder)
    return [clip] + ([load_dino(config.dino)] if config.dino else [])


def _face_reader(config: EvaluateConfig, of_faces: Collection[str]) -> FaceReader | None:
    """What finds faces: the models that are named, or those that an adapter which reads faces draws with."""
    if config.face_model is not None:
        return face_reader(OnnxFaces.from_folder(config.face_model))
    if not of_faces:
        return None
    found = Contents.of_file(locate(min(of_faces))[0]).identify(None)
    published = found.published[0] if len(found.published) == 1 else None
    reader = installed(packs_of(found.variants[0], published))
    return None if reader is None else face_reader(reader)


def _check_request(config: EvaluateConfig) -> None:
    """Raise what a request of these settings would, before an encoder is loaded."""
    fields = {"steps": config.steps, "guidance": config.guidance, "device": config.device}
    known = {name: each for name, each in fields.items() if each is not None}
    Request.from_mapping({"prompt": "x", **known})


def _reads_faces(adapter: str) -> bool:
    """Whether an adapter reads a face in the picture. Raises :class:`ModelError` for what is none."""
    found = Contents.of_file(locate(adapter)[0]).identify(None, hashed=False)
    return any(variant.reads_faces for variant in found.variants)


def _check_faces(config: EvaluateConfig, of_faces: Collection[str]) -> None:
    """Raise :class:`UsageError` where adapters read faces and no face model is known."""
    if of_faces and config.face_model is None and not any(map(is_installed, PACKS)):
        raise UsageError(f"adapter '{min(of_faces)}' reads faces: {how_to_get(())}")


# ---- drawing


class _Artist:
    """Draws the tasks through one engine, and keeps drawings in the output folder."""

    def __init__(
        self,
        config: EvaluateConfig,
        base: Base,
        engine: Engine,
        cases: Sequence[Case],
        of_faces: Collection[str],
    ) -> None:
        self.config, self.base, self.engine, self.cases = config, base, engine, cases
        self.of_faces = of_faces
        """The adapters that read faces."""
        self.pictures = {f"case-{number}": case.image for number, case in enumerate(cases)}
        self.hashes = [content_hash(case.image) for case in cases]
        self.seconds = 0.0
        """Time spent on drawing."""

    def draw(self, name: str, contender: Contender | None, task: str) -> Drawn:
        """The samples of each case; those in the output folder are not drawn again."""
        started = time.monotonic()
        jobs = list(product(range(len(self.cases)), range(self.config.samples)))
        requests = [self._request(*job, contender, task) for job in jobs]
        places = [
            self._place(case, asked, contender) for (case, _), asked in zip(jobs, requests, strict=True)
        ]
        found = {n: image for n, place in enumerate(places) if (image := _stored(place)) is not None}
        missing = [number for number in range(len(jobs)) if number not in found]
        with tqdm(total=len(missing), desc=f"{name} {task}", disable=self.config.quiet, leave=False) as bar:
            for start in range(0, len(missing), BATCH):
                part = missing[start : start + BATCH]
                results = self.engine.run_batch([requests[n] for n in part], pictures=self.pictures)
                for number, result in zip(part, results, strict=True):
                    found[number] = result.images[0]
                    _store(places[number], result.images[0])
                bar.update(len(part))
        self.seconds += time.monotonic() - started
        images = [found[number] for number in range(len(jobs))]
        return [images[at : at + self.config.samples] for at in range(0, len(jobs), self.config.samples)]

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
            fields["speed"] = contender.speed
            fields["face_model"] = config.face_model if contender.adapter in self.of_faces else None
        return Request.from_mapping({name: value for name, value in fields.items() if value is not None})

    def _place(self, case: int, request: Request, contender: Contender | None) -> Path | None:
        if self.config.output is None:
            return None
        weights = "" if contender is None else _weights(contender.adapter)
        about = [request.to_json(), self.hashes[case], self.base.fingerprint, weights]
        key = hashlib.blake2b(json.dumps(about).encode(), digest_size=12).hexdigest()
        return self.config.output / "drawings" / f"{key}.png"


def _weights(adapter: str) -> str:
    """A local adapter file's size and time: another file under the old name is drawn anew."""
    path = check_path(adapter, "adapter")
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return " ".join(f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def _stored(place: Path | None) -> Image.Image | None:
    with suppress(InputError):  # not drawn yet, or half-written by a crash
        return None if place is None else load_image(place)
    return None


def _store(place: Path | None, image: Image.Image) -> None:
    if place is not None:
        write_atomic(place, as_bytes(image), overwrite=True)


# ---- scoring


class _Look:
    """Measures drawings, picture by picture.

    ``notes`` say why there is no CLIP-T. Set ``text_alone``, the embeddings of what the bare base draws,
    before :meth:`both`.
    """

    text_alone: Tensor

    def __init__(
        self,
        cases: Sequence[Case],
        scorers: Sequence[Scorer],
        face: FaceReader | None,
        faces: Sequence[Tensor | None] | None,
    ) -> None:
        self.cases, self.scorers, self.face, self.faces = cases, scorers, face, faces
        self.references = [scorer.images([case.image for case in cases]) for scorer in scorers]
        self.own = self.other = None
        captions = [case.caption for case in cases]
        self.notes: list[str] = []
        if not all(captions):
            self.notes.append("no CLIP-T: it needs a caption for each picture")
        elif not tells_texts(scorers[0], self.references[0], captions):
            self.notes.append(
                f"no CLIP-T: '{scorers[0].name}' cannot match these pictures to their captions; name a CLIP "
                "with --clip"
            )
        else:
            self.own = scorers[0].texts(captions)
            self.other = scorers[0].texts([case.text for case in cases])

    def alone(self, drawn: Drawn) -> Values:
        """Figures of drawings from the picture alone."""
        seen = self.seen(drawn)
        values = self._near("", seen)
        if self.own is not None:
            values["CLIP-T"] = _mean(seen[0], self.own)
        pairs = zip(drawn, self.cases, strict=True)
        copies = [[copy_score(image, case.image) for image in samples] for samples, case in pairs]
        values["copy"] = torch.tensor(copies).mean(1)
        if len(drawn[0]) > 1:
            values["diversity"] = torch.tensor([diversity(samples) for samples in seen[0]])
        return values | self._identity(drawn)

    def both(self, drawn: Drawn, *, of_the_base: bool = False) -> Values:
        """Figures of drawings from picture and text, compared with the text alone from the same noise.
        ``of_the_base``: they are those from the text alone."""
        seen = self.seen(drawn)
        values = self._near("both ", seen)
        if self.other is not None:
            values["both CLIP-T"] = _mean(seen[0], self.other)
        values["both text kept"] = cosine(seen[0], self.text_alone).mean(1)
        texts = [case.text for case in self.cases]
        if len(set(texts)) > 1 and not of_the_base:
            values["both text found"] = found_share(seen[0], self.text_alone, texts)
        return values

    def seen(self, drawn: Drawn) -> list[Tensor]:
        """Each scorer's embeddings, ``N K E``."""
        flat = [image for samples in drawn for image in samples]
        return [scorer.images(flat).unflatten(0, (len(drawn), -1)) for scorer in self.scorers]

    def _near(self, task: str, seen: Sequence[Tensor]) -> Values:
        near = zip(("CLIP-I", "DINO"), seen, self.references, strict=False)
        return {task + name: _mean(embeddings, references) for name, embeddings, references in near}

    def _identity(self, drawn: Drawn) -> Values:
        """Cosine of the largest faces; 0 for a drawing without a face. References without a face are left
        out."""
        if self.face is None or self.faces is None:
            return {}
        likeness, there = [], []
        for samples, own in zip(drawn, self.faces, strict=True):
            if own is not None:
                faces = [self.face(image) for image in samples]
                likeness.append([0.0 if face is None else float(face @ own) for face in faces])
                there.append([float(face is not None) for face in faces])
        if not likeness:
            return {}
        return {"face identity": torch.tensor(likeness).mean(1), "face found": torch.tensor(there).mean(1)}


def _mean(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Mean cosine of each picture's samples (``N K E``) to its target (``N E``), ``N``."""
    return (embeddings.double() * targets.double()[:, None]).sum(-1).mean(1)
