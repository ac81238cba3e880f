"""A picture → the map that a ControlNet follows: edges for now, by OpenCV.

Libraries are imported when a kind is asked for. Nothing here knows ControlNets or requests.
"""

from typing import Any

import numpy as np
from PIL import Image

from imprompt.errors import UsageError

CANNY = (100, 200)
"""Thresholds of the published canny ControlNets' own examples (gradient of 8-bit values)."""


def edges(picture: Image.Image, low: float = CANNY[0], high: float = CANNY[1]) -> Image.Image:
    """Canny edges (Canny 1986) of an RGB picture, as RGB of its size: 255 on an edge, 0 elsewhere.

    The strongest of the three colours' gradients counts; ``low`` and ``high`` are the hysteresis thresholds.
    Raises :class:`UsageError` when OpenCV is not installed.
    """
    found = _opencv().Canny(np.asarray(picture.convert("RGB")), low, high)
    return Image.fromarray(found).convert("RGB")


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise UsageError(
            "control: canny needs OpenCV, which is not installed; run pip install 'imprompt[control]', or "
            "give finished edges as none:PATH."
        ) from error
    return cv2
