"""Tables of encoded pictures and captions: kept in a folder, or encoded each time they are asked for.

A stored table is a folder of shards, safetensors files that are named by a hash of their bytes. Rows stand
under a hash of their content, so a table is completed, never made anew, and runs may share a folder. A
damaged shard is deleted and its rows are missing. Nothing here knows what the rows are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from torch import Tensor
from tqdm import tqdm

from imprompt.errors import InputError, ModelError
from imprompt.training.folder import disk_errors, save_tensors

SHARD = 256  # rows a file: an interrupted encoding loses at most so many
ENCODE_BATCH = 16  # rows that are decoded and encoded at once
IN_MEMORY = 4 * 2**30  # bytes of one table that are held in memory; rows beyond are read from disk
_OURS = re.compile(
    r"(latents|texts|features-[a-z-]+)-[0-9a-f]{20}/([0-9a-f]{32}\.safetensors|\.shard\.part\.[0-9a-f]+)"
)

Item: TypeAlias = "dict[str, Tensor] | str"
"""The tensors of one picture or caption, or why it cannot be used."""


class Unread(str):
    """Why a picture cannot be read now. It is no fault of its content, so the next run tries again."""

    __slots__ = ()


Encode: TypeAlias = Callable[[Sequence[int]], list[Item]]
"""Encodes the rows with these numbers."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the encoding, and how to wait for all of them."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


class StoredTable:
    """The rows of ``keys`` that are in a folder; ``keys`` name each row's content, ``rejected`` has the
    reason for each row that could not be encoded."""

    def __init__(self, folder: Path, keys: Sequence[str], rejected: dict[int, str]) -> None:
        self.keys, self.rejected = keys, dict(rejected)
        self.shards: list[Path] = []
        """The files that hold rows of ``keys``."""
        self._rows: dict[str, Any] = {}  # name → tensor, or the open file that has it
        self._refused: dict[str, str] = {}
        wanted, room = set(keys), IN_MEMORY
        for shard in sorted(folder.glob("*.safetensors")):
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                room -= self._add(shard, wanted, room)
        for index, key in enumerate(keys):
            if key in self._refused:
                self.rejected[index] = self._refused[key]

    def _add(self, shard: Path, wanted: set[str], room: int) -> int:
        """Take in a shard's wanted rows, in memory if they fit into ``room`` bytes; gives the bytes taken."""
        try:
            opened = safe_open(shard, "pt")
            refused = json.loads((opened.metadata() or {}).get("rejected", "{}"))
        except (SafetensorError, ValueError):
            shard.unlink(missing_ok=True)
            return 0
        names = list(opened.keys())
        names = [name for name in names if _key(name) in wanted]
        if not names and wanted.isdisjoint(refused):
            return 0
        size = shard.stat().st_size
        content = shard.read_bytes() if size <= room else None
        if _digest(shard if content is None else content) != shard.stem:
            shard.unlink(missing_ok=True)
            return 0
        self.shards.append(shard)
        self._refused |= refused
        if content is None:
            self._rows |= dict.fromkeys(names, opened)
            return 0
        loaded = load_tensors(content)
        self._rows |= {name: loaded[name] for name in names}
        return size

    @property
    def missing(self) -> list[int]:
        """The rows that are not there yet."""
        known = {_key(name) for name in self._rows} | self._refused.keys()
        return [i for i, key in enumerate(self.keys) if key not in known and i not in self.rejected]

    def rows(self, name: str, indices: Sequence[int], views: Sequence[int] | None = None) -> Tensor:
        """The rows ``indices`` of tensor ``name`` as float32; ``views`` picks one of each row's versions."""
        found = []
        for place, index in enumerate(indices):
            key = f"{self.keys[index]}/{name}"
            held = self._rows[key]
            whole = held if isinstance(held, Tensor) else held.get_tensor(key)
            found.append((whole if views is None else whole[views[place]]).float())
        return torch.stack(found)


class LiveTable:
    """Rows encoded each time they are asked for."""

    shards: Sequence[Path] = ()

    def __init__(self, encode: Encode, rejected: dict[int, str]) -> None:
        self.encode, self.rejected = encode, rejected
        self._last: tuple[tuple[int, ...], list[Item]] = ((), [])

    def rows(self, name: str, indices: Sequence[int], views: Sequence[int] | None = None) -> Tensor:
        """As :meth:`StoredTable.rows`. Raises :class:`InputError` for a picture that was there before."""
        asked, items = self._last  # a step asks for several tensors of the same rows
        if asked != tuple(indices):
            with torch.no_grad():
                items = self.encode(indices)
            self._last = (tuple(indices), items)
        found = []
        for place, item in enumerate(items):
            if isinstance(item, str):
                raise InputError(f"row {indices[place]} cannot be read any more: {item}")
            found.append((item[name] if views is None else item[name][views[place]]).float().cpu())
        return torch.stack(found)


Table: TypeAlias = StoredTable | LiveTable


def complete(
    folder: Path,
    keys: Sequence[str],
    unread: dict[int, str],
    encode: Encode,
    ranks: Ranks,
    *,
    quiet: bool = False,
) -> StoredTable:
    """The stored table of ``keys``, its missing rows encoded now; processes share them.

    ``unread`` are rows that are not encoded, with the reason. Raises :class:`ModelError` for values that are
    not finite, :class:`InputError` when the folder cannot be written."""
    table = StoredTable(folder, keys, unread)
    missing = {keys[index]: index for index in reversed(table.missing)}  # the first row of each content
    ranks.wait()
    # By number: whatever another run adds to the folder meanwhile, each row has one process.
    mine = {key: index for key, index in missing.items() if index % ranks.count == ranks.index}
    failed = _store(folder, mine, encode, quiet)
    ranks.wait()
    if missing:
        table = StoredTable(folder, keys, unread)
        for index in table.missing:
            table.rejected[index] = failed.get(keys[index], "cannot be read by another process")
    return table


def _store(folder: Path, rows: Mapping[str, int], encode: Encode, quiet: bool) -> dict[str, Unread]:
    """Encode the rows of these keys into shards, and give those that cannot be read."""
    failed: dict[str, Unread] = {}
    title = f"encoding {folder.name.rpartition('-')[0]}"
    with tqdm(total=len(rows), desc=title, disable=quiet or not rows) as bar:
        for picked in chunks(sorted(rows, key=rows.__getitem__), SHARD):
            made: dict[str, Item] = {}
            for some in chunks(picked, ENCODE_BATCH):
                with torch.inference_mode():
                    made |= zip(some, encode([rows[key] for key in some]), strict=True)
                bar.update(len(some))
            failed |= {key: item for key, item in made.items() if isinstance(item, Unread)}
            _write_shard(folder, {key: item for key, item in made.items() if key not in failed})
    return failed


def remove_unused(root: Path, tables: Iterable[Table], days: int) -> str:
    """Delete the shards in ``root`` that none of ``tables`` uses and no run has used for ``days``.

    Gives a line that says what was removed; empty if that is nothing. Only files named as tables name theirs
    are touched. A run that reads a deleted shard keeps it open; the next one encodes its rows again."""
    used = {shard for table in tables for shard in table.shards}
    for shard in used:
        with contextlib.suppress(OSError):  # a folder that may only be read
            os.utime(shard)
    count, size, since = 0, 0, time.time() - 86_400 * days
    for path in root.glob("*/*"):
        if path in used or not _OURS.fullmatch(path.relative_to(root).as_posix()):
            continue
        with contextlib.suppress(OSError):
            about = path.stat()
            if about.st_mtime <= since:
                path.unlink()
                count, size = count + 1, size + about.st_size
                path.parent.rmdir()  # if it was the last
    why = f"no run has used for {days} days" if days else "this run does not use"
    return f"removed {count} files of the cache ({size / 1e6:.1f} MB) that {why}" if count else ""


def chunks(values: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """``values`` in order, at most ``size`` at once."""
    return (values[start : start + size] for start in range(0, len(values), size))


def _key(name: str) -> str:
    return name.rpartition("/")[0]


def _write_shard(folder: Path, items: Mapping[str, Item]) -> None:
    if not items:
        return
    rejected = {key: item for key, item in items.items() if isinstance(item, str)}
    tensors = {
        f"{key}/{name}": _compact(name, tensor)
        for key, item in items.items()
        if not isinstance(item, str)
        for name, tensor in item.items()
    }
    with disk_errors(folder, "the cache"):
        folder.mkdir(parents=True, exist_ok=True)
        part = save_tensors(tensors, {"rejected": json.dumps(rejected)}, folder / "shard.part")
        part.replace(folder / f"{_digest(part)}.safetensors")


def _digest(content: bytes | Path) -> str:
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
        return hashlib.file_digest(stream, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def _compact(name: str, tensor: Tensor) -> Tensor:
    """Half precision where the values fit it. Raises :class:`ModelError` for NaN or infinity."""
    if not tensor.isfinite().all():
        raise ModelError(
            f"the frozen model gives values that are not finite ('{name}'); its weights are damaged."
        )
    half = tensor.half()
    return (half if half.isfinite().all() and name != "crop" else tensor.float()).cpu().contiguous()
