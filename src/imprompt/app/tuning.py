"""Find the settings that keep most of a text and of a picture.

Settings are a sweep; each is drawn with a few seeds and measured by :mod:`imprompt.evaluation.front`. The
folder gets ``best.png`` and ``best.json`` (the chosen request, for ``--from``), ``sheet.png`` (pictures of
the front), ``front.png`` (the plot) and ``tune.json`` (all figures).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from imprompt import output
from imprompt.app.embedding import encoder_of
from imprompt.encoders.images import load_image
from imprompt.errors import InputError, UsageError
from imprompt.evaluation.charts import grid, scatter
from imprompt.evaluation.front import EncoderMeasure, Fidelity, Measure, NormalizedScore, choose, pareto_front
from imprompt.generation.engine import Engine, Result
from imprompt.generation.families import find_base
from imprompt.generation.sweep import expand, read_axis
from imprompt.io import check_path
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request
from imprompt.schema.values import is_saved

AXES = ("scale=0.3,0.6,0.9,1.2", "profile=linear,style,ease-out", "end=1,0.6")
"""The settings that are tried by default; on transformers without the profiles, which are UNets' layers'."""
_FILES = "best.png", "best.json", "tune.json", "front.png", "sheet.png"
_SHOWN = 7  # settings of the front on the sheet, beside the chosen one


@dataclass(frozen=True)
class Tuned:
    """The chosen request, its figures, and the files that were written."""

    request: Request
    fidelity: Fidelity
    label: str
    measure: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class _Trials:
    """What was drawn: every setting, the text alone and the picture alone, each with every seed."""

    labels: list[str]
    best_of: list[Result]
    """The first seed's result of each setting."""
    images: list[list[Image.Image]]
    text_alone: Sequence[Image.Image]
    picture_alone: Sequence[Image.Image]
    seeds: list[int | None]


def tune(
    request: Request,
    folder: str | Path,
    *,
    axes: Sequence[str] | None = None,
    prefer: float = 0.5,
    overwrite: bool = False,
    engine: Engine | None = None,
    measure: Callable[[Sequence[Image.Image], Sequence[Image.Image]], Measure] | None = None,
    say: Callable[[str], None] = print,
) -> Tuned:
    """Draw ``request`` with every setting of ``axes`` (``FIELD=VALUE,…``; ``None``: of :data:`AXES`) and
    choose the best one.

    Each is drawn with ``request.count`` seeds. ``prefer`` weighs the picture (1) against the text (0).
    ``measure`` makes a measure from what the text alone draws and the pictures shown; the default compares by
    the adapter's image encoder. With ``overwrite`` files that imprompt did not make are replaced. Raises
    :class:`UsageError` for a request without text or picture, and :class:`InputError` when the text alone and
    the picture alone look the same, and when a file cannot be written; nothing is written then.
    """
    folder = check_path(folder)
    places = [folder / name for name in _FILES]
    _check(request, folder, prefer)
    output.check_together(places, [request], overwrite=overwrite)
    trials = _draw(request, axes or usual_axes(request), engine or Engine(), say)
    references = [load_image(name) for name in _shown(request)]
    made = (measure or _by_encoder(request))(trials.text_alone, references)
    score = NormalizedScore.between(made, trials.text_alone, trials.picture_alone)
    found = [score(images) for images in trials.images]
    chosen, front = choose(found, prefer), pareto_front(found)
    for share, what, way in (
        (found[chosen].text, "text", "smaller"),
        (found[chosen].picture, "picture", "larger"),
    ):
        if share <= 0:
            say(f"no setting keeps anything of the {what} by this measure; try {way} scales with --sweep")
    best = trials.best_of[chosen]
    figures = {
        "measure": made.name,
        "seeds": len(trials.seeds),
        "prefer": prefer,
        "chosen": trials.labels[chosen],
        "settings": [
            {"setting": label, "text": one.text, "picture": one.picture, "front": i in front}
            for i, (label, one) in enumerate(zip(trials.labels, found, strict=True))
        ],
    }
    contents = (
        best,
        json.loads(output.Record(best.request, best.provenance).to_json(folder)),
        figures,
        _plot(trials, found, front, chosen, made.name),
        _sheet(request, references, trials, found, front, chosen),
    )
    paths = tuple(output.save_together(dict(zip(places, contents, strict=True)), overwrite=overwrite))
    return Tuned(best.request, found[chosen], trials.labels[chosen], made.name, paths)


def _check(request: Request, folder: Path, prefer: float) -> None:
    if not request.prompt or not request.images:
        raise UsageError("tune: weighs a text against a picture; give both.")
    if saved := next(filter(is_saved, _shown(request)), None):
        raise UsageError(f"tune: compares drawings with the picture itself; '{saved}' holds only features.")
    if not 0 <= prefer <= 1:
        raise UsageError(f"prefer is {prefer}; a number from 0 (the text) to 1 (the picture) is expected.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder.")


def usual_axes(request: Request) -> tuple[str, ...]:
    """Those of :data:`AXES` that act on the request's base."""
    transformer = find_base(request.base).kind.denoiser == "transformer"
    return tuple(axis for axis in AXES if not (transformer and axis.startswith("profile=")))


def _shown(request: Request) -> list[str]:
    """The pictures of all image prompts."""
    return [name for prompt in request.images for name in prompt.pictures]


def _draw(request: Request, axes: Sequence[str], engine: Engine, say: Callable[[str], None]) -> _Trials:
    asked = expand(request, [read_axis(text) for text in axes])
    count = request.count
    settings = len(asked.requests) // count  # the seed is the last axis and turns slowest
    say(f"drawing {settings} settings and the two ends, with {count} seed{'s' * (count > 1)} each")
    shared = asked.requests[0].replace(count=count)
    of_images = dict.fromkeys(("scale", "adapter", "image_guidance", "face_model"))
    bare = [
        ImagePrompt(prompt.image, adapter=prompt.adapter, framing=prompt.framing) for prompt in request.images
    ]
    ends = [shared.replace(images=(), **of_images), shared.replace(prompt="", scale=1.0, images=bare)]
    text_alone, picture_alone, *results = engine.run_batch([*ends, *asked.requests])
    return _Trials(
        labels=[" · ".join(labels[: len(axes)]) for labels in asked.labels[:settings]],
        best_of=results[:settings],
        images=[[result.images[0] for result in results[i::settings]] for i in range(settings)],
        text_alone=text_alone.images,
        picture_alone=picture_alone.images,
        seeds=[one.seed for one in asked.requests[::settings]],
    )


def _by_encoder(request: Request) -> Callable[[Sequence[Image.Image], Sequence[Image.Image]], Measure]:
    return partial(EncoderMeasure.between, encoder_of(request.base, request.adapter))


def _plot(
    trials: _Trials, found: Sequence[Fidelity], front: Sequence[int], chosen: int, measure: str
) -> Image.Image:
    count = len(trials.seeds)
    return scatter(
        [(one.text, one.picture) for one in found],
        [label.partition(" · ")[2] or "settings" for label in trials.labels],
        title=f"Text and picture by the {measure}, {count} seed{'s' * (count > 1)}; ringed: chosen",
        titles=(
            "of the text (0: the picture alone, 1: the text alone)",
            "of the picture (0: the text alone, 1: the picture alone)",
        ),
        lines=[front],
        marked=chosen,
        labels=[label.partition(" · ")[0] for label in trials.labels],
    )


def _sheet(
    request: Request,
    references: Sequence[Image.Image],
    trials: _Trials,
    found: Sequence[Fidelity],
    front: Sequence[int],
    chosen: int,
) -> Image.Image:
    """Columns from the text alone to the picture alone, a row a seed; the chosen setting is framed."""
    few = sorted({*front[:: max(1, -(-len(front) // _SHOWN))], chosen}, key=front.index)
    titles = [
        f"{trials.labels[i]} · text {found[i].text:.2f} · picture {found[i].picture:.2f}".replace(" · ", "\n")
        for i in few
    ]
    cells = [
        image
        for s in range(len(trials.seeds))
        for image in (
            trials.text_alone[s],
            *(trials.images[i][s] for i in few),
            trials.picture_alone[s],
            references[s % len(references)],
        )
    ]
    return grid(
        cells,
        ["text alone", *titles, "picture alone", "the picture"],
        [f"seed {seed}" for seed in trials.seeds],
        title=f"“{request.prompt}”: the front, from the text to the picture; framed: the chosen setting",
        marked=[few.index(chosen) + 1],
    )
