"""Faces in pictures → what face adapters read: an embedding of who it is, and of an aligned crop its look.

A detector and a recogniser, both ONNX files, run by onnxruntime (the extra ``face``): InsightFace's packs
(SCRFD and ArcFace), or permissively licensed ones (YuNet and SFace; AuraFace). Nothing is downloaded that was
not named. An adapter understands only the embeddings it was trained on, so these say which model made them.

Dimensions: ``N`` faces, ``E`` embedding, ``P`` patches and class token, ``W`` width of hidden states.
"""

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imprompt.catalog import licences
from imprompt.encoders.clip import Features
from imprompt.encoders.features import read_file, write_file
from imprompt.errors import InputError, ModelError, first_line

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Where ArcFace's training pictures of 112×112 have the eyes, the nose and the corners of the mouth."""
CROP = 224
"""Side of the aligned crop that FaceID-Plus's image encoder sees."""

_FORMAT = "imprompt-faces-1"
_SIDES = (640, 480, 320, 256)  # long side at which a face is looked for: close-ups are found when small
_CANVAS = 640
_THRESHOLD, _OVERLAP = 0.5, 0.4  # as InsightFace has them
_NON_COMMERCIAL = ("buffalo_l", "buffalo_s", "antelopev2")
_BY_FILE = {"w600k_r50": "buffalo_l", "w600k_mbf": "buffalo_s", "sface": "sface"}
_DETECTORS = re.compile(r"det_|scrfd|yunet|detection", re.I)
_RECOGNISERS = re.compile(r"w600k|glint|arcface|sface|recognition", re.I)


@dataclass(frozen=True)
class Face:
    """One face in a picture, in pixels from the upper left corner."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    score: float
    landmarks: Array
    """(5, 2): the eyes, the nose, the corners of the mouth, left before right as seen."""

    @property
    def area(self) -> float:
        """Of its box, in square pixels."""
        left, top, right, bottom = self.box
        return max(0.0, right - left) * max(0.0, bottom - top)


@dataclass(frozen=True)
class Faces:
    """What adapters read of ``N`` faces."""

    embedding: Tensor
    """``N E``, as the recogniser gives it: not normalised."""
    space: str
    """Which model's embedding it is: ``buffalo_l``, ``antelopev2``, …; ``unknown`` is believed to fit."""
    patches: Tensor | None = None
    """``N P W``: the image encoder's hidden states of each aligned crop, for FaceID-Plus."""
    negative_patches: Tensor | None = None
    """``1 P W``: the same of an all-zero preprocessed tensor."""


class FaceEmbedder(Protocol):
    """What finds faces in an RGB picture and tells them apart."""

    @property
    def name(self) -> str: ...
    @property
    def space(self) -> str: ...
    def find(self, image: Image.Image) -> list[Face]:
        """All faces, the largest first."""

    def embed(self, image: Image.Image, face: Face) -> Array:
        """``(E,)`` float32, not normalised."""


class PictureEncoder(Protocol):
    """What makes features of the crop, see :class:`imprompt.encoders.clip.ImageEncoder`."""

    def encode(self, images: Sequence[Image.Image]) -> Features: ...


def read(
    reader: FaceEmbedder,
    image: Image.Image,
    number: int = 0,
    encoder: PictureEncoder | None = None,
    name: str = "the picture",
    crop: Literal["aligned", "square"] = "aligned",
) -> Faces:
    """Face ``number`` of a picture (0 is the largest); with ``encoder`` its look as well, of the upright face
    or of the square around its box (black where the picture ends, as Kolors has it).

    Raises :class:`InputError` when there is no such face, saying what was tried.
    """
    found = reader.find(image)
    if not found:
        raise InputError(
            f"no face was found in '{name}' ({image.width}×{image.height}), {reader.name} looked "
            f"{getattr(reader, 'tried', 'at it')}. Give a photo with an upright, sharp face that is at least "
            "30 pixels wide and has some room around it, or embeddings made elsewhere."
        )
    if number >= len(found):
        raise InputError(
            f"face {number} of '{name}': {len(found)} were found, numbered from 0 with the largest first."
        )
    face = found[number]
    embedding = torch.from_numpy(np.asarray(reader.embed(image, face), np.float32))[None]
    if encoder is None:
        return Faces(embedding, reader.space)
    seen = align(image, face.landmarks, CROP) if crop == "aligned" else image.crop(_square(face.box))
    look = encoder.encode([seen])
    return Faces(embedding, reader.space, look.hidden, look.negative_hidden)


def joined(parts: Sequence[Faces]) -> Faces:
    """Several faces as one record. Raises :class:`InputError` for those of different models."""
    spaces = {part.space for part in parts}
    if len(spaces) != 1 or len({part.embedding.shape[-1] for part in parts}) != 1:
        raise InputError(f"faces of one prompt are of different face models ({', '.join(sorted(spaces))}).")
    looks = [part.patches for part in parts if part.patches is not None]
    if looks and len(looks) != len(parts):
        raise InputError("some faces of one prompt come with their crop's features and some do not.")
    return Faces(
        torch.cat([part.embedding for part in parts]),
        parts[0].space,
        torch.cat(looks) if looks else None,
        parts[0].negative_patches,
    )


# ---- geometry


def similarity(points: Array, targets: Array) -> Array:
    """The ``(2, 3)`` rotation, scale and shift that bring ``points`` nearest to ``targets`` (Umeyama 1991,
    eq. 40–42, least squares). Raises :class:`InputError` when all points are one."""
    centre, target = points.mean(0), targets.mean(0)
    spread, wanted = points - centre, targets - target
    variance = (spread**2).sum() / len(points)
    if not np.isfinite(points).all() or variance < 1e-9:
        raise InputError("a face's landmarks lie in one point; it cannot be aligned.")
    u, singular, vt = np.linalg.svd(wanted.T @ spread / len(points))
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    turned = (u * signs) @ vt
    scaled = turned * (singular * signs).sum() / variance
    return np.hstack([scaled, (target - scaled @ centre)[:, None]])


def align(image: Image.Image, landmarks: Array, size: int = 112) -> Image.Image:
    """The face upright and filling a square of ``size`` pixels as ArcFace's training pictures do; black where
    the picture ends. Bilinear, as InsightFace's ``norm_crop``."""
    matrix = similarity(np.asarray(landmarks, np.float64), TEMPLATE * size / 112)
    back = np.linalg.inv(matrix[:, :2])
    shift = -back @ matrix[:, 2]
    # Landmarks count a pixel's centre as 0, Pillow as 0.5.
    shift = shift + 0.5 - back @ np.array([0.5, 0.5])
    a, b, c, d = back.ravel()
    return image.transform(
        (size, size),
        Image.Transform.AFFINE,
        (a, b, shift[0], c, d, shift[1]),
        resample=Image.Resampling.BILINEAR,
    )


def _square(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """The square around a box's middle that is as wide as its longer side."""
    left, top, right, bottom = box
    x, y, half = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 2
    return x - half, y - half, x + half, y + half


def apart(faces: Sequence[Face], overlap: float = _OVERLAP) -> list[Face]:
    """The faces without those that overlap a better one by more than ``overlap`` (of their union), largest
    first."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda each: -each.score):
        if all(_union(face, other) <= overlap for other in kept):
            kept.append(face)
    return sorted(kept, key=lambda each: -each.area)


def _union(one: Face, other: Face) -> float:
    left, top = max(one.box[0], other.box[0]), max(one.box[1], other.box[1])
    right, bottom = min(one.box[2], other.box[2]), min(one.box[3], other.box[3])
    shared = max(0.0, right - left) * max(0.0, bottom - top)
    whole = one.area + other.area - shared
    return shared / whole if whole > 0 else 0.0


# ---- ONNX models


class OnnxFaces:
    """A detector (SCRFD with landmarks, or YuNet) and a recogniser (ArcFace's kind of 512 numbers on
    112×112, or SFace's 128) as ONNX files, on the CPU."""

    def __init__(self, detector: str | Path, recogniser: str | Path, space: str) -> None:
        self.space = space
        """Which model's embeddings these are."""
        self.name = f"{Path(detector).stem} with {Path(recogniser).stem}"
        self._detector, self._recogniser = _session(detector), _session(recogniser)
        self._outputs = [each.name for each in self._detector.get_outputs()]
        self._yunet = {"cls_8", "obj_8", "bbox_8", "kps_8"} <= set(self._outputs)
        if not self._yunet and len(self._outputs) != 9:
            raise ModelError(
                f"'{detector}' is no face detector that can be used: SCRFD with landmarks has 9 outputs, "
                f"YuNet has cls_8, obj_8, …; it has {len(self._outputs)}: {', '.join(self._outputs[:4])}."
            )
        shapes = self._recogniser.get_inputs()[0].shape, self._recogniser.get_outputs()[0].shape
        if list(shapes[0][1:]) != [3, 112, 112] or len(shapes[1]) != 2:
            raise ModelError(
                f"'{recogniser}' is no face recogniser: pictures of 3×112×112 in and one embedding out are "
                f"expected, it takes {shapes[0]} and gives {shapes[1]}."
            )
        if said := licence_note(space):
            licences.check(f"'{recogniser}'", licences.FACES)
            warnings.warn(said, stacklevel=2)

    @classmethod
    def from_folder(cls, folder: str | Path, space: str | None = None) -> "OnnxFaces":
        """The detector and the recogniser in a folder, or a hub repository (``owner/name``).

        ``space`` is told by the files' and the folder's names. Raises :class:`ModelError`, naming what is
        there, when one is missing or several are.
        """
        place = _place(str(folder))
        files = sorted(place.glob("*.onnx"))
        chosen = []
        for what, pattern in (("detector", _DETECTORS), ("recogniser", _RECOGNISERS)):
            fitting = [file for file in files if pattern.search(file.stem)]
            if len(fitting) != 1:
                there = ", ".join(file.name for file in files) or "no .onnx file"
                raise ModelError(
                    f"'{folder}' has {len(fitting)} files that are a face {what} by name ({there}). One of "
                    "each is expected, such as det_10g.onnx and w600k_r50.onnx, or use OnnxFaces(detector, "
                    "recogniser, space)."
                )
            chosen.append(fitting[0])
        detector, recogniser = chosen
        return cls(detector, recogniser, space or _space(str(folder), recogniser.stem))

    @property
    def tried(self) -> str:
        """How faces are looked for, in words."""
        return f"at sizes {', '.join(map(str, _SIDES))} for scores from {_THRESHOLD}"

    def find(self, image: Image.Image) -> list[Face]:
        """All faces, the largest first; smaller copies of the picture are looked at until there are some."""
        for side in _SIDES:
            scale = side / max(image.size)
            small = image.resize(
                (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
                Image.Resampling.BILINEAR,
            )
            canvas = Image.new("RGB", (_CANVAS, _CANVAS))
            canvas.paste(small, (0, 0))
            found = self._yunets(canvas) if self._yunet else self._scrfds(canvas)
            factors = image.width / small.width, image.height / small.height
            inside = [_scaled(face, *factors) for face in found]
            if inside:
                return apart(inside)
        return []

    def embed(self, image: Image.Image, face: Face) -> Array:
        """``(E,)`` float32 of the aligned face. Raises :class:`ModelError` when the model gives NaN."""
        pixels = np.asarray(align(image, face.landmarks), np.float32).transpose(2, 0, 1)[None]
        entry, outlet = self._recogniser.get_inputs()[0], self._recogniser.get_outputs()[0]
        if outlet.shape[-1] != 128:  # SFace normalises inside
            pixels = (pixels - 127.5) / 127.5
        (embedding,) = self._recogniser.run([outlet.name], {entry.name: pixels})[0]
        if not np.isfinite(embedding).all():
            raise ModelError(f"{self.name} gave an embedding with NaN; its file may be damaged.")
        return np.asarray(embedding, np.float32)

    def _scrfds(self, canvas: Image.Image) -> list[Face]:
        """SCRFD (Guo et al. 2021): at each stride scores, distances to the four sides, and landmarks, both in
        strides from an anchor's centre; two anchors a place."""
        pixels = (np.asarray(canvas, np.float32).transpose(2, 0, 1)[None] - 127.5) / 128
        outputs = self._detector.run(self._outputs, {self._detector.get_inputs()[0].name: pixels})
        faces = []
        for level, stride in enumerate((8, 16, 32)):
            scores, sides, marks = (
                outputs[level + 3 * kind].reshape(-1, width) for kind, width in enumerate((1, 4, 10))
            )
            grid = _CANVAS // stride
            down, across = np.divmod(np.arange(grid * grid), grid)
            centres = np.repeat(np.stack([across, down], 1), len(scores) // (grid * grid), axis=0)
            for i in np.flatnonzero(scores[:, 0] >= _THRESHOLD):
                x, y = centres[i] * stride
                left, top, right, bottom = sides[i] * stride
                faces.append(
                    Face(
                        (float(x - left), float(y - top), float(x + right), float(y + bottom)),
                        float(scores[i, 0]),
                        centres[i] * stride + marks[i].reshape(5, 2) * stride,
                    )
                )
        return faces

    def _yunets(self, canvas: Image.Image) -> list[Face]:
        """YuNet (Wu et al. 2023): class and object scores, centre and log size, and landmarks, in strides
        from each place's corner; BGR from 0 to 255."""
        pixels = np.ascontiguousarray(np.asarray(canvas, np.float32)[..., ::-1].transpose(2, 0, 1)[None])
        outputs = self._detector.run(self._outputs, {self._detector.get_inputs()[0].name: pixels})
        named = dict(zip(self._outputs, outputs, strict=True))
        faces = []
        for stride in (8, 16, 32):
            part = {
                kind: named[f"{kind}_{stride}"].reshape(-1, width)
                for kind, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10))
            }
            scores = np.sqrt(part["cls"].clip(0, 1) * part["obj"].clip(0, 1))[:, 0]
            grid = _CANVAS // stride
            for i in np.flatnonzero(scores >= _THRESHOLD):
                place = np.array([i % grid, i // grid], np.float64)
                x, y = (place + part["bbox"][i, :2]) * stride
                width, height = np.exp(part["bbox"][i, 2:]) * stride
                faces.append(
                    Face(
                        (
                            float(x - width / 2),
                            float(y - height / 2),
                            float(x + width / 2),
                            float(y + height / 2),
                        ),
                        float(scores[i]),
                        (place + part["kps"][i].reshape(5, 2)) * stride,
                    )
                )
        return faces


def installed(packs: Sequence[str]) -> OnnxFaces | None:
    """The first of InsightFace's packs that is where InsightFace keeps them (``$INSIGHTFACE_HOME/models`` or
    ``~/.insightface/models``); ``None`` when none is."""
    for pack in packs:
        place = home() / pack
        if any(place.glob("*.onnx")):
            return OnnxFaces.from_folder(place)
    return None


def home() -> Path:
    """Where InsightFace keeps its packs on this machine."""
    return Path(os.environ.get("INSIGHTFACE_HOME", "~/.insightface")).expanduser() / "models"


def licence_note(space: str) -> str | None:
    """What a user must know before using a face model's embeddings; ``None`` where there is nothing."""
    if space not in _NON_COMMERCIAL:
        return None
    return f"the face models {space} are InsightFace's, whose weights are for non-commercial use only"


def how_to_get(packs: Sequence[str]) -> str:
    """What to do when there is no face model, in words."""
    pack = packs[0] if packs else "buffalo_l"
    return (
        f"put InsightFace's pack {pack} (.onnx files; non-commercial weights) into {home() / pack}, or name "
        "another folder of it (face_embedder=, --face-model)."
    )


# ---- files


def save(faces: Faces, path: str | Path, pictures: Sequence[str] = ()) -> Path:
    """Write faces as ``.safetensors``; ``pictures`` are hashes of what they were made of. The file appears
    whole or not at all. Raises :class:`InputError`."""
    tensors = {"embedding": faces.embedding}
    if faces.patches is not None and faces.negative_patches is not None:
        tensors |= {"patches": faces.patches, "negative_patches": faces.negative_patches}
    header = {"format": _FORMAT, "space": faces.space, "pictures": json.dumps(tuple(pictures))}
    return write_file(path, tensors, header)


def load(path: str | Path) -> Faces:
    """Read what :func:`save` wrote. Raises :class:`InputError` for anything else, damaged files and NaN."""
    tensors, header = read_file(path)
    known = {"embedding", "patches", "negative_patches"}
    if header.get("format") != _FORMAT or "embedding" not in tensors or not tensors.keys() <= known:
        raise InputError(
            f"'{path}' holds no faces; 'imprompt embed' makes such files of photos with a face adapter."
        )
    if tensors["embedding"].ndim != 2 or any(
        tensor.ndim != 3 for name, tensor in tensors.items() if name != "embedding"
    ):
        raise InputError(f"'{path}': its tensors do not have the shapes of faces.")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise InputError(f"'{path}': faces contain NaN or infinite values.")
    return Faces(space=header.get("space", "unknown"), **tensors)


# ---- private


def _place(folder: str) -> Path:
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", folder):
        raise ModelError(f"there is no folder '{folder}' with a face detector and recogniser (.onnx).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(folder, allow_patterns=["*.onnx"]))
    except Exception as error:  # the hub's client raises nearly anything
        reason = first_line(error)
        raise ModelError(
            f"face models '{folder}' are no folder here and cannot be had from the hub: {reason}"
        ) from error


def _space(folder: str, recogniser: str) -> str:
    """Whose embeddings a recogniser makes, by names: ``glintr100`` is antelopev2's and AuraFace's alike."""
    for mark, space in _BY_FILE.items():
        if mark in recogniser.lower():
            return space
    for space in ("antelopev2", "auraface"):
        if space in folder.lower():
            return space
    return "unknown"


def _session(path: str | Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError("faces are found by onnxruntime: pip install 'imprompt[face]'.") from error
    if not Path(path).is_file():
        raise ModelError(f"there is no file '{path}'.")
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has exceptions of its own without a common base
        raise ModelError(f"'{path}' cannot be opened as an ONNX model: {first_line(error)}") from error


def _scaled(face: Face, across: float, down: float) -> Face:
    left, top, right, bottom = face.box
    box = (left * across, top * down, right * across, bottom * down)
    return Face(box, face.score, face.landmarks * np.array([across, down]))
