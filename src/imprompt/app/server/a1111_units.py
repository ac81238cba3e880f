"""Units of ``alwayson_scripts.controlnet`` → image prompts and controls of a request."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from imprompt import catalog
from imprompt.app.server.bodies import decoded_picture
from imprompt.app.server.native import PICTURE, keep
from imprompt.app.server.problems import Problem
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


async def read_units(values: Mapping[str, Any], fields: dict[str, Any], queue: Queue) -> None:
    """Add the image prompts and controls of all units to a request's fields. Raises :class:`Problem`."""
    for unit in _enabled_units(values):
        module = str(unit.get("module") or "none")
        if _IMAGE_PROMPT.search(module) or _adapter(unit) is not None:
            fields.setdefault("images", []).append(await _image_prompt(unit, queue))
        else:
            fields.setdefault("controls", []).append(await _control(unit, module, queue))


def _enabled_units(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    scripts = values.get("alwayson_scripts") or {}
    if not isinstance(scripts, dict):
        raise _wrong("alwayson_scripts", "an object is expected")
    script: Any = next((script for name, script in scripts.items() if name.lower() == "controlnet"), {})
    units = script.get("args", []) if isinstance(script, dict) else None
    if not isinstance(units, list) or not all(isinstance(unit, dict) for unit in units):
        raise _wrong("alwayson_scripts.controlnet.args", "a list of units is expected")
    return [unit for unit in units if unit.get("enabled", True) is not False]


async def _image_prompt(unit: Mapping[str, Any], queue: Queue) -> dict[str, Any]:
    if unit.get("ipadapter_input"):
        raise Problem(
            422, "pickle", "ipadapter_input: pickled features are never read; send the picture.",
            "ipadapter_input",
        )  # fmt: skip
    found: dict[str, Any] = {
        PICTURE: await _picture(unit, queue),
        "scale": _part(unit, "weight", 1.0),
        "start": _part(unit, "guidance_start", 0.0),
        "end": _part(unit, "guidance_end", 1.0),
    }
    if (adapter := _adapter(unit)) is not None:
        found["adapter"] = adapter
    mode = str(unit.get("resize_mode", "crop and resize")).lower()
    if mode not in _FRAMINGS:
        raise _wrong("resize_mode", f"'{mode[:40]}' is unknown")
    found["framing"] = _FRAMINGS[mode]
    kind = str(unit.get("weight_type") or "normal").lower()
    if kind not in _WEIGHT_TYPES:
        raise _wrong("weight_type", f"'{kind[:40]}' is unknown; known are {', '.join(_WEIGHT_TYPES)}")
    found["profile"] = _WEIGHT_TYPES[kind]
    if unit.get("advanced_weighting"):
        found["profile"] = unit["advanced_weighting"]
    if unit.get("effective_region_mask"):
        mask = decoded_picture(unit["effective_region_mask"], "effective_region_mask")
        found["mask"] = (await keep(queue, mask, "effective_region_mask")).id
    return found


async def _control(unit: Mapping[str, Any], module: str, queue: Queue) -> dict[str, Any]:
    kind = MODULES.get(module.lower())
    if kind is None:
        raise _wrong("module", f"'{module[:60]}' is unknown; known are ip-adapter-auto, {', '.join(MODULES)}")
    model = _HASH.sub("", str(unit.get("model") or "None"))
    found: dict[str, Any] = {
        "kind": kind,
        "path": await _picture(unit, queue),
        "scale": _part(unit, "weight", 1.0),
        "start": _part(unit, "guidance_start", 0.0),
        "end": _part(unit, "guidance_end", 1.0),
    }
    if model.lower() != "none":
        found["model"] = _named(model, {name: row.repo for name, row in catalog.controls().items()})
    return found


def _adapter(unit: Mapping[str, Any]) -> str | None:
    """The adapter that a unit's model names, by our name or its file's; ``None`` for no adapter's name."""
    model = _HASH.sub("", str(unit.get("model") or ""))
    files = {PurePosixPath(row.file).stem.lower(): name for name, row in catalog.adapters().items()}
    if model.lower() in catalog.adapters():
        return model.lower()
    return files.get(model.lower())


def _named(model: str, sources: Mapping[str, str]) -> str:
    """Our name of a control that is given by its file's."""
    if model in sources:
        return model
    key = model.lower().removeprefix("control_")
    return next((name for name, repo in sources.items() if repo.lower().endswith(key)), model)


async def _picture(unit: Mapping[str, Any], queue: Queue) -> str:
    image = unit.get("image") or unit.get("input_image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, dict):
        image = image.get("image")
    return (await keep(queue, decoded_picture(image, "image"), "image")).id


def _part(unit: Mapping[str, Any], name: str, default: float) -> float:
    value = unit.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, "a number is expected")
    return float(value)


def _wrong(field: str, text: str) -> Problem:
    return Problem(422, "invalid_request", f"{field}: {text}.", field)
