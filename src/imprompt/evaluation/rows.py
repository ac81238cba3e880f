"""Captioned pictures on disk: the one row format that training, the judge and the report read.

A folder holds pictures and a ``metadata.jsonl`` in the manner of Hugging Face's imagefolder, one JSON object
a line: ``file_name``; ``text`` (a caption or a list of them) or ``captions`` by kind
(``{"full": [...], "concept": [...], "style": [...]}``); ``group`` (a name) or ``groups`` by kind
(``{"concept": "sailboat", "style": "noto"}``); ``split`` (``"train"`` when absent; anything that starts with
``held_out`` is never trained on); any other field that is ``true`` is a tag to choose rows by. Without
``metadata.jsonl`` the caption is the ``.txt`` file beside.
Only text is read here: pictures are opened where they are needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imprompt.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")


@dataclass(frozen=True)
class Row:
    """One captioned picture.

    ``captions``: kind to texts (plain ``text`` has the kind ``"full"``); ``groups``: kind to name (plain
    ``group`` has the kind ``"group"``): pictures with the same name may stand as each other's reference.
    """

    file: Path
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    split: str = "train"
    tags: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Folder and file name: short, and the same wherever the data lie."""
        return f"{self.file.parent.name}/{self.file.name}"

    @property
    def trainable(self) -> bool:
        """Whether training may see this picture at all."""
        return self.split == "train"


@dataclass(frozen=True)
class Rejected:
    """A row or picture that cannot be used, and why; collected instead of stopping a run."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_rows(source: str | Path, *, only: str | None = None) -> tuple[list[Row], list[Rejected]]:
    """All usable rows of a folder or of one metadata file, in file order, and what had to be left out.

    ``only`` is a tag: rows without it are passed over in silence. A damaged line, an unknown shape of
    caption or a missing picture becomes a :class:`Rejected`.
    Raises :class:`InputError` when ``source`` does not exist or holds no usable row at all.
    """
    source = Path(source)
    if source.is_dir():
        metadata = source / "metadata.jsonl"
        rows, rejected = _from_lines(metadata) if metadata.is_file() else _from_sidecars(source)
    elif source.is_file():
        rows, rejected = _from_lines(source)
    else:
        raise InputError(f"no data at '{source}'; give a folder of captioned pictures or its metadata.jsonl")
    if only is not None and rows:
        rows = [row for row in rows if only in row.tags]
        if not rows:
            raise InputError(f"no row of '{source}' has the tag '{only}' (a field that is true)")
    if not rows:
        why = f" (first problem: {rejected[0]})" if rejected else ""
        raise InputError(
            f"'{source}' holds no usable picture{why}; expected a metadata.jsonl with file_name and text, "
            "or pictures with .txt captions beside them"
        )
    return rows, rejected


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a ``metadata.jsonl`` whose file names are relative to the file's own folder."""
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            record = {
                "file_name": row.file.relative_to(path.parent).as_posix(),
                "captions": {kind: list(texts) for kind, texts in row.captions.items()},
                "groups": row.groups,
                "split": row.split,
            } | dict.fromkeys(sorted(row.tags), True)
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")


def _from_lines(metadata: Path) -> tuple[list[Row], list[Rejected]]:
    rows: list[Row] = []
    rejected: list[Rejected] = []
    with metadata.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                rows.append(_parse(json.loads(line), metadata.parent))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                rejected.append(Rejected(f"{metadata.name}:{number}", f"{type(error).__name__}: {error}"))
    return rows, rejected


def _parse(record: dict[str, Any], folder: Path) -> Row:
    file = folder / record["file_name"]
    if not file.is_file():
        raise ValueError(f"picture '{record['file_name']}' is missing")
    captions = {kind: _texts(texts) for kind, texts in (record.get("captions") or {}).items()}
    if record.get("text") is not None:
        captions.setdefault("full", _texts(record["text"]))
    groups = {str(kind): str(name) for kind, name in (record.get("groups") or {}).items()}
    if record.get("group") is not None:
        groups.setdefault("group", str(record["group"]))
    split = record.get("split") or "train"
    if not isinstance(split, str):
        raise TypeError(f"split must be a name, given {split!r}")
    tags = frozenset(name for name, value in record.items() if value is True)
    return Row(file, captions, groups, split, tags)


def _texts(value: str | list[str]) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"a caption must be text or a list of texts, given {value!r}")
    return texts


def _from_sidecars(folder: Path) -> tuple[list[Row], list[Rejected]]:
    rows: list[Row] = []
    rejected: list[Rejected] = []
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES):
        name = file.relative_to(folder).as_posix()
        sidecar = file.with_suffix(".txt")
        try:
            text = sidecar.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            rejected.append(Rejected(name, f"no caption: '{sidecar.name}' is missing"))
        except UnicodeDecodeError as error:
            rejected.append(Rejected(name, f"caption is not UTF-8: {error}"))
        else:
            rows.append(Row(file, {"full": (text,)}))
    return rows, rejected
