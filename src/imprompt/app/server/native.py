"""The native API under ``/api/v1``: pictures in, jobs, progress as server-sent events, history, capabilities.

A job's request is the same :class:`~imprompt.schema.request.Request` as everywhere, with ids of uploaded
pictures where files stand elsewhere.
"""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict

from imprompt import catalog
from imprompt.app.server.bodies import form_body, json_body, read_request, uploads
from imprompt.app.server.capabilities import capabilities
from imprompt.app.server.problems import Problem
from imprompt.app.server.queue import Job, Queue
from imprompt.app.server.store import Picture, Store
from imprompt.catalog.resolve import is_here
from imprompt.encoders.images import load_image
from imprompt.errors import ImpromptError
from imprompt.generation.annotate import annotate
from imprompt.schema.request import Request

JobId = Annotated[str, Path(pattern="^[0-9a-f]{24}$", description="a job's id")]
PictureId = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="a picture's id")]
PICTURE = "image"
"""Field of an image prompt that names its picture."""
STILLS, CLIPS = (".png", ".jpg", ".webp"), (".webp", ".gif", ".mp4")


class ErrorView(BaseModel):
    """What went wrong."""

    code: str
    message: str
    field: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorView


class PictureView(BaseModel):
    """A stored picture."""

    id: str
    type: str
    width: int
    height: int
    frames: int
    bytes: int
    url: str
    thumbnail: str


class UploadView(PictureView):
    """An uploaded picture, and the request inside it if imprompt drew it."""

    request: dict[str, Any] | None = None
    missing: list[str] = []
    """Ids of pictures that the request shows and this server does not have."""


class JobView(BaseModel):
    """A job as it stands."""

    model_config = ConfigDict(extra="forbid")

    id: str
    number: int
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int
    """How many jobs are drawn before this one."""
    estimate: float | None
    """Seconds until it is done."""
    step: int
    steps: int
    created: float
    started: float | None
    finished: float | None
    pictures: list[PictureView]
    request: dict[str, Any]
    """As asked; when done, complete, so that it draws the same again."""
    notes: list[str]
    timings: dict[str, float]
    batch: int
    error: ErrorView | None


class HistoryView(BaseModel):
    """Finished jobs, newest first."""

    jobs: list[JobView]
    next: int | None
    """``before`` of the next page."""


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer} for status in (400, 401, 403, 422, 500, 503, *statuses)}


router = APIRouter(prefix="/api/v1", tags=["native"], responses=_errors())


def _queue(http: HTTPRequest) -> Queue:
    found: Queue = http.app.state.queue
    return found


QueueHere = Annotated[Queue, Depends(_queue)]

_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["request"],
                    "additionalProperties": False,
                    "properties": {
                        "request": {"type": "object", "description": "see `request` of /api/v1/capabilities"},
                        "format": {"type": "string", "enum": ["png", "jpg", "webp", "gif", "mp4"]},
                        "previews": {"type": "boolean", "default": True},
                    },
                }
            }
        },
    }
}
_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


# ---- pictures


@router.post(
    "/pictures", status_code=201, response_model=UploadView, openapi_extra=_UPLOAD_BODY,
    responses=_errors(408, 413, 415, 507),
)  # fmt: skip
async def upload(http: HTTPRequest, queue: QueueHere) -> Any:
    """Upload a picture, a mask or an animated picture; its id is the SHA-256 of its bytes."""
    settings, store = queue.settings, queue.store
    form = await form_body(http, settings)
    files = uploads(form, "file")
    if len(files) != 1:
        raise Problem(422, "missing_file", f"one part 'file' is expected, got {len(files)}.", "file")
    content = await files[0].read(settings.limits.picture_bytes + 1)
    await form.close()
    if len(content) > settings.limits.picture_bytes:
        raise Problem(413, "too_large", f"a picture has at most {settings.limits.picture_bytes >> 20} MB.")
    picture = await keep(queue, content, "file")
    record = await asyncio.to_thread(store.record, picture.id)
    view = picture_view(picture)
    if record is None:
        return view
    missing = [name for name in record.request.files if await _missing(queue, name)]
    return view | {"request": record.request.model_dump(mode="json"), "missing": missing}


async def keep(queue: Queue, content: bytes, field: str) -> Picture:
    """Store an uploaded picture once it is known to be one. Raises :class:`Problem`."""
    try:
        async with queue.decoding:
            await asyncio.to_thread(Store.check, content, queue.settings.limits.picture_pixels)
    except ImpromptError as error:
        text = f"{field}: {error}"
        raise Problem(422, "bad_picture", text, field) from error
    return await queue.blocking(queue.store.keep, content)


async def _missing(queue: Queue, name: str) -> bool:
    return len(name) != 64 or await queue.blocking(queue.store.find, name) is None


@router.get(
    "/pictures/{picture}", response_class=Response,
    responses={200: {"content": {"image/*": {}, "video/mp4": {}}}, **_errors(404)},
)  # fmt: skip
async def picture_file(
    picture: PictureId, queue: QueueHere, thumbnail: Annotated[bool, Query()] = False
) -> Response:
    """A stored picture, or a small WebP of it."""
    found = await queue.blocking(queue.store.find, picture)
    if found is None:
        raise Problem(404, "unknown_picture", "there is no such picture.")
    return await _file(queue, found, thumbnail=thumbnail)


async def _file(queue: Queue, picture: Picture, *, thumbnail: bool = False) -> Response:
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    try:
        if thumbnail and picture.type.startswith("image/"):
            async with queue.decoding:
                content = await asyncio.to_thread(queue.store.thumbnail, picture.id)
            return Response(content, media_type="image/webp", headers=headers)
        content = await asyncio.to_thread(queue.store.path(picture.id).read_bytes)
    except (OSError, ImpromptError) as error:
        raise Problem(404, "unknown_picture", "the picture's file is gone.") from error
    headers["Content-Disposition"] = f'inline; filename="imprompt-{picture.id[:8]}{picture.suffix}"'
    return Response(content, media_type=picture.type, headers=headers)


_MAP_KINDS = ("canny", "lineart", "scribble", "tile", "none")
"""Kinds of control whose map needs no model of its own."""
_MAP_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["kind", "picture"],
                    "properties": {
                        "kind": {"type": "string", "enum": list(_MAP_KINDS)},
                        "picture": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
                    },
                }
            }
        },
    }
}


@router.post(
    "/maps", status_code=201, response_model=PictureView, openapi_extra=_MAP_BODY,
    responses=_errors(404, 408, 413, 415, 507),
)  # fmt: skip
async def control_map(http: HTTPRequest, queue: QueueHere) -> Any:
    """What a control of this kind would follow in a stored picture."""
    values = await json_body(http, queue.settings)
    kind, name = values.get("kind"), values.get("picture")
    if kind not in _MAP_KINDS:
        raise Problem(422, "invalid_request", f"kind: one of {', '.join(_MAP_KINDS)} is expected.", "kind")
    if not isinstance(name, str) or await _missing(queue, name):
        raise Problem(404, "unknown_picture", "there is no such picture.", "picture")
    async with queue.decoding:
        content = await asyncio.to_thread(_drawn_map, kind, queue.store.path(name))
    return picture_view(await queue.blocking(queue.store.keep, content))


def _drawn_map(kind: str, path: FilePath) -> bytes:
    """A control's map as PNG, at most 1024 pixels wide or high. Raises :class:`ImpromptError`."""
    image = load_image(path)
    image.thumbnail((1024, 1024))
    stream = io.BytesIO()
    annotate(kind, image).save(stream, "PNG")
    return stream.getvalue()


# ---- jobs


@router.post(
    "/jobs", status_code=202, response_model=JobView, openapi_extra=_REQUEST_BODY,
    responses={200: {"model": JobView}, **_errors(408, 409, 413, 415, 429, 507)},
)  # fmt: skip
async def submit(
    http: HTTPRequest,
    queue: QueueHere,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> Any:
    """Accept a job: 202 with its place in the queue; 200 with the job that has this key already."""
    if idempotency_key is None:  # refused before any work is done for it
        queue.check_room(http.state.client)
    values = await json_body(http, queue.settings)
    if unknown := values.keys() - {"request", "format", "previews"}:
        name = min(unknown)
        raise Problem(
            422, "invalid_request", f"{name}: no such field; known are request, format, previews.", name
        )
    if not isinstance(values.get("request"), dict):
        raise Problem(422, "invalid_request", "request: an object of fields is expected.", "request")
    request = await checked_request(queue, values["request"])
    previews = values.get("previews", True)
    if not isinstance(previews, bool):
        raise Problem(422, "invalid_request", "previews: true or false is expected.", "previews")
    suffix = suffix_of(values.get("format"), request)
    job, new = await queue.submit(
        request, http.state.client, suffix=suffix, previews=previews, key=idempotency_key
    )
    location = {"Location": f"/api/v1/jobs/{job.id}"}
    return JSONResponse(job_view(queue, job), 202 if new else 200, location)


async def checked_request(queue: Queue, values: dict[str, Any]) -> Request:
    """A client's request whose pictures are all here. Raises :class:`Problem`."""
    request = read_request(values, queue.settings)
    for name in request.files:
        if await queue.blocking(queue.store.find, name) is None:
            raise Problem(
                422,
                "unknown_picture",
                f"picture {name[:12]}… is not on this server; upload it first.",
                "images",
            )
    await asyncio.to_thread(check_here, queue, request)
    return request


def check_here(queue: Queue, request: Request) -> None:
    """Raises :class:`Problem` for a catalogued base that is not on this machine and may not be downloaded."""
    name = request.base
    if name in queue.settings.bases or queue.settings.download:
        return
    row = catalog.bases()[name]
    if not is_here(row):
        text = f"base: '{name}' is not on the server's machine; run there: hf download {row.repo}"
        raise Problem(422, "not_here", text, "base")


def suffix_of(form: object, request: Request) -> str:
    """The ending of the files to write. Raises :class:`Problem` for a format the task does not have."""
    clip = request.task == "animate"
    if form is None:
        return ".webp" if clip else ".png"
    suffix = {"jpeg": ".jpg"}.get(str(form), f".{form}")
    known = CLIPS if clip else STILLS
    if suffix not in known:
        listed = ", ".join(known).replace(".", "")
        raise Problem(422, "invalid_request", f"format: '{form}'; {request.task} gives {listed}.", "format")
    return suffix


@router.get("/jobs/{job}", response_model=JobView, responses=_errors(404))
async def job_state(job: JobId, queue: QueueHere) -> Any:
    """A job as it stands."""
    return job_view(queue, await queue.find(job))


@router.delete("/jobs/{job}", response_model=JobView, responses=_errors(404, 409))
async def cancel(job: JobId, queue: QueueHere) -> Any:
    """Stop a job within a step. Stopping it twice is as stopping it once; a finished job is 409."""
    found = await queue.find(job)
    await queue.cancel(found)
    return job_view(queue, found)


@router.get(
    "/jobs/{job}/events", response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **_errors(404)},
)  # fmt: skip
async def events(job: JobId, queue: QueueHere) -> StreamingResponse:
    """Server-sent events ``queued``, ``step``, ``done``, ``failed``, ``cancelled``, with the job as JSON.

    ``step`` has ``preview`` now and then, a small picture as a data URL. The stream ends with the
    job; a client that lost it asks again and gets the state as it is.
    """
    found = await queue.find(job)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(queue, found), media_type="text/event-stream", headers=headers)


async def _events(queue: Queue, job: Job) -> AsyncIterator[str]:
    shown: bytes | None = None
    async for change in queue.changes(job):
        if change is None:
            yield ": still here\n\n"
            continue
        name = {"running": "step"}.get(job.state, job.state)
        if name == "step":
            body: dict[str, Any] = {"step": job.step, "steps": job.steps, "estimate": queue.estimate(job)}
            if job.preview is not None and job.preview is not shown:
                shown = job.preview
                body["preview"] = "data:image/webp;base64," + base64.b64encode(shown).decode()
        else:
            body = job_view(queue, job)
        yield f"event: {name}\nid: {job.version}\ndata: {json.dumps(body)}\n\n"


@router.get(
    "/jobs/{job}/pictures/{number}", response_class=Response,
    responses={200: {"content": {"image/*": {}, "video/mp4": {}}}, **_errors(404, 409)},
)  # fmt: skip
async def job_picture(job: JobId, number: Annotated[int, Path(ge=0, le=999)], queue: QueueHere) -> Response:
    """Picture ``number`` of a job, from 0."""
    found = await queue.find(job)
    if found.state != "done":
        raise Problem(409, "not_finished", f"the job is {found.state}; it has no pictures.")
    if number >= len(found.pictures):
        raise Problem(404, "unknown_picture", f"the job has {len(found.pictures)} pictures, counted from 0.")
    return await _file(queue, Picture(**found.pictures[number]))


# ---- history and capabilities


@router.get("/history", response_model=HistoryView)
async def history(
    queue: QueueHere,
    limit: Annotated[int, Query(ge=1, le=100)] = 40,
    before: Annotated[int | None, Query(ge=1, le=2**53)] = None,
) -> Any:
    """Finished jobs, newest first."""
    rows = await queue.blocking(queue.store.history, limit, before)
    jobs = await asyncio.to_thread(lambda: [Job.restored(row) for row in rows])
    following = jobs[-1].number if len(jobs) == limit else None
    return {"jobs": [job_view(queue, job) for job in jobs], "next": following}


@router.delete("/history/{job}", status_code=204, response_class=Response, responses=_errors(404, 409))
async def forget(job: JobId, queue: QueueHere) -> Response:
    """Delete a finished job and the pictures it drew."""
    await queue.forget(await queue.find(job))
    return Response(status_code=204)


@router.get("/capabilities")
async def what_is_offered(queue: QueueHere) -> dict[str, Any]:
    """Limits, models, and the JSON Schema of a request."""
    return await asyncio.to_thread(capabilities, queue.settings)


# ---- views


def picture_view(picture: Picture) -> dict[str, Any]:
    """A picture as the API shows it."""
    url = f"/api/v1/pictures/{picture.id}"
    names = Picture.__dataclass_fields__
    return {name: getattr(picture, name) for name in names} | {
        "url": url,
        "thumbnail": f"{url}?thumbnail=true",
    }


def job_view(queue: Queue, job: Job) -> dict[str, Any]:
    """A job as the API shows it."""
    return {
        "id": job.id,
        "number": job.number,
        "state": job.state,
        "position": queue.position(job),
        "estimate": None if job.over else queue.estimate(job),
        "step": job.step,
        "steps": job.steps,
        "created": job.created,
        "started": job.started,
        "finished": job.finished,
        "pictures": [picture_view(Picture(**picture)) for picture in job.pictures],
        "request": job.record or job.request.model_dump(mode="json"),
        "notes": job.notes,
        "timings": job.timings,
        "batch": job.batch,
        "error": job.error,
    }
