"""The model card of a run, as Markdown for the hub and as one HTML page that holds its sheets of samples."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from imprompt.training.config import TrainConfig
from imprompt.training.folder import WEIGHT_NAME

_SETTINGS = (
    "kind", "steps", "batch", "accumulate", "lr", "schedule", "warmup", "ema", "min_snr", "references",
    "drop_text", "drop_image", "drop_both", "resolution", "seed",
)  # fmt: skip
_LOSSES = {
    "validation_with_image": "with the picture",
    "validation_without_image": "without a picture",
    "validation_bare_base": "bare base",
}
"""Field of a validation record → its column."""
_LOSS_NOTE = "Loss on held-out pictures (less is better; differences of a few thousandths are small):"
_SHEET_NOTE = (
    "Held-out pictures; drawn from the caption alone, the picture alone, both, and the picture with another "
    "caption:"
)
_WIDE, _HIGH = 640, 200  # of the curve, in pixels


@dataclass(frozen=True)
class Card:
    """What a card says."""

    config: TrainConfig
    about: Mapping[str, str]
    """Base, encoder, data and start, as in the adapter's metadata."""
    figures: Sequence[Mapping[str, Any]]
    """The run's validations, in order."""
    kept: Mapping[str, Any] | None
    """The validation of the weights in the file."""

    @property
    def title(self) -> str:
        """The run's name."""
        return self.config.output.resolve().name

    @property
    def intro(self) -> str:
        """One sentence; names stand between backticks."""
        about = self.about
        return (
            f"An image-prompt adapter (IP-Adapter, {self.config.kind}) for `{about['imprompt.base']}`, "
            f"trained on {about['imprompt.pictures']} pictures, starting from {about['imprompt.start']}."
        )

    @property
    def command(self) -> str:
        """A command that draws with the adapter."""
        base, place = shlex.quote(self.about["imprompt.base"]), str(self.config.output)
        if self.config.push_to_hub:  # who reads it there has no such folder
            place = f"{self.config.push_to_hub}/{WEIGHT_NAME}"
        words = f'imprompt generate "a caption" --image picture.png --base {base}'
        return f"{words} --adapter {shlex.quote(place)}"

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Encoder, data and the fields that shape the result, with their values."""
        rows = [("image encoder", self.about["imprompt.image_encoder"] or "none")]
        rows.append(("data (hash)", self.about["imprompt.data"]))
        return rows + [(name, f"{getattr(self.config, name)}") for name in _SETTINGS]

    @property
    def losses(self) -> list[tuple[str, list[str]]]:
        """The start's losses and those of the weights in the file, each with its label."""
        if not self.figures:
            return []
        rows = [("start", self.figures[0])]
        if self.kept is not None and self.kept["step"] != self.figures[0]["step"]:
            rows.append((f"step {self.kept['step']}, in the file", self.kept))
        return [(name, [f"{record[field]:.4f}" for field in _LOSSES]) for name, record in rows]

    @property
    def unchanged(self) -> str:
        """Says so where the file has the start's weights, else empty."""
        if self.kept is None or self.kept["step"] != 0:
            return ""
        return "No step was better than the start; the file holds the start's weights."

    @property
    def sheets(self) -> list[Path]:
        """The first and the last sheet of samples."""
        found = sorted((self.config.output / "samples").glob("*.png"))
        return list(dict.fromkeys((found[0], found[-1]))) if found else []


def noted(config: TrainConfig, figures: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Settings and the last validation, as JSON, for the adapter file's metadata."""
    about = {"imprompt.settings": json.dumps({name: getattr(config, name) for name in _SETTINGS})}
    if figures:
        kept = {name: figures[-1][name] for name in ("step", *_LOSSES)}
        about["imprompt.validation"] = json.dumps(kept)
    return about


def markdown(card: Card) -> str:
    """The card as Markdown, with the hub's metadata at its head."""
    lines = [
        "---", "library_name: imprompt", f"base_model: {card.about['imprompt.base']}",
        "tags: [ip-adapter, image-prompt]", "---", f"# {card.title}", "", card.intro, "", "```sh",
        card.command, "```", "", "| | |", "|---|---|",
        *(f"| {name} | `{value}` |" for name, value in card.settings), "",
    ]  # fmt: skip
    if card.losses:
        lines += [_LOSS_NOTE, "", f"| | {' | '.join(_LOSSES.values())} |", "|---|---|---|---|"]
        lines += [f"| {name} | {' | '.join(values)} |" for name, values in card.losses]
        lines += ["", card.unchanged, ""] if card.unchanged else [""]
    if card.sheets:
        lines += [_SHEET_NOTE, "", *(f"![{path.stem}](samples/{path.name})" for path in card.sheets), ""]
    return "\n".join(lines)


def html(card: Card) -> str:
    """The card as one HTML page: the same, with the curve of the held-out loss and the sheets inside."""
    parts = [f"<h1>{escape(card.title)}</h1>", f"<p>{_marked(card.intro)}</p>"]
    parts.append(f"<pre>{escape(card.command)}</pre>")
    if card.losses:
        parts += [f"<p>{_LOSS_NOTE}</p>", _table(["", *_LOSSES.values()], card.losses)]
        parts += [f"<p>{escape(card.unchanged)}</p>", _curve(card.figures)]
    if card.sheets:
        parts.append(f"<p>{_SHEET_NOTE}</p>")
    for path in card.sheets:
        content = base64.b64encode(path.read_bytes()).decode()
        parts.append(f"<h2>Step {int(path.stem)}</h2>")
        parts.append(f'<img src="data:image/png;base64,{content}" alt="samples of step {int(path.stem)}">')
    parts += ["<h2>Settings</h2>", _table(["", ""], [(name, [value]) for name, value in card.settings])]
    head, tail = _PAGE.split("BODY")
    return head.replace("TITLE", escape(card.title)) + "\n".join(parts) + tail


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #18181b; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
  table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #e4e4e7 }
  td { font-variant-numeric: tabular-nums } pre { background: #fafafa; padding: 1rem; overflow-x: auto } img { max-width: 100% }
  polyline { fill: none; stroke-width: 2 } svg text { font-size: 12px }
</style>
BODY
</html>
"""  # noqa: E501
_COLOURS = ("#2563eb", "#ea580c", "#71717a")


def _marked(text: str) -> str:
    """Escaped, with code for what stands between backticks."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"] if any(head) else []
    lines += [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in (name, *values)) + "</tr>"
        for name, values in rows
    ]
    return "<table>" + "\n".join(lines) + "</table>"


def _curve(figures: Sequence[Mapping[str, Any]]) -> str:
    """The held-out losses over steps as SVG; empty for a single validation."""
    if len(figures) < 2:
        return ""
    values = [float(record[field]) for record in figures for field in _LOSSES]
    low, span = min(values), (max(values) - min(values)) or 1.0
    last = max(int(record["step"]) for record in figures) or 1
    lines = []
    for number, (field, label) in enumerate(_LOSSES.items()):
        heights = [_HIGH * (1 - (float(record[field]) - low) / span) for record in figures]
        points = " ".join(
            f"{_WIDE * int(record['step']) / last:.1f},{height:.1f}"
            for record, height in zip(figures, heights, strict=True)
        )
        lines.append(f'<polyline points="{points}" stroke="{_COLOURS[number]}"/>')
        lines.append(
            f'<text x="{_WIDE + 10}" y="{20 + 18 * number}" fill="{_COLOURS[number]}">{label}</text>'
        )
    ends = f"{low:.4f} to {low + span:.4f}, steps 0 to {last}"
    lines.append(f'<text x="0" y="{_HIGH + 22}">{ends}</text>')
    return (
        f'<svg viewBox="-2 -4 {_WIDE + 140} {_HIGH + 32}" width="{_WIDE + 140}" role="img" '
        f'aria-label="held-out loss over steps">{"".join(lines)}</svg>'
    )
