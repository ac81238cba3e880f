"""Which job is drawn when, by which worker, together with which others; and telling those who listen.

A job is accepted when its row is in the journal. Clients take turns; within a client it is first come, first
served. Jobs that differ only in texts, image prompts and seed are drawn as one batch. A job whose worker died
is tried once more, alone. Everything here runs on the event loop; the journal on a thread of its own.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

from imprompt.app.server import messages as say
from imprompt.app.server.jobs import Job, State, work_of
from imprompt.app.server.metrics import Metrics
from imprompt.app.server.problems import Problem
from imprompt.app.server.settings import Settings
from imprompt.app.server.store import Picture, Store
from imprompt.app.server.workers import Worker
from imprompt.schema.request import Request

log = logging.getLogger("imprompt.server")

ATTEMPTS = 2
"""How often a job may take its worker down."""
_REMEMBERED = 256  # finished jobs kept in memory; older ones are read from the journal
_WATCH_SECONDS = 0.02

_Args = TypeVarTuple("_Args")
_T = TypeVar("_T")


class Queue:
    """All jobs of the server and the workers that draw them."""

    def __init__(self, settings: Settings, store: Store, metrics: Metrics) -> None:
        self.settings, self.store, self.metrics = settings, store, metrics
        self.draining = False
        """Whether no jobs are accepted any more."""
        self.closing = False
        """Whether listeners are sent away."""
        self._decoding = asyncio.Semaphore(2)
        self.workers: list[Worker] = []
        self._waiting: list[Job] = []
        self._active: dict[str, Job] = {}
        self._recent: OrderedDict[str, Job] = OrderedDict()
        self._served: dict[str, float] = {}
        """Client → when a job of theirs was last started."""
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._writes: set[asyncio.Future[None]] = set()
        self._accepting: Counter[str] = Counter()
        """Client → jobs of theirs that are being journaled; they count as waiting."""
        self._rate: float | None = None
        """Seconds for a million pixel-steps, as lately measured."""

    # ---- life

    async def start(self) -> None:
        """Take up what an earlier server left, and start the workers."""
        await self.blocking(self.store.sweep)
        for row in await self.blocking(self.store.unfinished):
            job = Job.restored(row)
            self._active[job.id] = job
            if job.refused is not None:
                self._end(job, "failed", error=job.refused)
            elif job.state == "running" and job.attempts >= ATTEMPTS:
                self._end(job, "failed", error=_died_error())
            else:
                job.state = "queued"
                self._waiting.append(job)
        for device in self.settings.devices:
            setup = say.Setup(
                self.store.pictures, self.store.scratch, device, self.settings.dtype, self.settings.offload,
                self.settings.base, self.settings.download, self.settings.names,
            )  # fmt: skip
            worker = Worker(setup, self._heard, self._worker_died)
            worker.start()
            self.workers.append(worker)

    async def watch_loop(self) -> None:
        """Measure how much later than asked the event loop wakes up, until cancelled."""
        while True:
            asked = time.perf_counter() + _WATCH_SECONDS
            await asyncio.sleep(_WATCH_SECONDS)
            self.metrics.late.observe(max(0.0, time.perf_counter() - asked))

    async def drain(self, seconds: float) -> None:
        """Accept and start nothing more; wait for what is being drawn."""
        self.draining = True
        self._moved_up()
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(worker.jobs for worker in self.workers):
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """Accept and start nothing more, and send listeners away."""
        self.draining = self.closing = True
        for job in self._active.values():
            job.changed()

    async def stop(self) -> None:
        """End the workers. What is not finished stays in the journal for the next server."""
        self.close()
        for job in [job for job in self._active.values() if job.state == "running"]:
            job.attempts -= 1  # that we end it is no fault of its own
            job.state = "queued"
            self._journal(job, "queued")
        await asyncio.gather(*(worker.stop(5) for worker in self.workers))
        await asyncio.gather(*self._writes, return_exceptions=True)
        await self.blocking(self.store.close)
        self._disk.shutdown()

    def blocking(self, call: Callable[[*_Args], _T], *args: *_Args) -> asyncio.Future[_T]:
        """Run one of the store's methods on its thread, after all that were asked for before."""
        return asyncio.get_running_loop().run_in_executor(self._disk, call, *args)

    async def decode(self, call: Callable[[*_Args], _T], *args: *_Args) -> _T:
        """Run what decodes clients' pictures, which takes memory, on a thread: two at a time."""
        async with self._decoding:
            return await asyncio.to_thread(call, *args)

    @property
    def ready(self) -> bool:
        """Whether a worker has loaded its base."""
        loaded = (worker.ready and worker.problem is None for worker in self.workers)
        return any(loaded) and not self.draining

    @property
    def problem(self) -> str | None:
        """Why no worker could load its base; ``None`` while one may still."""
        found = [worker.problem for worker in self.workers]
        return found[0] if found and all(found) else None

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    # ---- jobs

    def check_room(self, client: str) -> None:
        """Raises :class:`Problem` when the queue is full, for all or for this client, or the server ends."""
        if self.draining:
            raise Problem(503, "draining", "the server is shutting down.", headers={"Retry-After": "10"})
        limits = self.settings.limits
        own = self._accepting[client] + sum(job.client == client for job in self._waiting)
        if len(self._waiting) + self._accepting.total() >= limits.queue:
            raise self._full("queue_full", f"{limits.queue} jobs are waiting already.")
        if own >= limits.client_share:
            raise self._full("client_share", f"{limits.client_share} jobs of yours are waiting already.")

    def _full(self, code: str, message: str) -> Problem:
        self.metrics.rejected.inc()
        seconds = max(1, min(60, round(self.estimate() or 2)))
        return Problem(429, code, message, headers={"Retry-After": str(seconds)})

    async def submit(
        self, request: Request, client: str, *, suffix: str = ".png", previews: bool = True,
        key: str | None = None,
    ) -> tuple[Job, bool]:  # fmt: skip
        """Accept a job. Returns it and True, or the one accepted earlier under this ``key`` and False.

        Raises :class:`Problem` when there is no room, ``key`` was used for another request, or the journal
        cannot be written.
        """
        job = Job(client, request, suffix, previews)
        if key is not None and (known := await self.blocking(self.store.keyed, client, key)) is not None:
            return await self._same(known, job), False
        self.check_room(client)
        self._accepting[client] += 1
        try:
            identity, job.number = await self.blocking(
                self.store.add, job.id, client, key, request.to_json(), job.body()
            )
        finally:
            self._accepting[client] -= 1
            self._accepting += Counter()  # without clients that have none
        if identity != job.id:
            return await self._same(identity, job), False
        self._active[job.id] = job
        self._waiting.append(job)
        self._assign()
        self._moved_up()
        return job, True

    async def _same(self, identity: str, job: Job) -> Job:
        """The job accepted under a key used again, if it is the same. Raises :class:`Problem`."""
        known = await self.find(identity)
        if known.request != job.request or known.suffix != job.suffix:
            raise Problem(409, "key_reused", "this Idempotency-Key was sent with another request.")
        return known

    async def find(self, identity: str) -> Job:
        """A job by its id. Raises :class:`Problem` for an unknown one."""
        found = self._active.get(identity) or self._recent.get(identity)
        if found is None:
            row = await self.blocking(self.store.job, identity)
            if row is None:
                raise Problem(404, "unknown_job", "there is no such job.")
            found = Job.restored(row)
        return found

    async def cancel(self, job: Job) -> None:
        """Stop a job within a step; of a finished one nothing is changed. Raises :class:`Problem` for it."""
        if job.state in ("done", "failed"):
            raise Problem(409, "finished", f"the job is {job.state} already.")
        if job.over:
            return
        for worker in self.workers:
            if job.id in worker.jobs:
                worker.cancel(job.id)
        self._end(job, "cancelled")

    async def forget(self, job: Job) -> None:
        """Delete a finished job and its pictures."""
        if not job.over:
            raise Problem(409, "not_finished", "cancel the job first.")
        self._recent.pop(job.id, None)
        await self.blocking(self.store.forget, job.id)

    def unfinished(self, client: str) -> list[Job]:
        """A client's jobs that are not over, oldest first."""
        return sorted(
            (job for job in self._active.values() if job.client == client), key=lambda job: job.number
        )

    def position(self, job: Job) -> int:
        """How many jobs are drawn before this one."""
        return self._waiting.index(job) if job in self._waiting else 0

    def estimate(self, job: Job | None = None) -> float | None:
        """Seconds until a job is done, or until the queue is empty; ``None`` before anything was drawn."""
        if self._rate is None:
            return None
        if job is not None and job.state == "running":
            return round(self._rate * job.left, 2)
        running = [one for one in self._active.values() if one.state == "running"]
        waiting = self._waiting if job is None else self._waiting[: self.position(job) + 1]
        left = sum(one.left for one in (*running, *waiting))
        return round(self._rate * left / max(1, len(self.workers)), 2)

    async def changes(self, job: Job) -> AsyncIterator[Job]:
        """The job after every change, and now and then between, until it is over or the server ends."""
        async for change in job.changes():
            yield change
            if self.closing or (self.draining and job.state == "queued"):
                return

    async def finish(self, job: Job) -> Job:
        """Wait until a job is over."""
        async for _ in self.changes(job):
            pass
        return job

    # ---- drawing

    def _assign(self) -> None:
        """Give every free worker something to draw."""
        if self.draining:
            return
        for worker in self.workers:
            if worker.free and self._waiting:
                batch = self._next_batch()
                for job in batch:
                    self._waiting.remove(job)
                    job.state, job.started = "running", time.time()
                    job.attempts += 1
                    job.step = job.steps = 0
                    self.metrics.waited.observe(job.started - job.created)
                    self._journal(job, "running")
                    job.changed()
                self._served[batch[0].client] = time.monotonic()
                self.metrics.batch_size.observe(len(batch))
                worker.draw(tuple(job.task() for job in batch))
        for client in self._served.keys() - {job.client for job in self._active.values()}:
            del self._served[client]

    def _next_batch(self) -> list[Job]:
        """The next job in turn, and the others that can be drawn with it."""
        heads: dict[str, Job] = {}
        for job in self._waiting:
            heads.setdefault(job.client, job)
        first = min(heads.values(), key=lambda job: (self._served.get(job.client, 0.0), job.number))
        if first.group is None or first.attempts:
            return [first]
        alike = [job for job in self._waiting if job.group == first.group and not job.attempts]
        alike.remove(first)
        return [first, *alike[: self.settings.limits.batch - 1]]

    def _heard(self, worker: Worker, message: object) -> None:
        """A worker said something."""
        if isinstance(message, say.Ready | say.Free):
            self._assign()
        elif not isinstance(message, say.Answer):
            log.error("a worker said %r", message)
        elif (job := self._running(message.id)) is not None:
            match message:
                case say.Stepped():
                    self._stepped(job, message)
                case say.Drawn():
                    self._drawn(job, message)
                case say.Failed():
                    error = Problem(message.status, message.code, message.message, message.field)
                    self._end(job, "failed", error=error)
                case say.Cancelled():
                    self._end(job, "cancelled")
        elif isinstance(message, say.Drawn):
            self._discard(message.id)

    def _discard(self, identity: str) -> None:
        """Delete what was drawn for a job that had been cancelled, or by a worker that died."""
        self._note(self.blocking(self.store.discard, identity))

    def _running(self, identity: str) -> Job | None:
        job = self._active.get(identity)
        return job if job is not None and job.state == "running" else None

    def _stepped(self, job: Job, message: say.Stepped) -> None:
        self.metrics.steps.inc(max(0, message.step - job.step))
        job.step, job.steps = message.step, message.steps
        job.preview = message.preview or job.preview
        job.changed()

    def _drawn(self, job: Job, message: say.Drawn) -> None:
        job.pictures, job.record = list(message.pictures), json.loads(message.request)
        job.notes, job.timings, job.batch = list(message.notes), message.timings, message.batch
        work = work_of(job.record)
        if work and "draw" in message.timings:
            rate = message.timings["draw"] / work / message.batch
            self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
        self._end(job, "done")

    def _worker_died(self, worker: Worker) -> None:
        """Its jobs are tried once more, each alone."""
        self.metrics.deaths.inc()
        for identity in reversed(worker.jobs):
            job = self._running(identity)
            if job is None or job.attempts >= ATTEMPTS:
                self._discard(identity)
                if job is not None:
                    self._end(job, "failed", error=_died_error())
                continue
            job.state = "queued"
            self._waiting.insert(0, job)
            self._journal(job, "queued")
            job.changed()
        self._assign()
        self._moved_up()

    def _end(self, job: Job, state: State, *, error: Problem | None = None) -> None:
        """Finish a job; listeners are told when the journal knows."""
        job.state, job.finished, job.preview = state, time.time(), None
        if error is not None:
            job.failed(error)
        with contextlib.suppress(ValueError):
            self._waiting.remove(job)
        self.metrics.finished.labels(state).inc()
        self.metrics.latency.observe(job.finished - job.created)
        self._active.pop(job.id, None)
        self._recent[job.id] = job
        while len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)
        log.info(
            "job", extra={
                "job": job.id, "state": state, "base": job.request.base, "task": job.request.task,
                "seconds": round(job.finished - job.created, 3), "batch": job.batch,
                **({"error": job.error["code"]} if job.error else {}),
                **({"prompt": job.request.prompt} if self.settings.log_prompts else {}),
            },
        )  # fmt: skip
        self._journal(job, state, then=job.changed)
        self._moved_up()

    def _journal(self, job: Job, state: State, then: Callable[[], None] | None = None) -> None:
        """Write a job's state; a full disk loses the row, not the job in memory."""
        drawn = [Picture(**picture) for picture in job.pictures]
        writing = self.blocking(self.store.update, job.id, state, job.attempts, job.body(), drawn)

        async def written() -> None:
            try:
                await writing
            except Problem as problem:
                log.error("cannot journal job %s: %s", job.id, problem.message)
            if then is not None:
                then()

        self._note(asyncio.ensure_future(written()))

    def _note(self, writing: asyncio.Future[None]) -> None:
        """The server ends after what is being written."""
        self._writes.add(writing)
        writing.add_done_callback(self._writes.discard)

    def _moved_up(self) -> None:
        """Tell the waiting jobs' listeners that there is another position and estimate."""
        for job in self._waiting:
            job.changed()


def _died_error() -> Problem:
    return Problem(
        500, "worker_died", f"the process that drew it died {ATTEMPTS} times, out of memory perhaps."
    )
