"""The folder of a training run: its lock, its identity, its log, and its checkpoints.

One process holds ``.lock`` during a run. ``run.json`` has the run's identity. A checkpoint is
``checkpoint-STEP.safetensors`` with a ``.json`` manifest that has its SHA-256; one that does not match its
manifest is not used. Files are written whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from imprompt.data.rows import Row
from imprompt.errors import InputError, ModelError, UsageError
from imprompt.io import finite, read_json, write_atomic

WEIGHT_NAME = "ip-adapter.safetensors"
RECORD, LOG, LOCK = "run.json", "log.jsonl", ".lock"
_WRITTEN = (LOG, "README.md", "card.html", "rejected.txt", "samples", "checkpoint-*")
"""What a run writes or deletes besides, by name."""
_HALF = re.compile(
    r"\.(checkpoint-\d+\.part\.[0-9a-f]{12}|(checkpoint-\d+\.json|run\.json|rejected\.txt|log\.jsonl|README\.md"
    r"|card\.html|ip-adapter\.safetensors|\d+\.png)\.[0-9a-f]{16}\.part)"
)
"""Names of files that a run was writing when it was killed."""


_FULL = ("No space left", "Disk quota exceeded", "File too large", "StorageFull", "FileTooLarge")
"""How the system and safetensors say that a disk is full."""


@dataclass(frozen=True)
class Identity:
    """Identity of a run, by the contents of its inputs, never by their paths."""

    config: dict[str, Any]
    """The fields of the configuration that may not change."""
    pictures: int
    data: str
    """Hash of all pictures, captions, groups and splits."""
    base: str
    """Hash of the weights of UNet, VAE and text encoders."""
    encoder: str
    start: str
    """Hash of the weights that training began with."""
    samples_per_step: int
    """Batch × accumulate × processes."""

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """The differences from the run that ``before`` records, in words."""
        now = json.loads(json.dumps(asdict(self)))
        was, fields = before.get("config", {}), now["config"]
        found = [
            f"{name} was {was.get(name)}, is {fields[name]}"
            for name in fields
            if was.get(name) != fields[name]
        ]
        if before.get("pictures") != self.pictures:
            found.append(f"there were {before.get('pictures')} pictures, now {self.pictures}")
        elif before.get("data") != self.data:
            found.append("pictures, captions or groups have changed")
        names = {"start": "the initial weights"}
        if was.get("dtype") == fields["dtype"]:  # else the hashes of the same weights differ
            names |= {"base": "the base's weights", "encoder": "the image encoder's weights"}
        found += [f"{what} have changed" for name, what in names.items() if before.get(name) != now[name]]
        if before.get("samples_per_step") != self.samples_per_step:
            found.append(
                f"a step was {before.get('samples_per_step')} samples, now batch × accumulate × processes is "
                f"{self.samples_per_step}"
            )
        return found


def data_hash(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Hash of what ``rows`` show and say; ``keys`` are hashes of their pictures."""
    digest = hashlib.blake2b(digest_size=16)
    for row, key in zip(rows, keys, strict=True):
        about = [key, row.captions, row.groups, row.split, row.repeats]
        digest.update(json.dumps(about, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


class RunFolder:
    """Owns the folder between :meth:`open` and :meth:`close`; only the main process writes to it."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path, self.resume = path, resume
        self._lock: int | None = None
        self._made = False

    def open(self) -> None:
        """Lock the folder, and remove what a killed run left half-written. Raises :class:`UsageError` when
        another process is training into it, when it holds a run and ``resume`` is not set, or when it holds
        none, but what a run would replace."""
        while not self._take_lock():
            pass  # the run that held it did not begin, and took the file away: make a new one
        is_run = (self.path / RECORD).exists()
        if not self.resume and (is_run or (self.path / WEIGHT_NAME).exists()):
            self.close()
            raise UsageError(f"'{self.path}' already holds a run; resume it (--resume) or name a new folder.")
        foreign = [] if is_run else sorted(p.name for name in _WRITTEN for p in self.path.glob(name))
        if foreign:
            self.close()
            raise UsageError(
                f"'{self.path}' holds no run, but '{foreign[0]}', which a run would replace; name a new "
                "folder."
            )
        for path in (*self.path.glob(".*"), *self.path.glob("samples/.*")):
            if _HALF.fullmatch(path.name):
                path.unlink()

    def _take_lock(self) -> bool:
        """Lock the file ``.lock``; false if it was removed between opening and locking it."""
        self._made = not self.path.exists()
        with disk_errors(self.path, "the run's folder"):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        if not _locked(lock):
            os.close(lock)
            raise UsageError(f"another process is training into '{self.path}'; wait for it, or stop it.")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), (self.path / LOCK).stat()):
                self._lock = lock
                return True
        os.close(lock)
        return False

    def close(self) -> None:
        """Release the folder; if no run began in it, leave it as it was."""
        if self._lock is None:
            return
        began = (self.path / RECORD).exists()
        if not began:
            (self.path / LOCK).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None
        if self._made and not began:
            with contextlib.suppress(OSError):  # something else lies in it by now
                self.path.rmdir()

    def begin(self, identity: Identity, course: Mapping[str, Any]) -> None:
        """Record which run this is, and its ``course``, for :meth:`course`. Raises :class:`UsageError` when
        the folder holds another one."""
        before = self._record()
        if before is not None and (changed := identity.differences(before)):
            raise UsageError(
                f"'{self.path}' holds another run ({'; '.join(changed)}). Put that back, or name a new "
                "folder."
            )
        record = asdict(identity) | {"course": course}
        self.write(RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def course(self) -> dict[str, Any]:
        """Steps, learning rate and warm-up of the run to resume; empty where there is none."""
        found: dict[str, Any] = (self._record() or {}).get("course", {}) if self.resume else {}
        return found

    def _record(self) -> dict[str, Any] | None:
        """What ``run.json`` says; ``None`` before a run began. Raises :class:`ModelError` when it is
        damaged."""
        path = self.path / RECORD
        return read_json(path, f"'{path}'", error=ModelError) if path.exists() else None

    def write(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""
        write_atomic(self.path / name, text.encode(), overwrite=True)

    # ---- log

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to the log; numbers that are not finite are written as null."""
        line = json.dumps(finite(record), allow_nan=False, ensure_ascii=False)
        with disk_errors(self.path / LOG, LOG), (self.path / LOG).open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The records in the log, without lines that a crash left half-written."""
        path = self.path / LOG
        if not path.exists():
            return []
        found = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    found.append(record)
        return found

    def rewind(self, step: int) -> None:
        """Delete log lines of steps that the resumed run repeats."""
        kept = [record for record in self.records() if record["step"] <= step]
        self.write(LOG, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))

    # ---- checkpoints

    def save_checkpoint(
        self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any], keep: int
    ) -> Path:
        """Write a checkpoint and forget all but the newest ``keep``. ``about`` has the adapter's ``variant``.

        Raises :class:`ModelError` when a tensor is not finite: what cannot be resumed is not kept as if it
        could."""
        bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise ModelError(
                f"step {step} is not saved: {len(bad)} tensors are not finite, such as '{bad[0]}'."
            )
        path = self.path / f"checkpoint-{step:08d}.safetensors"
        with disk_errors(path, f"step {step}", self._last()):
            names = {"step": str(step), "variant": str(about["variant"])}
            part = save_tensors(tensors, names, path.with_suffix(".part"))
            manifest = {**about, "step": step, "sha256": _sha256(part), "bytes": part.stat().st_size}
            self.write(path.with_suffix(".json").name, json.dumps(manifest) + "\n")
            part.replace(path)
        for old in self.checkpoints()[:-keep]:
            old.unlink()
            old.with_suffix(".json").unlink(missing_ok=True)
        return path

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
        """The newest sound checkpoint: tensors, manifest, and which newer ones are damaged; ``None`` without
        any. Raises :class:`ModelError` when all are damaged."""
        damaged: list[str] = []
        for path in reversed(self.checkpoints()):
            try:
                manifest = read_json(path.with_suffix(".json"), "manifest")
                if _sha256(path) != manifest["sha256"]:
                    raise ValueError("its SHA-256 is not that of its manifest")
                counts = {name: int(manifest[name]) for name in ("step", "skipped", "averages")}
                return load_file(path), manifest | counts, damaged
            except (InputError, OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
                damaged.append(f"{path.name} ({error})")
        if damaged:
            raise ModelError(f"every checkpoint in '{self.path}' is damaged: {'; '.join(damaged)}.")
        return None

    def checkpoints(self) -> list[Path]:
        """The checkpoints' weights, oldest first."""
        return sorted(self.path.glob("checkpoint-*.safetensors"))

    def _last(self) -> str:
        found = self.checkpoints()
        return f" The last one is '{found[-1].name}'." if found else ""


@contextlib.contextmanager
def disk_errors(path: Path, what: str, hint: str = "") -> Iterator[None]:
    """Turn what a disk refuses into one :class:`InputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if any(word in reason for word in _FULL):
            reason = "the disk is full; make room and resume"
        raise InputError(f"cannot write {what} to '{path}' ({reason}).{hint}") from error


def save_tensors(tensors: Mapping[str, Tensor], about: dict[str, str], path: Path) -> Path:
    """Write tensors under a name of their own beside ``path``, synced to disk; the caller renames it, and is
    told of a full disk by :func:`disk_errors`."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, about)
        with part.open("rb+") as handle:
            os.fsync(handle.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


def _locked(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: an open file cannot be deleted there, but two runs are not told apart
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
