"""The record inside a picture or clip: the request that draws it again, and its provenance.

A :class:`Record` is JSON. PNG has it in the text chunk ``imprompt``, JPEG and WebP in EXIF, GIF and MP4 in a
comment. Version 2 names files relative to its own folder (``./``, ``../``), models only where they were
given by a relative path; version 1 named them as they were given. A record may come from anybody:
:meth:`Record.lines` shows printable text only, and :meth:`Record.local_files` lists the files that a
repetition would read.
"""

import json
import os
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from imprompt.catalog import adapters, bases, controls, motions
from imprompt.errors import InputError, UsageError
from imprompt.io import check_path, printable, read_json
from imprompt.schema.request import Request

KEY = "imprompt"
"""First key of every record, and the name of the text chunk of PNG that holds it."""
VERSION = 2

_Rename: TypeAlias = Callable[[str], str]
_Aliases: TypeAlias = Callable[[], Container[str]]

_FIELDS: dict[str, dict[str, _Aliases | None]] = {
    "": {
        "image": None, "mask": None, "video": None, "base": bases, "adapter": adapters, "motion": motions,
        "face_model": tuple, "quantize": lambda: ("none", "int8", "float8"),
    },
    "images": {"image": None, "path": None, "negative": None, "mask": None, "adapter": adapters},
    "regions": {"mask": None},
    "controls": {"path": None, "model": controls},
    "loras": {"path": tuple},
    "embeddings": {"path": tuple},
}  # fmt: skip
"""Fields of a request's JSON that name files, by the list they are in → ``None`` for pictures, for models the
names that are no file's."""
_FINGERPRINTS: dict[str, _Aliases] = {
    "base": bases, "control": controls, "motion": motions, "adapter": adapters, "lora": tuple,
    "embedding": tuple, "image encoder of": adapters, "face models of": adapters,
}  # fmt: skip
"""Kind of model in ``fingerprints`` → the names that are no file's."""


@dataclass(frozen=True)
class Record:
    """The request and the provenance of one picture or clip."""

    request: Request
    """Draws this picture alone again."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Versions, device, and fingerprints of the weights."""

    def to_json(self, folder: Path | None = None) -> str:
        """The record as JSON in ASCII. Pictures that exist, and models given by a relative path, are named
        relative to ``folder``, if it is given."""
        request = json.loads(self.request.to_json())
        if folder is not None:
            request = _renamed(request, lambda name: _relative(name, folder))
        return json.dumps(
            {KEY: VERSION, "request": request, "provenance": dict(self.provenance)}, sort_keys=True
        )

    @classmethod
    def from_json(cls, text: str, folder: Path | None = None) -> "Record":
        """Read :meth:`to_json`, of this version or an older one.

        Names that exist relative to ``folder`` are completed with it. Raises :class:`UsageError` for anything
        else, and for the record of a newer imprompt.
        """
        return cls.from_mapping(read_json(text, "its record", error=UsageError), folder)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], folder: Path | None = None) -> "Record":
        """Read a parsed record as :meth:`from_json` does."""
        version = values.get(KEY)
        if type(version) is not int or not isinstance(values.get("request"), dict):
            raise UsageError("its record is not one of imprompt's.")
        if version > VERSION:
            raise UsageError(
                f"its record has version {version}; up to {VERSION} are known. Use a newer imprompt."
            )
        request = values["request"]
        if folder is not None and version > 1:
            request = _renamed(request, lambda name: _completed(name, folder))
        provenance = values.get("provenance")
        if not isinstance(provenance, dict):
            provenance = {}
        return cls(Request.from_mapping(request), {str(key): str(said) for key, said in provenance.items()})

    def lines(self) -> list[str]:
        """A printable line for each field that is set, and one for the provenance."""
        shown = []
        for name, value in json.loads(self.request.to_json()).items():
            if value not in (None, "", {}, []) and value is not False:
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                shown.append(f"{name:<11} {printable(text)}")
        made = ", ".join(f"{name} {value}" for name, value in self.provenance.items())
        return [*shown, f"made with   {printable(made)}"]

    def local_files(self) -> list[str]:
        """Printable names of the local pictures, masks and videos that drawing the request again reads."""
        return [printable(name) for name in self.request.files]


def parameters(request: Request) -> str:
    """The request in the text format of stable-diffusion-webui, which other tools read as ``parameters``."""
    fields: dict[str, object] = {
        "Steps": request.steps,
        "Sampler": request.scheduler or "default",
        "CFG scale": request.guidance,
        "Seed": request.seed,
        "Size": None if request.size is None else "{}x{}".format(*request.size),
        "Model": Path(request.base).name if "/" in request.base else request.base,
        "Denoising strength": request.strength,
    }
    fields |= _image_parameters(request)
    lines = [request.prompt]
    if request.negative:
        lines.append(f"Negative prompt: {request.negative}")
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items() if value is not None))
    return "\n".join(lines)


def _image_parameters(request: Request) -> dict[str, str]:
    """The image prompts as fields of :func:`parameters`."""
    if not request.images:
        return {}
    adapters = dict.fromkeys(prompt.adapter or request.adapter or "default" for prompt in request.images)
    shown = (
        f"{Path(name).name} {request.scale if prompt.scale is None else prompt.scale}"
        for prompt in request.images
        for name in prompt.pictures
    )
    return {"IP-Adapter": ", ".join(adapters), "IP-Adapter images": json.dumps("; ".join(shown))}


def as_record(path: Path, text: str | None) -> Record:
    """The record in the ``text`` that the file at ``path`` carries. Raises :class:`InputError`."""
    if text is None:
        raise InputError(
            f"'{path}' carries no request: imprompt did not make it, or another program saved it again."
        )
    try:
        return Record.from_json(text, home_of(path))
    except UsageError as error:
        raise InputError(f"'{path}': {error}") from error


def home_of(path: Path) -> Path:
    """The folder that the names in the record of a file are relative to."""
    return (path.resolve() if path.is_symlink() else path).parent


def _renamed(request: Mapping[str, Any], rename: _Rename) -> dict[str, Any]:
    """The JSON of a request with every file's name, also in ``hashes`` and ``fingerprints``, replaced by
    ``rename`` of it."""
    result = _with_fields(request, _FIELDS[""], rename)
    for key, fields in _FIELDS.items():
        if isinstance(each := result.get(key), list):
            result[key] = [_with_fields(one, fields, rename) for one in each]
    if isinstance(hashes := result.get("hashes"), dict):
        result["hashes"] = {rename(name): value for name, value in hashes.items()}
    if isinstance(prints := result.get("fingerprints"), dict):
        result["fingerprints"] = {_model_of(name, rename): value for name, value in prints.items()}
    return result


def _with_fields(value: Any, fields: Mapping[str, _Aliases | None], rename: _Rename) -> Any:
    """A record, or the text that is its short form, with its files renamed."""
    if not isinstance(value, dict):
        return _changed(value, next(iter(fields.values())), rename)
    return {
        key: _changed(each, fields[key], rename) if key in fields else each for key, each in value.items()
    }


def _changed(value: Any, aliases: _Aliases | None, rename: _Rename) -> Any:
    if isinstance(value, list):
        return [_changed(each, aliases, rename) for each in value]
    if not isinstance(value, str):
        return value
    return rename(value) if aliases is None else _model(value, aliases, rename)


def _model(name: str, aliases: _Aliases, rename: _Rename) -> str:
    """``rename`` of a model's name, if that is a relative path, or ``path:inside``: absolute names still hold
    where the picture is moved."""
    if name in aliases() or name.startswith(("hf:", "~")) or Path(name).is_absolute():
        return name
    if (whole := rename(name)) != name:
        return whole
    path, colon, inside = name.partition(":")
    return rename(path) + colon + inside if path and inside else name


def _model_of(key: str, rename: _Rename) -> str:
    """A key of ``fingerprints``, ``kind name``, with the name renamed."""
    for kind, aliases in _FINGERPRINTS.items():
        if key.startswith(f"{kind} "):
            return f"{kind} {_model(key.removeprefix(f'{kind} '), aliases, rename)}"
    return key


def _relative(name: str, folder: Path) -> str:
    """The name of what is there, relative to ``folder`` on the disk, whatever links lead to either."""
    try:
        place = check_path(name)
        if not os.path.lexists(place):
            return name  # of a picture that was handed over
        real = Path(os.path.realpath(place.parent), place.name)
        relative = Path(os.path.relpath(real, os.path.realpath(folder))).as_posix()
        return relative if relative.startswith("../") else f"./{relative}"
    except (InputError, ValueError):  # ValueError: another drive of Windows
        return name


def _completed(name: str, folder: Path) -> str:
    """The path from the folder of the record to what is there under ``name``, without detours through links;
    but what was recorded with them is found, too."""
    try:
        check_path(name)
        if not name.startswith(("./", "../")):
            return name
        direct = os.path.normpath(Path(os.path.realpath(folder), name))
        given = os.path.normpath(Path(folder, name))
        if os.path.lexists(given) and not (os.path.lexists(direct) and _differ(given, direct)):
            return f"./{given}" if given.startswith("~") else given
        return direct if os.path.lexists(direct) else name
    except (InputError, ValueError):
        return name


def _differ(one: str, other: str) -> bool:
    return os.path.realpath(one) != os.path.realpath(other)
