"""The model card of a trained adapter: what it is, what it was made from, what it reached, how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imprompt.training.config import TrainConfig

_SHOWN = ("kind", "steps", "batch", "accumulate", "lr", "schedule", "warmup", "ema", "min_snr", "seed")


def model_card(
    config: TrainConfig,
    about: Mapping[str, str],
    figures: Sequence[Mapping[str, Any]],
    kept: Mapping[str, Any] | None,
) -> str:
    """The card as Markdown. ``figures`` are the run's validations, ``kept`` that of the weights in the
    file."""
    folder = Path(config.output)
    base, encoder = about["imprompt.base"], about["imprompt.image_encoder"]
    lines = [
        "---",
        "library_name: imprompt",
        f"base_model: {base}",
        "tags: [ip-adapter, image-prompt]",
        "---",
        f"# {folder.name}",
        "",
        f"An image-prompt adapter (IP-Adapter, {config.kind}) for `{base}`, trained on "
        f"{about['imprompt.pictures']} pictures, starting from {about['imprompt.start']}.",
        "",
        "```sh",
        f'imprompt generate "a caption" --image picture.png --base {base} --adapter {folder}',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| image encoder | `{encoder}` |",
        f"| data (hash) | `{about['imprompt.data']}` |",
        *(f"| {name} | {getattr(config, name)} |" for name in _SHOWN),
        "",
    ]
    if figures:
        first, rows = figures[0], [("start", figures[0])]
        if kept is not None and kept is not first:
            rows.append((f"step {kept['step']}, in the file", kept))
        lines += [
            "Loss on held-out pictures (less is better; differences of a few thousandths are small):",
            "",
            "| | with the picture | without a picture | bare base |",
            "|---|---|---|---|",
            *(f"| {name} | {_three(record)} |" for name, record in rows),
            "",
        ]
        if kept is not None and kept["step"] == first["step"] == 0:
            lines += ["No step was better than the start; the file holds the start's weights.", ""]
    sheets = sorted((folder / "samples").glob("*.png")) if (folder / "samples").is_dir() else []
    if sheets:
        lines += [
            "Held-out pictures; drawn from the caption alone, the picture alone, both, and the picture with "
            "another caption:",
            "",
            *(f"![{path.stem}](samples/{path.name})" for path in dict.fromkeys((sheets[0], sheets[-1]))),
            "",
        ]
    return "\n".join(lines)


def _three(record: Mapping[str, Any]) -> str:
    names = ("validation_with_image", "validation_without_image", "validation_bare_base")
    return " | ".join(f"{record[name]:.4f}" for name in names)
