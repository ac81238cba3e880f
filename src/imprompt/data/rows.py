"""Read captioned pictures in the usual forms, as rows for training and evaluation.

=====================================================  ================================================
folder with ``metadata.jsonl``, ``.csv`` or ``.json``  Hugging Face's imagefolder, also with a folder for each
                                                       split; the file itself will do
folder of pictures                                     ``.txt`` or ``.caption`` beside each picture
folder of ``10_name`` folders                          kohya's: repeats and, without captions, the class name
``.json`` list                                         the reference script's ``[{"image_file", "text"}]``
``.tar``, or a folder of them                          WebDataset shards
``eval.json`` with ``sheet.webp``                      several pictures on one sheet, as bundled
folder of ``save_to_disk``, ``hf:owner/name``          Hugging Face datasets (needs the package)
``.parquet``, or a folder of them                      the same, as files
=====================================================  ================================================

A record has a picture (``file_name``, ``image_file``, …) and a caption (``text``, ``caption``, ``prompt``, …,
or ``captions`` by kind); :attr:`Dataset.notes` says which field was used. It may have ``group`` or ``groups``
by kind, ``split`` (only ``train`` is trained on), ``repeats``, and tags, which are fields that are ``true``.
Pictures are not decoded here.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from imprompt.encoders.images import as_bytes
from imprompt.errors import InputError, first_line
from imprompt.io import check_path, printable

PICTURES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2",
    ".ppm", ".qoi",
)  # fmt: skip
UNREAD = (".heic", ".heif", ".jxl", ".svg", ".psd", ".tga", ".exr", ".dng", ".cr2", ".cr3", ".nef", ".arw")
"""Suffixes of pictures in formats that are not read here."""
HELD_OUT = ("validation", "valid", "val", "dev", "test")
"""Folders of a split that is not trained on."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.json")
SIDECARS = (".txt", ".caption")
PICTURE_FIELDS = ("file_name", "image_file", "image", "filename", "file", "path", "image_path")
CAPTION_FIELDS = ("text", "caption", "prompt", "captions", "description", "txt")
HUB = "hf:"
PARQUET = ".parquet"
_SAVED_TO_DISK = (("dataset_info.json", "state.json"), ("dataset_dict.json",))
"""Files that tell a folder of ``save_to_disk``: of one split, of several."""
_KOHYA = re.compile(r"(\d+)_(.+)")
_TRAINED = ("train", "training")
_DAMAGE = (ValueError, TypeError, AttributeError, OSError, RecursionError)
"""What reading a damaged record raises."""


@dataclass(frozen=True)
class Row:
    """One picture with its captions.

    ``captions``: kind to texts (a plain caption has the kind ``"full"``); ``groups``: kind to name (a plain
    ``group`` has the kind ``"group"``): pictures of one name may stand as each other's reference. ``content``
    gives the encoded picture where it is not a file of its own; ``file`` then is its name.
    """

    file: Path
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    split: str = "train"
    tags: frozenset[str] = frozenset()
    repeats: int = 1
    content: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Name of its folder and file."""
        return f"{self.file.parent.name}/{self.file.name}"

    @property
    def trainable(self) -> bool:
        """Whether it may be used for training."""
        return self.split in _TRAINED

    @property
    def caption(self) -> str:
        """The first caption, of kind ``full`` if there is one; empty without captions."""
        kinds = ("full", *self.captions)
        return next((self.captions[kind][0] for kind in kinds if self.captions.get(kind)), "")

    def read(self) -> bytes:
        """The encoded picture. Raises ``OSError`` when it cannot be read."""
        return self.file.read_bytes() if self.content is None else self.content()


@dataclass(frozen=True)
class Rejected:
    """A record or picture that cannot be used, and the reason."""

    where: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.reason}")


@dataclass(frozen=True)
class Dataset:
    """The usable rows in the source's order, those left out, and notes on how it was read."""

    rows: list[Row]
    rejected: list[Rejected] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_dataset(
    source: str | Path, *, only: str | None = None, captions: Literal["required", "optional"] = "required"
) -> Dataset:
    """Read captioned pictures in any form listed above.

    ``only`` is a tag; rows without it are skipped. ``captions="required"`` rejects pictures of a plain folder
    without a caption, and sources without any. Damaged records and missing pictures are collected as
    :class:`Rejected`. Raises :class:`InputError` if ``source`` does not exist or has no usable row.
    """
    return usable(_read(source, captions == "required"), source, only=only, captions=captions)


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


def _read(source: str | Path, required: bool) -> Dataset:
    if str(source).startswith(HUB):
        return _hugging_face(str(source).removeprefix(HUB), required)
    path = check_path(source, "data")
    if path.is_dir():
        return _folder(path, required)
    if not path.is_file():
        raise InputError(
            f"no data at '{source}'; give a folder of captioned pictures, its metadata.jsonl, a .tar shard "
            f"or {HUB}owner/name."
        )
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return _shards([path])
    if suffix == PARQUET:
        return _hugging_face(str(path), required)
    if suffix not in _READERS:
        what = "one picture" if suffix in PICTURES + UNREAD else f"a file of the kind '{suffix}'"
        raise InputError(
            f"'{source}' is {what}; give a folder of captioned pictures, its metadata "
            f"({', '.join(_READERS)}), a .tar shard or a {PARQUET} file."
        )
    return _READERS[suffix](path)


def _folder(path: Path, required: bool) -> Dataset:
    if (path / "eval.json").is_file() and (path / "sheet.webp").is_file():
        return _sheet(path)
    if (metadata := _metadata(path)) is not None:
        return _with_unnamed(_READERS[metadata.suffix](metadata), path)
    if _is_saved_to_disk(path) or next(path.glob(f"*{PARQUET}"), None):
        return _hugging_face(str(path), required)
    if shards := sorted(path.glob("*.tar")):
        return _shards(shards)
    inside = [found for each in sorted(path.iterdir()) if (found := _metadata(each)) is not None]
    if not inside or any(file.parent == path for file in _files(path, PICTURES + UNREAD)):
        return _pictures(path, required)
    return _with_unnamed(_splits(inside), path)


def _is_saved_to_disk(folder: Path) -> bool:
    """Whether ``datasets`` saved it."""
    return any(all((folder / name).is_file() for name in names) for names in _SAVED_TO_DISK)


def _metadata(folder: Path) -> Path | None:
    """The file that describes the pictures of a folder."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _splits(files: Sequence[Path]) -> Dataset:
    """Read the folders of an imagefolder; those named after a held-out split are one."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    notes: list[str] = []
    for file in files:
        data, split = _READERS[file.suffix](file), file.parent.name
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
    macOS's copies, and what training runs have drawn."""
    found: list[Path] = []
    entered = {os.path.realpath(folder)}  # a link may lead back to a folder around it
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".")
            and name != "__MACOSX"
            and not (name == "samples" and "run.json" in files)
            and _first(os.path.realpath(f"{place}/{name}"), entered)
        ]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def _first(name: str, seen: set[str]) -> bool:
    """Whether ``name`` is new to ``seen``, which gets it."""
    new = name not in seen
    seen.add(name)
    return new


# ---- records


def _jsonl(path: Path) -> Dataset:
    def records() -> Iterator[tuple[str, Any]]:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield f"{path.name}:{number}", partial(json.loads, line)

    return _records(records(), path.parent)


def _json(path: Path) -> Dataset:
    try:
        listed = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is not valid JSON: {error}.") from error
    if not isinstance(listed, list):
        raise InputError(f"'{path}' holds a {type(listed).__name__}; a list of records was expected.")
    return _records(((f"{path.name}[{n}]", record) for n, record in enumerate(listed)), path.parent)


def _csv(path: Path) -> Dataset:
    try:
        text = path.read_text(encoding="utf-8-sig")
        heading = text.partition("\n")[0]
        separator = next((sign for sign in (",", ";", "\t") if sign in heading), ",")
        lines = list(csv.DictReader(io.StringIO(text), delimiter=separator))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not CSV in UTF-8: {error}.") from error
    records = ((f"{path.name}:{n}", partial(_csv_record, line)) for n, line in enumerate(lines, 2))
    return _records(records, path.parent)


def _csv_record(line: dict[str | None, Any]) -> dict[str | None, Any]:
    """The fields of a line that hold something. Raises ``ValueError`` for more of them than the heading."""
    if None in line:
        raise ValueError(
            'more fields than the heading has: put a caption with commas between double quotes (")'
        )
    return {name: value for name, value in line.items() if value}


_READERS: dict[str, Callable[[Path], Dataset]] = {".jsonl": _jsonl, ".csv": _csv, ".json": _json}
"""Readers of metadata, by suffix."""


def _records(records: Iterator[tuple[str, Any]], folder: Path) -> Dataset:
    rows: list[Row] = []
    rejected: list[Rejected] = []
    taken: dict[str, int] = {}
    for where, record in records:
        try:
            record = record() if callable(record) else record
            if not isinstance(record, dict):
                raise TypeError(f"a record is an object, given a {type(record).__name__}")
            rows.append(_row(record, folder, taken))
        except _DAMAGE as error:
            rejected.append(Rejected(where, first_line(error)))
    notes = [f"captions are read from the field '{name}' ({count})" for name, count in taken.items()]
    return Dataset(rows, rejected, notes if set(taken) - {"text", "captions"} else [])


def _row(record: Mapping[str, Any], folder: Path, taken: dict[str, int]) -> Row:
    named = next((record[name] for name in PICTURE_FIELDS if isinstance(record.get(name), str)), None)
    if named is None:
        raise ValueError(
            f"no picture: one of {', '.join(PICTURE_FIELDS)} is expected, given {', '.join(map(str, record))}"
        )
    file = folder / named
    if not file.is_file():
        file = folder / named.replace("\\", "/")
    if not file.is_file():
        raise ValueError(f"picture '{named}' is missing")
    return _described(Row(file), record, taken)


def _described(row: Row, record: Mapping[str, Any], taken: dict[str, int]) -> Row:
    """A row with what its record says beside the picture."""
    split = record.get("split") or "train"
    if not isinstance(split, str):
        raise TypeError(f"split must be a name, given {split!r}")
    tags = frozenset(name for name, value in record.items() if value is True)
    captions, groups = _captions(record, taken), _groups(record)
    _check_text(
        [split, *captions, *groups, *groups.values(), *(t for some in captions.values() for t in some)]
    )
    return replace(row, captions=captions, groups=groups, split=split, tags=tags, repeats=_repeats(record))


def _repeats(record: Mapping[str, Any]) -> int:
    said = record.get("repeats")
    try:
        repeats = 1 if said in (None, "") else int(said)
        if repeats >= 1 and (isinstance(said, str | None) or repeats == said):
            return repeats
    except (ValueError, TypeError, OverflowError):
        pass  # told below
    raise ValueError(f"repeats must be a whole number from 1, given {said!r}")


def _check_text(texts: Sequence[str]) -> None:
    """Raise ``ValueError`` for a text that cannot be written as UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"text holds half of a character: {text!r}") from None


def _groups(record: Mapping[str, Any]) -> dict[str, str]:
    by_kind = record.get("groups") or {}
    if not isinstance(by_kind, Mapping):
        raise TypeError(f"groups must be an object of names by kind, given {by_kind!r}")
    groups = {str(kind): str(name) for kind, name in by_kind.items()}
    if record.get("group") is not None:
        groups.setdefault("group", str(record["group"]))
    return groups


def _captions(record: Mapping[str, Any], taken: dict[str, int]) -> dict[str, tuple[str, ...]]:
    by_kind = record.get("captions")
    captions = {}
    if isinstance(by_kind, Mapping):
        captions = {str(kind): _texts(texts) for kind, texts in by_kind.items()}
    elif by_kind is not None and not isinstance(by_kind, str) and not isinstance(by_kind, list):
        raise TypeError(f"captions must be a list of texts or an object by kind, given {by_kind!r}")
    for name in CAPTION_FIELDS:
        value = record.get(name)
        if value is not None and not isinstance(value, Mapping) and not captions.get("full"):
            captions["full"] = _texts(value)
            if captions["full"]:
                taken[name] = taken.get(name, 0) + 1
    return captions


def _texts(value: object) -> tuple[str, ...]:
    texts = value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"a caption must be text or a list of texts, given {value!r}")
    return tuple(text.strip() for text in texts if text.strip())


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
    return Row(file, {"full": (said,)}, {"group": folder[2]}, repeats=max(1, int(folder[1])))


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


# ---- containers


def _shards(paths: Sequence[Path]) -> Dataset:
    """Read WebDataset shards: members with the same name up to the first dot make a row."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    taken: dict[str, int] = {}
    for path in paths:
        members: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    if member.isfile() and suffix and stem:  # without a stem it is hidden
                        members.setdefault(f"{folder}/{stem}", {})[f".{suffix.lower()}"] = member
        except (tarfile.TarError, OSError) as error:
            raise InputError(
                f"'{path}' is not a readable tar file ({first_line(error)}); compressed or truncated?"
            ) from error
        for key, parts in members.items():
            where = f"{path.name}/{key.lstrip('/')}"
            try:
                rows.append(_tar_row(path, key, parts, taken))
            except _DAMAGE as error:
                rejected.append(Rejected(where, first_line(error)))
    return Dataset(rows, rejected, [f"captions are read from '{name}' ({n})" for name, n in taken.items()])


def _tar_row(path: Path, key: str, parts: Mapping[str, tarfile.TarInfo], taken: dict[str, int]) -> Row:
    picture = next((member for suffix, member in parts.items() if suffix in PICTURES), None)
    if picture is None:
        raise ValueError(f"no picture among {', '.join(parts)}")
    record: dict[str, Any] = json.loads(_member(path, parts[".json"])) if ".json" in parts else {}
    if not isinstance(record, dict):
        raise TypeError("its .json is not an object")
    for suffix in SIDECARS:
        if suffix in parts:
            record["text"] = _member(path, parts[suffix]).decode("utf-8-sig")
    file = path / f"{key.lstrip('/')}{Path(picture.name).suffix}"
    return _described(Row(file, content=partial(_member, path, picture)), record, taken)


def _member(path: Path, member: tarfile.TarInfo) -> bytes:
    with path.open("rb") as handle:
        handle.seek(member.offset_data)
        return handle.read(member.size)


def _sheet(folder: Path) -> Dataset:
    """Read pictures from the square cells of one sheet; ``eval.json`` has their size and captions."""
    try:
        about = json.loads((folder / "eval.json").read_bytes())
        cell, columns = int(about["cell"]), int(about["columns"])
        records: list[dict[str, Any]] = about["pictures"]
        with Image.open(folder / "sheet.webp") as sheet:
            if sheet.width < columns * cell or sheet.height < -(-len(records) // columns) * cell:
                raise ValueError(f"sheet.webp is too small for {len(records)} pictures")
        rows = []
        for place, record in enumerate(records):
            names = {kind: record[kind] for kind in ("concept", "style")}
            box = (place % columns * cell, place // columns * cell)
            file = folder / f"{names['concept']}-{names['style']}.png"
            captions = {kind: tuple(texts) for kind, texts in record["captions"].items()}
            content = partial(_cell, folder / "sheet.webp", (*box, box[0] + cell, box[1] + cell))
            rows.append(Row(file, captions, names, record["split"], content=content))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the evaluation set '{folder}' is damaged: {type(error).__name__} {error}."
        ) from error
    return Dataset(rows)


def _cell(path: Path, box: tuple[int, int, int, int]) -> bytes:
    with Image.open(path) as sheet:
        return as_bytes(sheet.crop(box).convert("RGB"))


def _hugging_face(name: str, required: bool) -> Dataset:
    """Read a dataset of the package ``datasets``; pictures are not decoded."""
    stored, picture, notes = _hf_table(name)
    caption = next((key for key in CAPTION_FIELDS if key in stored.column_names), None)
    if picture is None or (caption is None and required):
        kinds = ((key, getattr(kind, "dtype", type(kind).__name__)) for key, kind in stored.features.items())
        raise InputError(
            f"dataset '{name}' has the columns {', '.join(f'{key} ({kind})' for key, kind in kinds)}; one of "
            f"pictures (datasets.Image) and one named {', '.join(CAPTION_FIELDS[:3])} are expected: "
            "cast_column and rename_column make them."
        )
    read = partial(_hf_bytes, stored, picture)
    texts = [""] * len(stored) if caption is None else stored.select_columns([caption])[caption]
    rows = [
        Row(Path(name, f"{n:08d}"), {"full": _texts(text or "")}, content=partial(read, n))
        for n, text in enumerate(texts)
    ]
    captions = f", captions from '{caption}'" if caption is not None else ""
    return Dataset(rows, notes=[*notes, f"pictures are read from '{picture}'{captions}"])


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
    if _is_saved_to_disk(path):
        return datasets.load_from_disk(name)
    files = [path] if path.is_file() else sorted(path.glob(f"*{PARQUET}"))
    if files:
        return datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train")
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
    value = stored[index][column]
    if value is None:
        return b""
    return value["bytes"] or Path(value["path"]).read_bytes()
