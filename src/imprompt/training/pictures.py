"""The pictures of a set before any model sees them: their hashes and sizes, targets and references.

Each picture is read once for its hash and its target's size, and again where it is encoded: sets may be
larger than the memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imprompt.data.rows import Row
from imprompt.encoders.images import load_image
from imprompt.errors import ImpromptError
from imprompt.training.data import crop_box
from imprompt.training.tables import Unread

REFERENCE_SIDE = 512  # references are kept at this size while they wait for the encoder
LEAST_SIDE, LARGEST_RATIO = 8, 10  # of a picture worth training on

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Decoded:
    """One row's target at its size, its reference (the same crop), and SDXL's size conditions."""

    target: Image.Image
    reference: Image.Image
    crop: tuple[float, ...]


@dataclass(frozen=True)
class Pictures:
    """The pictures of ``rows``, with a hash of each one's bytes and its target's size."""

    rows: Sequence[Row]
    keys: Sequence[str]
    sizes: Sequence[Size]
    unread: dict[int, str]
    """Row number to reason, for files that cannot be read."""
    workers: int = 2
    """Threads that read and decode."""

    @classmethod
    def read(cls, rows: Sequence[Row], size: Callable[[bytes], Size], workers: int = 2) -> Pictures:
        """Read each picture once; ``size`` gives its target's size from its bytes (empty: unreadable)."""
        unread: dict[int, str] = {}

        def one(index: int) -> tuple[str, Size]:
            content = _content(rows[index])
            if isinstance(content, str):
                unread[index] = content
                return f"unreadable-{index}", size(b"")
            return _hash(content), size(content)

        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(one, range(len(rows))))
        return cls(rows, [key for key, _ in found], [each for _, each in found], unread, workers)

    @cached_property
    def names(self) -> list[str]:
        """Each picture's hash with its target's size: what its encodings are stored under."""
        return [f"{key}-{wide}x{high}" for key, (wide, high) in zip(self.keys, self.sizes, strict=True)]

    def decode(self, picked: Iterable[int]) -> list[Decoded | str]:
        """The pictures of these rows, or why one cannot be used (:class:`Unread`: why it cannot be read)."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._one, picked))

    def _one(self, index: int) -> Decoded | str:
        content = _content(self.rows[index])
        if isinstance(content, str):
            return content
        if _hash(content) != self.keys[index]:  # what is made of it would be stored as the old content's
            return Unread("changed since the run began")
        try:
            picture = load_image(content)
        except ImpromptError as error:
            return str(error)
        width, height = picture.size
        if min(width, height) < LEAST_SIDE or max(width, height) > LARGEST_RATIO * min(width, height):
            return f"{width}×{height} pixels: too small or too narrow to train on"
        box = crop_box(width, height, *self.sizes[index])
        crop = picture.crop(box)
        reference = crop.copy()
        reference.thumbnail((REFERENCE_SIDE, REFERENCE_SIDE), Image.Resampling.BICUBIC)
        wide, high = self.sizes[index]
        scale = wide / (box[2] - box[0])  # SDXL's conditions: as if the picture had been scaled, then cropped
        conditions = (height, width, box[1] * scale, box[0] * scale, high, wide)
        target = crop if crop.size == (wide, high) else crop.resize((wide, high), Image.Resampling.LANCZOS)
        return Decoded(target, reference, conditions)


def _content(row: Row) -> bytes | Unread:
    try:
        return row.read()
    except OSError as error:
        return Unread(f"cannot be read ({error.strerror or error})")


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def neighbours(sizes: Sequence[Size], most: int, pixels: int) -> list[list[int]]:
    """Places of neighbours of one size together, in order: at most ``most``, with no more than ``pixels``."""
    runs: list[list[int]] = []
    for place, (wide, high) in enumerate(sizes):
        room = min(most, pixels // (wide * high))
        if runs and len(runs[-1]) < room and sizes[runs[-1][0]] == (wide, high):
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def to_tensor(image: Image.Image) -> Tensor:
    """``3 H W`` from 0 to 1."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)
