"""An evaluation's report: an aligned table, JSON without NaN, and one HTML page with bars, plot and
pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt.encoders.images import as_bytes
from imprompt.errors import ImpromptError, UsageError
from imprompt.evaluation.charts import scatter
from imprompt.evaluation.config import BARE
from imprompt.evaluation.metrics import Interval
from imprompt.evaluation.run import Figure, Report
from imprompt.io import finite, read_json
from imprompt.output.record import KEY, VERSION
from imprompt.places import check_place, identities

_MARK = b"<title>imprompt evaluate</title>"  # near the start of report.html.j2
SHOWN = 4  # best and worst pictures of each contender


def table(report: Report) -> str:
    """Figures and differences as aligned text, then the notes."""
    figures = [("figure", "of", "value", "95 % interval", "n")]
    for each in report.figures:
        figures.append(
            (each.name, each.contender, f"{each.value.mean:.3f}", _spread(each.value), f"{each.value.n}")
        )
    differences = [("difference", "of", "value", "95 % interval", "real")]
    for one in report.differences:
        pair = f"{one.first} - {one.second}"
        differences.append((one.name, pair, f"{one.value.mean:+.3f}", _spread(one.value), one.verdict))
    parts = [_aligned(figures), _aligned(differences) if len(differences) > 1 else "", *report.notes]
    return "\n".join(part for part in parts if part) + "\n"


def to_json(report: Report) -> str:
    """Figures, differences, front and settings, marked as imprompt's by the key ``imprompt``. Numbers that
    are not finite are null."""
    content = {
        KEY: VERSION,
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
    return json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_target(path: Path, *, overwrite: bool = False, reads: Iterable[str | Path | None] = ()) -> None:
    """Raises :class:`InputError` when a report cannot be written to ``path``: earlier reports are replaced,
    other files only with ``overwrite``, and the files ``reads`` never."""
    files = identities(reads, folders=False)
    check_place(path, overwrite=overwrite, is_ours=_is_report, reads=files)


def _is_report(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with suppress(ImpromptError, OSError):
        if path.suffix == ".html":
            with path.open("rb") as page:
                return _MARK in page.read(1000)
        return KEY in read_json(path, "report", max_bytes=1 << 30)
    return False


def check_html() -> None:
    """Raise :class:`UsageError` when jinja2, which makes the page, is not installed."""
    if find_spec("jinja2") is None:
        raise UsageError("the HTML report needs jinja2: pip install 'imprompt[evaluate]'.")


def html(report: Report) -> str:
    """The page in one file: figures, the front, and the best and worst pictures of each contender.

    Raises :class:`UsageError` without jinja2."""
    check_html()
    from jinja2 import Template

    template = Template(
        (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"), autoescape=True
    )
    contenders = [name for name in report.by_case if name != BARE]
    return template.render(
        report=report,
        figures=[(each, _spread(each.value), bar) for each, bar in _bars(report.figures)],
        differences=[(each, _spread(each.value)) for each in report.differences],
        front=_data_url(_front_plot(report)) if report.front else None,
        sheets=[(name, *_extremes(report, name)) for name in contenders],
        settings=json.dumps(report.settings, indent=2, ensure_ascii=False),
    )


# ---- private


def _extremes(report: Report, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pictures that a contender follows best and worst by CLIP-I, with what it drew."""
    near = report.by_case[name]["CLIP-I"]
    order = near.argsort(descending=True).tolist()
    both = report.drawn.get(f"{name} both")

    def shown(numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                "value": float(near[number]),
                "text": report.cases[number].text,
                "reference": _data_url(report.cases[number].image),
                "alone": [_data_url(image) for image in report.drawn[f"{name} picture"][number][:3]],
                "both": [_data_url(image) for image in both[number][:3]] if both else [],
            }
            for number in numbers
        ]

    return shown(order[:SHOWN]), shown(order[::-1][: min(SHOWN, max(0, len(order) - SHOWN))])


def _bars(figures: Sequence[Figure]) -> list[tuple[Figure, tuple[float, float, float]]]:
    """Each figure with low end, mean and high end in percent of that figure's range over all contenders."""
    ranges: dict[str, list[float]] = {}
    for each in figures:
        ranges.setdefault(each.name, []).extend(_ends(each.value))
    found = []
    for each in figures:
        low, high = min(ranges[each.name]), max(ranges[each.name])
        start, middle, end = (100 * (x - low) / ((high - low) or 1) for x in _ends(each.value))
        found.append((each, (start, middle, end)))
    return found


def _ends(value: Interval) -> tuple[float, float, float]:
    if value.low is None or value.high is None:
        return value.mean, value.mean, value.mean
    return value.low, value.mean, value.high


def _front_plot(report: Report) -> Image.Image:
    """Text against picture over scale, a line for each contender."""
    names = [point["contender"] for point in report.front]
    lines = [[i for i, name in enumerate(names) if name == each] for each in dict.fromkeys(names)]
    text = "text (CLIP-T)" if report.settings["clip_t"] else "likeness to what the text alone draws"
    return scatter(
        [(point["text"], point["picture"]) for point in report.front],
        names,
        titles=(text, "picture (CLIP-I)"),
        title="Text and picture over scale",
        lines=lines,
        labels=[f"{point['scale']:g}" for point in report.front],
    )


def _data_url(image: Image.Image) -> str:
    shown = image.copy()
    shown.thumbnail((640, 640))
    return "data:image/png;base64," + base64.b64encode(as_bytes(shown)).decode()


def _spread(value: Interval) -> str:
    return "" if value.low is None or value.high is None else f"{value.low:.3f} … {value.high:.3f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows) + "\n"
