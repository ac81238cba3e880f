"""Units of ``alwayson_scripts.controlnet`` → image prompts and controls of a request."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from pydantic import AliasChoices, Field, field_validator

from imprompt import catalog
from imprompt.app.server.bodies import Body, checked
from imprompt.app.server.problems import refused
from imprompt.app.server.protocols import PICTURE, keep_encoded
from imprompt.app.server.queue import Queue

MODULES = {
    "none": "none", "canny": "canny", "depth": "depth", "depth_midas": "depth", "depth_anything": "depth",
    "depth_anything_v2": "depth", "depth_zoe": "depth", "depth_leres": "depth", "openpose": "pose",
    "openpose_full": "pose", "dw_openpose_full": "pose", "lineart": "lineart",
    "lineart_standard": "lineart", "lineart_realistic": "lineart", "lineart_coarse": "lineart",
    "scribble_pidinet": "scribble", "scribble_xdog": "scribble", "scribble_hed": "scribble",
    "tile_resample": "tile", "seg_ofade20k": "seg", "seg_ufade20k": "seg",
}  # fmt: skip
"""Their name of a preprocessor → our kind of control."""
_IMAGE_PROMPT = re.compile(r"^ip-?adapter|ipadapter|^clip-vit", re.IGNORECASE)
_FRAMINGS = {
    "0": "squash", "just resize": "squash", "1": "crop", "crop and resize": "crop",
    "scale to fit (inner fit)": "crop", "2": "pad", "resize and fill": "pad", "envelope (outer fit)": "pad",
}  # fmt: skip
_WEIGHT_TYPES = {
    "normal": "linear", "linear": "linear", "ease in": "ease-in", "ease out": "ease-out",
    "ease in-out": "ease-in-out", "reverse in-out": "reverse-in-out", "weak input": "weak-input",
    "weak output": "weak-output", "weak middle": "weak-middle", "strong middle": "strong-middle",
    "style transfer": "style-transfer", "composition": "composition",
    "strong style transfer": "strong-style-transfer",
}  # fmt: skip
_HASH = re.compile(r"\s*\[[0-9a-fA-F]+\]$")


class Unit(Body):
    """One unit: an image prompt by its module's or model's name, else a control."""

    enabled: bool = True
    module: str = "none"
    model: str = ""
    image: Any = Field(default=None, validation_alias=AliasChoices("image", "input_image"))
    weight: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    resize_mode: str | int = "crop and resize"
    weight_type: str = "normal"
    advanced_weighting: list[float] | None = None
    effective_region_mask: str | None = None
    ipadapter_input: Any = None

    @field_validator("model")
    @classmethod
    def _without_hash(cls, model: str) -> str:
        return _HASH.sub("", model)


class Script(Body):
    """ControlNet's entry of ``alwayson_scripts``."""

    args: list[Unit] = Field(default_factory=list)


async def read_units(scripts: Mapping[str, Any], queue: Queue) -> dict[str, Any]:
    """The image prompts and controls of all units, as a request's fields. Raises :class:`Problem`."""
    script: Any = next((script for name, script in scripts.items() if name.lower() == "controlnet"), {})
    found: dict[str, Any] = {"images": [], "controls": []}
    for unit in checked(Script, script).args:
        if not unit.enabled:
            continue
        if _IMAGE_PROMPT.search(unit.module) or _adapter(unit, queue) is not None:
            found["images"].append(await _image_prompt(unit, queue))
        else:
            found["controls"].append(await _control(unit, queue))
    return found


async def _image_prompt(unit: Unit, queue: Queue) -> dict[str, Any]:
    if unit.ipadapter_input:
        raise refused("ipadapter_input", "pickled features are never read; send the picture.", "pickle")
    found: dict[str, Any] = {
        PICTURE: await _picture(unit, queue),
        "scale": unit.weight,
        "start": unit.guidance_start,
        "end": unit.guidance_end,
        "adapter": _adapter(unit, queue),
        "framing": _looked_up("resize_mode", str(unit.resize_mode), _FRAMINGS),
        "profile": unit.advanced_weighting or _looked_up("weight_type", unit.weight_type, _WEIGHT_TYPES),
    }
    if unit.effective_region_mask:
        mask = await keep_encoded(queue, unit.effective_region_mask, "effective_region_mask")
        found["mask"] = mask.id
    return found


async def _control(unit: Unit, queue: Queue) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": _looked_up("module", unit.module, MODULES),
        "path": await _picture(unit, queue),
        "scale": unit.weight,
        "start": unit.guidance_start,
        "end": unit.guidance_end,
    }
    if unit.model.lower() not in ("", "none"):
        found["model"] = _named(unit.model, {name: row.repo for name, row in catalog.controls().items()})
    return found


def _looked_up(field: str, name: str, known: Mapping[str, str]) -> str:
    """Our word for theirs. Raises :class:`Problem` for one that is not known."""
    if (found := known.get(name.lower())) is None:
        raise refused(field, f"'{name[:60]}' is unknown; known are {', '.join(known)}.")
    return found


def _adapter(unit: Unit, queue: Queue) -> str | None:
    """The adapter that a unit's model names, by our name or its file's; ``None`` for no adapter's name."""
    model = unit.model.lower()
    names = {name.lower(): name for name in (*catalog.adapters(), *queue.settings.adapters)}
    if model in names:
        return names[model]
    files = {PurePosixPath(row.file).stem.lower(): name for name, row in catalog.adapters().items()}
    return files.get(model)


def _named(model: str, sources: Mapping[str, str]) -> str:
    """Our name of a control that is given by its file's."""
    if model in sources:
        return model
    key = model.lower().removeprefix("control_")
    return next((name for name, repo in sources.items() if repo.lower().endswith(key)), model)


async def _picture(unit: Unit, queue: Queue) -> str:
    image = unit.image
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, dict):
        image = image.get("image")
    return (await keep_encoded(queue, image, "image")).id
