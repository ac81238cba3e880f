"""``imprompt tune``: which scale, profile and window give most of a text and of a picture at once.

Settings are a sweep like any other; each is drawn with a few seeds and measured (``evaluation.fidelity``). A
folder gets ``best.png`` and ``best.json`` (the chosen request, to be repeated with ``--from``), ``front.png``
(the plot), ``sheet.png`` (the pictures on the front, and the ends) and ``tune.json`` (all figures).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt.app.embed import encoder_of
from imprompt.encoders.images import load_image
from imprompt.errors import InputError, UsageError
from imprompt.evaluation.charts import grid, scatter
from imprompt.evaluation.fidelity import ByEncoder, ByJudge, Fidelity, Measure, choose, fidelities, front
from imprompt.evaluation.judge import Judge
from imprompt.generation import output
from imprompt.generation.engine import Engine, Result
from imprompt.generation.models import EMOJI, find_base
from imprompt.generation.request import ImageRef, Request
from imprompt.generation.sweep import read_axis, spread

AXES = ("scale=0.3,0.5,0.7,0.9", "profile=linear,style,ease-out", "end=1,0.6")
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
    say(f"drawing {settings} settings and the two ends, with {seeds} seeds each")
    text_alone = engine.run(shared.replace(images=(), **of_images)).images
    bare = [ImageRef(path=ref.path, adapter=ref.adapter, framing=ref.framing) for ref in request.images]
    alone = shared.replace(prompt="", scale=1.0, images=bare)
    picture_alone = engine.run(alone).images
    results = [engine.run(one) for one in asked.requests]
    drawn = [[result.images[0] for result in results[i::settings]] for i in range(settings)]
    measure = _measure(request, text_alone)
    found = fidelities(measure, drawn, text_alone, picture_alone)
    chosen, ahead = choose(found, prefer), front(found)
    labels = [" · ".join(said[: len(axes)]) for said in asked.labels[:settings]]
    paths = _write(folder, results[chosen], found, labels, chosen, ahead, measure.name, seeds, prefer)
    step = max(1, -(-len(ahead) // _SHOWN))
    few = sorted({*ahead[::step], chosen}, key=ahead.index)
    columns = ["text alone", *(labels[i] for i in few), "picture alone"]
    pages = [[text_alone[s], *(drawn[i][s] for i in few), picture_alone[s]] for s in range(seeds)]
    said = [f"text {found[i].text:.2f} picture {found[i].picture:.2f}" for i in few]
    sheet = grid(
        [image for page in pages for image in page],
        columns,
        [f"seed {asked.requests[s * settings].seed}" for s in range(seeds)],
        title=f"“{request.prompt}”: from the text to the picture",
        captions=["", *said, ""] * seeds,
        marked=1 + few.index(chosen),
    )
    sheet.save(folder / "sheet.png")
    return Tuned(
        results[chosen].request, found[chosen], labels[chosen], measure.name, (*paths, folder / "sheet.png")
    )


def _measure(request: Request, text_alone: Sequence[Image.Image]) -> Measure:
    references = [load_image(Path(ref.path).expanduser()) for ref in request.images]
    place = EMOJI / "judge.safetensors"
    if request.base == "emoji" and place.is_file():
        judged = ByJudge.of(Judge.load(place), request.prompt, references)
        if judged is not None:
            return judged
    name = request.adapter or find_base(request.base).defaults.adapter
    return ByEncoder.of(encoder_of(None, request.base, name), text_alone, references)


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = output.save(best, folder / "best.png")
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
        for name, text in (("best", best.request.to_json()), ("tune", json.dumps(figures, indent=2))):
            (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
            paths.append(folder / f"{name}.json")
        groups = [label.partition(" · ")[2] or "settings" for label in labels]
        plot = scatter(
            [(one.text, one.picture) for one in found],
            groups,
            titles=(f"of the text ({measure})", f"of the picture ({measure})"),
            front=ahead,
            marked=chosen,
            labels=[label.partition(" · ")[0] for label in labels],
        )
        plot.save(folder / "front.png")
    except OSError as error:
        raise InputError(f"cannot write into '{folder}' ({error.strerror or error}).") from error
    return [*paths, folder / "front.png"]
