"""Read captioned pictures in the usual forms, as rows for training and evaluation.

=====================================================  ================================================
folder with ``metadata.jsonl``, ``.csv`` or ``.json``  Hugging Face's imagefolder, also with a folder for each
                                                       split; the file itself will do
folder of pictures                                     ``.txt`` or ``.caption`` beside each picture
folder of ``10_name`` folders                          kohya's: repeats and, without captions, the class name
``.json`` list                                         the reference script's ``[{"image_file", "text"}]``
``.tar``, ``x-{000..012}.tar``, or a folder of them    WebDataset shards
``eval.json`` with ``sheet.webp``                      several pictures on one sheet, as bundled
folder of ``save_to_disk``, ``hf:owner/name``          Hugging Face datasets (needs the package)
``.parquet``, or a folder of them                      the same, as files
=====================================================  ================================================

Pictures are not decoded here. What a record may hold: :mod:`imprompt.data.rows`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from imprompt.data.containers import (
    HUB,
    PARQUET,
    PICTURES,
    SIDECARS,
    is_saved_to_disk,
    read_hugging_face,
    read_shards,
    read_sheet,
    shards_of,
)
from imprompt.data.rows import (
    CAPTION_FIELDS,
    PICTURE_FIELDS,
    Dataset,
    Ignored,
    Record,
    Rejected,
    Row,
    in_folder,
    rows_of,
)
from imprompt.errors import InputError
from imprompt.io import check_path

UNREAD = (".heic", ".heif", ".jxl", ".svg", ".psd", ".tga", ".exr", ".dng", ".cr2", ".cr3", ".nef", ".arw")
"""Suffixes of pictures in formats that are not read here."""
HELD_OUT = ("validation", "valid", "val", "dev", "test")
"""Folders of a split that is not trained on."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.json")
_KOHYA = re.compile(r"(0*[1-9]\d{0,3})_(.+)")
"""Repeats and name of a folder; a longer number is a date."""


def read_dataset(
    source: str | Path,
    *,
    only: str | None = None,
    ignore: Sequence[str] = (),
    captions: Literal["required", "optional"] = "required",
) -> Dataset:
    """Read captioned pictures in any form listed above.

    ``only`` is a tag; rows without it are skipped. ``ignore`` are fields of records that are not read, such
    as a ``split`` that means something else. ``captions="required"`` rejects pictures of a plain folder
    without a caption, and sources without any. Damaged records and missing pictures are collected as
    :class:`Rejected`. Raises :class:`InputError` if ``source`` does not exist or has no usable row, and for
    a field to ignore that no record has.
    """
    if named := [name for name in ignore if name in PICTURE_FIELDS]:
        raise InputError(f"ignore: '{named[0]}' names a record's picture, which is needed; leave it out.")
    ignored = Ignored(dict.fromkeys(ignore, 0))
    data = _read(source, captions == "required", ignored)
    for name, count in ignored.items():
        if not count:
            raise InputError(
                f"ignore: no record of '{source}' has a field '{name}' that would be read; leave it out."
            )
    return usable(data, source, only=only, captions=captions)


def usable(
    data: Dataset,
    source: str | Path,
    *,
    only: str | None = None,
    captions: Literal["required", "optional"] = "required",
) -> Dataset:
    """Check rows that are read already, or were made in Python, as :func:`read_dataset` does.

    ``source`` is their name in messages. Raises :class:`InputError` if no row is usable.
    """
    rows = data.rows
    if only is not None and rows:
        rows = [row for row in rows if only in row.tags]
        if not rows:
            raise InputError(f"no row of '{source}' has the tag '{only}' (a field that is true).")
    if not rows:
        why = f" (first problem: {data.rejected[0]})" if data.rejected else ""
        raise InputError(
            f"'{source}' holds no usable picture{why}; expected pictures with .txt captions beside them, "
            "or a metadata.jsonl with file_name and text."
        )
    bare = sum(not row.caption for row in rows)
    if captions == "required" and bare == len(rows):
        raise InputError(
            f"none of the {bare} pictures of '{source}' has a caption: give each record a field named "
            f"{', '.join(CAPTION_FIELDS[:3])}, or each picture a .txt file beside it."
        )
    notes = data.notes + ([f"{bare} of {len(rows)} pictures have no caption"] if bare else [])
    return replace(data, rows=rows, notes=notes)


# ---- which form it is


def _read(source: str | Path, required: bool, ignored: Ignored) -> Dataset:
    if str(source).startswith(HUB):
        return read_hugging_face(str(source).removeprefix(HUB), required, ignored)
    path = check_path(source, "data")
    if path.is_dir():
        return _folder(path, required, ignored)
    if not path.is_file() and path.suffix.lower() == ".tar" and len(shards := shards_of(str(path))) > 1:
        return _named_shards(source, shards, ignored)
    if not path.is_file():
        raise InputError(
            f"no data at '{source}'; give a folder of captioned pictures, its metadata.jsonl, a .tar shard "
            f"or {HUB}owner/name."
        )
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return read_shards([path], ignored)
    if suffix == PARQUET:
        return read_hugging_face(str(path), required, ignored)
    if suffix not in _READERS:
        what = "one picture" if suffix in PICTURES + UNREAD else f"a file of the kind '{suffix}'"
        raise InputError(
            f"'{source}' is {what}; give a folder of captioned pictures, its metadata "
            f"({', '.join(_READERS)}), a .tar shard or a {PARQUET} file."
        )
    return _READERS[suffix](path, ignored)


def _named_shards(source: str | Path, shards: Sequence[Path], ignored: Ignored) -> Dataset:
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise InputError(
            f"data '{source}' names {len(shards)} shards, of which {len(missing)} are not there, first "
            f"'{missing[0]}'. Give the range of those that are here, or their folder."
        )
    return read_shards(shards, ignored)


def _folder(path: Path, required: bool, ignored: Ignored) -> Dataset:
    if (path / "eval.json").is_file() and (path / "sheet.webp").is_file():
        return read_sheet(path)
    if (metadata := _metadata(path)) is not None:
        return _with_unnamed(_READERS[metadata.suffix](metadata, ignored), path)
    if is_saved_to_disk(path) or next(path.glob(f"*{PARQUET}"), None):
        return read_hugging_face(str(path), required, ignored)
    if shards := sorted(path.glob("*.tar")):
        return read_shards(shards, ignored)
    inside = [found for each in sorted(path.iterdir()) if (found := _metadata(each)) is not None]
    if not inside or any(file.parent == path for file in _files(path, PICTURES + UNREAD)):
        return _pictures(path, required)
    return _with_unnamed(_splits(inside, ignored), path)


def _metadata(folder: Path) -> Path | None:
    """The file that describes the pictures of a folder."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _splits(files: Sequence[Path], ignored: Ignored) -> Dataset:
    """Read the folders of an imagefolder; those named after a held-out split are one."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    notes: list[str] = []
    for file in files:
        data, split = _READERS[file.suffix](file, ignored), file.parent.name
        held = split.lower() in HELD_OUT
        rows += [replace(row, split=split) if held and row.trainable else row for row in data.rows]
        rejected += [Rejected(f"{split}/{item.where}", item.reason) for item in data.rejected]
        notes += [f"{split}: {note}" for note in data.notes]
        notes += [f"pictures of '{split}' are held out ({len(data.rows)})"] if held else []
    return Dataset(rows, rejected, notes)


def _with_unnamed(data: Dataset, folder: Path) -> Dataset:
    """Note how many pictures of a folder its metadata does not name."""
    unnamed = {os.path.normpath(file) for file in _files(folder, PICTURES + UNREAD)}
    unnamed -= {os.path.normpath(row.file) for row in data.rows}
    said = f"pictures that the folder's metadata does not name are not used ({len(unnamed)})"
    return replace(data, notes=data.notes + ([said] if unnamed else []))


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files with these suffixes, in any case, at any depth, also behind links; without hidden ones,
    macOS's copies, a disk's lost+found, and what training runs have drawn. Raises :class:`InputError` for a
    folder that cannot be read."""
    found: list[Path] = []
    entered = {os.path.realpath(folder)}  # a link may lead back to a folder around it
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".")
            and name not in ("__MACOSX", "lost+found")
            and not (name == "samples" and "run.json" in files)
            and _first(os.path.realpath(f"{place}/{name}"), entered)
        ]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def _refuse(error: OSError) -> None:
    raise InputError(f"folder '{error.filename}' cannot be read ({error.strerror}).") from error


def _first(name: str, seen: set[str]) -> bool:
    """Whether ``name`` is new to ``seen``, which gets it."""
    new = name not in seen
    seen.add(name)
    return new


# ---- metadata


def _jsonl(path: Path, ignored: Ignored) -> Dataset:
    def records() -> Iterator[tuple[str, Record]]:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield f"{path.name}:{number}", partial(_jsonl_record, path.parent, line)

    return rows_of(records(), ignored)


def _jsonl_record(folder: Path, line: bytes) -> tuple[Row, Mapping[str, Any]]:
    return in_folder(folder, json.loads(line))


def _json(path: Path, ignored: Ignored) -> Dataset:
    try:
        listed = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is not valid JSON: {error}.") from error
    if not isinstance(listed, list):
        raise InputError(f"'{path}' holds a {type(listed).__name__}; a list of records was expected.")
    records = (
        (f"{path.name}[{n}]", partial(in_folder, path.parent, record)) for n, record in enumerate(listed)
    )
    return rows_of(records, ignored)


def _csv(path: Path, ignored: Ignored) -> Dataset:
    try:
        text = path.read_text(encoding="utf-8-sig")
        heading = text.partition("\n")[0]
        separator = next((sign for sign in (",", ";", "\t") if sign in heading), ",")
        table = csv.DictReader(io.StringIO(text), delimiter=separator)
        lines = [(table.line_num, line) for line in table]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not CSV in UTF-8: {error}.") from error
    records = ((f"{path.name}:{n}", partial(_csv_record, path.parent, line)) for n, line in lines)
    return rows_of(records, ignored)


def _csv_record(folder: Path, line: dict[str | None, Any]) -> tuple[Row, Mapping[str, Any]]:
    """The fields of a line that hold something. Raises ``ValueError`` for more of them than the heading."""
    if None in line:
        raise ValueError(
            'more fields than the heading has: put a caption with commas between double quotes (")'
        )
    return in_folder(folder, {name: value for name, value in line.items() if value})


_READERS: dict[str, Callable[[Path, Ignored], Dataset]] = {".jsonl": _jsonl, ".csv": _csv, ".json": _json}
"""Readers of metadata, by suffix."""


# ---- pictures with files beside them


def _pictures(folder: Path, required: bool) -> Dataset:
    rows: list[Row] = []
    rejected: list[Rejected] = []
    bare: list[Rejected] = []
    classes = 0
    files = _files(folder, PICTURES + UNREAD)
    texts = {file.with_suffix(file.suffix.lower()): file for file in _files(folder, SIDECARS)}
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            text = _sidecar(file, texts)
        except InputError as error:
            rejected.append(Rejected(name, str(error)))
            continue
        top = _KOHYA.fullmatch(name.partition("/")[0]) if "/" in name else None
        if top is not None:
            classes += not text
            rows.append(_kohya_row(file, text, top))
        elif text or not required:
            rows.append(Row(file, {"full": (text,)} if text else {}))
        else:
            bare.append(Rejected(name, f"no caption: '{file.stem}.txt' is missing or empty"))
    if bare and len(bare) == len(files):
        raise InputError(
            f"none of the {len(bare)} pictures in '{folder}' has a caption: write what a picture shows into "
            f"a text file of its name beside it, for '{bare[0].where}' into '{files[0].stem}.txt'."
        )
    notes = [f"{classes} pictures without a caption take their folder's name"] if classes else []
    return Dataset(rows, rejected + bare, notes)


def _kohya_row(file: Path, text: str, folder: re.Match[str]) -> Row:
    """A picture of a folder ``10_name``: 10 repeats; without a caption of its own it gets the folder's
    name."""
    said = text or folder[2].replace("_", " ")
    return Row(file, {"full": (said,)}, {"group": folder[2]}, repeats=int(folder[1]))


def _sidecar(file: Path, texts: Mapping[Path, Path]) -> str:
    """The caption of ``a.png`` in ``a.txt`` or ``a.png.txt``; empty if there is none.

    Raises :class:`InputError`, the reason without the file's name, if picture or caption cannot be read."""
    if file.suffix.lower() in UNREAD:
        raise InputError(f"{file.suffix} is not read here; convert it to PNG or JPEG")
    names = [name for suffix in SIDECARS for name in (file.with_suffix(suffix), Path(f"{file}{suffix}"))]
    found = next((texts[name] for name in names if name in texts), None)
    try:
        return "" if found is None else found.read_text(encoding="utf-8-sig").strip()
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"caption is not UTF-8 text ({error}); save it as UTF-8") from error
