"""``imprompt tune``: which scale, profile and window give most of a text and of a picture at once.

Settings are a sweep like any other; each is drawn with a few seeds and measured (``evaluation.front``). A
folder gets ``best.png`` and ``best.json`` (the chosen request, to be repeated with ``--from``), ``front.png``
(the plot), ``sheet.png`` (the pictures on the front, and the ends) and ``tune.json`` (all figures).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt import output
from imprompt.app.embedding import encoder_of
from imprompt.encoders.images import load_image
from imprompt.errors import InputError, UsageError
from imprompt.evaluation.charts import grid, scatter
from imprompt.evaluation.front import EncoderMeasure, Fidelity, NormalizedScore, choose, pareto_front
from imprompt.generation.engine import Engine, Result
from imprompt.generation.families import find_base
from imprompt.generation.sweep import read_axis, spread
from imprompt.schema.prompt import ImagePrompt, is_saved
from imprompt.schema.request import Request

AXES = ("scale=0.3,0.6,0.9,1.2", "profile=linear,style,ease-out", "end=1,0.6")
"""What is tried when nothing is said."""
_SHOWN = 7  # settings of the front on the sheet, beside the chosen one


@dataclass(frozen=True)
class Tuned:
    """The chosen request, what was measured, and the files."""

    request: Request
    fidelity: Fidelity
    label: str
    measure: str
    paths: tuple[Path, ...]


def tune(
    request: Request,
    folder: str | Path,
    *,
    axes: Sequence[str] = AXES,
    prefer: float = 0.5,
    engine: Engine | None = None,
    say: Callable[[str], None] = print,
) -> Tuned:
    """Draw ``request`` with every setting of ``axes`` (``FIELD=VALUE,…``) and ``request.count`` seeds, and
    choose.

    ``prefer`` is the picture's weight against the text's. Raises :class:`UsageError` for a request without
    text or picture, :class:`InputError` when both ends look the same; nothing is written then.
    """
    if not request.prompt or not request.images:
        raise UsageError("tune: weighs a text against a picture; give both.")
    if saved := next(filter(is_saved, _shown(request)), None):
        raise UsageError(f"tune: compares drawings with the picture itself; '{saved}' holds only features.")
    if not 0 <= prefer <= 1:
        raise UsageError(f"prefer is {prefer}; from 0 (the text) to 1 (the picture) is expected.")
    folder, engine = Path(folder), engine or Engine()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is no folder.")
    asked = spread(request, [read_axis(text) for text in axes])
    seeds = request.count
    # The sweep's last axis is the seed, which turns slowest: setting i is at i, i + settings, …
    settings = len(asked.requests) // seeds
    shared = asked.requests[0].replace(count=seeds)
    of_images = dict.fromkeys(("scale", "adapter", "image_guidance"))
    say(f"drawing {settings} settings and the two ends, with {seeds} seed{'s' * (seeds > 1)} each")
    text_alone = engine.run(shared.replace(images=(), **of_images)).images
    bare = [
        ImagePrompt(prompt.image, adapter=prompt.adapter, framing=prompt.framing) for prompt in request.images
    ]
    alone = shared.replace(prompt="", scale=1.0, images=bare)
    picture_alone = engine.run(alone).images
    between = _between(request, text_alone, picture_alone)
    results = [engine.run(one) for one in asked.requests]
    drawn = [[result.images[0] for result in results[i::settings]] for i in range(settings)]
    found = [between(images) for images in drawn]
    measure = between.measure.name
    chosen, ahead = choose(found, prefer), pareto_front(found)
    for share, what in ((found[chosen].text, "text"), (found[chosen].picture, "picture")):
        if share <= 0:
            way = "smaller" if what == "text" else "larger"
            say(f"no setting has anything of the {what} by this measure; try {way} scales with --sweep")
    labels = [" · ".join(said[: len(axes)]) for said in asked.labels[:settings]]
    paths = _write(folder, results[chosen], found, labels, chosen, ahead, measure, seeds, prefer)
    step = max(1, -(-len(ahead) // _SHOWN))
    few = sorted({*ahead[::step], chosen}, key=ahead.index)
    said = [
        f"{labels[i]} · text {found[i].text:.2f} · picture {found[i].picture:.2f}".replace(" · ", "\n")
        for i in few
    ]
    shown = [load_image(Path(name).expanduser()) for name in _shown(request)]
    pages = [
        [text_alone[s], *(drawn[i][s] for i in few), picture_alone[s], shown[s % len(shown)]]
        for s in range(seeds)
    ]
    sheet = grid(
        [image for page in pages for image in page],
        ["text alone", *said, "picture alone", "the picture"],
        [f"seed {asked.requests[s * settings].seed}" for s in range(seeds)],
        title=f"“{request.prompt}”: the front, from the text to the picture; framed: the chosen setting",
        marked=1 + few.index(chosen),
    )
    output.save_page(sheet, folder / "sheet.png")
    return Tuned(
        results[chosen].request, found[chosen], labels[chosen], measure, (*paths, folder / "sheet.png")
    )


def _shown(request: Request) -> list[str]:
    """The pictures of all image prompts."""
    return [name for prompt in request.images for name in prompt.pictures]


def _between(
    request: Request, text_alone: Sequence[Image.Image], picture_alone: Sequence[Image.Image]
) -> NormalizedScore:
    """Fidelity by the adapter's own encoder, between what the text and what the picture draws alone."""
    references = [load_image(Path(name).expanduser()) for name in _shown(request)]
    name = request.adapter or find_base(request.base).defaults.adapter
    encoder = encoder_of(None, request.base, name)
    return NormalizedScore.between(
        EncoderMeasure.between(encoder, text_alone, references), text_alone, picture_alone
    )


def _write(
    folder: Path,
    best: Result,
    found: Sequence[Fidelity],
    labels: Sequence[str],
    chosen: int,
    ahead: Sequence[int],
    measure: str,
    seeds: int,
    prefer: float,
) -> list[Path]:
    figures: dict[str, Any] = {
        "measure": measure,
        "seeds": seeds,
        "prefer": prefer,
        "chosen": labels[chosen],
        "settings": [
            {"setting": label, "text": one.text, "picture": one.picture, "front": i in ahead}
            for i, (label, one) in enumerate(zip(labels, found, strict=True))
        ],
    }
    plot = scatter(
        [(one.text, one.picture) for one in found],
        [label.partition(" · ")[2] or "settings" for label in labels],
        title=f"Text and picture by the {measure}, {seeds} seed{'s' * (seeds > 1)}; ringed: chosen",
        titles=(
            "of the text (0: the picture alone, 1: the text alone)",
            "of the picture (0: the text alone, 1: the picture alone)",
        ),
        front=ahead,
        marked=chosen,
        labels=[label.partition(" · ")[0] for label in labels],
    )
    return [
        *output.save(best, folder / "best.png"),
        output.save_json({"request": json.loads(best.request.to_json())}, folder / "best.json"),
        output.save_json(figures, folder / "tune.json"),
        output.save_page(plot, folder / "front.png"),
    ]
