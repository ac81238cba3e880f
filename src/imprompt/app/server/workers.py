"""Starts worker processes, carries messages to and from them, and starts another where one has died.

The server's own process never imports torch: it starts at once, stays small, and has few objects for the
garbage collector to look at while clients wait.
"""

import asyncio
import contextlib
import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from imprompt.app.server import messages as say

log = logging.getLogger("imprompt.server")

_LONGEST_PAUSE = 30.0  # between two attempts to start a worker that dies at once
_NICENESS = 5  # of a worker beside the server, which answers in time while the processors draw


class Worker:
    """The server's side of one worker process. All methods belong to the event loop's thread."""

    def __init__(
        self,
        setup: say.Setup,
        on_message: Callable[["Worker", object], None],
        on_death: Callable[["Worker"], None],
    ) -> None:
        self.setup = setup
        self.ready = False
        """Whether it takes jobs."""
        self.problem: str | None = None
        """Why it could not load its base when it last tried; ``None``: it could, or is about to try."""
        self.jobs: tuple[str, ...] = ()
        """What it is drawing."""
        self.memory = 0
        self.cache_hits = 0
        self.cache_misses = 0
        self._on_message, self._on_death = on_message, on_death
        self._loop = asyncio.get_running_loop()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._stopping = False
        self._pause = 0.5

    @property
    def free(self) -> bool:
        """Whether it waits for jobs."""
        return self.ready and not self.jobs and not self._stopping

    @property
    def pid(self) -> int | None:
        """Of its process."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process; :attr:`ready` follows when it has tried to load its base."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.setup), daemon=True)
        process.start()
        theirs.close()
        self._process, self._pipe = process, ours
        threading.Thread(target=self._listen, args=(ours,), daemon=True).start()

    def draw(self, tasks: tuple[say.Task, ...]) -> None:
        """Give it jobs; it must be :attr:`free`."""
        self.jobs = tuple(task.id for task in tasks)
        self._send(say.Draw(tasks))

    def cancel(self, job: str) -> None:
        """Tell it that a job is not wanted any more."""
        self._send(say.Cancel(job))

    async def stop(self, timeout: float) -> None:
        """End the process, by force if it takes longer than ``timeout`` seconds."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        self._send(say.Stop())
        await asyncio.to_thread(process.join, timeout)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join, 5)

    def _send(self, message: object) -> None:
        assert self._pipe is not None
        with contextlib.suppress(OSError):  # it has died; the listening thread tells
            self._pipe.send(message)

    def _listen(self, pipe: Connection) -> None:
        """Runs on a thread: pass messages on until the pipe ends."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = pipe.recv()
                self._loop.call_soon_threadsafe(self._received, message)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._died)

    def _received(self, message: object) -> None:
        if isinstance(message, say.Ready):
            self.ready, self.problem, self._pause = True, message.problem, 0.5
        elif isinstance(message, say.Drawn) and json.loads(message.request)["base"] == self.setup.base:
            self.problem = None  # what was missing is there by now
        elif isinstance(message, say.Free):
            self.jobs = ()
            self.memory = message.memory
            self.cache_hits, self.cache_misses = message.cache_hits, message.cache_misses
        self._on_message(self, message)

    def _died(self) -> None:
        if self._process is not None:
            self._process.join(5)
        code = self._process.exitcode if self._process else None
        if not self.ready:
            self.problem = f"the worker died while it loaded base '{self.setup.base}' (exit code {code})."
        self.ready = False
        if self._stopping:
            return
        log.error("worker %s died (exit code %s); another starts", self.setup.device, code)
        self._on_death(self)
        self.jobs = ()
        self._loop.call_later(self._pause, self._restart)
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    def _restart(self) -> None:
        if not self._stopping:
            self.start()


def _work(pipe: Connection, setup: say.Setup) -> None:
    """What the new process runs."""
    if hasattr(os, "nice"):  # not on Windows
        os.nice(_NICENESS)
    from imprompt.app.server import worker  # here, and not above: see the module's first lines

    worker.main(pipe, setup)
