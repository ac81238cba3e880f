"""Face models as ONNX files: a detector and a recogniser, run by onnxruntime (extra ``face``) on the CPU.

InsightFace's packs (SCRFD and ArcFace), or permissively licensed models (YuNet and AuraFace). Nothing is
downloaded unless it is named.
"""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imprompt import hub
from imprompt.catalog import licences
from imprompt.catalog.resolve import resolve
from imprompt.encoders.face_geometry import Array, Face, align, nms
from imprompt.errors import ModelError, first_line
from imprompt.io import check_path

PACKS = ("buffalo_l", "buffalo_s", "antelopev2")
"""InsightFace's packs, whose weights are for non-commercial use."""

_SIDES = (640, 480, 320, 256)  # long side at which a face is looked for: close-ups are found when small
_CANVAS = 640
_THRESHOLD = 0.5  # as InsightFace has it
_WIDTH = 512  # of the embeddings that published adapters read
_BY_FILE = {"w600k_r50": "buffalo_l", "w600k_mbf": "buffalo_s"}
_DETECTORS = re.compile(r"det_|scrfd|yunet|detection", re.I)
_RECOGNISERS = re.compile(r"w600k|glint|arcface|recognition", re.I)


class OnnxFaces:
    """A detector (SCRFD with landmarks, or YuNet) and a recogniser of ArcFace's kind (112×112 pixels in, 512
    numbers out)."""

    def __init__(self, detector: str | Path, recogniser: str | Path, space: str) -> None:
        self.space = space
        """Name of the face model whose embeddings these are."""
        self.files = check_path(detector), check_path(recogniser)
        self.name = f"{Path(detector).stem} with {Path(recogniser).stem}"
        self._detector, self._recogniser = map(_session, self.files)
        self._outputs = [each.name for each in self._detector.get_outputs()]
        self._is_yunet = {"cls_8", "obj_8", "bbox_8", "kps_8"} <= set(self._outputs)
        if not self._is_yunet and len(self._outputs) != 9:
            raise ModelError(
                f"'{detector}' cannot be used as the face detector: SCRFD with landmarks has 9 outputs, "
                f"YuNet has cls_8, obj_8, …; it has {len(self._outputs)}: {', '.join(self._outputs[:4])}."
            )
        shapes = self._recogniser.get_inputs()[0].shape, self._recogniser.get_outputs()[0].shape
        if list(shapes[0][1:]) != [3, 112, 112] or list(shapes[1][1:]) != [_WIDTH]:
            raise ModelError(
                f"'{recogniser}' cannot be used as the face recogniser: it takes {shapes[0]} and "
                f"gives {shapes[1]}; pictures of 3×112×112 in and {_WIDTH} numbers out are expected."
            )
        if note := licence_note(space):
            licences.check(f"'{recogniser}'", licences.FACES)
            warnings.warn(note, stacklevel=2)

    @classmethod
    def from_folder(cls, folder: str | Path, space: str | None = None) -> "OnnxFaces":
        """The detector and the recogniser in a folder, or a hub repository (``owner/name``).

        ``space`` is told by the names of the files and the folder. Raises :class:`ModelError` unless there is
        one of each.
        """
        files = sorted(_folder(str(folder)).glob("*.onnx"))
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
        """Sizes and threshold of the detection, for messages."""
        return f"at sizes {', '.join(map(str, _SIDES))} for scores from {_THRESHOLD}"

    def find(self, image: Image.Image) -> list[Face]:
        """All faces, the largest first. The picture is tried at smaller sizes until there are some."""
        for side in _SIDES:
            scale = side / max(image.size)
            small = image.resize(
                (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
                Image.Resampling.BILINEAR,
            )
            canvas = Image.new("RGB", (_CANVAS, _CANVAS))
            canvas.paste(small, (0, 0))
            found = self._detect(canvas)
            if found:
                across, down = image.width / small.width, image.height / small.height
                return nms([face.scaled(across, down) for face in found])
        return []

    def embed(self, image: Image.Image, face: Face) -> Array:
        """Embed the aligned face: ``(512,)`` float32. Raises :class:`ModelError` if the model returns NaN."""
        pixels = np.asarray(align(image, face.landmarks), np.float32).transpose(2, 0, 1)[None]
        entry, outlet = self._recogniser.get_inputs()[0], self._recogniser.get_outputs()[0]
        (embedding,) = self._recogniser.run([outlet.name], {entry.name: (pixels - 127.5) / 127.5})[0]
        if not np.isfinite(embedding).all():
            raise ModelError(f"{self.name} gave an embedding with NaN; its file may be damaged.")
        return np.asarray(embedding, np.float32)

    def _detect(self, canvas: Image.Image) -> list[Face]:
        pixels: Array = np.asarray(canvas, np.float32)
        # YuNet reads BGR from 0 to 255.
        pixels = pixels[..., ::-1] if self._is_yunet else (pixels - 127.5) / 128
        entry = {self._detector.get_inputs()[0].name: np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])}
        outputs = self._detector.run(self._outputs, entry)
        if self._is_yunet:
            return _yunet_faces(dict(zip(self._outputs, outputs, strict=True)))
        return _scrfd_faces(outputs)


def _scrfd_faces(outputs: Sequence[Array]) -> list[Face]:
    """SCRFD (Guo et al. 2021): at each stride scores, distances to the four sides, and landmarks, both in
    strides from an anchor's centre; two anchors a place."""
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
            box = (float(x - left), float(y - top), float(x + right), float(y + bottom))
            landmarks = centres[i] * stride + marks[i].reshape(5, 2) * stride
            faces.append(Face(box, float(scores[i, 0]), landmarks))
    return faces


def _yunet_faces(outputs: Mapping[str, Array]) -> list[Face]:
    """YuNet (Wu et al. 2023): class and object scores, centre and log size, and landmarks, in strides from
    each place's corner."""
    faces = []
    for stride in (8, 16, 32):
        part = {
            kind: outputs[f"{kind}_{stride}"].reshape(-1, width)
            for kind, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10))
        }
        scores = np.sqrt(part["cls"].clip(0, 1) * part["obj"].clip(0, 1))[:, 0]
        grid = _CANVAS // stride
        for i in np.flatnonzero(scores >= _THRESHOLD):
            corner = np.array([i % grid, i // grid], np.float64)
            centre = (corner + part["bbox"][i, :2]) * stride
            half = np.exp(part["bbox"][i, 2:]) * stride / 2
            left, top, right, bottom = (float(side) for side in (*(centre - half), *(centre + half)))
            landmarks = (corner + part["kps"][i].reshape(5, 2)) * stride
            faces.append(Face((left, top, right, bottom), float(scores[i]), landmarks))
    return faces


def installed(packs: Sequence[str]) -> OnnxFaces | None:
    """The first of these packs that is installed where InsightFace does (``$INSIGHTFACE_HOME/models`` or
    ``~/.insightface/models``), if any."""
    for pack in packs:
        if is_installed(pack):
            return OnnxFaces.from_folder(home() / pack)
    return None


def is_installed(pack: str) -> bool:
    """Whether InsightFace's folder of that pack holds models."""
    return any((home() / pack).glob("*.onnx"))


def home() -> Path:
    """InsightFace's folder of packs, beginning with ``~`` for a user who has no home."""
    return Path(os.path.expanduser(os.environ.get("INSIGHTFACE_HOME", "~/.insightface"))) / "models"  # noqa: PTH111


def licence_note(space: str) -> str | None:
    """A note on a face model's licence, if it is non-commercial."""
    if space not in PACKS:
        return None
    return f"the face models {space} are InsightFace's, whose weights are for non-commercial use only"


def how_to_get(packs: Sequence[str]) -> str:
    """How to install a face model, for messages."""
    pack = packs[0] if packs else "buffalo_l"
    return (
        f"put InsightFace's pack {pack} (.onnx files; non-commercial weights) into {home() / pack}, or name "
        "another folder of it (face_embedder=, --face-model)."
    )


def _folder(name: str) -> Path:
    source = resolve(name, "folder of face models", {}, "a folder of .onnx files or a hub id (owner/name)")
    if source.path is None:
        return hub.fetch_folder(source.repo, ["*.onnx"], what=source.title) / source.inside
    if not source.path.is_dir():
        raise ModelError(f"'{name}' is not a folder; one with a face detector and a recogniser is expected.")
    return source.path


def _space(folder: str, recogniser: str) -> str:
    """Name of the face model, by file and folder; ``glintr100`` is the file of both antelopev2 and
    AuraFace."""
    for mark, space in _BY_FILE.items():
        if mark in recogniser.lower():
            return space
    for space in ("antelopev2", "auraface"):
        if space in folder.lower():
            return space
    return "unknown"


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError("faces are found by onnxruntime: pip install 'imprompt[face]'.") from error
    if not path.is_file():
        raise ModelError(f"there is no file '{path}'.")
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has exceptions of its own without a common base
        raise ModelError(f"'{path}' cannot be opened as an ONNX model: {first_line(error)}") from error
