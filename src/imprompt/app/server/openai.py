"""OpenAI's images API: ``/v1/images/generations`` and ``/v1/images/edits``, as its Python client speaks it.

Pictures without a mask are image prompts; with one, the first picture is inpainted where the mask is
transparent and the others are image prompts. ``input_fidelity`` sets their scale. Everything else that
imprompt can do is in the one field ``imprompt``: an object of a request's fields.
"""

import io
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image, ImageOps
from pydantic import BaseModel
from starlette.datastructures import FormData

from imprompt import catalog
from imprompt.app.server.bodies import form_body, json_body, parsed, texts, uploads
from imprompt.app.server.capabilities import capabilities
from imprompt.app.server.native import PICTURE, checked_request, keep
from imprompt.app.server.problems import Problem
from imprompt.app.server.queue import Job, Queue
from imprompt.app.server.waiting import as_base64, contents, drawn, finished
from imprompt.schema.request import Request

router = APIRouter(prefix="/v1", tags=["openai"])

_THEIRS = re.compile(r"^(gpt-image|dall-e|chatgpt-image)")  # programs often have a name of theirs built in
_FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_FIDELITY = {"low": 0.6, "high": 0.9}
_EFFORT = {"low": 0.5, "medium": 1.0, "standard": 1.0, "high": 1.5, "hd": 1.5}
"""``quality`` → factor of the base's own number of steps."""
_STEPS = 30  # of bases that do not say
_MASK_NAME = "mask"


class ErrorBody(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """The body of an answer that is no success."""

    error: ErrorBody


class ImageBody(BaseModel):
    """One drawn picture."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None


class ImagesBody(BaseModel):
    """What was drawn."""

    created: int
    data: list[ImageBody]
    background: Literal["opaque"]
    output_format: str
    quality: str
    size: str
    usage: dict[str, Any]


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer}
    for status in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 507)
}


def error_body(problem: Problem) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(problem.status)
    kind = kind or ("server_error" if problem.status >= 500 else "invalid_request_error")
    return {"error": {"message": problem.message, "type": kind, "param": problem.field, "code": problem.code}}


def _queue(http: HTTPRequest) -> Queue:
    found: Queue = http.app.state.queue
    return found


QueueHere = Annotated[Queue, Depends(_queue)]


def _body(kind: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": required}
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


_PROPERTIES: dict[str, Any] = {
    "prompt": {"type": "string", "minLength": 1},
    "model": {"type": "string"},
    "n": {"type": "integer", "minimum": 1},
    "size": {"type": "string"},
    "quality": {"type": "string", "enum": ["auto", *_EFFORT]},
    "output_format": {"type": "string", "enum": list(_FORMATS)},
    "response_format": {"type": "string", "enum": ["b64_json", "url"]},
    "stream": {"type": "boolean"},
    "partial_images": {"type": "integer", "minimum": 0, "maximum": 3},
    "imprompt": {"type": "object", "description": "fields of imprompt's own request"},
}
_PICTURES = {
    "image": {"type": "string", "format": "binary"},
    "mask": {"type": "string", "format": "binary"},
    "input_fidelity": {"type": "string", "enum": list(_FIDELITY)},
}


@router.post(
    "/images/generations", response_model=ImagesBody, responses=_ERRORS,
    openapi_extra=_body("application/json", _PROPERTIES, ["prompt"]),
)  # fmt: skip
async def generations(http: HTTPRequest, queue: QueueHere) -> Response:
    """Draw pictures from a text."""
    values = await json_body(http, queue.settings)
    request = await checked_request(queue, _fields(values, queue))
    return await _answer(http, queue, values, request, "image_generation")


@router.post(
    "/images/edits", response_model=ImagesBody, responses=_ERRORS,
    openapi_extra=_body("multipart/form-data", _PROPERTIES | _PICTURES, ["prompt", "image"]),
)  # fmt: skip
async def edits(http: HTTPRequest, queue: QueueHere) -> Response:
    """Draw from pictures: as image prompts, or, with a mask, inside the first of them."""
    form = await form_body(http, queue.settings)
    try:
        values = _form_values(form, queue)
        fields = _fields(values, queue)
        await _add_pictures(form, fields, values, queue)
    finally:
        await form.close()
    request = await checked_request(queue, fields)
    return await _answer(http, queue, values, request, "image_edit")


@router.get("/models", responses=_ERRORS)
async def models(queue: QueueHere) -> dict[str, Any]:
    """The bases that can be named as ``model``."""
    offered = [row["name"] for row in capabilities(queue.settings)["bases"] if row["offered"]]
    return {"object": "list", "data": [_model(name) for name in offered]}


@router.get("/models/{model}", responses=_ERRORS)
async def model(model: str, queue: QueueHere) -> dict[str, Any]:
    """One base."""
    return _model(_base(model, queue))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "imprompt"}


# ---- in


def _form_values(form: FormData, queue: Queue) -> dict[str, Any]:
    """Text parts as values; ``imprompt`` is JSON, or ``imprompt[field]`` as their client writes objects."""
    values: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, text in texts(form).items():
        inner = re.fullmatch(r"imprompt\[(\w+)\]", name)
        if inner:
            own[inner[1]] = _scalar(text)
        elif name == "imprompt":
            own |= parsed(text, queue.settings)
        elif name in ("n", "partial_images", "output_compression"):
            values[name] = _scalar(text)
        elif name == "stream":
            values[name] = text.lower() == "true"
        else:
            values[name] = text
    return values | ({"imprompt": own} if own else {})


def _scalar(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int | float | bool | str | None) else text


def _fields(values: Mapping[str, Any], queue: Queue) -> dict[str, Any]:
    """A request's fields from OpenAI's. Raises :class:`Problem`."""
    own = values.get("imprompt") or {}
    if not isinstance(own, dict):
        raise _wrong("imprompt", "an object of fields is expected")
    prompt, count = values.get("prompt"), values.get("n")
    if not isinstance(prompt, str):
        raise _wrong("prompt", "a text is expected")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
        raise _wrong("n", "a whole number is expected")
    _check_choices(values)
    base = _base(values.get("model"), queue)
    fields = {"prompt": prompt, "base": base, "count": 1 if count is None else count}
    if values.get("size") not in (None, "auto"):
        fields["size"] = values["size"]
    effort = _EFFORT.get(values.get("quality") or "auto", 1.0)
    if effort != 1:
        fields["steps"] = max(1, round(_STEPS * effort))
    return fields | own


def _check_choices(values: Mapping[str, Any]) -> None:
    """Raises :class:`Problem` for a value that is none of a field's."""
    known = {
        "output_format": tuple(_FORMATS),
        "response_format": ("b64_json", "url"),
        "quality": ("auto", *_EFFORT),
        "background": ("auto", "opaque"),
        "input_fidelity": tuple(_FIDELITY),
    }
    for name, choices in known.items():
        if values.get(name) not in (None, *choices):
            raise _wrong(name, f"one of {', '.join(choices)} is expected")


def _base(name: object, queue: Queue) -> str:
    """The base that ``model`` names; OpenAI's own names stand for the server's first."""
    if name is None or (isinstance(name, str) and _THEIRS.match(name)):
        return queue.settings.base
    if isinstance(name, str) and name in {**catalog.bases(), **queue.settings.bases}:
        return name
    raise Problem(404, "model_not_found", f"the model '{str(name)[:80]}' does not exist here.", "model")


async def _add_pictures(
    form: FormData, fields: dict[str, Any], values: Mapping[str, Any], queue: Queue
) -> None:
    """Store the uploaded pictures and name them in the request's fields."""
    files = uploads(form, "image", "image[]")
    if not files:
        raise _wrong("image", "a picture is expected")
    cap = queue.settings.limits.picture_bytes
    found = [await file.read(cap + 1) for file in files]
    if any(len(content) > cap for content in found):
        raise Problem(413, "too_large", f"image: a picture has at most {cap >> 20} MB.", "image")
    ids = [(await keep(queue, content, "image")).id for content in found]
    masks = uploads(form, _MASK_NAME)
    if masks:
        mask = _repainted(await masks[0].read(cap + 1), found[0], queue)
        fields |= {"task": "inpaint", "image": ids.pop(0), "mask": (await keep(queue, mask, "mask")).id}
    fields["images"] = _image_prompts(ids, fields.get("images", []))
    if ids and values.get("input_fidelity") is not None:
        fields.setdefault("scale", _FIDELITY[values["input_fidelity"]])


def _image_prompts(ids: list[str], options: Any) -> list[dict[str, Any]]:
    """An image prompt for each picture, with the options that ``imprompt.images`` has for it."""
    if (
        not isinstance(options, list)
        or len(options) > len(ids)
        or not all(isinstance(o, dict) for o in options)
    ):
        raise _wrong("imprompt.images", "at most one object of options for each picture is expected")
    options = options + [{}] * (len(ids) - len(options))
    return [{PICTURE: name, **option} for name, option in zip(ids, options, strict=True)]


def _repainted(mask: bytes, picture: bytes, queue: Queue) -> bytes:
    """Their mask, transparent where to repaint, as ours: white there. Raises :class:`Problem`."""
    pixels = queue.settings.limits.picture_pixels
    queue.store.check(mask, pixels)
    with Image.open(io.BytesIO(mask)) as opened:
        if "A" not in opened.getbands() and "transparency" not in opened.info:
            raise _wrong("mask", "a PNG with transparency is expected, transparent where to repaint")
        white = ImageOps.invert(opened.convert("RGBA").getchannel("A"))
    with Image.open(io.BytesIO(picture)) as opened:
        size = ImageOps.exif_transpose(opened).size
    if white.size != size:
        raise _wrong("mask", f"it is {white.width}×{white.height}, the picture {size[0]}×{size[1]}")
    stream = io.BytesIO()
    white.save(stream, "PNG")
    return stream.getvalue()


def _wrong(field: str, text: str) -> Problem:
    return Problem(400, "invalid_value", f"{field}: {text}.", field)


# ---- out


async def _answer(
    http: HTTPRequest, queue: Queue, values: Mapping[str, Any], request: Request, kind: str
) -> Response:
    form = values.get("output_format") or "png"
    if values.get("stream"):
        partials = values.get("partial_images") or 0
        if isinstance(partials, bool) or not isinstance(partials, int) or not 0 <= partials <= 3:
            raise _wrong("partial_images", "0 to 3 is expected")
        job, _ = await queue.submit(request, http.state.client, suffix=_FORMATS[form], previews=partials > 0)
        events = _events(queue, job, values, form, kind, partials)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )
    job = await drawn(queue, http, request, _FORMATS[form])
    if values.get("response_format") == "url":
        base = str(http.base_url).rstrip("/")
        data = [{"url": f"{base}/api/v1/pictures/{picture['id']}"} for picture in job.pictures]
    else:
        data = [{"b64_json": as_base64(content)} for content in await contents(queue, job.pictures)]
    return JSONResponse({"created": int(job.created), "data": data, **_about(job, values, form)})


def _about(job: Job, values: Mapping[str, Any], form: str) -> dict[str, Any]:
    """What both forms of answer say beside the pictures."""
    quality = values.get("quality") or "auto"
    quality = quality if quality in ("low", "medium", "high") else "medium"
    size = "{width}x{height}".format(**job.pictures[0]) if job.pictures else "auto"
    tokens = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    details = {"image_tokens": 0, "text_tokens": 0}
    return {
        "background": "opaque",
        "output_format": form,
        "quality": quality,
        "size": size,
        "usage": {**tokens, "input_tokens_details": details},
    }


async def _events(
    queue: Queue, job: Job, values: Mapping[str, Any], form: str, kind: str, partials: int
) -> AsyncIterator[str]:
    """Partial pictures at even distances, then each finished one; a client that goes away cancels."""
    sent = 0
    try:
        async for change in queue.changes(job):
            if change is None:
                yield ": still drawing\n\n"
                continue
            due = sent < partials and job.step * (partials + 1) >= job.steps * (sent + 1)
            if due and job.preview and job.steps and not job.over:
                body = {"b64_json": as_base64(job.preview), "partial_image_index": sent}
                yield _event(f"{kind}.partial_image", job, values, form, body)
                sent += 1
        try:
            finished(job)
        except Problem as problem:
            yield f"event: error\ndata: {json.dumps({'type': 'error', **error_body(problem)})}\n\n"
            return
        for content in await contents(queue, job.pictures):
            yield _event(f"{kind}.completed", job, values, form, {"b64_json": as_base64(content)})
    finally:
        if not job.over and not queue.draining:
            await queue.cancel(job)


def _event(name: str, job: Job, values: Mapping[str, Any], form: str, body: dict[str, Any]) -> str:
    data = {"type": name, "created_at": int(time.time()), **body, **_about(job, values, form)}
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
