"""Rows of a dataset: a picture with its captions, and what a record says of it.

A record has a picture (``file_name``, ``image_file``, …) and a caption (``text``, ``caption``, ``prompt``, …,
or ``captions`` by kind); :attr:`Dataset.notes` says which field was used. It may have ``group`` or ``groups``
by kind, ``split`` (only ``train`` is trained on), ``repeats``, and tags, which are fields that are ``true``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from imprompt.errors import first_line
from imprompt.io import printable

PICTURE_FIELDS = ("file_name", "image_file", "image", "filename", "file", "path", "image_path")
CAPTION_FIELDS = ("text", "caption", "prompt", "captions", "description", "txt")
_TRAINED = ("train", "training")
_OR_IGNORE = "; if it means something else, give ignore={}"
DAMAGE = (ValueError, TypeError, AttributeError, OSError, RecursionError)
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
        return self.split.lower() in _TRAINED

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


Record: TypeAlias = Callable[[], tuple[Row, Mapping[str, Any]]]
"""Reads a record: its picture as a row that says nothing yet, and the record's fields."""


Ignored: TypeAlias = dict[str, int]
"""Fields that are not read → how many records have them, which readers count."""


def rows_of(records: Iterable[tuple[str, Record]], ignored: Ignored) -> Dataset:
    """The rows of records, each with the place that messages name, without the fields ``ignored``, which are
    counted. What is damaged becomes a :class:`Rejected`."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    taken: dict[str, int] = {}
    for where, read in records:
        try:
            row, fields = read()
            for name in ignored.keys() & fields.keys():
                ignored[name] += 1
            read_fields = {name: value for name, value in fields.items() if name not in ignored}
            rows.append(described(row, read_fields, taken))
        except DAMAGE as error:
            rejected.append(Rejected(where, first_line(error)))
    notes = [f"captions are read from the field '{name}' ({count})" for name, count in taken.items()]
    return Dataset(rows, rejected, notes if set(taken) - {"text", "captions"} else [])


def fields_of(record: object) -> dict[str, Any]:
    """The fields of a record. Raises ``TypeError`` for anything but an object."""
    if not isinstance(record, dict):
        raise TypeError(f"a record is an object, given a {type(record).__name__}")
    return record


def in_folder(folder: Path, record: object) -> tuple[Row, Mapping[str, Any]]:
    """A record of a metadata file, and the picture in ``folder`` that it names. Raises ``ValueError`` for
    none."""
    fields = fields_of(record)
    named = next((fields[name] for name in PICTURE_FIELDS if isinstance(fields.get(name), str)), None)
    if named is None:
        raise ValueError(
            f"no picture: one of {', '.join(PICTURE_FIELDS)} is expected, given {', '.join(map(str, fields))}"
        )
    for file in (folder / named, folder / named.replace("\\", "/")):
        if file.is_file():
            return Row(file), fields
    raise ValueError(f"picture '{named}' is missing")


def described(row: Row, record: Mapping[str, Any], taken: dict[str, int]) -> Row:
    """A row with what its record says beside the picture; ``taken`` counts the fields that gave captions.

    Raises ``TypeError`` or ``ValueError`` for a value of another kind than expected."""
    split = record.get("split")
    split = "train" if split in (None, "") else split
    if not isinstance(split, str):
        raise TypeError(f"split must be a name, given {split!r}{_OR_IGNORE.format('split')}")
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
    raise ValueError(f"repeats must be a whole number from 1, given {said!r}{_OR_IGNORE.format('repeats')}")


def _check_text(texts: Sequence[str]) -> None:
    """Raise ``ValueError`` for a text that cannot be written as UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"text holds half of a character: {text!r}") from None


def _groups(record: Mapping[str, Any]) -> dict[str, str]:
    """Name by kind; null and an empty name are no group."""
    by_kind = record.get("groups") or {}
    if not isinstance(by_kind, Mapping):
        raise TypeError(f"groups must be an object of names by kind, given {by_kind!r}")
    named = {"group": record.get("group"), **by_kind}
    return {str(kind): str(name) for kind, name in named.items() if name not in (None, "")}


def _captions(record: Mapping[str, Any], taken: dict[str, int]) -> dict[str, tuple[str, ...]]:
    by_kind = record.get("captions")
    captions = {}
    if isinstance(by_kind, Mapping):
        captions = {str(kind): caption_texts(texts) for kind, texts in by_kind.items()}
    elif by_kind is not None and not isinstance(by_kind, str) and not isinstance(by_kind, list):
        raise TypeError(f"captions must be a list of texts or an object by kind, given {by_kind!r}")
    for name in CAPTION_FIELDS:
        value = record.get(name)
        if value is not None and not isinstance(value, Mapping) and not captions.get("full"):
            captions["full"] = caption_texts(value)
            if captions["full"]:
                taken[name] = taken.get(name, 0) + 1
    return captions


def caption_texts(value: object) -> tuple[str, ...]:
    """A caption, or a list of captions, without blank ones. Raises ``TypeError`` for anything else."""
    texts = value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"a caption must be text or a list of texts, given {value!r}")
    return tuple(text.strip() for text in texts if text.strip())
