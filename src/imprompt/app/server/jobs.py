"""A job: one accepted request, and everything that becomes of it."""

import asyncio
import json
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from imprompt import catalog
from imprompt.app.batching import batch_key
from imprompt.app.server import messages as say
from imprompt.app.server.problems import Problem, problem_of
from imprompt.errors import ImpromptError
from imprompt.schema.request import Request

State = Literal["queued", "running", "done", "failed", "cancelled"]
FINISHED = ("done", "failed", "cancelled")
_JOURNALED = ("suffix", "previews", "started", "finished", "pictures", "record", "notes", "timings", "batch",
              "error", "status")  # fmt: skip

_ANY = Request(prompt="any")
"""Stands for a request that cannot be read."""


@dataclass(eq=False)
class Job:
    """One accepted job. Jobs are compared by identity."""

    client: str
    request: Request
    suffix: str = ".png"
    previews: bool = True
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    state: State = "queued"
    attempts: int = 0
    number: int = 0
    """Order of acceptance."""
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    step: int = 0
    steps: int = 0
    preview: bytes | None = None
    pictures: list[dict[str, Any]] = field(default_factory=list)
    record: dict[str, Any] | None = None
    """The complete request, when done."""
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    batch: int = 0
    """How many jobs were drawn together."""
    error: dict[str, Any] | None = None
    status: int = 500
    """HTTP status that goes with :attr:`error`."""
    refused: Problem | None = None
    """Why the request that an earlier server accepted is none for this one."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in FINISHED

    @cached_property
    def group(self) -> str | None:
        """Equal for jobs that can be drawn as one batch; ``None`` for one that is drawn alone."""
        return batch_key(self.request)

    @cached_property
    def work(self) -> float:
        """Millions of pixel-steps."""
        return work_of(self.request.model_dump(mode="json"))

    @property
    def left(self) -> float:
        """Millions of pixel-steps that are still to be drawn."""
        return self.work * (1 - self.step / max(1, self.steps))

    def changed(self) -> None:
        """Wake up everybody who listens to :meth:`changes`."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changes(self, keep_alive: float = 15.0) -> AsyncIterator["Job"]:
        """The job now, after every change, and every ``keep_alive`` seconds, until it is over."""
        while True:
            changed = self._changed
            yield self
            if self.over:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), keep_alive)

    def failed(self, error: Problem) -> None:
        """Note why it cannot be drawn."""
        self.error, self.status = error.to_dict(), error.status

    def task(self) -> say.Task:
        """What its worker is told."""
        return say.Task(self.id, self.request.model_dump(mode="json"), self.suffix, self.previews)

    def body(self) -> dict[str, Any]:
        """What the journal keeps beside the request."""
        return {name: getattr(self, name) for name in _JOURNALED}

    @classmethod
    def restored(cls, row: sqlite3.Row) -> "Job":
        """A job from its row in the journal. One that another version accepted and this one refuses keeps its
        fields in :attr:`record`, with :attr:`refused`."""
        columns = {name: row[name] for name in ("id", "client", "state", "attempts", "number", "created")}
        values = columns | json.loads(row["body"])
        try:
            return cls(request=Request.from_json(row["request"]), **values)
        except ImpromptError as error:
            values["record"] = values["record"] or json.loads(row["request"])
            return cls(request=_ANY, refused=problem_of(error), **values)


def work_of(request: Mapping[str, Any]) -> float:
    """Millions of pixel-steps of a request's fields; what they leave open is guessed."""
    row = catalog.bases().get(request["base"])
    side = row.size if row else 512
    width, height = request.get("size") or (side, side)
    frames = request.get("frames") or (16 if request["task"] == "animate" else 1)
    return width * height * (request.get("steps") or 30) * request["count"] * frames / 1e6
