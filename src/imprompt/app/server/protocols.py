"""What the protocols share: finding the queue, storing pictures, checking requests, and drawing while a
client waits."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Annotated, Any

from fastapi import Depends
from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from imprompt import catalog
from imprompt.app.server.bodies import decoded_picture, read_request
from imprompt.app.server.jobs import Job
from imprompt.app.server.problems import Problem, refused
from imprompt.app.server.queue import Queue
from imprompt.app.server.settings import Settings
from imprompt.app.server.store import Picture, readable
from imprompt.catalog import AdapterRow, Entry
from imprompt.catalog.resolve import is_here
from imprompt.errors import ImpromptError
from imprompt.schema.request import Request

PICTURE = "image"
"""Field of an image prompt that names its picture."""
_STATUSES = (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 507)


def errors(answer: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI schema: what a protocol's routes answer when they refuse or fail."""
    return {status: {"model": answer} for status in _STATUSES}


async def _queue(http: HTTPRequest) -> Queue:  # async: FastAPI runs the others on threads
    return http.app.state.queue


QueueHere = Annotated[Queue, Depends(_queue)]

# ---- in


async def keep(queue: Queue, content: bytes, field: str) -> Picture:
    """Store an uploaded picture once it is known to be one; a video is stored as an animated picture.

    Raises :class:`Problem`.
    """
    limits = queue.settings.limits
    if len(content) > limits.picture_bytes:
        raise refused(field, f"a picture has at most {limits.picture_bytes >> 20} MB.", "too_large", 413)
    try:
        content = await queue.decode(readable, content, limits.picture_pixels, limits.frames)
    except ImpromptError as error:
        raise refused(field, str(error), "bad_picture") from error
    return await queue.blocking(queue.store.keep, content)


async def keep_encoded(queue: Queue, value: object, field: str) -> Picture:
    """Store a picture that came in base64. Raises :class:`Problem`."""
    return await keep(queue, await asyncio.to_thread(decoded_picture, value, field), field)


async def checked_request(queue: Queue, values: dict[str, Any]) -> Request:
    """A client's request whose pictures and base are here. Raises :class:`Problem`."""
    request = read_request(values, queue.settings)
    for name in request.files:
        if await queue.blocking(queue.store.find, name) is None:
            text = f"picture {name[:12]}… is not on this server; upload it first."
            raise Problem(422, "unknown_picture", text, "images")
    for field, row in () if queue.settings.download else _models(request, queue.settings):
        if not await asyncio.to_thread(is_here, row):
            what = f"{row.repo} {row.file}" if isinstance(row, AdapterRow) else row.repo
            text = f"'{row.name}' is not on the server's machine; run there: hf download {what}"
            raise refused(field, text, "not_here")
    return request


_CATALOGUE: dict[str, Callable[[], Mapping[str, Entry]]] = {
    "base": catalog.bases, "images.adapter": catalog.adapters, "controls.model": catalog.controls,
    "motion": catalog.motions,
}  # fmt: skip
"""Field that names a model → where its aliases stand."""


def _models(request: Request, settings: Settings) -> Iterator[tuple[str, Entry]]:
    """The models of the catalogue that a request draws with, named or by default, with their fields."""
    own = {"base": settings.bases, "images.adapter": settings.adapters}
    for field, name in _names(request, _usual(request, settings)):
        row = _CATALOGUE[field]().get(name)
        if row is not None and name not in own.get(field, ()):
            yield field, row


def _names(request: Request, usual: tuple[str, str, Mapping[str, str]]) -> list[tuple[str, str]]:
    adapter, motion, controls = usual
    adapter = request.adapter or adapter
    named = [("base", request.base)]
    named += [("images.adapter", prompt.adapter or adapter) for prompt in request.images]
    named += [("controls.model", each.model or controls.get(each.kind, "")) for each in request.controls]
    return named + ([("motion", request.motion or motion)] if request.task == "animate" else [])


def _usual(request: Request, settings: Settings) -> tuple[str, str, Mapping[str, str]]:
    """The base's own adapter, motion adapter and controls, as far as the catalogue tells."""
    base = None if request.base in settings.bases else catalog.bases().get(request.base)
    if base is None:
        return "", "", {}
    family = catalog.families()[base.family]
    return family.adapter or "", family.motion or "", family.controls


# ---- out


async def drawn(
    queue: Queue, http: HTTPRequest, request: Request, suffix: str = ".png", *, previews: bool = False
) -> Job:
    """The finished job. A client that goes away cancels it. Raises :class:`Problem` when it fails."""
    job, _ = await queue.submit(request, http.state.client, suffix=suffix, previews=previews)
    waits = [asyncio.ensure_future(queue.finish(job)), asyncio.ensure_future(_gone(http))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        if not job.over and not queue.draining:
            await queue.cancel(job)
    return finished(job)


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
    while not await http.is_disconnected():
        await asyncio.sleep(0.2)


async def contents(queue: Queue, pictures: list[dict[str, Any]]) -> list[bytes]:
    """The files of a job's pictures."""
    paths = [queue.store.path(picture["id"]) for picture in pictures]
    return await queue.blocking(lambda: [path.read_bytes() for path in paths])  # after they are placed


async def encoded(files: list[bytes]) -> list[str]:
    """Files in base64, encoded beside the event loop."""
    return await asyncio.to_thread(lambda: [as_base64(content) for content in files])


def unchanged(http: HTTPRequest, etag: str) -> bool:
    """Whether the client has what this entity tag names, so that 304 is the answer."""
    known = http.headers.get("if-none-match", "").replace("W/", "").split(",")
    return etag in map(str.strip, known)


def server_sent(event: str, data: object) -> str:
    """One server-sent event, with its data as JSON."""
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


def streamed(events: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events as an answer, which proxies pass on at once."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def as_base64(content: bytes) -> str:
    """Bytes in base64, as text."""
    return base64.b64encode(content).decode("ascii")
