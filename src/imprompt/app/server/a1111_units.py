"""Units of ``alwayson_scripts.controlnet`` → image prompts and controls of a request."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from pydantic import AliasChoices, Field, field_validator

from imprompt import catalog
from imprompt.app.server.bodies import Body, checked
from imprompt.app.server.problems import refused
from imprompt.app.server.protocols import PICTURE, keep, keep_encoded
from imprompt.app.server.queue import Queue
from imprompt.app.server.store import Picture
from imprompt.encoders.images import as_bytes, load_image

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
FRAMINGS = {
    "0": "squash", "just resize": "squash", "1": "crop", "crop and resize": "crop",
    "scale to fit (inner fit)": "crop", "2": "pad", "resize and fill": "pad", "envelope (outer fit)": "pad",
}  # fmt: skip
"""Their resize modes → our framings."""
_FAVORS = {
    "0": "balanced", "balanced": "balanced", "1": "prompt", "my prompt is more important": "prompt",
    "2": "control", "controlnet is more important": "control",
}  # fmt: skip
"""Their control modes → what is favoured here."""
_THRESHOLDS = {
    "canny": (100, 200), "depth_leres": (0, 0), "scribble_xdog": (32, -1), "tile_resample": (1, -1),
}  # fmt: skip
"""Preprocessors with thresholds → what these are here."""
_UNSET = (-1, 0.5, 64)
"""What clients send for a threshold that nobody has set."""
_RESOLUTIONS = (-1, 0.5, 64, 512)
"""The same for a preprocessor's resolution."""
_WEIGHT_TYPES = {
    "normal": "linear", "linear": "linear", "ease in": "ease-in", "ease out": "ease-out",
    "ease in-out": "ease-in-out", "reverse in-out": "reverse-in-out", "weak input": "weak-input",
    "weak output": "weak-output", "weak middle": "weak-middle", "strong middle": "strong-middle",
    "style transfer": "style-transfer", "composition": "composition",
    "strong style transfer": "strong-style-transfer",
}  # fmt: skip
NOT_HERE = "are not part of this server; leave it out."
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
    control_mode: str | int = "balanced"
    threshold_a: float = -1
    threshold_b: float = -1
    processor_res: float = -1
    pixel_perfect: bool = False
    mask: Any = Field(default=None, validation_alias=AliasChoices("mask", "mask_image"))

    @field_validator("model")
    @classmethod
    def _without_hash(cls, model: str) -> str:
        return _HASH.sub("", model)


class Script(Body):
    """ControlNet's entry of ``alwayson_scripts``."""

    args: list[Unit] = Field(default_factory=list)


class Scripts(Body):
    """The one script that is read."""

    controlnet: Script


class Extended(Body):
    """The field of ``txt2img`` and ``img2img`` that has units."""

    alwayson_scripts: Scripts


async def read_units(scripts: Mapping[str, Any], queue: Queue, size: tuple[int, int]) -> dict[str, Any]:
    """The image prompts and controls of all units, as a request's fields. Raises :class:`Problem`."""
    script: Any = next((script for name, script in scripts.items() if name.lower() == "controlnet"), {})
    found: dict[str, Any] = {"images": [], "controls": []}
    extended = checked(Extended, {"alwayson_scripts": {"controlnet": script}})
    for unit in extended.alwayson_scripts.controlnet.args:
        if not unit.enabled:
            continue
        if _IMAGE_PROMPT.search(unit.module) or _adapter(unit, queue) is not None:
            found["images"].append(await _image_prompt(unit, queue))
        else:
            found["controls"].append(await _control(unit, queue, size))
    return found


async def _image_prompt(unit: Unit, queue: Queue) -> dict[str, Any]:
    if unit.ipadapter_input:
        raise refused("ipadapter_input", "pickled features are never read; send the picture.", "pickle")
    adapter = _adapter(unit, queue)
    if adapter is None and unit.model.lower() not in ("", "none"):
        known = ", ".join(queue.settings.known_adapters)
        raise refused("model", f"'{unit.model[:60]}' is unknown; known are None, {known}.")
    found: dict[str, Any] = {
        PICTURE: (await _picture(unit, queue)).id,
        "scale": unit.weight,
        "start": unit.guidance_start,
        "end": unit.guidance_end,
        "adapter": adapter,
        "framing": looked_up("resize_mode", str(unit.resize_mode), FRAMINGS),
        "profile": unit.advanced_weighting or looked_up("weight_type", unit.weight_type, _WEIGHT_TYPES),
    }
    if unit.effective_region_mask:
        mask = await keep_encoded(queue, unit.effective_region_mask, "effective_region_mask")
        found["mask"] = mask.id
    return found


async def _control(unit: Unit, queue: Queue, size: tuple[int, int]) -> dict[str, Any]:
    _check_control(unit)
    framing = looked_up("resize_mode", str(unit.resize_mode), FRAMINGS)
    found: dict[str, Any] = {
        "kind": looked_up("module", unit.module, MODULES),
        "path": await framed(queue, await _picture(unit, queue), size, framing, "image"),
        "scale": unit.weight,
        "start": unit.guidance_start,
        "end": unit.guidance_end,
        "favor": looked_up("control_mode", str(unit.control_mode), _FAVORS),
    }
    if unit.model.lower() not in ("", "none"):
        found["model"] = _named(unit.model, {name: row.repo for name, row in catalog.controls().items()})
    return found


def _check_control(unit: Unit) -> None:
    """Raises :class:`Problem` for what would change the control and has no counterpart."""
    if unit.mask:
        raise refused("mask", f"masks of controls {NOT_HERE}", "not_supported")
    check_preprocessor(unit)


def check_preprocessor(unit: Unit, prefix: str = "") -> None:
    """Raises :class:`Problem` for settings of a preprocessor that are others than here; ``prefix`` begins the
    fields' names."""
    own = _THRESHOLDS.get(unit.module.lower())
    given = {"threshold_a": unit.threshold_a, "threshold_b": unit.threshold_b}
    for (field, value), here in zip(given.items(), own or (), strict=False):
        if value not in (*_UNSET, here):
            text = f"{value:g} is asked, here it is always {here}; leave it out."
            raise refused(prefix + field, text, "not_supported")
    if unit.module.lower() != "none" and not unit.pixel_perfect and unit.processor_res not in _RESOLUTIONS:
        text = "preprocessors work at the size of the drawing; send pixel_perfect."
        raise refused(f"{prefix}processor_res", text, "not_supported")


async def framed(queue: Queue, picture: Picture, size: tuple[int, int], framing: str, field: str) -> str:
    """The id of a stored picture brought to the proportions of ``size``, unless it is to be cropped.

    A size beyond the server's limits is refused later.
    """
    if framing == "crop" or max(size) > queue.settings.limits.side:
        return picture.id
    content = await queue.decode(_framed, queue.store.path(picture.id), size, framing)
    return picture.id if content is None else (await keep(queue, content, field)).id


def _framed(path: Path, size: tuple[int, int], framing: str) -> bytes | None:
    """The picture squashed, or with its edges drawn out to the borders; ``None`` where nothing changes."""
    image = load_image(path)
    if image.width * size[1] == image.height * size[0]:
        return None
    if framing == "squash":
        return as_bytes(image.resize(size, Image.Resampling.LANCZOS))
    image = ImageOps.contain(image, size, Image.Resampling.LANCZOS)
    borders = [(free // 2, free - free // 2) for free in (size[1] - image.height, size[0] - image.width)]
    return as_bytes(Image.fromarray(np.pad(np.asarray(image), [*borders, (0, 0)], mode="edge")))


def looked_up(field: str, name: str, known: Mapping[str, str]) -> str:
    """Our word for theirs. Raises :class:`Problem` for one that is not known."""
    if (found := known.get(name.lower())) is None:
        raise refused(field, f"'{name[:60]}' is unknown; known are {', '.join(known)}.")
    return found


def _adapter(unit: Unit, queue: Queue) -> str | None:
    """The adapter that a unit's model names, by our name or its file's; ``None`` for no adapter's name."""
    model = unit.model.lower()
    names = {name.lower(): name for name in queue.settings.known_adapters}
    if model in names:
        return names[model]
    files = {PurePosixPath(row.file).stem.lower(): name for name, row in catalog.adapters().items()}
    return files.get(model)


def _named(model: str, sources: Mapping[str, str]) -> str:
    """Our name of a control that is given by its file's."""
    if model in sources:
        return model
    key = re.compile(rf"(.*[/_-])?{re.escape(model.lower().removeprefix('control_'))}")  # whole words
    return next((name for name, repo in sources.items() if key.fullmatch(repo.lower())), model)


async def _picture(unit: Unit, queue: Queue) -> Picture:
    image = unit.image
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, dict):
        image = image.get("image")
    return await keep_encoded(queue, image, "image")
