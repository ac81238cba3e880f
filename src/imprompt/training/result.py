"""Results of a run: the adapter file with its metadata, the model card, and the upload to the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.checkpoints.checkpoint import StateDict
from imprompt.errors import ModelError, first_line
from imprompt.training.config import TrainConfig
from imprompt.training.folder import WEIGHT_NAME

_SHOWN = ("kind", "steps", "batch", "accumulate", "lr", "schedule", "warmup", "ema", "min_snr", "seed")


def write_adapter(adapter: IPAdapter, folder: Path, about: Mapping[str, str], dtype: torch.dtype) -> Path:
    """Write the weights as they are now in the published layout, and read them back.

    Raises :class:`ModelError` when they are not finite or do not read back as written."""
    expected: StateDict = {
        section: {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
        for section, tensors in adapter.state_dict().items()
    }
    made = IPAdapter.from_state_dict(expected, variant=adapter.checkpoint.variant.name)
    made.checkpoint = replace(made.checkpoint, metadata=dict(about))
    path = made.save_pretrained(folder, WEIGHT_NAME)
    read = IPAdapter.from_pretrained(path).state_dict()
    for section, tensors in expected.items():
        for name, tensor in tensors.items():
            if name not in read[section] or not torch.equal(read[section][name].cpu(), tensor):
                raise ModelError(f"'{path}' does not read back as written: '{section}.{name}' differs.")
    return path


def push(repository: str, folder: Path) -> None:
    """Upload the adapter, its card and the last sheet of samples."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=[WEIGHT_NAME, "README.md", "samples/*.png"]
        )
    except Exception as error:  # the hub's client raises nearly anything
        raise ModelError(
            f"the adapter is in '{folder}' but was not uploaded to {repository}: {first_line(error)}."
        ) from error


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
