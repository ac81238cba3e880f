"""``--sweep``: draw every combination of settings, each with its own request inside, and one page of all."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from imprompt import output
from imprompt.errors import UsageError
from imprompt.evaluation.charts import grid
from imprompt.generation.engine import Engine, Result
from imprompt.generation.sweep import Sweep, expand, read_axis
from imprompt.schema.request import Request


def sweep(
    request: Request,
    axes: Sequence[str],
    target: str | Path,
    *,
    engine: Engine | None = None,
    overwrite: bool = False,
    numbered: bool = False,
) -> tuple[list[Result], list[Path]]:
    """Draw ``request`` with all combinations of ``axes`` (``FIELD=VALUE,…``) and put all on one page.

    Returns the results and the files: ``NAME-1.png``, ``NAME-2.png``, … and last ``NAME-grid.png``. With
    ``overwrite`` files that imprompt did not make are replaced; with ``numbered`` another name is taken where
    one is. All requests are checked before the first is drawn, and nothing is written before the last is.
    Raises :class:`UsageError` for an axis that is unknown or has no effect.
    """
    if isinstance(axes, str):
        raise UsageError(f"sweep: a list of axes is expected; write ['{axes}'].")
    target, engine = Path(target), engine or Engine()
    asked = expand(request, [read_axis(text) for text in axes])
    output.check_target(target, asked.requests, overwrite=overwrite, numbered=numbered, pages=["grid"])
    results = engine.run_batch(asked.requests)
    # Of a clip the page shows the frame in the middle.
    middle = (request.frames or 1) // 2 if request.task == "animate" else 0
    page = sheet(asked, [result.images[min(middle, len(result.images) - 1)] for result in results])
    paths = output.save(results, target, overwrite=overwrite, numbered=numbered, pages={"grid": page})
    return results, paths


def sheet(asked: Sweep, images: Sequence[Image.Image]) -> Image.Image:
    """The page: the first axis runs to the right, all others downwards; above stands what they share."""
    columns = len(asked.axes[0].values)
    rows = ["\n".join(labels[1:]) for labels in asked.labels[::columns]]
    first = asked.requests[0]
    swept = {axis.field for axis in asked.axes}
    shared = [f"“{first.prompt}”"] if first.prompt and "prompt" not in swept else []
    shared += [] if "seed" in swept else [f"seed {first.seed}"]
    return grid(images, asked.axes[0].labels, rows, title=", ".join(shared))
