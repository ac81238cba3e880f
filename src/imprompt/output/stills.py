"""Pictures and clips on disk with the request inside, and the request back from them, without torch.

A file or folder of frames is written whole or not at all, and replaces what imprompt wrote there before; a
folder that holds anything else is never touched. PNG carries our record as the text chunk ``imprompt``
(JSON) and the line format of other tools as ``parameters``; JPEG and WebP carry both in EXIF. The record in
picture ``i`` of several is the request that draws just that one.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from imprompt.encoders.video import find_ffmpeg
from imprompt.errors import InputError, UsageError
from imprompt.output.clips import SUFFIXES, check_pace, read_text, write_clip, write_frames
from imprompt.schema.request import Request, Task

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""File name suffix → format that can be written."""

_KEY = "imprompt"
_MAP_KEY = "imprompt-control"
"""Of a control's map: the kind of control."""
_VERSION = 1
_EXIF_DESCRIPTION = 0x010E
_EXIF_IFD = 0x8769
_EXIF_COMMENT = 0x9286
_UNICODE = b"UNICODE\0"


class Drawn(Protocol):
    """What is saved: see :class:`imprompt.generation.engine.Result`."""

    @property
    def images(self) -> Sequence[Image.Image]: ...
    @property
    def request(self) -> Request: ...
    @property
    def provenance(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Record:
    """What a picture of ours says about itself."""

    request: Request
    provenance: dict[str, str] = field(default_factory=dict)
    """With what it was drawn: versions, device, fingerprints of base, adapter and encoder."""

    def to_json(self) -> str:
        """The text of the ``imprompt`` chunk."""
        request = json.loads(self.request.to_json())
        record = {_KEY: _VERSION, "request": request, "provenance": self.provenance}
        return json.dumps(record, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Read :meth:`to_json`. Raises :class:`UsageError` when it is no such record, or a newer kind."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UsageError(f"its record is not valid JSON ({error}).") from error
        if not isinstance(values, dict) or not isinstance(values.get(_KEY), int):
            raise UsageError("its record is not one of imprompt's.")
        if values[_KEY] > _VERSION:
            raise UsageError(
                f"its record has version {values[_KEY]}, known is up to {_VERSION}; use a newer imprompt."
            )
        provenance = values.get("provenance", {})
        return cls(
            Request.from_mapping(values.get("request")), {str(k): str(v) for k, v in provenance.items()}
        )


def save(result: Drawn, path: str | Path) -> list[Path]:
    """Write a result's pictures and return their paths.

    One picture goes to ``path``; of several, ``name.png`` becomes ``name-1.png``, ``name-2.png``, …. Files of
    these names, and folders that are :func:`our_frames`, are replaced, once all are written. Raises
    :class:`UsageError` for an unknown format and :class:`InputError` when the place cannot be written to.
    """
    if result.request.task == "animate":
        return _save_clips(result, path)
    target = check_target(path, count=len(result.images))
    paths = names(target, len(result.images))
    parts = [place.with_name(f".{place.name}.{os.getpid()}.part") for place in paths]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for index, (image, part) in enumerate(zip(result.images, parts, strict=True)):
            record = Record(result.request.single(index), result.provenance)
            with part.open("xb") as stream:
                image.save(stream, FORMATS[target.suffix.lower()], **_options(record, target.suffix))
        for part, place in zip(parts, paths, strict=True):
            part.replace(place)
    except OSError as error:
        raise InputError(f"cannot write '{target}' ({error.strerror or error}).") from error
    except ValueError as error:
        raise InputError(f"cannot write '{target}' ({error}); a .png holds longer texts.") from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return paths


def save_maps(
    maps: Sequence[Image.Image | Sequence[Image.Image]], request: Request, target: str | Path
) -> list[Path]:
    """Write what the request's controls followed beside ``target``, as ``NAME-control-1-canny.png``, …, or a
    folder of frames without the ending where it moves; each can be given back as ``none:PATH,model=NAME``.
    Raises :class:`InputError`."""
    paths = []
    for place, ref, shown in zip(_map_places(request, target), request.controls, maps, strict=True):
        still = isinstance(shown, Image.Image)
        path = place.with_name(f"{place.name}.png") if still else place
        _check_place(path, folder=not still)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        info = PngInfo()
        info.add_itxt(_MAP_KEY, ref.kind)
        try:
            if isinstance(shown, Image.Image):
                shown.save(part, "PNG", pnginfo=info)
            else:
                write_frames(shown, part, info)
            _put(part, path)
        except OSError as error:
            raise InputError(f"cannot write '{path}' ({error.strerror or error}).") from error
        finally:
            _remove(part)
        paths.append(path)
    return paths


def check_maps(request: Request, target: str | Path) -> None:
    """Raises :class:`InputError`, before anything is drawn, where :func:`save_maps` could not write."""
    for place in _map_places(request, target):
        _check_place(place.with_name(f"{place.name}.png"), folder=False)
        if request.task == "animate":  # only its picture tells whether a control moves
            _check_place(place, folder=True)


def _save_clips(result: Drawn, path: str | Path) -> list[Path]:
    """:func:`save` of clips: a file each, or a folder of frames each."""
    request, suffix = result.request, Path(path).suffix.lower()
    assert request.frames is not None
    assert request.fps is not None
    starts = range(0, len(result.images), request.frames)
    target = check_target(path, "animate", len(starts))
    check_pace(suffix, request.fps)
    paths = names(target, len(starts))
    parts = [place.with_name(f".{place.name}.{os.getpid()}.part") for place in paths]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for index, (start, part) in enumerate(zip(starts, parts, strict=True)):
            frames = result.images[start : start + request.frames]
            record = Record(request.single(index), result.provenance)
            write_clip(frames, part, suffix, request.fps, record.to_json())
        for part, place in zip(parts, paths, strict=True):
            _put(part, place)
    except OSError as error:
        raise InputError(f"cannot write '{target}' ({error.strerror or error}).") from error
    finally:
        for part in parts:
            _remove(part)
    return paths


def _put(part: Path, place: Path) -> None:
    """Make a finished file or folder the one at ``place``. Of folders, which no system replaces at once, the
    old one is put aside first, and comes back if that fails."""
    if not place.is_dir():
        part.replace(place)
        return
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    place.replace(old)
    try:
        part.replace(place)
    except OSError:
        old.replace(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part)
    part.unlink(missing_ok=True)


def _map_places(request: Request, target: str | Path) -> list[Path]:
    """Where each control's map goes, without an ending."""
    place = Path(target)
    return [
        place.with_name(f"{place.stem}-control-{number}-{ref.kind}")
        for number, ref in enumerate(request.controls, 1)
    ]


def _check_place(place: Path, *, folder: bool) -> None:
    """Raises :class:`InputError` when something is at ``place`` that a file, or a ``folder`` of frames, must
    not replace."""
    if place.is_dir() and not folder:
        raise InputError(f"cannot write '{place}': it is a folder.")
    if folder and place.exists() and not our_frames(place):
        what = "is a folder of other things" if place.is_dir() else "is a file"
        raise InputError(
            f"cannot write frames to '{place}': it {what}; only a folder of frames that imprompt wrote is "
            "replaced. Give another name, or remove it."
        )


def our_frames(folder: Path) -> bool:
    """Whether a folder holds frames that imprompt wrote, and nothing else."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    try:
        return bool(files) and all(map(_is_our_frame, files))
    except OSError:
        return False


def _is_our_frame(file: Path) -> bool:
    if not (file.is_file() and file.suffix == ".png" and file.stem.isdigit()):
        return False
    with Image.open(file, formats=("PNG",)) as image:
        return not image.info.keys().isdisjoint((_KEY, _MAP_KEY))


def names(target: Path, count: int) -> list[Path]:
    """The files that ``count`` pictures saved as ``target`` become."""
    if count == 1:
        return [target]
    return [target.with_name(f"{target.stem}-{number}{target.suffix}") for number in range(1, count + 1)]


def free_name(folder: Path, stem: str, count: int, suffix: str = ".png") -> Path:
    """The first of ``stem.png``, ``stem-1.png``, … in ``folder`` whose pictures would replace nothing."""
    number = 0
    while True:
        target = folder / (f"{stem}-{number}{suffix}" if number else f"{stem}{suffix}")
        if not any(path.exists() for path in names(target, count)):
            return target
        number += 1


def check_target(path: str | Path, task: Task = "generate", count: int = 1) -> Path:
    """``path``, if ``count`` pictures can be written there; said before drawing, not after. Raises as
    :func:`save`, and :class:`ModelError` when a video file is asked for and there is no encoder."""
    target = Path(path)
    known = SUFFIXES if task == "animate" else tuple(FORMATS)
    if target.suffix.lower() not in known:
        listed = ", ".join(suffix for suffix in known if suffix)
        folder = ", or have no ending for a folder of frames" if "" in known else ", or in / for a new folder"
        raise UsageError(f"cannot write '{target}': the name must end in {listed}{folder}.")
    if target.suffix.lower() == ".mp4":
        find_ffmpeg()
    for place in names(target, count):
        _check_place(place, folder=not target.suffix)
    above = next((folder for folder in target.absolute().parents if folder.exists()), Path("/"))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"cannot write '{target}': '{above}' is no folder one may write to.")
    return target


def read_record(path: str | Path) -> Record:
    """What a picture says about itself.

    Raises :class:`InputError` when it cannot be read or carries no record of imprompt's.
    """
    place = Path(path)
    if not place.exists():
        raise InputError(f"there is no file '{path}'.")
    try:
        text = read_text(place, _KEY)
        if text is not None:
            return _record(path, text or None)
        if place.is_dir():
            raise InputError(
                f"'{path}' is a folder, and no clip of imprompt's: its pictures carry no request."
            )
        with Image.open(place, formats=("PNG", "JPEG", "WEBP")) as image:
            text = image.info.get(_KEY) if image.format == "PNG" else _exif_text(image)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"'{path}' is no PNG, JPEG or WebP picture, and no GIF or MP4.") from error
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise InputError(f"'{path}' is damaged and cannot be read ({error}).") from error
    return _record(path, text)


def _record(path: str | Path, text: str | None) -> Record:
    if text is None:
        raise InputError(
            f"'{path}' carries no request: imprompt did not make it, or another program saved it again."
        )
    try:
        return Record.from_json(text)
    except UsageError as error:
        raise InputError(f"'{path}': {error}") from error


def read_request(path: str | Path) -> Request:
    """The request that draws a saved picture again. Raises as :func:`read_record`."""
    return read_record(path).request


def parameters(request: Request) -> str:
    """The request in the text format that stable-diffusion-webui made common (``parameters``)."""
    scheduler = request.scheduler or "default"
    fields = {
        "Steps": request.steps,
        "Sampler": scheduler,
        "CFG scale": request.guidance,
        "Seed": request.seed,
    }
    if request.size is not None:
        fields["Size"] = "{}x{}".format(*request.size)
    fields["Model"] = Path(request.base).name if "/" in request.base else request.base
    if request.strength is not None:
        fields["Denoising strength"] = request.strength
    if request.images:
        shown = "; ".join(
            f"{Path(ref.path).name} {request.scale if ref.scale is None else ref.scale}"
            for ref in request.images
        )
        fields["IP-Adapter"] = ", ".join(
            {ref.adapter or request.adapter or "default": None for ref in request.images}
        )
        fields["IP-Adapter images"] = json.dumps(shown)
    lines = [request.prompt]
    if request.negative:
        lines.append(f"Negative prompt: {request.negative}")
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items() if value is not None))
    return "\n".join(lines)


def _options(record: Record, suffix: str) -> dict[str, object]:
    if FORMATS[suffix.lower()] == "PNG":
        info = PngInfo()
        info.add_itxt(_KEY, record.to_json())
        info.add_itxt("parameters", parameters(record.request))
        return {"pnginfo": info}
    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = record.to_json()  # json.dumps escapes to ASCII, as this tag demands
    exif.get_ifd(_EXIF_IFD)[_EXIF_COMMENT] = _UNICODE + parameters(record.request).encode("utf-16-be")
    if FORMATS[suffix.lower()] == "WEBP":
        return {"exif": exif, "lossless": True}
    return {"exif": exif, "quality": 95, "subsampling": 0}


def _exif_text(image: Image.Image) -> str | None:
    text = image.getexif().get(_EXIF_DESCRIPTION)
    return text if isinstance(text, str) and f'"{_KEY}":' in text else None
