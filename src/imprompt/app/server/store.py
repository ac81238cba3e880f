"""Pictures and jobs on disk: what survives a restart.

Pictures are files named by the SHA-256 of their bytes, so that an id can neither be guessed nor name a path.
Jobs are rows of an SQLite journal: a job is accepted once its row is on the disk, and its pictures are there
before its row says done. All methods block; the server calls them on one thread of their own, which alone
places and deletes pictures: two jobs may draw the same, and one that is being placed is not deleted with the
other's. Workers write into :func:`scratch_of` a job.
"""

import contextlib
import errno
import hashlib
import io
import json
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt.app.server.problems import Problem
from imprompt.encoders.images import MAX_FRAMES, as_bytes, container_of, frame_count, load_image
from imprompt.encoders.video import read_video
from imprompt.errors import ImpromptError, InputError, UsageError
from imprompt.io import write_atomic
from imprompt.output import Record, read_record
from imprompt.output.clips import durations
from imprompt.schema.request import Request

ID = re.compile(r"[0-9a-f]{64}")
_SCRATCH = "imprompt-"
"""Begins the names of folders in which jobs' pictures are written."""
THUMBNAIL = 320
"""Longest side of a thumbnail, in pixels."""
VIDEO = "video/mp4"
VIDEO_SIDE = 1024
"""Longest side of an uploaded video's frames, in pixels."""

_TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  client TEXT NOT NULL,
  key TEXT,
  state TEXT NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0,
  created REAL NOT NULL,
  request TEXT NOT NULL,
  body TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS keys ON jobs (client, key) WHERE key IS NOT NULL;
CREATE INDEX IF NOT EXISTS states ON jobs (state);
CREATE TABLE IF NOT EXISTS pictures (
  id TEXT PRIMARY KEY,
  type TEXT NOT NULL,
  width INTEGER NOT NULL,
  height INTEGER NOT NULL,
  frames INTEGER NOT NULL,
  bytes INTEGER NOT NULL,
  used REAL NOT NULL
);
"""


@dataclass(frozen=True)
class Picture:
    """What is known of a stored picture."""

    id: str
    type: str
    """Media type."""
    width: int
    height: int
    frames: int
    bytes: int

    @property
    def suffix(self) -> str:
        """End of its file name for people who save it."""
        return {"image/jpeg": ".jpg"}.get(self.type, f".{self.type.partition('/')[2]}")


class Store:
    """The folder of one server. Not for several servers at once: the journal is locked.

    Raises :class:`UsageError` for a folder that cannot be used.
    """

    def __init__(self, folder: Path, *, stored_bytes: int) -> None:
        self.pictures, self.scratch = folder / "pictures", folder / "scratch"
        self._folder, self._stored_bytes = folder, stored_bytes
        self._database = self._opened()

    def _opened(self) -> sqlite3.Connection:
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"'{self._folder}' cannot be used ({error.strerror}); give another --folder."
            ) from error
        database = sqlite3.connect(self._journal, check_same_thread=False, timeout=1)
        database.row_factory = sqlite3.Row
        try:
            database.execute("PRAGMA locking_mode=EXCLUSIVE")
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            database.executescript(_TABLES)
        except sqlite3.OperationalError as error:
            database.close()
            raise UsageError(
                f"'{self._folder}' is in use by another server, or cannot be written to ({error}); give "
                "another --folder."
            ) from error
        except sqlite3.DatabaseError as error:
            database.close()
            raise UsageError(
                f"'{self._journal}' is no journal of a server ({error}); move it away, or give another "
                "--folder."
            ) from error
        return database

    @property
    def _journal(self) -> Path:
        return self._folder / "journal.sqlite"

    def _write_again(self) -> None:
        """Write the journal anew after somebody has deleted its file, which is still open and whole."""
        copy = sqlite3.connect(":memory:", check_same_thread=False)
        copy.row_factory = sqlite3.Row
        self._database.backup(copy)
        self._database.close()  # before the next is open: closing deletes files by their names
        self._database = copy  # stays if the folder cannot be used now, until the next attempt
        self._database = self._opened()
        copy.backup(self._database)
        copy.close()

    def close(self) -> None:
        """Release the journal."""
        self._database.close()

    # ---- jobs

    def add(
        self, job: str, client: str, key: str | None, request: str, body: Mapping[str, Any]
    ) -> tuple[str, int]:
        """Journal a new job. Returns its id and number, or those of the one that has this ``key``."""
        with self._writing() as database:
            database.execute(
                "INSERT INTO jobs (id, client, key, state, created, request, body) VALUES (?,?,?,?,?,?,?) "
                "ON CONFLICT (client, key) WHERE key IS NOT NULL DO NOTHING",
                (job, client, key, "queued", time.time(), request, json.dumps(body)),
            )
            row = database.execute(
                "SELECT id, number FROM jobs WHERE id = ? OR (client = ? AND key = ?)", (job, client, key)
            ).fetchone()
        return row["id"], row["number"]

    def keyed(self, client: str, key: str) -> str | None:
        """The job that a client sent with this Idempotency-Key."""
        row = self._database.execute(
            "SELECT id FROM jobs WHERE client = ? AND key = ?", (client, key)
        ).fetchone()
        return None if row is None else row["id"]

    def update(
        self,
        job: str,
        state: str,
        attempts: int,
        body: Mapping[str, Any],
        drawn: Sequence[Picture] = (),
    ) -> None:
        """Journal what has become of a job and, at once with it, the pictures it drew, which are put in their
        places."""
        with self._writing() as database:
            if drawn:
                self._place(job)
            for picture in drawn:
                self._register(database, picture)
            database.execute(
                "UPDATE jobs SET state = ?, attempts = ?, body = ? WHERE id = ?",
                (state, attempts, json.dumps(body), job),
            )
        if drawn:
            self._make_room()

    def job(self, job: str) -> sqlite3.Row | None:
        """A job's row."""
        return self._database.execute("SELECT * FROM jobs WHERE id = ?", (job,)).fetchone()

    def unfinished(self) -> list[sqlite3.Row]:
        """Jobs that an earlier server accepted and did not finish, oldest first."""
        return self._database.execute(
            "SELECT * FROM jobs WHERE state IN ('queued', 'running') ORDER BY number"
        ).fetchall()

    def history(self, limit: int, before: int | None) -> list[sqlite3.Row]:
        """Finished jobs, newest first."""
        return self._database.execute(
            "SELECT * FROM jobs WHERE state = 'done' AND number < ? ORDER BY number DESC LIMIT ?",
            (2**62 if before is None else before, limit),
        ).fetchall()

    def forget(self, job: str) -> None:
        """Delete a job, and the pictures it drew that no other job mentions."""
        row = self.job(job)
        if row is None:
            return
        drawn = [picture["id"] for picture in json.loads(row["body"]).get("pictures", ())]
        gone = [picture for picture in drawn if not self._wanted(picture, ("queued", "running", "done"), job)]
        for picture in gone:  # first, which makes room for the journal on a full disk
            self.path(picture).unlink(missing_ok=True)
        with self._writing() as database:
            database.execute("DELETE FROM jobs WHERE id = ?", (job,))
            database.executemany("DELETE FROM pictures WHERE id = ?", [(picture,) for picture in gone])

    # ---- pictures

    def path(self, picture: str) -> Path:
        """Where a picture's file is, or would be. Raises :class:`Problem` for what is no id."""
        if not ID.fullmatch(picture):
            raise Problem(
                404, "unknown_picture", "a picture's id is the 64 hexadecimal digits of its SHA-256."
            )
        return self.pictures / picture[:2] / picture

    def find(self, picture: str) -> Picture | None:
        """What is known of a picture; marks it as used, unless the disk is full."""
        row = self._database.execute("SELECT * FROM pictures WHERE id = ?", (picture,)).fetchone()
        if row is None or not self.path(picture).is_file():
            return None
        with contextlib.suppress(Problem), self._writing() as database:
            database.execute("UPDATE pictures SET used = ? WHERE id = ?", (time.time(), picture))
        return Picture(*(row[name] for name in Picture.__dataclass_fields__))

    def keep(self, content: bytes) -> Picture:
        """Keep a :func:`readable` picture. Raises :class:`Problem` when the disk is full."""
        identity = hashlib.sha256(content).hexdigest()
        known = self.find(identity)
        if known is not None:
            return known
        picture = describe(content, identity)
        try:
            write_atomic(self.path(identity), content, overwrite=True)
        except ImpromptError as error:
            raise disk_problem(error) from error
        self.register(picture)
        return picture

    def register(self, picture: Picture) -> None:
        """Note a picture whose file is in its place."""
        with self._writing() as database:
            self._register(database, picture)
        self._make_room()

    def _register(self, database: sqlite3.Connection, picture: Picture) -> None:
        database.execute(
            "INSERT OR REPLACE INTO pictures VALUES (?,?,?,?,?,?,?)",
            (*(getattr(picture, name) for name in Picture.__dataclass_fields__), time.time()),
        )

    def record(self, picture: str) -> Record | None:
        """The request inside a picture, if imprompt wrote one, with pictures named by their ids."""
        with contextlib.suppress(ImpromptError):
            found = read_record(self.path(picture))
            text = found.request.to_json()
            for name in found.request.files:  # reading completes names to paths beside the file
                text = text.replace(json.dumps(name), json.dumps(Path(name).name if _is_id(name) else name))
            return replace(found, request=Request.from_json(text))
        return None

    def bytes(self) -> int:
        """Size of all pictures."""
        return self._database.execute("SELECT coalesce(sum(bytes), 0) FROM pictures").fetchone()[0]

    def _make_room(self) -> None:
        """Delete the pictures unused for longest when there are too many."""
        excess = self.bytes() - self._stored_bytes
        if excess <= 0:
            return
        for row in self._database.execute("SELECT id, bytes FROM pictures ORDER BY used").fetchall():
            if not self._wanted(row["id"], ("queued", "running")):
                with self._writing() as database:
                    database.execute("DELETE FROM pictures WHERE id = ?", (row["id"],))
                self.path(row["id"]).unlink(missing_ok=True)
                excess -= row["bytes"]
            if excess <= 0:
                return

    def _wanted(self, picture: str, states: Sequence[str], but: str = "") -> bool:
        """Whether a job in one of these states mentions a picture, not counting the job ``but``."""
        marks = ",".join("?" * len(states))
        found = self._database.execute(
            f"SELECT 1 FROM jobs WHERE state IN ({marks}) AND id != ? AND (instr(request, ?) OR "
            "instr(body, ?)) LIMIT 1",
            (*states, but, picture, picture),
        ).fetchone()
        return found is not None

    def _place(self, job: str) -> None:
        """Move a job's pictures, which are named by their ids, to where :meth:`path` looks for them."""
        for file in scratch_of(self.scratch, job).glob("*"):
            place = self.path(file.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        self.discard(job)

    def discard(self, job: str) -> None:
        """Delete what a worker wrote for a job and nobody wants."""
        shutil.rmtree(scratch_of(self.scratch, job), ignore_errors=True)

    def sweep(self) -> None:
        """Delete what a server that ended while it wrote has left: half-written files, and unknown ones."""
        for folder in self.scratch.glob(f"{_SCRATCH}*"):
            shutil.rmtree(folder, ignore_errors=True)
        known = {row["id"] for row in self._database.execute("SELECT id FROM pictures")}
        for path in self.pictures.glob("[0-9a-f][0-9a-f]/*"):
            if _is_id(path.name) and path == self.path(path.name) and path.name not in known:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            if not self._journal.exists():
                self._write_again()
            with self._database:
                yield self._database
        except (sqlite3.Error, OSError, ImpromptError) as error:
            raise disk_problem(error) from error


def scratch_of(scratch: Path, job: str) -> Path:
    """The folder in ``scratch`` for the pictures of a job that is being drawn."""
    return scratch / f"{_SCRATCH}{job}"


def _is_id(name: str) -> bool:
    return ID.fullmatch(Path(name).name) is not None


def readable(content: bytes, max_pixels: int, max_frames: int) -> bytes:
    """The picture itself, or the animated WebP of a video, once it is known that it can be decoded.

    Raises :class:`InputError` for what cannot, and for a video of more than ``max_frames``.
    """
    if container_of(content):
        return as_animation(content, max_frames)
    load_image(content, max_pixels=max_pixels)
    return content


def as_animation(video: bytes, max_frames: int = MAX_FRAMES) -> bytes:
    """A video as an animated WebP of at most 1024 pixels a side. Raises :class:`InputError`."""
    frames, fps = _frames(video, max_frames)
    for frame in frames:
        frame.thumbnail((VIDEO_SIDE, VIDEO_SIDE))
    return as_bytes(
        frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=durations(len(frames), fps, 1),
        quality=90, method=0,
    )  # fmt: skip


def _frames(video: bytes, max_frames: int) -> tuple[list[Image.Image], float]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(video)
        file.flush()
        try:
            return read_video(file.name, max_frames=max_frames)
        except InputError as error:
            raise InputError(str(error).replace(f"'{file.name}'", "the video")) from error


def describe(content: bytes, identity: str) -> Picture:
    """What the bytes of a picture or clip say about it."""
    if container_of(content):
        frames, _ = _frames(content, MAX_FRAMES)
        return Picture(identity, VIDEO, *frames[0].size, len(frames), len(content))
    with Image.open(io.BytesIO(content)) as image:
        form = "JPEG" if image.format == "MPO" else image.format or ""  # MPO: a camera's JPEG of two pictures
        kind = Image.MIME.get(form, "application/octet-stream")
        return Picture(identity, kind, image.width, image.height, frame_count(content), len(content))


def thumbnail_of(content: bytes) -> bytes:
    """A small WebP of a picture's first frame."""
    image = _frames(content, MAX_FRAMES)[0][0] if container_of(content) else load_image(content)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return as_bytes(image, "WEBP", quality=80)


def disk_problem(error: Exception) -> Problem:
    """What to answer when the disk is full or the folder is gone."""
    cause: BaseException | None = error
    full = "full" in str(error)
    while cause is not None and not full:
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = cause.__cause__
    if full:
        return Problem(507, "disk_full", "the server's disk is full; nothing was kept.")
    return Problem(503, "storage", "the server cannot write to its folder; nothing was kept.")
