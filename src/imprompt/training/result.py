"""Results of a run: the adapter file with its metadata, and the upload to the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.checkpoints.checkpoint import check_written
from imprompt.checkpoints.contents import by_section
from imprompt.errors import ModelError, UsageError, first_line
from imprompt.tensorfile import metadata_of
from imprompt.training.folder import WEIGHT_NAME

_UPLOADED = [WEIGHT_NAME, "README.md", "card.html", "samples/*.png"]


def write_adapter(adapter: IPAdapter, folder: Path, about: Mapping[str, str], dtype: torch.dtype) -> Path:
    """Write the weights as they are now in the published layout, and read them back.

    Raises :class:`ModelError` when they are not finite or do not read back as written."""
    weights = {name: each.detach().to("cpu", dtype) for name, each in adapter.module.state_dict().items()}
    state = by_section(weights, adapter.checkpoint.name)
    made = IPAdapter.from_state_dict(state, variant=adapter.checkpoint.variant.name)
    made.checkpoint = replace(made.checkpoint, metadata=dict(about))
    path = made.save_pretrained(folder, WEIGHT_NAME)
    check_written(path, weights)
    return path


def validation_in(path: Path) -> dict[str, Any] | None:
    """The validation of the weights in an adapter file: its step and losses, as its metadata has them.

    ``None`` without a file, and for weights of a step that was not validated."""
    about = metadata_of(path)
    found: dict[str, Any] | None = json.loads(about.get("imprompt.validation", "null"))
    return found if found is not None and str(found["step"]) == about.get("imprompt.step") else None


def check_repository(name: str | None) -> None:
    """Raise :class:`UsageError` for a name that the hub does not take; meant for before the run."""
    try:
        if name is not None:
            validate_repo_id(name)
    except HFValidationError as error:
        reason = first_line(error).rstrip(".")
        raise UsageError(f"push_to_hub '{name}': OWNER/NAME is expected ({reason}).") from error


def push(repository: str, folder: Path) -> None:
    """Upload the adapter, its cards and the sheets of samples."""
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=_UPLOADED)
    except Exception as error:  # the hub's client raises nearly anything
        raise ModelError(
            f"the adapter is in '{folder}' but was not uploaded to {repository}: "
            f"{first_line(error).rstrip('.')}."
        ) from error
