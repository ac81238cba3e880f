"""For the protocols whose answer is the picture itself: draw, as long as the client waits."""

import asyncio
import base64
from typing import Any

from fastapi import Request as HTTPRequest

from imprompt.app.server.problems import Problem
from imprompt.app.server.queue import Job, Queue
from imprompt.schema.request import Request


async def drawn(
    queue: Queue, http: HTTPRequest, request: Request, suffix: str = ".png", *, previews: bool = False
) -> Job:
    """The finished job. A client that goes away cancels it. Raises :class:`Problem` when it fails."""
    job, _ = await queue.submit(request, http.state.client, suffix=suffix, previews=previews)
    await until_over(queue, http, job)
    return finished(job)


async def until_over(queue: Queue, http: HTTPRequest, job: Job) -> None:
    """Wait until a job is over, or cancel it when the client goes away."""
    waits = [asyncio.ensure_future(queue.finish(job)), asyncio.ensure_future(_gone(http))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        if not job.over and not queue.draining:
            await queue.cancel(job)


def finished(job: Job) -> Job:
    """A job that is done. Raises :class:`Problem` for one that is not."""
    if job.state == "done":
        return job
    if job.state == "failed" and job.error is not None:
        raise Problem(job.status, job.error["code"], job.error["message"], job.error["field"])
    if job.state == "cancelled":
        raise Problem(409, "cancelled", "the job was cancelled.")
    raise Problem(503, "draining", "the server is shutting down.", headers={"Retry-After": "10"})


async def _gone(http: HTTPRequest) -> None:
    while True:
        if await http.is_disconnected():
            return
        await asyncio.sleep(0.2)


async def contents(queue: Queue, pictures: list[dict[str, Any]]) -> list[bytes]:
    """The files of a job's pictures."""

    def read() -> list[bytes]:
        return [queue.store.path(picture["id"]).read_bytes() for picture in pictures]

    return await asyncio.to_thread(read)


def as_base64(content: bytes) -> str:
    """Bytes in base64, as text."""
    return base64.b64encode(content).decode("ascii")
