"""The record inside a picture or clip: the request that draws it again, and its provenance.

A :class:`Record` is JSON. PNG has it in the text chunk ``imprompt``, JPEG and WebP in EXIF, GIF and MP4 in a
comment. Version 2 names files relative to its own folder (``./``, ``../``); version 1 named them as they
were given. A record may come from anybody: :meth:`Record.lines` shows printable text only, and
:meth:`Record.local_files` lists the files that a repetition would read.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imprompt.errors import InputError, UsageError
from imprompt.io import check_path, printable, read_json
from imprompt.schema.request import Request

KEY = "imprompt"
"""First key of every record, and the name of the text chunk of PNG that holds it."""
VERSION = 2

_PICTURES = {
    "": ("image", "mask", "video"),
    "images": ("image", "path", "negative", "mask"),
    "regions": ("mask",),
    "controls": ("path",),
}
"""Fields of a request's JSON that name pictures, by the list they are in."""


@dataclass(frozen=True)
class Record:
    """The request and the provenance of one picture or clip."""

    request: Request
    """Draws this picture alone again."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Versions, device, and fingerprints of the weights."""

    def to_json(self, folder: Path | None = None) -> str:
        """The record as JSON in ASCII. Files that exist are named relative to ``folder``, if it is given."""
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
        return Record.from_json(text, path.parent)
    except UsageError as error:
        raise InputError(f"'{path}': {error}") from error


def _renamed(request: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """The JSON of a request with every picture's name, also in ``hashes``, replaced by ``rename`` of it."""

    def replaced(record: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        return {key: changed(value) if key in names else value for key, value in record.items()}

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(each) for each in value]
        return rename(value) if isinstance(value, str) else value

    result = replaced(request, _PICTURES[""])
    for key, names in _PICTURES.items():
        if isinstance(result.get(key), list):
            result[key] = [
                replaced(each, names) if isinstance(each, dict) else changed(each) for each in result[key]
            ]
    if isinstance(result.get("hashes"), dict):
        result["hashes"] = {rename(name): value for name, value in result["hashes"].items()}
    return result


def _relative(name: str, folder: Path) -> str:
    try:
        place = check_path(name)
        if not os.path.lexists(place):
            return name  # of a picture that was handed over
        relative = Path(os.path.relpath(place, folder)).as_posix()
        return relative if relative.startswith("../") else f"./{relative}"
    except (InputError, ValueError):  # ValueError: another drive of Windows
        return name


def _completed(name: str, folder: Path) -> str:
    try:
        if not name.startswith(("./", "../")):
            return name
        place = os.path.normpath(folder / check_path(name))
        return place if os.path.lexists(place) else name
    except (InputError, ValueError):
        return name
