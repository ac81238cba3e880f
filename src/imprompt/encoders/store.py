"""Features of pictures that were seen before, kept on the disk for later processes.

A file's name is a hash of everything that decides its features: the pictures' pixels, the encoder's weights,
how pictures are prepared, number format, device, threads and versions. So nothing in the folder is ever out
of date, what is damaged is made anew, and any of it may be deleted. ``IMPROMPT_FEATURE_CACHE`` is the
folder's size in MB (default 256); 0 keeps nothing.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from imprompt.encoders.clip import Features
from imprompt.encoders.features import Saved, load, save
from imprompt.errors import InputError, UsageError
from imprompt.io import cache_folder

SWITCH = "IMPROMPT_FEATURE_CACHE"
"""Environment variable: megabytes that may be kept."""
_DEFAULT_MB = 256
_FORMAT = 1
"""Counts on when the same key would mean other features, because framing or the files changed."""


class FeatureStore:
    """Features in a folder of at most ``limit`` bytes; those that were not used for longest go first."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit

    @classmethod
    def of_user(cls) -> "FeatureStore | None":
        """The user's own, in ``~/.cache/imprompt``; ``None`` where it is switched off, or the user has no
        home. Raises :class:`UsageError` for a size that is not a number."""
        size = os.environ.get(SWITCH) or str(_DEFAULT_MB)
        if not size.isdecimal():
            raise UsageError(f"{SWITCH} is '{size}'; a size in MB is expected, 0 for none.")
        try:
            return cls(cache_folder() / "features", int(size) * 1_000_000) if int(size) else None
        except InputError:
            return None

    def get(self, key: Mapping[str, object]) -> Features | None:
        """What was kept under ``key``; ``None`` when it is not there, or damaged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            found = load(path).features
        except InputError:
            return None
        with contextlib.suppress(OSError):  # deleted meanwhile
            path.touch()
        return found

    def put(self, key: Mapping[str, object], features: Features) -> None:
        """Keep features, and delete what is too much. A folder that cannot be written keeps nothing."""
        encoder = str(key.get("weights", ""))
        with contextlib.suppress(InputError, OSError):
            saved = Saved(features, encoder, encoder, (), str(key.get("framing", "crop")))
            save(saved, self._path(key), overwrite=True)
            self._shrink()

    def _shrink(self) -> None:
        about = [(file.stat(), file) for file in self._folder.glob("*.safetensors")]
        left = self._limit
        for stat, file in sorted(about, key=lambda pair: -pair[0].st_mtime_ns):
            left -= stat.st_size
            if left < 0:
                file.unlink(missing_ok=True)

    def _path(self, key: Mapping[str, object]) -> Path:
        text = json.dumps({**key, "format": _FORMAT}, sort_keys=True, default=str)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
