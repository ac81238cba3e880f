"""Datasets whose pictures lie in containers: tar shards, a sheet of pictures, Hugging Face datasets."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt.data.rows import (
    CAPTION_FIELDS,
    DAMAGE,
    Dataset,
    Ignored,
    Record,
    Row,
    described,
    fields_of,
    rows_of,
)
from imprompt.encoders.images import as_bytes
from imprompt.errors import InputError, first_line

PICTURES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2",
    ".ppm", ".qoi",
)  # fmt: skip
SIDECARS = (".txt", ".caption")
HUB = "hf:"
PARQUET = ".parquet"
_BRACE = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<listed>[^{},]*,[^{}]*))\}")
_MOST_SHARDS = 100_000
_SAID = ("group", "groups", "split", "repeats")
"""Columns of a Hugging Face dataset that are read beside pictures, captions, and tags, which are bool."""
_SAVED_TO_DISK = (("dataset_info.json", "state.json"), ("dataset_dict.json",))
"""Files that tell a folder of ``save_to_disk``: of one split, of several."""


def is_saved_to_disk(folder: Path) -> bool:
    """Whether ``datasets`` saved it."""
    return any(all((folder / name).is_file() for name in names) for names in _SAVED_TO_DISK)


def shards_of(pattern: str) -> list[Path]:
    """The shards that WebDataset's ``x-{000..012}.tar`` or ``{a,b}.tar`` names; without braces, the one.

    Raises :class:`InputError` for a range that counts down, and of more than 100,000 shards.
    """
    brace = _BRACE.search(pattern)
    if brace is None:
        return [Path(pattern)]
    if brace["listed"] is not None:
        parts = brace["listed"].split(",")
    else:
        first, last = int(brace["first"]), int(brace["last"])
        if not first <= last < first + _MOST_SHARDS:
            raise InputError(
                f"data '{pattern}': {brace[0]} counts from {first} to {last}; it counts up, and at most "
                f"{_MOST_SHARDS:,} shards are read."
            )
        width = len(brace["first"])
        parts = [f"{number:0{width}}" for number in range(first, last + 1)]
    head, tail = pattern[: brace.start()], pattern[brace.end() :]
    return [path for part in parts for path in shards_of(f"{head}{part}{tail}")]


def read_shards(paths: Sequence[Path], ignored: Ignored) -> Dataset:
    """Read WebDataset shards: members with the same name up to the first dot make a row.

    Raises :class:`InputError` for a file that is no tar; a damaged record is a :class:`Rejected`."""
    records: list[tuple[str, Record]] = []
    several = 0
    for path in paths:
        members: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    if member.isfile() and suffix and stem:  # without a stem it is hidden
                        members.setdefault(f"{folder}/{stem}".lstrip("/"), {})[f".{suffix.lower()}"] = member
        except (tarfile.TarError, OSError) as error:
            raise InputError(
                f"'{path}' is not a readable tar file ({first_line(error)}); compressed or truncated?"
            ) from error
        for key, parts in members.items():
            records.append((f"{path.name}/{key}", partial(_tar_record, path, key, parts)))
            several += len(parts.keys() & {*PICTURES}) > 1
    data = rows_of(records, ignored)
    notes = [f"records with several pictures: {several}; the first of each is used"] if several else []
    return replace(data, notes=data.notes + notes)


def _tar_record(path: Path, key: str, parts: Mapping[str, tarfile.TarInfo]) -> tuple[Row, Mapping[str, Any]]:
    picture = next((member for suffix, member in parts.items() if suffix in PICTURES), None)
    if picture is None:
        raise ValueError(f"no picture among {', '.join(parts)}")
    fields = fields_of(json.loads(_member(path, parts[".json"]))) if ".json" in parts else {}
    caption = next((parts[suffix] for suffix in SIDECARS if suffix in parts), None)
    if caption is not None:
        fields["text"] = _member(path, caption).decode("utf-8-sig")
    file = path / f"{key}{Path(picture.name).suffix}"
    return Row(file, content=partial(_member, path, picture)), fields


def _member(path: Path, member: tarfile.TarInfo) -> bytes:
    with path.open("rb") as handle:
        handle.seek(member.offset_data)
        return handle.read(member.size)


def read_sheet(folder: Path) -> Dataset:
    """Read pictures from the square cells of one sheet; ``eval.json`` has their size in pixels and captions.

    Raises :class:`InputError` for a damaged set."""
    try:
        about = json.loads((folder / "eval.json").read_bytes())
        cell, columns = int(about["cell"]), int(about["columns"])
        records: list[dict[str, Any]] = about["pictures"]
        with Image.open(folder / "sheet.webp") as sheet:
            fits = min(cell, columns) >= 1 and columns * cell <= sheet.width
            places = sheet.height // cell * columns if fits else 0
        if len(records) > places:
            raise ValueError(f"sheet.webp is too small for {len(records)} pictures")
        rows = []
        for place, record in enumerate(records):
            names = {kind: record[kind] for kind in ("concept", "style")}
            box = (place % columns * cell, place // columns * cell)
            content = partial(_cell, folder / "sheet.webp", (*box, box[0] + cell, box[1] + cell))
            row = Row(folder / f"{names['concept']}-{names['style']}.png", content=content)
            rows.append(described(row, record | {"groups": names}, {}))
    except (*DAMAGE, LookupError, ArithmeticError) as error:
        raise InputError(
            f"the evaluation set '{folder}' is damaged: {type(error).__name__} {error}."
        ) from error
    return Dataset(rows)


def _cell(path: Path, box: tuple[int, int, int, int]) -> bytes:
    with Image.open(path) as sheet:
        return as_bytes(sheet.crop(box).convert("RGB"))


def read_hugging_face(name: str, required: bool, ignored: Ignored) -> Dataset:
    """Read a dataset of the package ``datasets``: a folder of ``save_to_disk``, Parquet, or one of the
    hub. Pictures are not decoded. The columns ``group``, ``groups``, ``split`` and ``repeats``, and tags,
    mean what they do in other records.

    Raises :class:`InputError` without the package, for what it cannot read, without a column of pictures,
    and, if captions are ``required``, without one of captions."""
    stored, picture, notes = _hf_table(name)
    named = (key for key in CAPTION_FIELDS if key not in ignored)
    caption = next((key for key in named if key in stored.column_names), None)
    if picture is None or (caption is None and required):
        kinds = ((key, getattr(kind, "dtype", type(kind).__name__)) for key, kind in stored.features.items())
        raise InputError(
            f"dataset '{name}' has the columns {', '.join(f'{key} ({kind})' for key, kind in kinds)}; one of "
            f"pictures (datasets.Image) and one named {', '.join(CAPTION_FIELDS[:3])} are expected: "
            "cast_column and rename_column make them."
        )
    data = rows_of(_hf_records(name, stored, picture, caption, ignored), ignored)
    captions = f", captions from '{caption}'" if caption is not None else ""
    return replace(data, notes=[*notes, f"pictures are read from '{picture}'{captions}"])


def _hf_records(
    name: str, stored: Any, picture: str, caption: str | None, ignored: Ignored
) -> Iterator[tuple[str, Record]]:
    read = [
        key
        for key, kind in stored.features.items()
        if key in (caption, *_SAID, *ignored) or getattr(kind, "dtype", "") == "bool"
    ]
    fields = stored.select_columns(read).to_list() if read else [{}] * len(stored)
    for n, said in enumerate(fields):
        row = Row(Path(name, f"{n:08d}"), content=partial(_hf_bytes, stored, picture, n))
        yield str(row.file), partial(_both, row, said)


def _both(row: Row, fields: dict[str, Any]) -> tuple[Row, dict[str, Any]]:
    return row, fields


def _hf_table(name: str) -> tuple[Any, str | None, list[str]]:
    """The training split of a saved or published dataset, the name of its column of pictures, if any, and
    notes."""
    if not name:
        raise InputError(f"'{HUB}' names no dataset; write {HUB}owner/name.")
    if find_spec("datasets") is None:
        raise InputError(f"'{name}' is a Hugging Face dataset, read by datasets: pip install datasets.")
    import datasets

    try:
        stored = _hf_stored(name)
    except InputError:
        raise
    except Exception as error:  # the package raises nearly anything
        raise InputError(f"dataset '{name}' cannot be read: {first_line(error)}.") from error
    notes: list[str] = []
    if isinstance(stored, dict):
        split = "train" if "train" in stored else next(iter(stored))
        notes += (
            [f"the split '{split}' is read, and no other of {', '.join(stored)}"] if len(stored) > 1 else []
        )
        stored = stored[split]
    picture = next((key for key, kind in stored.features.items() if _holds_pictures(kind)), None)
    if picture is not None:
        stored = stored.cast_column(picture, datasets.Image(decode=False))
    return stored, picture, notes


def _hf_stored(name: str) -> Any:
    """What ``datasets`` makes of a folder of ``save_to_disk``, of Parquet files, and of a dataset on the hub,
    as ``owner/name`` or ``owner/name:configuration``. Raises :class:`InputError` for one of several
    configurations that is not named, and whatever the package raises."""
    import datasets

    path = Path(name)
    if is_saved_to_disk(path):
        return datasets.load_from_disk(name)
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=name, split="train")
    if any(path.glob(f"*{PARQUET}")):  # their names tell the splits
        return datasets.load_dataset("parquet", data_dir=name)
    owned, _, configuration = name.partition(":")
    if not configuration:
        known = datasets.get_dataset_config_names(owned)
        if len(known) > 1 and "default" not in known:
            raise InputError(
                f"dataset '{name}' has the configurations {', '.join(known)}; write {HUB}{name}:{known[0]}, "
                "or another."
            )
    return datasets.load_dataset(owned, configuration or None)


def _holds_pictures(kind: Any) -> bool:
    """Whether a column is of pictures, or of their bytes as ``datasets`` writes them."""
    import datasets

    return isinstance(kind, datasets.Image) or (isinstance(kind, dict) and {*kind} == {"bytes", "path"})


def _hf_bytes(stored: Any, column: str, index: int) -> bytes:
    """The encoded picture of a record; empty where the record has none."""
    value = stored[index][column] or {}
    if value.get("bytes") or not value.get("path"):
        return value.get("bytes") or b""
    return Path(value["path"]).read_bytes()
