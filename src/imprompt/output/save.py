"""Write pictures and clips, and read their records back.

All files of one run are encoded in memory and written together (:mod:`imprompt.io`). What is replaced is said
in :mod:`imprompt.places`; a folder with anything but imprompt's frames never is.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import av
from PIL import Image, UnidentifiedImageError

from imprompt.errors import InputError, UsageError, first_line
from imprompt.io import check_file, check_path, read_json, write_all, write_folder
from imprompt.output.clips import SUFFIXES, check_fps, encode_clip, encode_frames
from imprompt.output.record import KEY, VERSION, Record, as_record, parameters
from imprompt.output.stills import FORMATS, encode_png, encode_still, is_ours, still_text
from imprompt.places import Identity, check_folder_above, check_not_read, check_place, identities
from imprompt.schema.request import Request, Task

if TYPE_CHECKING:
    from imprompt.generation.engine import Result

_MAP_KEY = f"{KEY}-control"  # text chunk of a control's map: its kind
_PAGE_KEY = f"{KEY}-page"  # text chunk of a page of several pictures
_Files = dict[str, bytes | dict[str, bytes]]  # ending after the target's stem → file, or files of a folder


def save(
    drawn: "Result | Sequence[Result]",
    path: str | Path,
    *,
    overwrite: bool = False,
    numbered: bool = False,
    maps: bool = False,
    pages: Mapping[str, Image.Image] | None = None,
    keep_names: bool = False,
) -> list[Path]:
    """Write the pictures or clips of one result or several and return their paths.

    One goes to ``path``; several become ``NAME-1.png``, ``NAME-2.png``, …. ``maps`` adds the maps of the
    first result's controls as ``NAME-control-1-canny.png``, or a folder of frames for a control that moves;
    each can be used again as ``none:PATH,model=NAME``. ``pages`` are further pictures: ``{"grid": page}``
    becomes ``NAME-grid.png``. With ``numbered`` nothing is replaced: if the name is taken, a free one is
    used. With ``keep_names`` the record names files as the request does, not relative to ``path``.

    Raises :class:`UsageError` for an unknown format and :class:`InputError` when a file cannot be written, or
    would take the place of one that a request reads.
    """
    results = drawn if isinstance(drawn, Sequence) else [drawn]
    target = _checked(path, results[0].request.task)
    files = _files(results, target, keep_names=keep_names) | (_maps(results[0]) if maps else {})
    files |= {f"-{name}.png": encode_png(page, {_PAGE_KEY: name}) for name, page in (pages or {}).items()}
    reads = _reads(result.request for result in results)
    while True:
        chosen = free_name(target.parent, target.stem, files, target.suffix) if numbered else target
        try:
            placed = {_beside(chosen, ending): content for ending, content in files.items()}
            return _write(placed, reads, overwrite=overwrite, exclusive=numbered)
        except FileExistsError as error:  # another process was faster
            if not numbered:
                raise InputError(
                    f"cannot write '{error.filename}': it was made meanwhile; save under another name."
                ) from error


def save_together(
    files: "Mapping[Path, Result | Image.Image | Mapping[str, object]]", *, overwrite: bool = False
) -> list[Path]:
    """Write results of one picture, pages (PNG) and JSON objects under the names given, all or none, and
    return their paths. JSON is marked as imprompt's by the key ``imprompt``. Raises as :func:`save`."""
    placed: dict[Path, bytes | dict[str, bytes]] = {}
    requests = []
    for path, content in files.items():
        if isinstance(content, Image.Image):
            placed[_checked(path, "generate")] = encode_png(content, {_PAGE_KEY: path.stem})
        elif isinstance(content, Mapping):
            text = json.dumps({KEY: VERSION, **content}, indent=2, ensure_ascii=False) + "\n"
            placed[check_path(path)] = text.encode()
        else:
            target = _checked(path, content.request.task)
            (placed[target],) = _files([content], target).values()
            requests.append(content.request)
    return _write(placed, _reads(requests), overwrite=overwrite)


def save_page(image: Image.Image, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a page of pictures (a grid, a chart) as PNG. Raises :class:`InputError`."""
    return save_together({Path(path): image}, overwrite=overwrite)[0]


def check_target(
    path: str | Path,
    asked: Request | Sequence[Request],
    *,
    overwrite: bool = False,
    numbered: bool = False,
    maps: bool = False,
    pages: Iterable[str] = (),
) -> Path:
    """``path``, if what the requests draw can be written there; to be called before drawing.

    The options are those of :func:`save`, ``pages`` the pages' names. Raises as :func:`save`.
    """
    requests = asked if isinstance(asked, Sequence) else [asked]
    task = requests[0].task
    target = _checked(path, task)
    for request in requests:
        if request.fps is not None:
            check_fps(target.suffix.lower(), request.fps)
    check_folder_above(target)
    if numbered:  # another name is chosen where one is taken
        return target
    reads = _reads(requests)
    for place in names(target, sum(request.count for request in requests)):
        _check_place(place, reads, folder=not target.suffix, overwrite=overwrite)
    check_together([_beside(target, f"-{name}.png") for name in pages], requests, overwrite=overwrite)
    for number, control in enumerate(requests[0].controls if maps else (), 1):
        ending = f"-control-{number}-{control.kind}"
        _check_place(_beside(target, f"{ending}.png"), reads, folder=False, overwrite=overwrite)
        if task == "animate":  # only its picture tells whether a control moves
            _check_place(_beside(target, ending), reads, folder=True, overwrite=overwrite)
    return target


def check_together(paths: Iterable[Path], requests: Iterable[Request], *, overwrite: bool = False) -> None:
    """Raises :class:`InputError` when pages, pictures or JSON of the requests cannot be written to ``paths``;
    to be called before drawing."""
    reads = _reads(requests)
    for path in paths:
        _check_place(path, reads, folder=False, overwrite=overwrite)


def names(target: Path, count: int) -> list[Path]:
    """The files that ``count`` pictures saved as ``target`` become."""
    if count == 1:
        return [target]
    return [_beside(target, f"-{number}{target.suffix}") for number in range(1, count + 1)]


def free_name(folder: Path, stem: str, endings: Iterable[str] | int = 1, suffix: str = ".png") -> Path:
    """The first of ``stem.png``, ``stem-1.png``, … in ``folder`` that names nothing yet, with each of
    ``endings`` (or, of a number, those of so many pictures)."""
    number = 0
    while True:
        target = folder / (f"{stem}-{number}{suffix}" if number else f"{stem}{suffix}")
        if isinstance(endings, int):
            taken = any(os.path.lexists(path) for path in names(target, endings))
        else:
            taken = any(os.path.lexists(_beside(target, ending)) for ending in endings)
        if not taken:
            return target
        number += 1


def our_frames(folder: Path) -> bool:
    """Whether a folder holds frames that imprompt wrote, and nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    files = sorted(folder.iterdir())
    return bool(files) and all(map(_is_our_frame, files))


def read_record(path: str | Path) -> Record:
    """The record in a picture, clip or folder of frames.

    Only headers are read. Raises :class:`InputError` when it cannot be read or carries no record.
    """
    place = check_file(path, "picture", folder=True)
    try:
        first = min(place.glob("*.png"), default=None) if place.is_dir() else place
        with warnings.catch_warnings(action="ignore"):  # of damage
            text = None if first is None else _text(first)
        if text is None and place.is_dir():
            raise InputError(
                f"'{path}' is a folder, and no clip of imprompt's: its pictures carry no request."
            )
        if text is None and _is_our_file(place):
            raise InputError(
                f"'{path}' is a page of pictures, or a control's map, and carries no request; the pictures "
                "that were drawn do."
            )
        return as_record(place, text)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"'{path}' is not a PNG, JPEG, WebP, GIF or MP4 file.") from error
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise InputError(f"'{path}' is damaged and cannot be read ({first_line(error)}).") from error


def recorded_fps(folder: Path) -> float | None:
    """Frames per second of the clip of imprompt's in a folder of frames, by its record; ``None`` without one.

    Raises :class:`InputError` for a record that cannot be read.
    """
    first = min(folder.glob("*.png"), default=None)
    try:
        text = None if first is None else _text(first)
    except Exception:  # damaged: reported where the frames are decoded
        return None
    return None if first is None or text is None else as_record(first, text).request.fps


def read_request(path: str | Path) -> Request:
    """The request that draws a saved picture again. Raises as :func:`read_record`."""
    return read_record(path).request


# ---- private


def _checked(path: str | Path, task: Task) -> Path:
    """``path`` as a target, if its name has an ending that can be written."""
    target = check_path(path)
    known = SUFFIXES if task == "animate" else tuple(FORMATS)
    if target.suffix.lower() not in known:
        listed = ", ".join(suffix for suffix in known if suffix)
        folder = ", or have no ending for a folder of frames" if "" in known else ", or in / for a new folder"
        raise UsageError(f"cannot write '{path}': the name must end in {listed}{folder}.")
    return target


def _files(results: "Sequence[Result]", target: Path, *, keep_names: bool = False) -> _Files:
    """The pictures or clips as they will be on the disk."""
    folder = None if keep_names else target.parent
    try:
        made = [each for one in results for each in _encoded(one, target.suffix.lower(), folder)]
    except (UsageError, InputError) as error:
        raise type(error)(f"cannot write '{target}': {error}") from error
    endings = [name.name.removeprefix(target.stem) for name in names(target, len(made))]
    return dict(zip(endings, made, strict=True))


def _encoded(result: "Result", suffix: str, folder: Path | None) -> Iterator[bytes | dict[str, bytes]]:
    """Each picture or clip of a result as it will be in the file."""
    request = result.request
    size = 1 if request.task != "animate" else request.frames
    assert size is not None
    for index, start in enumerate(range(0, len(result.images), size)):
        record = Record(request.single(index), result.provenance)
        text = record.to_json(folder)
        if request.task == "animate":
            assert request.fps is not None
            check_fps(suffix, request.fps)
            yield encode_clip(result.images[start : start + size], suffix, request.fps, text)
        else:
            yield encode_still(result.images[start], suffix, text, parameters(record.request))


def _maps(result: "Result") -> _Files:
    """The maps of a result's controls; a folder of frames has no ending."""
    files: _Files = {}
    for number, (control, shown) in enumerate(zip(result.request.controls, result.maps, strict=True), 1):
        ending, texts = f"-control-{number}-{control.kind}", {_MAP_KEY: control.kind}
        if isinstance(shown, Image.Image):
            files[f"{ending}.png"] = encode_png(shown, texts)
        else:
            files[ending] = encode_frames(shown, texts)
    return files


def _write(
    files: Mapping[Path, bytes | dict[str, bytes]],
    reads: frozenset[Identity],
    *,
    overwrite: bool,
    exclusive: bool = False,
) -> list[Path]:
    """Write files, and folders of frames, and return their paths."""
    if not exclusive:
        for path, content in files.items():
            _check_place(path, reads, folder=isinstance(content, dict), overwrite=overwrite)
    placed: list[Path] = []
    try:
        for path, content in files.items():
            if isinstance(content, dict):
                write_folder(path, content, is_ours=None if exclusive else _is_our_frame)
                placed.append(path)
        write_all(
            {path: content for path, content in files.items() if isinstance(content, bytes)},
            overwrite=not exclusive,
        )
    except BaseException:
        for folder in placed if exclusive else ():
            shutil.rmtree(folder)
        raise
    return list(files)


def _reads(requests: Iterable[Request]) -> frozenset[Identity]:
    """The files that the requests read."""
    named = (name for request in requests for name in request.files)
    return identities({name for name in named if isinstance(name, str)})  # others are in memory


def _check_place(path: Path, reads: frozenset[Identity], *, folder: bool, overwrite: bool) -> None:
    """Raises :class:`InputError` when something is at ``path`` that must not be replaced."""
    if not folder:
        check_place(path, overwrite=overwrite, is_ours=_is_our_file, reads=reads)
        return
    if os.path.lexists(path) and not our_frames(path):
        what = "is a folder of other things" if path.is_dir() else "is a file"
        raise InputError(
            f"cannot write frames to '{path}': it {what}; only a folder of frames that imprompt wrote is "
            "replaced. Give another name, or remove it."
        )
    check_not_read(path, reads)


def _is_our_file(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        if path.suffix == ".json":
            return KEY in read_json(path, "record")
        return _text(path) is not None or _is_our_still(path)
    except Exception:  # of another kind, or damaged
        return False


def _is_our_still(path: Path) -> bool:
    with Image.open(path, formats=("PNG",)) as image:
        return is_ours(image)


def _is_our_frame(file: Path) -> bool:
    if file.is_symlink() or not (file.is_file() and file.suffix == ".png" and file.stem.isdigit()):
        return False
    try:
        return _is_our_still(file)
    except Exception:  # another kind of file, or damaged
        return False


def _text(path: Path) -> str | None:
    """The record in a file, ``None`` without one. Raises nearly anything for damaged files."""
    with path.open("rb") as stream:
        if stream.read(12)[4:8] == b"ftyp":
            stream.seek(0)
            with av.open(stream, "r", format="mp4") as container:
                text = container.metadata.get("comment")
            return text if text is not None and text.startswith(f'{{"{KEY}":') else None
    with Image.open(path, formats=("PNG", "JPEG", "WEBP", "GIF")) as image:
        if image.format != "GIF":
            return still_text(image)
        comment = image.info.get("comment", b"")
    return comment.decode("ascii", "replace") if comment.startswith(b"{") else None


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f"{target.stem}{ending}")
