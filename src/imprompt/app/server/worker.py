"""The process that draws: owns one device's Engine, takes jobs from a pipe, and writes pictures to the store.

It looks into the pipe after every denoising step, so that a cancelled job ends within a step, and ends when
the server is gone. Only the server's own messages come through the pipe; what clients sent is a validated
request and pictures that were decoded once before.
"""

import contextlib
import hashlib
import io
import logging
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt.app.server import messages as say
from imprompt.app.server.logs import log_to_stderr
from imprompt.app.server.problems import Problem, problem_of
from imprompt.app.server.store import ID, as_animation, describe, disk_problem, scratch_of
from imprompt.encoders.images import as_bytes, container_of
from imprompt.errors import Cancelled, ImpromptError, InputError
from imprompt.generation.engine import Engine, Result
from imprompt.generation.steps import Step
from imprompt.hub import offline
from imprompt.output import save
from imprompt.schema.request import Request

_PREVIEW_SECONDS = 0.2  # between two previews of one job
_PREVIEW_SIDE = 256
_FOLDERS = re.compile(
    r"(?<=')(~|[A-Za-z]:)?[/\\][^'\n]*[/\\](?=[^'/\\]*')"  # in quotes
    r"|(?<![^\s\"(])(~|[A-Za-z]:)?[/\\]([^\s'\"/\\]+[/\\])+"
)
"""This machine's part of a path, which is no client's affair."""

log = logging.getLogger("imprompt.worker")


def main(pipe: Connection, setup: say.Setup) -> None:
    """Draw what comes through ``pipe`` until it is closed or says stop."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server decides when its workers end
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr("imprompt.worker", "py.warnings")
    logging.captureWarnings(True)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server is gone
        Worker(pipe, setup).run()


class Worker:
    """One Engine and its pipe."""

    def __init__(self, pipe: Connection, setup: say.Setup) -> None:
        self._pipe, self._setup = pipe, setup
        self._engine = Engine()
        self._waiting: list[say.Draw] = []
        self._cancelled: set[str] = set()
        self._stopping = False

    def run(self) -> None:
        """Load the base, then draw until told to stop."""
        self._pipe.send(say.Ready(self._warm_up()))
        while not self._stopping:
            while not self._waiting and not self._stopping:
                self._hear()
            if self._waiting:
                self._draw_batch(self._waiting.pop(0).tasks)
                self._cancelled.clear()
                features = self._engine.features
                self._pipe.send(say.Free(_memory(), features.hits, features.misses))

    def _hear(self) -> None:
        """Wait for the server's next message; without a server, stop."""
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            message = say.Stop()
        if isinstance(message, say.Draw):
            self._waiting.append(message)
        elif isinstance(message, say.Cancel):
            self._cancelled.add(message.id)
        elif isinstance(message, say.Stop):
            self._stopping = True

    def _warm_up(self) -> str | None:
        """Load the base by drawing one small step. Returns what is wrong with it, if anything is; it is tried
        again when a job needs it."""
        request = {"prompt": "a cat", "base": self._setup.base, "steps": 1, "seed": 0}
        try:
            self._engine.run(self._prepared(request))
        except ImpromptError as error:
            log.error("worker %s: cannot load base '%s': %s", self._setup.device, self._setup.base, error)
            return self._told(problem_of(error).message)
        except Exception as error:  # a fault of ours; other bases may be fine
            log.exception("worker %s: cannot load base '%s'", self._setup.device, self._setup.base)
            return f"base '{self._setup.base}' failed unexpectedly ({type(error).__name__})."
        return None

    # ---- one batch

    def _draw_batch(self, tasks: Sequence[say.Task]) -> None:
        """Draw jobs together, those that may download apart from the others."""
        wanted = [task for task in tasks if task.id not in self._cancelled]
        for task in tasks:
            if task not in wanted:
                self._pipe.send(say.Cancelled(task.id))
        asking = [task for task in wanted if self._may_download(task)]
        self._draw_together(asking)
        self._draw_together([task for task in wanted if task not in asking])

    def _draw_together(self, wanted: Sequence[say.Task]) -> None:
        """Draw jobs of which all may download or none; when one of them cannot be drawn, each alone."""
        if len(wanted) > 1:
            try:
                results = self._draw(wanted)
            except Cancelled:
                for task in wanted:
                    self._pipe.send(say.Cancelled(task.id))
                return
            except Exception as error:  # whose fault it is shows when each is drawn alone
                log.info("worker: a batch of %d is drawn one by one (%s)", len(wanted), type(error).__name__)
            else:
                for task, result in zip(wanted, results, strict=True):
                    with self._telling_faults(task):
                        self._finish(task, result, len(wanted))
                return
        for task in wanted:
            with self._telling_faults(task):
                self._finish(task, self._draw([task])[0], 1)

    @contextlib.contextmanager
    def _telling_faults(self, task: say.Task) -> Iterator[None]:
        """Tell the server what goes wrong inside: it is the end of this job alone."""
        try:
            yield
        except Cancelled:
            self._pipe.send(say.Cancelled(task.id))
        except Problem as problem:
            self._fail(task, problem)
        except ImpromptError as error:
            self._fail(task, problem_of(error))
        except (BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:  # a fault of ours: the next job is fine
            log.exception("a job failed unexpectedly", extra={"job": task.id})
            text = f"the drawing failed unexpectedly ({type(error).__name__}); the server's log says more."
            self._fail(task, Problem(500, "internal", text))

    def _draw(self, tasks: Sequence[say.Task]) -> list[Result]:
        requests = [self._prepared(task.request) for task in tasks]
        pictures: dict[str, Image.Image] = {}
        for request in requests:
            for name in request.files:
                if name not in pictures:
                    pictures[name] = self._open(name)
        progress = _Progress(tasks)

        def on_step(step: Step) -> None:
            while not self._stopping and self._pipe.poll():
                self._hear()
            if self._stopping or all(task.id in self._cancelled for task in tasks):
                raise Cancelled("the job was cancelled.")
            for message in progress.messages(step, self._cancelled):
                self._pipe.send(message)

        with contextlib.nullcontext() if self._may_download(tasks[0]) else offline():
            if len(requests) == 1:
                return [self._engine.run(requests[0], pictures=pictures, on_step=on_step)]
            return self._engine.run_batch(requests, pictures=pictures, on_step=on_step)

    def _may_download(self, task: say.Task) -> bool:
        """Whether the hub may be asked: with ``--download``, and for what the server was started with."""
        own = {name for kind in ("bases", "adapters") for name in self._setup.names.get(kind, ())}
        request = task.request
        named = {request["base"], *(one["adapter"] for one in [request, *request["images"]])}
        return self._setup.download or bool(own & named)

    def _open(self, name: str) -> Image.Image:
        path = self._setup.pictures / name[:2] / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"pictures: '{name}' is not on the server any more; upload it again.") from error
        return Image.open(io.BytesIO(as_animation(content) if container_of(content) else content))

    def _prepared(self, values: Mapping[str, Any]) -> Request:
        """The request as this machine draws it: offered names looked up, on this worker's device."""
        own = {"device": self._setup.device, "dtype": self._setup.dtype, "offload": self._setup.offload}
        return Request.from_mapping(renamed({**values, **own}, self._setup.names))

    def _public(self, request: Request) -> Request:
        """The complete request as clients may see it: without this machine's paths and device."""
        back = {kind: {to: name for name, to in names.items()} for kind, names in self._setup.names.items()}
        values = request.model_dump(mode="json")
        own = {name: Request.model_fields[name].default for name in ("device", "dtype", "offload")}
        return Request.from_mapping(renamed({**values, **own}, back))

    # ---- its end

    def _finish(self, task: say.Task, result: Result, batch: int) -> None:
        if task.id in self._cancelled:
            raise Cancelled("the job was cancelled.")
        shown = replace(result, request=self._public(result.request))
        pictures = self._store(shown, task)
        # How this machine keeps its models is no client's affair.
        notes = tuple(_short(note) for note in result.notes if not note.startswith("offload "))
        timings = dict(result.timings)
        record = shown.request.to_json()
        self._pipe.send(say.Drawn(task.id, tuple(pictures), record, notes, timings, batch))

    def _fail(self, task: say.Task, problem: Problem) -> None:
        text = self._told(problem.message)
        self._pipe.send(say.Failed(task.id, problem.status, problem.code, text, problem.field))

    def _told(self, text: str) -> str:
        """A message as clients may read it: with the names that they know, and no folders of this machine."""
        for offered in self._setup.names.values():
            for name, place in offered.items():
                text = text.replace(f"'{place}'", f"'{name}'")
        return _short(_FOLDERS.sub("", text))

    def _store(self, result: Result, task: say.Task) -> list[dict[str, Any]]:
        """Write a result's pictures or clips for the server to take, under the names of their contents.

        Raises :class:`Problem` when the disk is full or the folder is gone.
        """
        folder = scratch_of(self._setup.scratch, task.id)
        shutil.rmtree(folder, ignore_errors=True)  # of a worker that died with this job
        try:
            folder.mkdir(parents=True)
            # Names are those that the server offers, whatever files here are called like them.
            paths = save(result, folder / f"picture{task.suffix}", keep_names=True)
            return [self._named(path) for path in paths]
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            of_disk = error.__cause__ if isinstance(error, InputError) else error
            if not isinstance(of_disk, OSError):
                raise  # such as a format that cannot hold the picture
            raise disk_problem(error) from error

    def _named(self, path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        picture = describe(content, hashlib.sha256(content).hexdigest())
        # Made here, where a full disk ends the job.
        (self._setup.pictures / picture.id[:2]).mkdir(parents=True, exist_ok=True)
        path.replace(path.with_name(picture.id))
        return asdict(picture)


class _Progress:
    """What to tell of the steps of a batch: counted over all pictures of each job, previews only so often."""

    def __init__(self, tasks: Sequence[say.Task]) -> None:
        self._tasks, self._last_preview = tasks, 0.0

    def messages(self, step: Step, cancelled: set[str]) -> Iterator[say.Stepped]:
        """A message for each job that the step drew."""
        now, alone = time.monotonic(), len(self._tasks) == 1
        showing = now - self._last_preview >= _PREVIEW_SECONDS
        if showing:
            self._last_preview = now
        for place, task in enumerate(self._tasks):
            which = 0 if alone else place - step.picture  # memory may suffice for a part of the batch only
            if task.id in cancelled or not 0 <= which < step.together:
                continue
            done, total = step.index, step.total
            if alone:
                done, total = step.picture * total + done * step.together, step.pictures * total
            preview = _small(step.preview(which)) if showing and task.previews else None
            yield say.Stepped(task.id, min(done, total), total, preview)


def renamed(values: Mapping[str, Any], names: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """A request's fields with the names of bases, adapters and LoRAs looked up in ``names``."""

    def looked_up(record: Mapping[str, Any], field: str, kind: str) -> dict[str, Any]:
        name = record.get(field)
        return {**record, field: names.get(kind, {}).get(name, name)} if name else dict(record)

    changed = looked_up(looked_up(values, "base", "bases"), "adapter", "adapters")
    changed["images"] = [looked_up(each, "adapter", "adapters") for each in values.get("images", ())]
    changed["loras"] = [looked_up(each, "path", "loras") for each in values.get("loras", ())]
    return changed


def _short(text: str) -> str:
    """A message for people, with the first digits of pictures' ids."""
    return ID.sub(lambda found: f"{found[0][:12]}…", text)


def _small(image: Image.Image) -> bytes:
    image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    return as_bytes(image, "WEBP", quality=60)


def _memory() -> int:
    """Resident bytes of this process, 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()
