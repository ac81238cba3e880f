"""Files: write them whole or not at all, read JSON within limits, check paths, hash contents, derive seeds.

Everything that imprompt writes goes through :func:`write_atomic`, :func:`write_all` or :func:`write_folder`.
All errors name the file and are one line. Pictures are read by :mod:`imprompt.encoders.images`.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from imprompt.errors import ImpromptError, InputError, first_line

Content: TypeAlias = bytes | Callable[[BinaryIO], None]
"""What a file will hold: its bytes, or a function that writes them to a stream in memory."""

MAX_JSON = 16 * 1024 * 1024
"""Default cap on the size of a JSON text, in bytes."""
MAX_DEPTH = 64
"""Default cap on how deep a JSON text may be nested."""

_REMEMBERED = 16_000_000  # bytes from which a file's hash is kept on the disk
_MAX_REMEMBERED = 1000  # hashes
_HASHES = "sha256.json"
_NAME_BYTES = 255  # of one component of a path, on every common file system
_PATH_BYTES = 4096


# ---- writing


def write_atomic(path: str | Path, content: Content, *, overwrite: bool) -> Path:
    """Write one file whole or not at all, and return its path.

    The content is encoded in memory, written to a new file of random name in the same folder, synced to disk
    and renamed. A symbolic link at ``path`` is replaced, never followed. Whatever interrupts it, also Ctrl-C,
    leaves the old file as it was and nothing beside it. The folder is made if it is missing.

    Raises :class:`FileExistsError` when there is something at ``path`` and not ``overwrite``, and
    :class:`InputError` when the file cannot be written.
    """
    return write_all({check_path(path): content}, overwrite=overwrite)[0]


def write_all(files: Mapping[Path, Content], *, overwrite: bool) -> list[Path]:
    """Write several files as :func:`write_atomic` does; none takes its place before all are on the disk."""
    parts: dict[Path, Path] = {}
    placed: list[Path] = []
    done = False
    try:
        for path, content in files.items():
            with _writing(path):
                check_path(path)
                if path.is_dir() and not path.is_symlink():
                    raise InputError(f"cannot write '{path}': it is a folder.")
                path.parent.mkdir(parents=True, exist_ok=True)
                part = parts[path] = _beside(path, "part")
                _write_new(part, content)
        for path, part in parts.items():
            with _writing(path):
                _place(part, path, overwrite)
                placed.append(path)
        done = True
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
        if not done and not overwrite:
            for path in placed:
                path.unlink(missing_ok=True)
    return list(files)


def write_folder(
    path: str | Path, files: Mapping[str, Content], *, is_ours: Callable[[Path], bool] | None = None
) -> Path:
    """Write a folder of files whole or not at all, and return its path.

    With ``is_ours`` a folder that is already there is replaced: files in it for which ``is_ours`` is true
    are deleted, all others are moved to the new folder. Raises :class:`FileExistsError` when there is
    something at ``path`` and no ``is_ours``, :class:`InputError` when it cannot be written.
    """
    path = check_path(path)
    if os.path.lexists(path) and (is_ours is None or path.is_symlink() or not path.is_dir()):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    part, replaced = _beside(path, "part"), list[Path]()
    try:
        try:
            with _writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                part.mkdir()
                for name, content in files.items():
                    _write_new(part / name, content)
                while not _swap(part, path, replaced if is_ours else None):
                    pass  # another process wrote the folder in between: replace that one too
        finally:
            _tidy(part, replaced, path, is_ours)
    except KeyboardInterrupt:  # which may have come while it tidied up
        _tidy(part, replaced, path, is_ours)
        raise
    return path


def _tidy(part: Path, replaced: list[Path], path: Path, is_ours: Callable[[Path], bool] | None) -> None:
    """Remove ``part`` if it was not renamed, and the folders that another stands in place of now."""
    with _writing(path):
        if part.exists():
            shutil.rmtree(part)
        for old in replaced:
            if is_ours is not None and old.exists() and path.exists():
                _clear(old, path, is_ours)


def _swap(part: Path, path: Path, replaced: list[Path] | None) -> bool:
    """Rename ``part`` to ``path``. A folder there is renamed and added to ``replaced``, and comes back
    if that fails; without ``replaced`` it raises :class:`FileExistsError`. Whether it worked."""
    old = _beside(path, "old")
    try:
        if replaced is not None and path.exists():
            with contextlib.suppress(FileNotFoundError):  # another process is replacing it too
                path.rename(old)
                replaced.append(old)
        part.rename(path)
    except OSError as error:
        _put_back(old, path)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if replaced is None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        return False
    except BaseException:
        _put_back(old, path)
        raise
    return True


def _put_back(old: Path, path: Path) -> None:
    if old.exists() and not path.exists():
        old.rename(path)


def _clear(old: Path, new: Path, is_ours: Callable[[Path], bool]) -> None:
    """Delete our files in ``old``, move the others to ``new`` under names that are free, remove ``old``."""
    for file in sorted(old.iterdir()):
        if is_ours(file):
            file.unlink()
            continue
        target, number = new / file.name, 0
        while os.path.lexists(target):
            number += 1
            target = new / f"{file.stem}-{number}{file.suffix}"
        file.rename(target)
    old.rmdir()


def _write_new(path: Path, content: Content) -> None:
    if not isinstance(content, bytes):
        memory = io.BytesIO()
        content(memory)
        content = memory.getvalue()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o666), "wb") as stream:  # noqa: PTH123  # a descriptor, not a path
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        if os.fstat(stream.fileno()).st_size != len(content):
            raise OSError(errno.ENOSPC, "not all bytes could be written")


def _place(part: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        part.replace(path)
        return
    try:
        os.link(part, path)  # unlike rename, this fails if there is something at path
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        part.replace(path)


def _beside(path: Path, ending: str) -> Path:
    """A hidden name nobody else uses, in the folder of ``path``."""
    name = path.name.encode(errors="surrogateescape")[:100].decode(errors="ignore")
    return path.with_name(f".{name}.{secrets.token_hex(8)}.{ending}")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        if not _is_above(error.filename, path):
            raise
        raise InputError(f"cannot write '{path}': '{error.filename}' is not a folder.") from error
    except OSError as error:
        raise InputError(f"cannot write '{path}' ({error.strerror or first_line(error)}).") from error


def _is_above(name: object, path: Path) -> bool:
    return isinstance(name, str) and Path(name) in path.parents


# ---- reading


def check_path(path: str | Path, what: str = "path") -> Path:
    """``path`` with ``~`` expanded at its beginning, if a file can have that name.

    The file ``./~x`` gets an absolute path, since a :class:`Path` forgets the ``./``. Raises
    :class:`InputError` for NUL, text that is not valid Unicode, a component of more than 255 bytes, more than
    4096 bytes in all, and a home folder of nobody (``~nouser/x``, which in a :class:`Path` is a file of the
    current folder). Nothing is read.
    """
    text = str(path)
    if not text:
        raise InputError(f"{what}: it is empty; give the path of a file.")
    shown = printable(text if len(text) <= 80 else text[:40] + "…" + text[-20:])
    _check_name(text, f"{what} '{shown}'")
    expanded = os.path.expanduser(text)  # noqa: PTH111  # a Path forgets whether it began with ./
    user = text.partition("/")[0]
    if expanded.startswith("~") and (isinstance(path, str) or user == "~"):
        raise InputError(f"{what} '{shown}': there is no home folder '{user}' (a file: ./{text}).")
    place = Path(expanded)
    if not str(place).startswith("~"):
        return place
    try:
        return Path.cwd() / place
    except OSError as error:
        raise InputError(f"{what} '{shown}': the current folder is not there any more.") from error


def _check_name(text: str, named: str) -> None:
    """Raise :class:`InputError`, which begins with ``named``, for text that no file can have as its name."""
    if "\0" in text:
        raise InputError(f"{named} holds a NUL character, which no file's name can.")
    try:
        coded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise InputError(f"{named} is not valid Unicode.") from error
    if len(coded) > _PATH_BYTES or any(len(part) > _NAME_BYTES for part in coded.split(b"/")):
        raise InputError(f"{named} is too long: a file's name has at most {_NAME_BYTES} bytes.")


def check_file(path: str | Path, what: str = "", *, folder: bool = False) -> Path:
    """``path`` with ``~`` expanded, if it is a regular file, or with ``folder`` a folder, that can be read.

    ``what`` begins the message. Raises :class:`InputError`, also for pipes and devices, which may never end.
    """
    place = check_path(path, what or "path")
    prefix, name = f"{what}: " if what else "", f"'{printable(str(path))}'"
    try:
        mode = place.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if re.match(r"(https?|ftp|s3|file):/", str(path)):
            raise InputError(f"{prefix}{name} is an address; save the file and give its name.") from error
        raise InputError(f"{prefix}there is no file {name}.") from error
    except OSError as error:
        raise InputError(f"{prefix}{name} cannot be read ({error.strerror}).") from error
    if stat.S_ISDIR(mode) and not folder:
        raise InputError(f"{prefix}{name} is a folder; a file is expected.")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{prefix}{name} is a pipe or a device; a file is expected.")
    if not os.access(place, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
        raise InputError(f"{prefix}{name} cannot be read (Permission denied).")
    return place


def read_bytes(path: str | Path, what: str = "", *, limit: int) -> bytes:
    """The content of a file of at most ``limit`` bytes. Raises :class:`InputError`."""
    place = check_file(path, what)
    try:
        with place.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}).") from error
    if len(content) > limit:
        raise InputError(f"'{path}' has more than {limit:,} bytes.")
    return content


def read_json(
    source: Path | str | bytes,
    what: str,
    *,
    expect: type | tuple[type, ...] = dict,
    error: type[ImpromptError] = InputError,
    max_bytes: int = MAX_JSON,
    max_depth: int = MAX_DEPTH,
) -> Any:
    """Parse JSON: the file at a :class:`Path`, or a text.

    ``what`` names it in messages; ``expect`` is the type of the outermost value. Raises ``error`` when it is
    not JSON, of another type, longer than ``max_bytes``, nested deeper than ``max_depth``, has a key twice in
    one object, or holds NaN, Infinity or text that is not valid Unicode.
    """
    try:
        text = read_bytes(source, what, limit=max_bytes) if isinstance(source, Path) else source
        if len(text) > max_bytes:
            raise ValueError(f"more than {max_bytes:,} bytes")
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        _check_nesting(value, max_depth)
    except InputError as wrong:
        raise error(str(wrong)) from wrong
    except RecursionError as wrong:
        raise error(f"{what}: nested too deeply; at most {max_depth} levels are read.") from wrong
    except UnicodeDecodeError as wrong:
        raise error(f"{what}: not valid JSON (not UTF-8).") from wrong
    except ValueError as wrong:
        raise error(f"{what}: not valid JSON ({printable(first_line(wrong))}).") from wrong
    if not isinstance(value, expect):
        kinds = expect if isinstance(expect, tuple) else (expect,)
        wanted = " or ".join(_JSON_NAMES.get(kind, kind.__name__) for kind in kinds)
        got = _JSON_NAMES.get(type(value), type(value).__name__)
        raise error(f"{what}: {wanted} is expected, this is {got}.")
    return value


_JSON_NAMES = {
    dict: "an object", list: "an array", str: "a text", int: "a number", float: "a number",
    bool: "true or false", type(None): "null",
}  # fmt: skip


def finite(value: Any) -> Any:
    """A JSON value with null for every number that is not finite, since JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _check_nesting(value: object, max_depth: int) -> None:
    level, depth = [value], 0
    while level:
        if depth > max_depth:
            raise ValueError(f"nested deeper than {max_depth} levels")
        inner: list[object] = []
        for each in level:
            if isinstance(each, dict):
                inner += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, str) and not is_text(each):
                raise ValueError("holds text that is not valid Unicode")
        level, depth = inner, depth + 1


# ---- texts


def is_text(text: str) -> bool:
    """Whether a text can be encoded, that is, holds no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """``text`` in one line that is safe to show on a terminal: control characters, line ends, lone surrogates
    and marks that turn the direction of writing become escapes such as ``\\x1b``."""
    return "".join(_shown(letter) for letter in text)


def _shown(letter: str) -> str:
    kind = unicodedata.category(letter)
    if kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and letter not in "\u200c\u200d"):
        return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
    return letter


# ---- hashes and seeds


def sha256(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal; of a folder, of its files' contents in the order of their names.

    A file that has not changed since (path, size, times and inode) is not read again; hashes of large files
    are kept in ``~/.cache/imprompt`` for later processes. Raises :class:`InputError`.
    """
    place = check_file(path, folder=True)
    try:
        if not place.is_dir():
            return _hash_file(place)
        digest = hashlib.sha256()
        for file in sorted(inside for inside in place.iterdir() if inside.is_file()):
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}).") from error


def cache_folder() -> Path:
    """Where things are kept that can be made anew: ``$XDG_CACHE_HOME/imprompt`` or ``~/.cache/imprompt``.

    Raises :class:`InputError` for a user who has no home.
    """
    return check_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "imprompt"


def fingerprint(*paths: str | Path) -> str:
    """Twelve hex digits that differ when the content or the number of the files differs."""
    return hashlib.sha256("".join(sha256(path) for path in paths).encode()).hexdigest()[:12]


def _hash_file(path: Path) -> str:
    about = path.stat()
    return _hash_known(path.absolute(), about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)


@functools.lru_cache(maxsize=256)
def _hash_known(path: Path, size: int, *times_and_inode: int) -> str:
    if size < _REMEMBERED:
        return _hash(path)
    key = " ".join(map(str, (path.resolve(), size, *times_and_inode)))
    known: dict[str, Any] = {}
    with contextlib.suppress(ImpromptError):  # none yet, or damaged: it is made anew
        known = read_json(cache_folder() / _HASHES, "cache")
    if isinstance(found := known.get(key), str) and len(found) == 64:
        return found
    digest = _hash(path)
    entries = [*list(known.items())[-_MAX_REMEMBERED:], (key, digest)]
    with contextlib.suppress(ImpromptError):  # no home, or one that cannot be written: hashed again next time
        content = json.dumps(dict(entries), indent=0).encode()
        write_atomic(cache_folder() / _HASHES, content, overwrite=True)
    return digest


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seed_for(seed: int, index: int = 0, purpose: str = "noise") -> int:
    """The seed of one random stream, in [0, 2**53): for picture ``index`` of a run, for one ``purpose``.

    ``noise`` is ``seed + index``, so that picture ``i`` of a run is the first of the run with ``seed + i``.
    Other purposes are hashed, hence independent of it and of each other.
    """
    if purpose == "noise":
        return (seed + index) % 2**53
    digest = hashlib.blake2b(f"{purpose}:{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**53
