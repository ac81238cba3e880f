"""A picture → the map that a ControlNet or T2I-Adapter follows, in its size and as RGB.

Edges come from OpenCV, depth and segmentation from transformers' models of the hub; each is imported or
fetched when its kind is asked for, once for all frames of a clip, and given back after the last. What cannot
be found well is refused in one line, never guessed. Nothing here knows ControlNets or requests.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from imprompt.errors import InputError, ModelError, UsageError

CANNY = (100, 200)
"""Thresholds of the published canny ControlNets' own examples (gradient of 8-bit values)."""

MODELS: dict[str, tuple[str, str]] = {
    "depth": ("depth-anything/Depth-Anything-V2-Small-hf", "99 MB, Apache-2.0"),
    "seg": ("openmmlab/upernet-convnext-tiny", "241 MB, MIT"),
}
"""Kind → the hub's repository that finds it, its size and licence. Both hold safetensors."""

_PAPER = 0.6  # share of a line drawing that is its ground, at least
_NEAR_GROUND = 24  # how far the ground's brightness may be from its median


def annotate(kind: str, picture: Image.Image) -> Image.Image:
    """The map of one of :data:`~imprompt.generation.request.CONTROLS` for an RGB picture, of its size.

    Raises as :func:`annotate_frames`.
    """
    return annotate_frames(kind, [picture])[0]


def annotate_frames(kind: str, pictures: Iterable[Image.Image]) -> list[Image.Image]:
    """:func:`annotate` of each picture, by a model that is loaded once. A frame in which nothing is found is
    black.

    Raises :class:`UsageError` when a library is missing, :class:`InputError` when no picture holds what is
    asked for, :class:`ModelError` when a model cannot be had.
    """
    find = _ANNOTATORS[kind]()
    found: list[Image.Image] = []
    nothing: list[_Nothing] = []
    for picture in pictures:
        try:
            found.append(find(picture.convert("RGB")))
        except _Nothing as error:
            nothing.append(error)
            found.append(Image.new("RGB", picture.size))
    if nothing and len(nothing) == len(found):
        raise nothing[0]
    return found


def edges(picture: Image.Image, low: float = CANNY[0], high: float = CANNY[1]) -> Image.Image:
    """Canny edges (Canny 1986) of an RGB picture, as RGB of its size: 255 on an edge, 0 elsewhere.

    The strongest of the three colours' gradients counts; ``low`` and ``high`` are the hysteresis thresholds.
    Raises :class:`UsageError` when OpenCV is not installed.
    """
    found = _opencv().Canny(np.asarray(picture.convert("RGB")), low, high)
    return Image.fromarray(found).convert("RGB")


# ---- private

_Find = Callable[[Image.Image], Image.Image]


class _Nothing(InputError):
    """A picture without what a control follows: no map, but among others' frames an empty one."""

    def __init__(self, what: str) -> None:
        super().__init__(f"control: {what}; it would have no effect.")


def _canny(picture: Image.Image) -> Image.Image:
    found = edges(picture)
    if not found.getbbox():
        raise _Nothing("canny finds no edge in the picture")
    return found


def _depth() -> _Find:
    """Near is bright, as in MiDaS, which the depth ControlNets were trained on."""
    processor, model = _loaded("depth", "AutoModelForDepthEstimation")

    def find(picture: Image.Image) -> Image.Image:
        found = _seen(processor, model, picture)
        depth = processor.post_process_depth_estimation(found, [(picture.height, picture.width)])[0]
        values = depth["predicted_depth"].float().numpy()
        low, high = float(values.min()), float(values.max())
        if not high > low:
            raise _Nothing("depth finds the picture equally far everywhere")
        return Image.fromarray(((values - low) / (high - low) * 255).round().astype(np.uint8)).convert("RGB")

    return find


def _segments() -> _Find:
    """Each pixel in the colour that ADE20K gives to what it shows."""
    processor, model = _loaded("seg", "AutoModelForSemanticSegmentation")
    colours = np.frombuffer(bytes.fromhex(_ADE20K), np.uint8).reshape(-1, 3)

    def find(picture: Image.Image) -> Image.Image:
        size = (picture.height, picture.width)
        found = _seen(processor, model, picture)
        labels = processor.post_process_semantic_segmentation(found, target_sizes=[size])[0]
        return Image.fromarray(colours[labels.numpy()])

    return find


def _drawing(kind: str, picture: Image.Image) -> Image.Image:
    """A line drawing with its lines bright on black, as ControlNets take them."""
    grey = np.asarray(picture.convert("L"), dtype=np.int16)
    ground = int(np.median(grey))
    if (np.abs(grey - ground) <= _NEAR_GROUND).mean() < _PAPER:
        raise InputError(
            f"control: {kind} takes a line drawing, and this is none (no even ground); of other pictures "
            f"canny finds the edges, and a finished map goes by none:PATH."
        )
    lines = (ground - grey if ground >= 128 else grey - ground).clip(0)
    if lines.max() <= _NEAR_GROUND:
        raise _Nothing(f"{kind} finds no line in the picture")
    full = lines * (255 / lines.max())
    if kind == "scribble":  # trained on strokes without shades
        full = np.where(full >= 128, 255, 0)
    return Image.fromarray(full.round().astype(np.uint8)).convert("RGB")


def _pose() -> _Find:
    raise UsageError(
        "control: pose: nothing that finds people's limbs comes with imprompt; draw or export the OpenPose "
        "skeleton and give it as none:PATH,model=sd15-pose (or sdxl-pose)."
    )


def _as_it_is(picture: Image.Image) -> Image.Image:
    return picture


_ANNOTATORS: dict[str, Callable[[], _Find]] = {
    "canny": lambda: _canny,
    "depth": _depth,
    "pose": _pose,
    "lineart": lambda: partial(_drawing, "lineart"),
    "scribble": lambda: partial(_drawing, "scribble"),
    "tile": lambda: _as_it_is,
    "seg": _segments,
    "none": lambda: _as_it_is,
}
"""Kind → what loads its finder."""


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise UsageError(
            "control: canny needs OpenCV, which is not installed; run pip install 'imprompt[control]', or "
            "give finished edges as none:PATH."
        ) from error
    return cv2


def _loaded(kind: str, model_class: str) -> tuple[Any, Any]:
    """The picture processor of a kind's model, and the model: on the CPU in fp32, so that the map is the same
    wherever it is drawn."""
    repository, about = MODELS[kind]
    try:
        import transformers

        processor = transformers.AutoImageProcessor.from_pretrained(repository)
        model = getattr(transformers, model_class).from_pretrained(repository, use_safetensors=True)
    except Exception as error:  # the hub's client raises nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"control: {kind} is found by {repository} ({about}), which cannot be had: {reason} Look at the "
            "network and HF_HUB_OFFLINE, or give a finished map as none:PATH."
        ) from error
    return processor, model.eval()


def _seen(processor: Any, model: Any, picture: Image.Image, **more: Any) -> Any:
    """What a model says about a picture."""
    import torch

    with torch.inference_mode():
        return model(**processor(picture, return_tensors="pt", **more))


# RGB of the 150 classes of ADE20K's scene parsing benchmark in their order, as its own tools draw them.
_ADE20K = (
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff0652"
    "8fff8cccff04ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0"
    "ffb8060aff47ff290a07ffffe0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff"
    "8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff"
    "00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ff"
    "ff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc200ff52000aff0070ff3300ff00c2ff007aff"
    "00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ffff001f00b8ff00d6ffff0070"
    "5cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff500"
    "0abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff"
)
