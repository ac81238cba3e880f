"""The native API under ``/api/v1``: pictures in, jobs, progress as server-sent events, history, capabilities.

A job's request is the same :class:`~imprompt.schema.request.Request` as everywhere, with ids of uploaded
pictures where files stand elsewhere.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query
from fastapi import Request as HTTPRequest
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, StrictBool

from imprompt.app.server.bodies import Body, checked, described, form_body, json_body, uploads
from imprompt.app.server.capabilities import capabilities
from imprompt.app.server.jobs import Job
from imprompt.app.server.maps import MapKind, drawn_map
from imprompt.app.server.problems import Problem, refused
from imprompt.app.server.protocols import (
    QueueHere,
    as_base64,
    checked_request,
    errors,
    keep,
    server_sent,
    streamed,
    unchanged,
)
from imprompt.app.server.queue import Queue
from imprompt.app.server.store import Picture, thumbnail_of
from imprompt.errors import ImpromptError
from imprompt.output.clips import check_fps
from imprompt.schema.request import Request

JobId = Annotated[str, Path(pattern="^[0-9a-f]{24}$", description="a job's id")]
PictureId = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="a picture's id")]
STILLS, CLIPS = (".png", ".jpg", ".webp"), (".webp", ".gif", ".mp4")  # the first is the default
_MEDIA: dict[str, Any] = {"image/*": {}, "video/mp4": {}}
_FILES: dict[int | str, dict[str, Any]] = {
    200: {"content": _MEDIA},
    206: {"content": _MEDIA, "description": "the part that Range asks for; players of videos do"},
    304: {"description": "the client has it already, as If-None-Match says"},
}
_EVENTS: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}


class ErrorView(BaseModel):
    """What went wrong."""

    code: str
    message: str
    field: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorView


@dataclass(frozen=True)
class PictureView(Picture):
    """A stored picture."""

    url: str
    thumbnail: str


@dataclass(frozen=True)
class UploadView(PictureView):
    """An uploaded picture, and the request inside it if imprompt drew it."""

    request: dict[str, Any] | None = None
    missing: list[str] = field(default_factory=list)
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


class JobBody(Body):
    """A job to accept."""

    model_config = ConfigDict(extra="forbid")

    request: dict[str, Any]
    """As everywhere, with ids of uploaded pictures for files."""
    format: Literal["png", "jpg", "jpeg", "webp", "gif", "mp4"] | None = None
    previews: StrictBool = True


class UploadBody(BaseModel):
    """A picture, a mask, an animated picture or a video."""


class MapBody(Body):
    """A picture, and what a control takes from it. These kinds need no model of their own."""

    kind: MapKind
    picture: str


async def _only_known_parameters(http: HTTPRequest) -> None:
    """Refuse query parameters that the route does not read."""
    known = [field.alias for field in http.scope["route"].dependant.query_params]
    for name in http.query_params:
        if name not in known:
            there = f"known here: {', '.join(known)}" if known else "this route has none"
            raise refused(name[:60], f"no such query parameter; {there}.", "unknown_parameter")


router = APIRouter(
    prefix="/api/v1", tags=["native"], responses=errors(ErrorAnswer),
    dependencies=[Depends(_only_known_parameters)],
)  # fmt: skip


async def _job(job: JobId, queue: QueueHere) -> Job:
    return await queue.find(job)


JobHere = Annotated[Job, Depends(_job)]


# ---- pictures


@router.post(
    "/pictures", status_code=201, response_model=UploadView,
    openapi_extra=described(UploadBody, kind="multipart/form-data", files=["file"]),
)  # fmt: skip
async def upload(http: HTTPRequest, queue: QueueHere) -> Any:
    """Upload a picture, a mask, an animated picture or a video; its id is the SHA-256 of what is stored."""
    async with form_body(http, queue.settings, "file") as form:
        files = uploads(form, "file")
        if len(files) != 1:
            raise Problem(422, "missing_file", f"one part 'file' is expected, got {len(files)}.", "file")
        if len(form) != 1:
            other = next(name for name in form if name != "file")
            raise refused(other[:60], "no such part; 'file' is the only one.", "unknown_parameter")
        content = await files[0].read(queue.settings.limits.picture_bytes + 1)
    picture = await keep(queue, content, "file")
    record = await asyncio.to_thread(queue.store.record, picture.id)
    view = picture_view(picture)
    if record is None:
        return view
    missing = [name for name in record.request.files if await _missing(queue, name)]
    return view | {"request": record.request.model_dump(mode="json"), "missing": missing}


async def _missing(queue: Queue, name: str) -> bool:
    return len(name) != 64 or await queue.blocking(queue.store.find, name) is None


@router.head("/pictures/{picture}", include_in_schema=False)
@router.get("/pictures/{picture}", response_class=Response, responses=_FILES)
async def picture_file(
    http: HTTPRequest, picture: PictureId, queue: QueueHere, thumbnail: Annotated[bool, Query()] = False
) -> Response:
    """A stored picture, or a small WebP of it."""
    found = await queue.blocking(queue.store.find, picture)
    if found is None:
        raise Problem(404, "unknown_picture", "there is no such picture.")
    return await _file(http, queue, found, thumbnail=thumbnail)


async def _file(http: HTTPRequest, queue: Queue, picture: Picture, *, thumbnail: bool = False) -> Response:
    etag = f'"{picture.id[:32]}{"-small" if thumbnail else ""}"'
    headers = {"Cache-Control": "private, max-age=31536000, immutable", "ETag": etag}
    if unchanged(http, etag):
        return Response(None, 304, headers)
    path = queue.store.path(picture.id)
    try:
        stat = await queue.blocking(path.stat)  # which is done after pictures are put in their places
        if thumbnail:
            content = await queue.decode(lambda: thumbnail_of(path.read_bytes()))
            return Response(content, media_type="image/webp", headers=headers)
    except (OSError, ImpromptError) as error:
        raise Problem(404, "unknown_picture", "the picture's file is gone.") from error
    headers["Content-Disposition"] = f'inline; filename="imprompt-{picture.id[:8]}{picture.suffix}"'
    return FileResponse(path, media_type=picture.type, headers=headers, stat_result=stat)


@router.post("/maps", status_code=201, response_model=PictureView, openapi_extra=described(MapBody))
async def control_map(http: HTTPRequest, queue: QueueHere) -> Any:
    """What a control of this kind would follow in a stored picture."""
    body = checked(MapBody, await json_body(http, queue.settings))
    if await _missing(queue, body.picture):
        raise Problem(404, "unknown_picture", "there is no such picture.", "picture")
    content = await queue.decode(drawn_map, body.kind, queue.store.path(body.picture))
    return picture_view(await queue.blocking(queue.store.keep, content))


# ---- jobs


@router.post(
    "/jobs", status_code=202, response_model=JobView, responses={200: {"model": JobView}},
    openapi_extra=described(JobBody, records={"request": "Request"}),
)  # fmt: skip
async def submit(
    http: HTTPRequest,
    queue: QueueHere,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> Any:
    """Accept a job: 202 with its place in the queue; 200 with the job that has this key already."""
    if idempotency_key is None:  # refused before any work is done for it
        queue.check_room(http.state.client)
    body = checked(JobBody, await json_body(http, queue.settings))
    request = await checked_request(queue, body.request)
    job, new = await queue.submit(
        request, http.state.client, suffix=suffix_of(body.format, request), previews=body.previews,
        key=idempotency_key,
    )  # fmt: skip
    location = {"Location": f"/api/v1/jobs/{job.id}"}
    return JSONResponse(job_view(queue, job), 202 if new else 200, location)


def suffix_of(form: str | None, request: Request) -> str:
    """The ending of the files to write. Raises :class:`Problem` for a format the task does not have, and
    :class:`UsageError` for one that cannot show the clip's frames per second."""
    known = CLIPS if request.task == "animate" else STILLS
    if form is None:
        return known[0]
    suffix = {"jpeg": ".jpg"}.get(form, f".{form}")
    if suffix not in known:
        listed = ", ".join(known).replace(".", "")
        raise refused("format", f"'{form}'; {request.task} gives {listed}.")
    if request.fps is not None:
        check_fps(suffix, request.fps)
    return suffix


@router.get("/jobs/{job}", response_model=JobView)
async def job_state(job: JobHere, queue: QueueHere) -> Any:
    """A job as it stands."""
    return job_view(queue, job)


@router.delete("/jobs/{job}", response_model=JobView)
async def cancel(job: JobHere, queue: QueueHere) -> Any:
    """Stop a job within a step. Stopping it twice is as stopping it once; a finished job is 409."""
    await queue.cancel(job)
    return job_view(queue, job)


@router.get("/jobs/{job}/events", response_class=Response, responses={200: {"content": _EVENTS}})
async def events(job: JobHere, queue: QueueHere) -> StreamingResponse:
    """Server-sent events ``queued``, ``step``, ``done``, ``failed``, ``cancelled``, with the job as JSON.

    ``step`` has ``preview`` now and then, a small picture as a data URL. The stream ends with the
    job; a client that lost it asks again and gets the state as it is.
    """
    return streamed(_events(job, queue))


async def _events(job: Job, queue: Queue) -> AsyncIterator[str]:
    shown: bytes | None = None
    async for _ in queue.changes(job):
        if job.state != "running":
            yield server_sent(job.state, job_view(queue, job))
            continue
        body: dict[str, Any] = {"step": job.step, "steps": job.steps, "estimate": queue.estimate(job)}
        if job.preview is not None and job.preview is not shown:
            shown = job.preview
            body["preview"] = f"data:image/webp;base64,{as_base64(shown)}"
        yield server_sent("step", body)


@router.head("/jobs/{job}/pictures/{number}", include_in_schema=False)
@router.get("/jobs/{job}/pictures/{number}", response_class=Response, responses=_FILES)
async def job_picture(
    http: HTTPRequest, job: JobHere, number: Annotated[int, Path(ge=0, le=999)], queue: QueueHere
) -> Response:
    """Picture ``number`` of a job, from 0."""
    if job.state != "done":
        raise Problem(409, "not_finished", f"the job is {job.state}; it has no pictures.")
    if number >= len(job.pictures):
        raise Problem(404, "unknown_picture", f"the job has {len(job.pictures)} pictures, counted from 0.")
    return await _file(http, queue, Picture(**job.pictures[number]))


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


@router.delete("/history/{job}", status_code=204, response_class=Response)
async def forget(job: JobHere, queue: QueueHere) -> Response:
    """Delete a finished job and the pictures it drew."""
    await queue.forget(job)
    return Response(status_code=204)


@router.get("/capabilities")
async def what_is_offered(queue: QueueHere) -> dict[str, Any]:
    """Limits, models, and the JSON Schema of a request."""
    return await asyncio.to_thread(capabilities, queue.settings)


# ---- views


def picture_view(picture: Picture) -> dict[str, Any]:
    """A picture as the API shows it."""
    url = f"/api/v1/pictures/{picture.id}"
    return {**asdict(picture), "url": url, "thumbnail": f"{url}?thumbnail=true"}


def job_view(queue: Queue, job: Job) -> dict[str, Any]:
    """A job as the API shows it."""
    same = ("id", "number", "state", "step", "steps", "created", "started", "finished", "notes", "timings",
            "batch", "error")  # fmt: skip
    return {name: getattr(job, name) for name in same} | {
        "position": queue.position(job),
        "estimate": None if job.over else queue.estimate(job),
        "pictures": [picture_view(Picture(**picture)) for picture in job.pictures],
        "request": job.record or job.request.model_dump(mode="json"),
    }
