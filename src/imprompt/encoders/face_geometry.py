"""Geometry of faces: boxes, landmarks, overlap and alignment."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from imprompt.errors import InputError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Positions of the eyes, the nose and the corners of the mouth in ArcFace's pictures of 112×112."""
OVERLAP = 0.4
"""Intersection over union from which two boxes count as one face; InsightFace's."""


@dataclass(frozen=True)
class Face:
    """One face in a picture, in pixels from the upper left corner."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    score: float
    """The detector's, 0 to 1."""
    landmarks: Array
    """(5, 2): the eyes, the nose, the corners of the mouth, left before right as seen."""

    @property
    def area(self) -> float:
        """Area of its box in square pixels."""
        left, top, right, bottom = self.box
        return max(0.0, right - left) * max(0.0, bottom - top)

    @property
    def square(self) -> tuple[float, float, float, float]:
        """The square around the middle of its box, as wide as the box's longer side."""
        left, top, right, bottom = self.box
        x, y, half = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 2
        return x - half, y - half, x + half, y + half

    def scaled(self, across: float, down: float) -> "Face":
        """The face in a picture scaled by ``across`` and ``down``."""
        left, top, right, bottom = self.box
        box = (left * across, top * down, right * across, bottom * down)
        return Face(box, self.score, self.landmarks * np.array([across, down]))


def similarity(points: Array, targets: Array) -> Array:
    """The ``(2, 3)`` similarity transform from ``points`` to ``targets`` by least squares (Umeyama 1991, eq.
    40–42). Raises :class:`InputError` if all points are equal."""
    centre, target = points.mean(0), targets.mean(0)
    centred, wanted = points - centre, targets - target
    variance = (centred**2).sum() / len(points)
    if not np.isfinite(points).all() or variance < 1e-9:
        raise InputError("a face's landmarks lie in one point; it cannot be aligned.")
    u, singular, vt = np.linalg.svd(wanted.T @ centred / len(points))
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    turned = (u * signs) @ vt
    scaled = turned * (singular * signs).sum() / variance
    return np.hstack([scaled, (target - scaled @ centre)[:, None]])


def align(image: Image.Image, landmarks: Array, size: int = 112) -> Image.Image:
    """Align a face to ArcFace's template in a square of ``size`` pixels, black outside of the picture;
    bilinear, like InsightFace's ``norm_crop``."""
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


def nms(faces: Sequence[Face]) -> list[Face]:
    """Non-maximum suppression: remove faces that overlap a better one by more than :data:`OVERLAP`
    (intersection over union). Returns the rest, largest first."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda each: -each.score):
        if all(_intersection_over_union(face, other) <= OVERLAP for other in kept):
            kept.append(face)
    return sorted(kept, key=lambda each: -each.area)


def _intersection_over_union(one: Face, other: Face) -> float:
    left, top = max(one.box[0], other.box[0]), max(one.box[1], other.box[1])
    right, bottom = min(one.box[2], other.box[2]), min(one.box[3], other.box[3])
    shared = max(0.0, right - left) * max(0.0, bottom - top)
    union = one.area + other.area - shared
    return shared / union if union > 0 else 0.0
