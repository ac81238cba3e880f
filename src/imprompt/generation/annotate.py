"""A picture → the map that a ControlNet or T2I-Adapter follows, in its size and as RGB.

Edges come from OpenCV; depth, segmentation and poses from transformers' models of the hub. Each is imported
or fetched when its kind is asked for, once for all frames of a clip, and given back after the last. What
cannot be found well is refused in one line, never guessed. Nothing here knows ControlNets or requests.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from imprompt.errors import InputError, ModelError, UsageError, first_line

CANNY = (100, 200)
"""Thresholds of the published canny ControlNets' own examples (gradient of 8-bit values)."""

MODELS: dict[str, tuple[str, str]] = {
    "depth": ("depth-anything/Depth-Anything-V2-Small-hf", "99 MB, Apache-2.0"),
    "seg": ("openmmlab/upernet-convnext-tiny", "241 MB, MIT"),
    "person": ("PekingU/rtdetr_r18vd_coco_o365", "81 MB, Apache-2.0"),
    "pose": ("usyd-community/vitpose-base-simple", "344 MB, Apache-2.0"),
}
"""What is found → the hub's repository that finds it, its size and licence. All hold safetensors. A pose is
found in what ``person`` finds."""

_PAPER = 0.6  # share of a line drawing that is its ground, at least
_NEAR_GROUND = 24  # how far the ground's brightness may be from its median
_SEEN = 0.3  # from which score on a person or a joint counts, as in ViTPose's own examples


def annotate(kind: str, picture: Image.Image) -> Image.Image:
    """The map of one of :data:`~imprompt.schema.request.CONTROLS` for an RGB picture, of its size.

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
    found = _opencv("canny").Canny(np.asarray(picture.convert("RGB")), low, high)
    return Image.fromarray(found).convert("RGB")


def skeletons(people: Sequence[np.ndarray], size: tuple[int, int]) -> Image.Image:
    """People's joints drawn on black as OpenPose's body of 18 joints, which the pose ControlNets learnt from.

    ``people``: for each the 17 joints of COCO as (17, 3): x and y in pixels, score; those below 0.3 are left
    out. The neck, which COCO lacks, is the middle of the shoulders. Limbs are ellipses of 4 pixels to either
    side in 0.6 of their colour, joints discs of radius 4, at a shorter side of 512 (lllyasviel/ControlNet,
    ``annotator/openpose``). Raises :class:`UsageError` when OpenCV is not installed.
    """
    cv2 = _opencv("pose")
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    thick = max(1, round(4 * min(size) / 512))
    bodies = []
    for coco in people:
        neck = np.append((coco[5, :2] + coco[6, :2]) / 2, min(coco[5, 2], coco[6, 2]))
        bodies.append(np.vstack([coco, neck])[_OPENPOSE])
    for body in bodies:
        for (one, other), colour in zip(_LIMBS, _COLOURS, strict=False):
            (x0, y0, seen), (x1, y1, seen_too) = body[one], body[other]
            if min(seen, seen_too) < _SEEN:
                continue
            centre = round((x0 + x1) / 2), round((y0 + y1) / 2)
            half = round(math.hypot(x1 - x0, y1 - y0) / 2), thick
            angle = round(math.degrees(math.atan2(y1 - y0, x1 - x0)))
            shape = cv2.ellipse2Poly(centre, half, angle, 0, 360, 1)
            cv2.fillConvexPoly(canvas, shape, [int(part * 0.6) for part in colour])
    for body in bodies:
        for (x, y, seen), colour in zip(body, _COLOURS, strict=True):
            if seen >= _SEEN:
                cv2.circle(canvas, (round(x), round(y)), thick, colour, thickness=-1)
    return Image.fromarray(canvas)


# ---- private

# OpenPose's joints by their places in COCO's, 17 being the neck: nose, neck, right arm, left arm, right leg,
# left leg, right and left eye, right and left ear.
_OPENPOSE = [0, 17, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_COLOURS = [  # of joints; limb i has joint i's: the hues from red, 20° apart as OpenPose writes them
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
    (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
    (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
]  # fmt: skip

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
    """People by a detector, their joints by ViTPose (Xu et al. 2022), drawn as OpenPose does."""
    _opencv("pose")
    if importlib.util.find_spec("scipy") is None:
        raise UsageError(
            "control: pose needs SciPy, which is not installed; run pip install 'imprompt[control]', or give "
            "a drawn skeleton as none:PATH."
        )
    watcher, detector = _loaded("person", "AutoModelForObjectDetection")
    processor, model = _loaded("pose", "VitPoseForPoseEstimation")

    def find(picture: Image.Image) -> Image.Image:
        found = watcher.post_process_object_detection(
            _seen(watcher, detector, picture), _SEEN, [(picture.height, picture.width)]
        )[0]
        names = [detector.config.id2label[int(label)] for label in found["labels"]]
        boxes = found["boxes"].numpy()[[name == "person" for name in names]]
        if not len(boxes):
            raise _Nothing("pose finds nobody in the picture")
        boxes[:, 2:] -= boxes[:, :2]  # ViTPose takes left, top, width, height
        joints = _seen(processor, model, picture, boxes=[boxes])
        people = processor.post_process_pose_estimation(joints, boxes=[boxes])[0]
        drawn = skeletons(
            [np.column_stack([one["keypoints"].numpy(), one["scores"].numpy()]) for one in people],
            picture.size,
        )
        if not drawn.getbbox():
            raise _Nothing("pose finds no limbs in the picture")
        return drawn

    return find


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
    "frame": lambda: _as_it_is,
    "none": lambda: _as_it_is,
}
"""Kind → what loads its finder."""


def _opencv(kind: str) -> Any:
    try:
        import cv2
    except ImportError as error:
        raise UsageError(
            f"control: {kind} needs OpenCV, which is not installed; run pip install 'imprompt[control]', or "
            "give a finished map as none:PATH."
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
        reason = first_line(error)
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
