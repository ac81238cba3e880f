"""What may be written where: one rule for every command, asked before the work and again before writing.

A file that imprompt made is replaced, any other only with ``overwrite``, and one that is read for what is
written never. Nothing is written here: see :mod:`imprompt.io`.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

from imprompt.errors import InputError
from imprompt.io import check_path

Identity: TypeAlias = tuple[int, int]
"""Device and inode: equal for all names of one file or folder."""


def identities(names: Iterable[str | Path | None], *, folders: bool = True) -> frozenset[Identity]:
    """What the local files among ``names`` are, and the folders, whose files all count as read, with
    ``folders``; a name of nothing (an alias) is passed over."""
    found = (_identity(name, folders=folders) for name in names if name is not None)
    return frozenset(each for each in found if each is not None)


def check_place(
    path: Path,
    *,
    overwrite: bool,
    is_ours: Callable[[Path], bool],
    reads: frozenset[Identity] = frozenset(),
    said: str = "imprompt did not make the file that is there",
) -> None:
    """Raises :class:`InputError` when a file must not, or cannot, be written to ``path``.

    ``is_ours`` tells whether a file is of those that are replaced, ``said`` in the message that it is not;
    ``reads`` are the :func:`identities` of all that is read.
    """
    check_folder_above(path)
    if not os.path.lexists(path):
        return
    check_not_read(path, reads)
    if path.is_dir() and not path.is_symlink():
        raise InputError(f"cannot write '{path}': it is a folder.")
    if not overwrite and not is_ours(path):
        raise InputError(f"cannot write '{path}': {said}; give another name, or --overwrite.")


def check_not_read(path: Path, reads: frozenset[Identity]) -> None:
    """Raises :class:`InputError` when what is at ``path`` is read, lies in a folder that is, or is a folder
    with a file in it that is."""
    if not reads or not os.path.lexists(path):
        return
    inside = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
    if any(_identity(place) in reads for place in (path, *path.absolute().parents, *inside)):
        raise InputError(
            f"cannot write '{path}': what is there is read in this run, and would be lost; give another name."
        )


def check_folder_above(path: Path) -> None:
    """Raises :class:`InputError` when no file can be made at ``path``: its folder, or the nearest one above
    that is there, cannot be written."""
    above = next((folder for folder in path.absolute().parents if os.path.lexists(folder)), Path("/"))
    try:
        # A file without a name: permissions alone may promise too much.
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise InputError(
            f"cannot write '{path}': '{above}' is not a writable folder ({error.strerror or error})."
        ) from error


def _identity(name: str | Path, *, folders: bool = True) -> Identity | None:
    with contextlib.suppress(OSError, ValueError, InputError):
        about = check_path(name).stat()
        if folders or not stat.S_ISDIR(about.st_mode):
            return about.st_dev, about.st_ino
    return None
