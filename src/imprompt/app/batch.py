"""``imprompt batch``: draw a file of requests, one JSON object a line, and go on where it stopped.

Every finished job is a line of the manifest in the output folder, written once its files are there. A job is
not drawn again while its files, in the format that is asked for, are there and were last drawn by the same
request. What fails is listed and does not stop the rest.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tqdm import tqdm

from imprompt.app.batching import batch_key
from imprompt.errors import ImpromptError, InputError, ModelError, UsageError
from imprompt.io import check_file, check_path, read_json
from imprompt.output import check_target, names, save
from imprompt.output.clips import SUFFIXES
from imprompt.output.stills import FORMATS
from imprompt.places import Identity, check_not_read, identities
from imprompt.schema.request import Request

if TYPE_CHECKING:
    from imprompt.generation.engine import Engine, Result
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_LINE_BYTES = 1 << 20
_RANKS = (("SLURM_PROCID", "SLURM_NTASKS"), ("RANK", "WORLD_SIZE"))  # of srun, of torchrun


@dataclass(frozen=True)
class Job:
    """One line of the file."""

    id: str
    """Stem of its files' names; the line's own ``id``, else its number."""
    digest: str
    """Of the line's fields: equal as long as the same is asked."""
    request: Request | None
    error: str | None = None
    """Why the line is not a request."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``imprompt batch``."""
    add = parser.add_argument
    add("jobs", help="a .jsonl file: a request a line; paths in it are relative to the file")
    add("-o", "--output", required=True, metavar="FOLDER", help="where files and manifest go")
    add("--format", help="png, jpg or webp; clips: webp, gif or mp4; default: png, webp")
    add("--batch", type=int, default=8, metavar="N", help="draw at most N together; default: 8")
    add(
        "--shard", metavar="I/N", help="draw only part I (from 1) of N; auto: as SLURM's srun or torchrun say"
    )
    add(
        "--ray",
        nargs="?",
        const=0,
        type=int,
        metavar="N",
        help="draw with Ray, on N workers of its cluster or of this machine; without N: one a GPU, else one",
    )
    add("--device", metavar="NAME", help="device of requests that name none")
    add("--overwrite", action="store_true", help="replace files that imprompt did not make")
    add("-q", "--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Draw the file's jobs; 1 when some failed. Raises :class:`UsageError` and :class:`InputError`."""
    source, folder = check_path(args.jobs).absolute(), check_path(args.output, "--output").absolute()
    _check(args)
    index, count = read_shard(args.shard)
    jobs = list(read_jobs(source, args.device))
    _check_ids(jobs)
    drawer = Drawer(source.parent, folder, args.format, args.overwrite)
    reads = drawer.reads(jobs)
    part = jobs[index::count]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output '{args.output}': this cannot be a folder ({error.strerror}).") from error
    name = "manifest.jsonl" if count == 1 else f"manifest-{index + 1}-of-{count}.jsonl"
    drawn_by = read_manifests(folder)
    drawing = drawer.missing(jobs)
    left = [drawer.checked(job, reads, drawing) for job in part if not drawer.has(job, drawn_by)]
    batches = list(_batches(left, args.batch))
    with _open_manifest(folder / name) as manifest:
        if len(left) < len(part):
            print(f"imprompt: {len(part) - len(left)} of {len(part)} are drawn already", file=sys.stderr)
        drawn = map(drawer, batches) if args.ray is None else _drawn_by_ray(drawer, batches, args.ray)
        failed = _write(drawn, manifest, len(left), quiet=args.quiet)
    for entry in failed:
        print(f"imprompt: {entry['id']}: {entry['error']}", file=sys.stderr)
    print(f"imprompt: {len(left) - len(failed)} drawn, {len(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> None:
    """Raises :class:`UsageError` for options that would fail every job."""
    if args.batch < 1:
        raise UsageError(f"--batch {args.batch}: 1 or more is expected.")
    if (args.ray or 0) < 0:
        raise UsageError(f"--ray {args.ray}: 1 or more is expected, or no number.")
    endings = [suffix for suffix in dict.fromkeys((*FORMATS, *SUFFIXES)) if suffix]
    if args.format is not None and f".{args.format.removeprefix('.').lower()}" not in endings:
        raise UsageError(f"--format '{args.format}': {', '.join(endings).replace('.', '')} are known.")
    if args.device is not None:
        try:
            Request(prompt="any", device=args.device)
        except UsageError as error:
            raise UsageError(f"--{error}") from error


# ---- reading


def read_shard(text: str | None) -> tuple[int, int]:
    """``I/N`` as an index from 0 and a count. Raises :class:`UsageError`."""
    if text is None:
        return 0, 1
    if text == "auto":
        for rank, size in _RANKS:
            if rank in os.environ and size in os.environ:
                return _read_rank(rank, size)
        raise UsageError("--shard auto: neither SLURM nor torchrun has started this process; say I/N.")
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard '{text}': I/N is expected, such as 1/8, counted from 1.")
    return int(match[1]) - 1, int(match[2])


def _read_rank(rank: str, size: str) -> tuple[int, int]:
    index, count = os.environ[rank], os.environ[size]
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(
            f"--shard auto: {rank}={index} of {size}={count} is no part of a whole; mend them, or say I/N."
        )
    return int(index), int(count)


def read_jobs(source: Path, device: str | None = None) -> Iterator[Job]:
    """The jobs of a file; a line that is not a request has an ``error``. Raises :class:`InputError`."""
    try:
        with check_file(source).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _read_job(f"{number:06}", line, device)
    except OSError as error:
        raise InputError(f"'{source}' cannot be read ({error.strerror}).") from error


def _read_job(default: str, line: bytes, device: str | None) -> Job:
    identity, digest = default, hashlib.sha256(line.strip()).hexdigest()
    try:
        values = read_json(line, "the line", error=UsageError, max_bytes=_LINE_BYTES)
        given = values.pop("id", default)
        if not isinstance(given, str) or not _ID.fullmatch(given):
            raise UsageError(f"id: {given!r}; letters, digits and ._- are expected, for it names files.")
        identity = given
        if device is not None:
            values.setdefault("device", device)
        return Job(identity, digest, Request.from_mapping(values))
    except ImpromptError as error:
        return Job(identity, digest, None, str(error))


def _check_ids(jobs: Sequence[Job]) -> None:
    seen: dict[str, str] = {}
    for job in jobs:
        count = 1 if job.request is None else job.request.count
        for name in {job.id, *(f"{job.id}-{number + 1}" for number in range(count) if count > 1)}:
            if name.lower() in seen:
                other = seen[name.lower()]
                raise UsageError(
                    f"id: '{job.id}' is there twice, and files are named by it."
                    if other.lower() == job.id.lower()
                    else f"id: '{job.id}' and '{other}' would both write '{name}'; name one otherwise."
                )
            seen[name.lower()] = job.id


def read_manifests(folder: Path) -> dict[str, str]:
    """Each file that earlier runs, of all shards, have drawn → digest of the job that drew it last. Half a
    line at an end is ignored."""
    done: list[tuple[float, list[Any], str]] = []
    for path in filter(Path.is_file, sorted(folder.glob("manifest*.jsonl"))):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            entry = _read_entry(line)
            if entry.get("state") == "done" and isinstance(files := entry.get("files"), list):
                stamp = entry.get("time")
                when = stamp if isinstance(stamp, int | float) else 0.0
                done.append((when, files, str(entry["digest"])))
    in_order = sorted(done, key=lambda each: each[0])
    return {str(name): digest for _, files, digest in in_order for name in files}


def _read_entry(line: str | bytes) -> Mapping[str, Any]:
    """A line of a manifest; empty for half a line, or another file's."""
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict) and "digest" in entry:
            return entry
    return {}


def _open_manifest(path: Path) -> BinaryIO:
    """The manifest, to append lines to. Raises :class:`InputError` for what is no manifest of a batch."""
    try:
        manifest = path.open("a+b")
        manifest.seek(0)
        lines = manifest.readlines()
    except OSError as error:
        raise InputError(f"cannot write '{path}' ({error.strerror}).") from error
    whole = [line for line in lines if line.endswith(b"\n")]
    if whole and not any(map(_read_entry, whole)):
        manifest.close()
        raise InputError(f"'{path}' is no manifest of a batch; name another folder (--output), or rename it.")
    if len(whole) < len(lines):  # half a line, where a machine stopped
        manifest.write(b"\n")
    return manifest


# ---- drawing


@dataclass(frozen=True)
class Drawer:
    """Draws batches of jobs into a folder with an engine of its own, which is made when it first draws."""

    home: Path
    """What the jobs' paths are relative to."""
    folder: Path
    form: str | None
    """Format of the files; ``None``: PNG, and WebP for clips."""
    overwrite: bool = False
    """Whether files that imprompt did not make are replaced."""

    def __call__(self, batch: Sequence[Job]) -> list[dict[str, Any]]:
        """Draw jobs together, and save them; each job's line of the manifest."""
        with contextlib.chdir(self.home):
            return [self._finish(job, outcome) for job, outcome in self._draw(batch)]

    def reads(self, jobs: Iterable[Job]) -> frozenset[Identity]:
        """The files that any of the jobs reads, which none of them replaces."""
        with contextlib.chdir(self.home):
            return identities({name for job in jobs if job.request is not None for name in job.request.files})

    def has(self, job: Job, drawn_by: Mapping[str, str]) -> bool:
        """Whether the job's files are there, and no other job drew them since."""
        if job.request is None:
            return False
        places = names(self._target(job), job.request.count)
        return all(drawn_by.get(place.name) == job.digest and place.exists() for place in places)

    def missing(self, jobs: Iterable[Job]) -> dict[Path, str]:
        """The jobs' files that are not there yet → id of the job that draws it."""
        asked = ((job, job.request.count) for job in jobs if job.request is not None)
        places = ((place, job.id) for job, count in asked for place in names(self._target(job), count))
        return {place.resolve(): identity for place, identity in places if not place.exists()}

    def checked(self, job: Job, reads: frozenset[Identity], drawing: Mapping[Path, str]) -> Job:
        """The job, with an ``error`` if its files cannot be written, or it reads one that is :meth:`missing`:
        both are known before it is drawn."""
        if job.request is None:
            return job
        try:
            for name in job.request.files:
                other = drawing.get((self.home / name).resolve(), job.id)
                if other != job.id:
                    raise InputError(
                        f"'{name}' is drawn in this run, by job '{other}', and jobs are drawn in any order; "
                        "run the batch again when it is there."
                    )
            target = check_target(self._target(job), job.request, overwrite=self.overwrite)
            for place in names(target, job.request.count):
                check_not_read(place, reads)
        except ImpromptError as error:
            return replace(job, request=None, error=str(error))
        return job

    def _target(self, job: Job) -> Path:
        assert job.request is not None
        suffix = self.form or ("webp" if job.request.task == "animate" else "png")
        return self.folder / f"{job.id}.{suffix.removeprefix('.')}"

    @cached_property
    def _engine(self) -> "Engine":
        from imprompt.generation.engine import Engine

        return Engine()

    def _draw(self, batch: Sequence[Job]) -> Iterator[tuple[Job, "Result | ImpromptError"]]:
        """Each job with its result or what went wrong; when a batch fails, each of it is drawn alone."""
        if len(batch) > 1:
            with contextlib.suppress(ImpromptError):
                results = self._engine.run_batch([job.request for job in batch if job.request is not None])
                yield from zip(batch, results, strict=True)
                return
        for job in batch:
            yield job, self._alone(job)

    def _alone(self, job: Job) -> "Result | ImpromptError":
        if job.request is None:
            return UsageError(job.error or "")
        try:
            return self._engine.run(job.request)
        except ImpromptError as error:
            return error

    def _finish(self, job: Job, outcome: "Result | ImpromptError") -> dict[str, Any]:
        """Save a result; the job's line of the manifest."""
        entry: dict[str, Any] = {"id": job.id, "digest": job.digest, "time": round(time.time(), 3)}
        try:
            if isinstance(outcome, ImpromptError):
                raise outcome
            paths = save(outcome, self._target(job), overwrite=self.overwrite)
        except ImpromptError as error:
            return entry | {"state": "failed", "error": " ".join(str(error).split())}
        files = [path.relative_to(self.folder).as_posix() for path in paths]
        return entry | {
            "state": "done",
            "files": files,
            "seed": outcome.request.seed,
            "notes": list(outcome.notes),
        }


def _drawn_by_ray(
    drawer: Drawer, batches: Sequence[Sequence[Job]], workers: int
) -> Iterator[list[dict[str, Any]]]:
    try:
        from imprompt.app.batch_ray import drawn
    except ImportError as error:
        raise ModelError(f"--ray needs more packages ({error}): pip install 'imprompt[ray]'") from error
    return drawn(drawer, batches, workers)


def _write(
    drawn: Iterable[list[dict[str, Any]]], manifest: BinaryIO, count: int, *, quiet: bool
) -> list[dict[str, Any]]:
    """Write each batch to the manifest once its files are there; returns the lines of those that failed."""
    failed = []
    with tqdm(total=count, unit="job", disable=quiet or not sys.stderr.isatty()) as bar:
        for entries in drawn:
            try:
                manifest.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
                manifest.flush()
                os.fsync(manifest.fileno())
            except OSError as error:
                raise InputError(f"cannot write '{manifest.name}' ({error.strerror}).") from error
            failed += [entry for entry in entries if "error" in entry]
            bar.update(len(entries))
    return failed


def _batches(jobs: Iterable[Job], most: int) -> Iterator[list[Job]]:
    """Jobs that can be drawn together, at most ``most`` at once; lines that are not requests come alone."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        key = None if job.request is None else batch_key(job.request)
        groups.setdefault(f"alone {job.id}" if key is None else key, []).append(job)
    for group in groups.values():
        for start in range(0, len(group), most):
            yield group[start : start + most]
