"""An evaluation's report: an aligned table, JSON without NaN, and one HTML page with plots and pictures."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt.errors import InputError, UsageError
from imprompt.evaluation.metrics import Interval
from imprompt.evaluation.run import BARE, Figure, Report

SHOWN = 4  # best and worst pictures of each contender
_CELL = 192


def table(report: Report) -> str:
    """Figures and differences as aligned text, then the notes."""
    figures = [("figure", "of", "value", "95 % interval", "n")]
    for each in report.figures:
        figures.append(
            (each.name, each.contender, f"{each.value.mean:.3f}", _spread(each.value), f"{each.value.n}")
        )
    differences = [("difference", "of", "value", "95 % interval", "real")]
    for one in report.differences:
        said = {True: "yes", False: "no", None: "one picture"}[one.real]
        pair = f"{one.first} - {one.second}"
        differences.append((one.name, pair, f"{one.value.mean:+.3f}", _spread(one.value), said))
    parts = [_aligned(figures), _aligned(differences) if len(differences) > 1 else "", *report.notes]
    return "\n".join(part for part in parts if part) + "\n"


def to_json(report: Report) -> str:
    """Figures, differences, front and settings. Numbers that are not finite are null."""
    content = {
        "figures": [asdict(each) for each in report.figures],
        "differences": [asdict(each) | {"real": each.real} for each in report.differences],
        "front": list(report.front),
        "settings": report.settings,
        "notes": list(report.notes),
        "by_picture": {
            name: {figure: values.tolist() for figure, values in found.items()}
            for name, found in report.by_case.items()
        },
    }
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_target(path: Path) -> None:
    """Raise :class:`InputError` when a file cannot be written there; nothing is left behind."""
    if path.is_dir():
        raise InputError(f"cannot write '{path}': it is a folder.")
    probe = path.with_name(f".{path.name}.probe")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write '{path}' ({error.strerror or error}).") from error


def check_html() -> None:
    """Raise :class:`UsageError` when what draws the page is not installed."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise UsageError(f"the HTML report needs {' and '.join(missing)}: pip install 'imprompt[evaluate]'.")


def html(report: Report) -> str:
    """The page: figures, plots, and the best and worst pictures of each contender. It refers to no other
    file.

    Raises :class:`UsageError` without jinja2 and matplotlib."""
    check_html()
    from jinja2 import Template

    template = Template(
        (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"), autoescape=True
    )
    contenders = [name for name in report.by_case if name != BARE]
    return template.render(
        report=report,
        figures=[(each, _spread(each.value)) for each in report.figures],
        differences=[(each, _spread(each.value)) for each in report.differences],
        plots=[_data_url(plot) for plot in _plots(report)],
        sheets=[(name, *_extremes(report, name)) for name in contenders],
        settings=json.dumps(report.settings, indent=2, ensure_ascii=False),
    )


# ---- private


def _extremes(report: Report, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pictures that a contender follows best and worst by CLIP-I, with what it drew."""
    near = report.by_case[name]["CLIP-I"]
    order = near.argsort(descending=True).tolist()

    def shown(numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                "value": float(near[number]),
                "text": report.cases[number].text,
                "reference": _data_url(report.cases[number].image),
                "alone": [_data_url(image) for image in report.drawn[f"{name} picture"][number][:3]],
                "both": [_data_url(image) for image in report.drawn[f"{name} both"][number][:3]],
            }
            for number in numbers
        ]

    return shown(order[:SHOWN]), shown(order[::-1][: min(SHOWN, max(0, len(order) - SHOWN))])


def _plots(report: Report) -> list[Image.Image]:
    import matplotlib

    matplotlib.use("Agg")
    names = dict.fromkeys(each.name for each in report.figures)
    plots = [_interval_plot(name, [each for each in report.figures if each.name == name]) for name in names]
    return ([_front_plot(report)] if report.front else []) + plots


def _interval_plot(name: str, figures: Sequence[Figure]) -> Image.Image:
    """One figure of all contenders, a row each, with its interval."""
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(5.2, 0.45 * len(figures) + 1.0))
    for row, each in enumerate(figures):
        if each.value.low is not None and each.value.high is not None:
            axes.plot([each.value.low, each.value.high], [row, row], color="#2563eb", linewidth=2)
        axes.plot(each.value.mean, row, "o", color="#18181b")
    axes.set_yticks(range(len(figures)), [each.contender for each in figures])
    axes.set_ylim(-0.6, len(figures) - 0.4)
    axes.invert_yaxis()
    axes.set_title(name, loc="left")
    axes.grid(axis="x", color="#e4e4e7")
    return _rendered(drawing)


def _front_plot(report: Report) -> Image.Image:
    """Text against picture over scale, a line for each contender."""
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(5.2, 4))
    for name in dict.fromkeys(point["contender"] for point in report.front):
        points = [point for point in report.front if point["contender"] == name]
        axes.plot([p["text"] for p in points], [p["picture"] for p in points], "o-", label=name)
        for point in points:
            place = (point["text"], point["picture"])
            axes.annotate(f"{point['scale']:g}", place, textcoords="offset points", xytext=(5, 4), fontsize=8)
    said = "text (CLIP-T)" if report.settings["clip_t"] else "likeness to what the text alone draws"
    axes.set_xlabel(said)
    axes.set_ylabel("picture (CLIP-I)")
    axes.set_title("Text and picture over scale", loc="left")
    axes.legend()
    return _rendered(drawing)


def _rendered(drawing: Any) -> Image.Image:
    from matplotlib import pyplot

    stream = io.BytesIO()
    drawing.savefig(stream, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(drawing)
    return Image.open(stream)


def _data_url(image: Image.Image) -> str:
    shown = image.copy()
    if max(shown.size) > 640:
        shown.thumbnail((640, 640))
    stream = io.BytesIO()
    shown.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _spread(value: Interval) -> str:
    return "" if value.low is None or value.high is None else f"{value.low:.3f} … {value.high:.3f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
