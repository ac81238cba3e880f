"""Resolve the name of a base, adapter, encoder, control, motion adapter, LoRA or embedding.

A name is an alias of the catalogue, a local file or folder, or ``owner/name[/folder][/file]`` of the hub, if
need be with the prefix ``hf:``. Names that look like a path are not looked for on the hub.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imprompt import hub
from imprompt.catalog import ASSETS, AdapterRow, BaseRow, ControlRow, EncoderRow, Entry, MotionRow, lookup
from imprompt.catalog.licences import check
from imprompt.errors import ModelError, first_line
from imprompt.io import check_path, fingerprint, read_json

_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"{_PART}/{_PART}(/[\w. -]+)*")
_ENDING = re.compile(r"\.[A-Za-z]\w{1,11}$")  # of a file of weights, or a picture
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx")


@dataclass(frozen=True)
class Source:
    """A model's place: a local file or folder, or a file or folder of a hub repository."""

    name: str
    """The name that was resolved."""
    path: Path | None = None
    """The local file or folder; ``None``: it is on the hub."""
    repo: str = ""
    inside: str = ""
    """File or folder in the repository; empty: the repository itself."""
    revision: str | None = None
    row: Entry | None = None
    """Its record, if it is in the catalogue."""
    kind: str = ""
    """What it is, in messages: "base", "adapter", …"""

    def __str__(self) -> str:
        return self.folder + (f":{self.inside}" if self.inside else "")

    @property
    def is_file(self) -> bool:
        """Whether it is a file; told by its name if it is on the hub."""
        return self.inside.endswith(_WEIGHTS) if self.path is None else self.path.is_file()

    @property
    def folder(self) -> str:
        """The local path or the repository, for ``from_pretrained``."""
        return self.repo if self.path is None else str(self.path)

    def file(self, name: str = "", *, what: str = "") -> Path:
        """Path of a file in it, or of the source itself, downloaded if it is on the hub.

        Raises :class:`ModelError` if there is none.
        """
        if self.path is None:
            inside = "/".join(part for part in (self.inside, name) if part)
            return hub.fetch(
                self.repo, inside, revision=self.revision, what=what or self.title, about=self.about
            )
        path = self.path / name if name else self.path
        if not path.is_file():
            raise ModelError(f"{what or self.title}: there is no file '{path}'.")
        return path

    def config(self, name: str = "config.json") -> Mapping[str, Any]:
        """Read a JSON file in it; empty if a local folder has no such file.

        Raises :class:`ModelError` for a damaged file, and one that cannot be downloaded.
        """
        if self.path is not None and not (self.path / name).is_file():
            return {}
        path = self.file(name)
        return read_json(path, f"'{path}'", error=ModelError)

    @property
    def weights(self) -> tuple[Path, ...]:
        """Its ``.safetensors`` files on this machine."""
        if self.path is None:
            if self.is_file:
                found = hub.cached_file(self.repo, self.inside, self.revision)
                return () if found is None else (found,)
            return tuple(hub.cached_weights(self.repo, self.inside, self.revision))
        return (self.path,) if self.path.is_file() else tuple(sorted(self.path.rglob("*.safetensors")))

    @property
    def title(self) -> str:
        """Its kind, and its name in quotes."""
        return f"{self.kind} '{self.name}'".lstrip()

    @property
    def about(self) -> str:
        """Size and licence by the catalogue, for messages; empty if it is not in it."""
        return "" if self.row is None else f"{size_of(self.row)}licence {self.row.licence}"

    def not_loaded(self, error: Exception, about: str = "") -> ModelError:
        """The error to raise when a library could not load it; ``about`` adds facts, such as size and
        licence."""
        if self.path is not None:
            return ModelError(f"{self.title} cannot be loaded: {first_line(error)}")
        return hub.failure(self.title, self.repo, error, about=about)


def resolve(name: str | Path, kind: str, table: Mapping[str, Entry], others: str = "") -> Source:
    """Resolve a name, without asking the hub.

    ``kind`` is what it is, in messages ("base", "adapter", …); ``table`` the aliases to look in, which may be
    empty; ``others`` says what may be given instead of an alias. Raises :class:`UsageError` for an unknown
    alias, :class:`ModelError` for a path that does not exist, and a licence that ``IMPROMPT_COMMERCIAL``
    forbids.
    """
    text = str(name)
    found = _in_catalogue(text, kind, table) or _on_this_machine(text, kind) or _on_hub(text, kind, table)
    if found is not None:
        return found
    others = others or "a file, a folder or a hub id (owner/name)"
    if "/" in text or "\\" in text or _ENDING.search(text) or not table:
        raise ModelError(f"there is no {kind} at '{text}'; {others} is expected.")
    lookup(table, text, kind, others)
    raise AssertionError("lookup raises for a name that is not in the table")


def _in_catalogue(name: str, kind: str, table: Mapping[str, Entry]) -> Source | None:
    row = table.get(name)
    if row is None:
        return None
    check(f"{kind} '{name}'", row.licence)
    inside = _inside(row)
    if not row.bundled:
        return Source(name, None, row.repo, inside, getattr(row, "revision", None), row, kind)
    path = ASSETS / inside
    if not path.exists():
        raise ModelError(
            f"the bundled {kind} is incomplete: '{path.name}' is missing. Install imprompt again."
        )
    return Source(name, path, row=row, kind=kind)


def _on_this_machine(name: str, kind: str) -> Source | None:
    """A path, or ``folder:inside``."""
    if name.startswith("hf:"):
        return None
    path = check_path(name, kind)
    folder, _, inside = name.partition(":")
    if not path.exists() and folder and inside:
        path = check_path(folder, kind) / inside
    return Source(name, path, kind=kind) if path.exists() else None


def _on_hub(name: str, kind: str, table: Mapping[str, Entry]) -> Source | None:
    hub_id = name.removeprefix("hf:").replace(":", "/", 1)
    if not _HUB_ID.fullmatch(hub_id) or (hub_id == name and _looks_like_a_path(name)):
        return None
    owner, repo, *inside = hub_id.split("/", 2)
    row = next((row for row in table.values() if row.repo == hub_id and not _inside(row)), None)
    return Source(name, None, f"{owner}/{repo}", "".join(inside), None, row, kind)


def fingerprint_of(weights: Sequence[Path], name: str) -> str:
    """Twelve hex digits that differ when a weight file differs; without files on this machine, a hash of the
    name."""
    return fingerprint(*weights) if weights else hashlib.sha256(name.encode()).hexdigest()[:12]


def is_here(row: Entry) -> bool:
    """Whether a model of the catalogue is on this machine, without asking the hub."""
    names = {AdapterRow: "", BaseRow: "model_index.json", EncoderRow: "model.safetensors"}
    file = "/".join(part for part in (_inside(row), names.get(type(row), "config.json")) if part)
    revision = getattr(row, "revision", None)
    return row.bundled or hub.cached_file(row.repo, file, revision) is not None


def size_of(row: Entry) -> str:
    """Size of the download followed by a comma, for messages; empty if unknown."""
    match row:
        case BaseRow(gigabytes=size) if size:
            return f"{size:g} GB, "
        case AdapterRow(megabytes=size) | ControlRow(megabytes=size) | MotionRow(megabytes=size) if size:
            return f"{size} MB, "
        case EncoderRow(bytes=int(size)):
            return f"{size / 1e9:.1f} GB, "
    return ""


def _inside(row: Entry) -> str:
    match row:
        case AdapterRow(file=inside) | EncoderRow(folder=inside) | ControlRow(folder=inside):
            return inside
        case MotionRow(bundled=True):
            return "motion"
    return ""


def _looks_like_a_path(name: str) -> bool:
    """Whether it is probably a mistyped path: in a folder that exists, or of two parts with a file's
    suffix."""
    owner, *rest = name.split("/")
    return Path(owner).is_dir() or (len(rest) == 1 and rest[0].endswith(_WEIGHTS))
