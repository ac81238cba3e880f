"""Make the map that a ControlNet or T2I-Adapter follows from a picture: RGB, of the picture's size.

Edges come from OpenCV, depth, segmentation and poses from models of transformers, faces from the face models
of :mod:`imprompt.encoders.face`. A model is loaded when its kind is asked for, once for all frames of a clip,
and freed after the last one. A picture in which nothing is found is an error of one line.
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
"""Hysteresis thresholds in the examples of the published canny ControlNets (gradients of 8-bit values)."""

MODELS: dict[str, tuple[str, str]] = {
    "depth": ("depth-anything/Depth-Anything-V2-Small-hf", "99 MB, Apache-2.0"),
    "seg": ("openmmlab/upernet-convnext-tiny", "241 MB, MIT"),
    "person": ("PekingU/rtdetr_r18vd_coco_o365", "81 MB, Apache-2.0"),
    "pose": ("usyd-community/vitpose-base-simple", "344 MB, Apache-2.0"),
}
"""Kind → hub repository of the model that finds it, its size and licence. All hold safetensors. Joints
(``pose``) are looked for in the boxes that ``person`` finds."""

_MIN_BACKGROUND = 0.6  # share of a line drawing that is background, at least
_BACKGROUND_RANGE = 24  # how far the background's brightness may be from its median
MIN_SCORE = 0.3  # for a person or a joint to count, as in ViTPose's examples


def annotate(kind: str, picture: Image.Image, *, face_model: str | None = None) -> Image.Image:
    """The map of one RGB picture, of its size; see :func:`annotate_frames`."""
    return annotate_frames(kind, [picture], face_model=face_model)[0]


def annotate_frames(
    kind: str, pictures: Iterable[Image.Image], *, face_model: str | None = None
) -> list[Image.Image]:
    """The maps of RGB pictures for one of :data:`~imprompt.schema.request.CONTROLS`, by a model that is
    loaded once.

    A frame in which nothing is found is black if something is found in another. ``face_model`` is the folder
    of face models for the kind ``face``; ``None``: InsightFace's packs where InsightFace keeps them. Raises
    :class:`UsageError` when a library is missing, :class:`InputError` when nothing is found in any picture,
    :class:`ModelError` when a model cannot be loaded.
    """
    find = _ANNOTATORS[kind](face_model)
    found: list[Image.Image] = []
    nothing: list[_NothingFound] = []
    for picture in pictures:
        try:
            found.append(find(picture.convert("RGB")))
        except _NothingFound as error:
            nothing.append(error)
            found.append(Image.new("RGB", picture.size))
    if nothing and len(nothing) == len(found):
        raise nothing[0]
    return found


def edges(picture: Image.Image, low: float = CANNY[0], high: float = CANNY[1]) -> Image.Image:
    """Canny edges (Canny 1986) of an RGB picture, as RGB of its size: 255 on an edge, 0 elsewhere.

    At each pixel the strongest gradient of the three colours is used; ``low`` and ``high`` are the hysteresis
    thresholds. Raises :class:`UsageError` when OpenCV is not installed.
    """
    found = _opencv("canny").Canny(np.asarray(picture.convert("RGB")), low, high)
    return Image.fromarray(found).convert("RGB")


def skeletons(people: Sequence[np.ndarray], size: tuple[int, int]) -> Image.Image:
    """Draw people's joints on black as the 18 joints of OpenPose, which pose ControlNets were trained with.

    ``people`` has an array (17, 3) for each person: x and y in pixels and the score of COCO's joints; joints
    with a score below 0.3 are left out. The neck, which COCO does not have, is the middle of the shoulders.
    Limbs are ellipses of half-width 4 in 0.6 of their colour, joints discs of radius 4, for a shorter side of
    512 pixels (lllyasviel/ControlNet, ``annotator/openpose``). ``size`` is (width, height). Raises
    :class:`UsageError` when OpenCV is not installed.
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
            if min(seen, seen_too) < MIN_SCORE:
                continue
            centre = round((x0 + x1) / 2), round((y0 + y1) / 2)
            half = round(math.hypot(x1 - x0, y1 - y0) / 2), thick
            angle = round(math.degrees(math.atan2(y1 - y0, x1 - x0)))
            shape = cv2.ellipse2Poly(centre, half, angle, 0, 360, 1)
            cv2.fillConvexPoly(canvas, shape, [int(part * 0.6) for part in colour])
    for body in bodies:
        for (x, y, seen), colour in zip(body, _COLOURS, strict=True):
            if seen >= MIN_SCORE:
                cv2.circle(canvas, (round(x), round(y)), thick, colour, thickness=-1)
    return Image.fromarray(canvas)


def face_keypoints(landmarks: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Draw the five points of one face on black, as InstantID's ControlNet was trained with them.

    ``landmarks`` (5, 2) are x and y in pixels of the eyes, the nose and the corners of the mouth. From the
    nose to each other point runs an ellipse of half-width 4 in 0.6 of that point's colour; the points are
    discs of radius 10 in full colour (``draw_kps`` of instantX-research/InstantID, which does not scale with
    ``size``, (width, height)). Raises :class:`UsageError` when OpenCV is not installed.
    """
    cv2 = _opencv("face")
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    nose = landmarks[2]
    for number in (0, 1, 3, 4):
        point, colour = landmarks[number], _FACE_COLOURS[number]
        across, down = point - nose
        centre = int((point[0] + nose[0]) / 2), int((point[1] + nose[1]) / 2)
        half = int(math.hypot(across, down) / 2), 4
        shape = cv2.ellipse2Poly(centre, half, int(math.degrees(math.atan2(down, across))), 0, 360, 1)
        cv2.fillConvexPoly(canvas, shape, colour)
    canvas = (canvas * 0.6).astype(np.uint8)
    for point, colour in zip(landmarks, _FACE_COLOURS, strict=True):
        cv2.circle(canvas, (int(point[0]), int(point[1])), 10, colour, thickness=-1)
    return Image.fromarray(canvas)


# ---- private

_FACE_COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))

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


class _NothingFound(InputError):
    """There is nothing in a picture that the control could follow."""

    def __init__(self, what: str) -> None:
        super().__init__(f"control: {what}; it would have no effect.")


def _canny(picture: Image.Image) -> Image.Image:
    found = edges(picture)
    if not found.getbbox():
        raise _NothingFound("canny finds no edge in the picture")
    return found


def _depth(_: object) -> _Find:
    """Near is bright, as in the maps of MiDaS that depth ControlNets were trained with."""
    processor, model = _loaded("depth", "AutoModelForDepthEstimation")

    def find(picture: Image.Image) -> Image.Image:
        found = _output(processor, model, picture)
        depth = processor.post_process_depth_estimation(found, [(picture.height, picture.width)])[0]
        values = depth["predicted_depth"].float().numpy()
        low, high = float(values.min()), float(values.max())
        if not high > low:
            raise _NothingFound("depth finds the picture equally far everywhere")
        return Image.fromarray(((values - low) / (high - low) * 255).round().astype(np.uint8)).convert("RGB")

    return find


def _segments(_: object) -> _Find:
    """Each pixel in the colour of its class in ADE20K."""
    processor, model = _loaded("seg", "AutoModelForSemanticSegmentation")
    colours = np.frombuffer(bytes.fromhex(_ADE20K), np.uint8).reshape(-1, 3)

    def find(picture: Image.Image) -> Image.Image:
        size = (picture.height, picture.width)
        found = _output(processor, model, picture)
        labels = processor.post_process_semantic_segmentation(found, target_sizes=[size])[0]
        return Image.fromarray(colours[labels.numpy()])

    return find


def _drawing(kind: str, picture: Image.Image) -> Image.Image:
    """A line drawing with its lines bright on black, as ControlNets take them."""
    grey = np.asarray(picture.convert("L"), dtype=np.int16)
    background = int(np.median(grey))
    if (np.abs(grey - background) <= _BACKGROUND_RANGE).mean() < _MIN_BACKGROUND:
        raise InputError(
            f"control: {kind} takes a line drawing, and this picture has no even background; use canny for "
            "other pictures, or give a finished map as none:PATH."
        )
    lines = (background - grey if background >= 128 else grey - background).clip(0)
    if lines.max() <= _BACKGROUND_RANGE:
        raise _NothingFound(f"{kind} finds no line in the picture")
    full = lines * (255 / lines.max())
    if kind == "scribble":  # its ControlNets were trained with strokes of full brightness
        full = np.where(full >= 128, 255, 0)
    return Image.fromarray(full.round().astype(np.uint8)).convert("RGB")


def _pose(_: object) -> _Find:
    """People by a detector, their joints by ViTPose (Xu et al. 2022), drawn as OpenPose draws them."""
    _opencv("pose")
    if importlib.util.find_spec("scipy") is None:
        raise UsageError(
            "control: pose needs SciPy, which is not installed; run pip install 'imprompt[control]', or give "
            "a drawn skeleton as none:PATH."
        )
    detector_processor, detector = _loaded("person", "AutoModelForObjectDetection")
    processor, model = _loaded("pose", "VitPoseForPoseEstimation")

    def find(picture: Image.Image) -> Image.Image:
        found = detector_processor.post_process_object_detection(
            _output(detector_processor, detector, picture), MIN_SCORE, [(picture.height, picture.width)]
        )[0]
        labels = [detector.config.id2label[int(label)] for label in found["labels"]]
        boxes = found["boxes"].numpy()[[label == "person" for label in labels]]
        if not len(boxes):
            raise _NothingFound("pose finds nobody in the picture")
        boxes[:, 2:] -= boxes[:, :2]  # ViTPose reads left, top, width, height
        joints = _output(processor, model, picture, boxes=[boxes])
        people = processor.post_process_pose_estimation(joints, boxes=[boxes])[0]
        drawn = skeletons(
            [np.column_stack([one["keypoints"].numpy(), one["scores"].numpy()]) for one in people],
            picture.size,
        )
        if not drawn.getbbox():
            raise _NothingFound("pose finds no limbs in the picture")
        return drawn

    return find


def _face(face_model: str | None) -> _Find:
    """The five points of the largest face."""
    _opencv("face")
    from imprompt.encoders import face_onnx

    packs = ("antelopev2", "buffalo_l")
    models = face_onnx.installed(packs) if face_model is None else face_onnx.OnnxFaces.from_folder(face_model)
    if models is None:
        raise ModelError(f"control: face finds the points by face models. {face_onnx.how_to_get(packs)}")

    def find(picture: Image.Image) -> Image.Image:
        found = models.find(picture)
        if not found:
            raise _NothingFound("face finds no face in the picture")
        return face_keypoints(max(found, key=lambda one: one.area).landmarks, picture.size)

    return find


def _unchanged(picture: Image.Image) -> Image.Image:
    return picture


_ANNOTATORS: dict[str, Callable[[str | None], _Find]] = {
    "canny": lambda _: _canny,
    "depth": _depth,
    "pose": _pose,
    "face": _face,
    "lineart": lambda _: partial(_drawing, "lineart"),
    "scribble": lambda _: partial(_drawing, "scribble"),
    "tile": lambda _: _unchanged,
    "seg": _segments,
    "frame": lambda _: _unchanged,
    "none": lambda _: _unchanged,
}
"""Kind → what loads its function from picture to map, given the folder of face models."""


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
    """The image processor and the model of a kind: on the CPU in float32, so that the map is the same on all
    devices."""
    repository, about = MODELS[kind]
    try:
        import transformers

        processor = transformers.AutoImageProcessor.from_pretrained(repository)
        model = getattr(transformers, model_class).from_pretrained(repository, use_safetensors=True)
    except Exception as error:  # the hub's client raises nearly anything
        reason = first_line(error)
        raise ModelError(
            f"control: {kind} is found by {repository} ({about}), which cannot be loaded: {reason} Check the "
            "network and HF_HUB_OFFLINE, or give a finished map as none:PATH."
        ) from error
    return processor, model.eval()


def _output(processor: Any, model: Any, picture: Image.Image, **more: Any) -> Any:
    """The model's output for a picture."""
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
