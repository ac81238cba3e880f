"""OpenAI's images API: ``/v1/images/generations`` and ``/v1/images/edits``, as its Python client speaks it.

Pictures without a mask are image prompts; with one, the first picture is inpainted where the mask is
transparent and the others are image prompts. ``input_fidelity`` sets their scale. Everything else that
imprompt can do is in the one field ``imprompt``: an object of a request's fields.
"""

import asyncio
import io
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData

from imprompt.app.server.bases import served
from imprompt.app.server.bodies import (
    Body,
    Fields,
    checked,
    described,
    form_body,
    json_body,
    parsed,
    texts,
    uploads,
)
from imprompt.app.server.capabilities import offered_bases
from imprompt.app.server.jobs import Job
from imprompt.app.server.problems import Problem, refused
from imprompt.app.server.protocols import (
    PICTURE,
    QueueHere,
    as_base64,
    checked_request,
    contents,
    drawn,
    encoded,
    errors,
    finished,
    keep,
    server_sent,
    streamed,
)
from imprompt.app.server.queue import Queue
from imprompt.encoders.images import as_bytes, load_image
from imprompt.errors import ImpromptError
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.request import ControlRef, LoraRef, Request

_THEIRS = re.compile(r"^(gpt-image|dall-e|chatgpt-image)")  # programs often have a name of theirs built in
_FIDELITY = {"low": 0.6, "high": 0.9}
_NO_EFFECT = "one of theirs without a counterpart; it has no effect"
_EFFORT = {"low": 0.5, "high": 1.5, "hd": 1.5}
"""``quality`` → factor of the base's own number of steps."""
_KEY = re.compile(r"\[(\w*)\]")
_BRACKETED = re.compile(rf"imprompt(?:{_KEY.pattern})+")
_TEXTS = {
    name
    for model in (Request, ImagePrompt, TextRegion, ControlRef, LoraRef)
    for name, field in model.model_fields.items()
    if field.annotation in (str, str | None)
}
"""Fields that are texts, which a form does not tell from numbers."""


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


class Generation(Body):
    """What ``images/generations`` takes."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    n: int = Field(default=1, ge=1)
    size: str = "auto"
    quality: Literal["auto", "low", "medium", "standard", "high", "hd"] = "auto"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    response_format: Literal["b64_json", "url"] = "b64_json"
    background: Literal["auto", "opaque"] = "auto"
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=3)
    imprompt: dict[str, Any] = Field(default_factory=dict, description="fields of imprompt's own request")
    user: Any = Field(default=None, description=_NO_EFFECT)
    safety_identifier: Any = Field(default=None, description=_NO_EFFECT)
    style: Any = Field(default=None, description=_NO_EFFECT)
    moderation: Any = Field(default=None, description=_NO_EFFECT)
    output_compression: Any = Field(default=None, description=_NO_EFFECT)


class Edit(Generation):
    """What ``images/edits`` takes besides its pictures."""

    input_fidelity: Literal["low", "high"] | None = None


router = APIRouter(prefix="/v1", tags=["openai"], responses=errors(ErrorAnswer))


def error_body(problem: Problem) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(problem.status)
    kind = kind or ("server_error" if problem.status >= 500 else "invalid_request_error")
    return {"error": {"message": problem.message, "type": kind, "param": problem.field, "code": problem.code}}


@router.post("/images/generations", response_model=ImagesBody, openapi_extra=described(Generation))
async def generations(http: HTTPRequest, queue: QueueHere) -> Response:
    """Draw pictures from a text."""
    body = _checked(Generation, await json_body(http, queue.settings))
    request = await _request(queue, await _fields(body, queue))
    return await _answer(http, queue, body, request, "image_generation")


@router.post(
    "/images/edits", response_model=ImagesBody,
    openapi_extra=described(Edit, kind="multipart/form-data", files=["image", "mask"]),
)  # fmt: skip
async def edits(http: HTTPRequest, queue: QueueHere) -> Response:
    """Draw from pictures: as image prompts, or, with a mask, inside the first of them."""
    async with form_body(http, queue.settings, "image", "image[]", "mask") as form:
        body = _checked(Edit, _form_values(form, queue))
        fields = await _fields(body, queue)
        await _add_pictures(form, fields, body, queue)
    request = await _request(queue, fields)
    return await _answer(http, queue, body, request, "image_edit")


@router.get("/models")
def models(http: HTTPRequest) -> dict[str, Any]:  # looks at the disk, and so runs on a thread
    """The bases that can be named as ``model``."""
    return {"object": "list", "data": [_model(name) for name in offered_bases(http.app.state.settings)]}


@router.get("/models/{model}")
async def model(model: str, queue: QueueHere) -> dict[str, Any]:
    """One base."""
    return _model(_base(model, queue))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "imprompt"}


# ---- in


def _checked(model: type[Fields], values: dict[str, Any]) -> Fields:
    for name, value in values.items():
        if name not in model.model_fields and value is not None:
            raise _wrong(name[:80], _unknown(name))
    return checked(model, values, status=400, code="invalid_value")


def _unknown(name: str) -> str:
    """What to do with a parameter that is not theirs."""
    if name in ("image", "image[]", "mask"):
        return "pictures are sent as files, to images/edits"
    if name in Request.model_fields:
        return f"send it inside 'imprompt', as {{'imprompt': {{'{name}': …}}}}"
    return "this server has no such parameter"


def _form_values(form: FormData, queue: Queue) -> dict[str, Any]:
    """Text parts as values; ``imprompt`` is JSON, or in brackets as their client writes objects."""
    values: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, given in texts(form).items():
        if len(given) > 1 and not name.endswith("]"):
            raise _wrong(name[:80], "it is there twice; send it once")
        if name == "imprompt":
            own |= parsed(given[-1], queue.settings)
        elif name.startswith("imprompt["):
            _add_bracketed(own, name, given)
        else:
            values[name] = given[-1]
    return {**values, "imprompt": own}


def _add_bracketed(own: dict[str, Any], name: str, given: list[str]) -> None:
    """Put the values of a part such as ``imprompt[field][]`` or ``imprompt[field][][key]`` in their place.

    Their client sends a list of objects key by key, so the nth value of each key is the nth object's. Raises
    :class:`Problem` for what cannot be told apart.
    """
    keys = _KEY.findall(name)
    sound = _BRACKETED.fullmatch(name) is not None and keys[0] and keys.count("") <= 1
    if not sound:
        raise _unclear(name)
    values = [_scalar(text, next(filter(None, reversed(keys)))) for text in given]
    if "" not in keys:
        rows, inner = [own], keys
    elif keys[-1]:
        rows, inner = _rows(own, keys[: keys.index("")], len(values), name), keys[keys.index("") + 1 :]
    else:
        rows, inner, values = [own], keys[:-1], [values]
    if len(rows) != len(values):
        raise _unclear(name)
    for row, value in zip(rows, values, strict=True):
        place = _inside(row, inner[:-1], name)
        if inner[-1] in place:
            raise _unclear(name)
        place[inner[-1]] = value


def _inside(place: dict[str, Any], keys: list[str], name: str) -> dict[str, Any]:
    """The object under ``keys``, made if it is not there."""
    for key in keys:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise _unclear(name)
    return place


def _rows(own: dict[str, Any], keys: list[str], count: int, name: str) -> list[dict[str, Any]]:
    """The list of objects under ``keys``, made with ``count`` of them if it is not there."""
    rows = _inside(own, keys[:-1], name).setdefault(keys[-1], [{} for _ in range(count)])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _unclear(name)
    return rows


def _unclear(name: str) -> Problem:
    return _wrong(
        name[:80], "it cannot be told what this belongs to; send 'imprompt' as one part of JSON text"
    )


def _scalar(text: str, name: str) -> Any:
    """What a text stands for; fields that are texts keep it, also where it looks like a number."""
    if name in _TEXTS:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int | float | bool | str | None) else text


async def _fields(body: Generation, queue: Queue) -> dict[str, Any]:
    """A request's fields from OpenAI's. Raises :class:`Problem`."""
    base = _base(body.model, queue)
    fields: dict[str, Any] = {"prompt": body.prompt, "base": base, "count": body.n}
    if body.size != "auto":
        fields["size"] = body.size
    if body.quality in _EFFORT:
        own = (await served(base, queue.settings)).steps
        fields["steps"] = max(1, round(own * _EFFORT[body.quality]))
    return fields | body.imprompt


async def _request(queue: Queue, fields: dict[str, Any]) -> Request:
    """A request that draws pictures. Raises :class:`Problem`."""
    request = await checked_request(queue, fields)
    if request.task == "animate":
        raise _wrong("imprompt.task", "clips are not part of this API; ask /api/v1/jobs for them")
    return request


def _base(name: str | None, queue: Queue) -> str:
    """The base that ``model`` names; OpenAI's own names stand for the server's first."""
    if name is None or _THEIRS.match(name):
        return queue.settings.base
    if name in queue.settings.known_bases:
        return name
    raise Problem(404, "model_not_found", f"the model '{name[:80]}' does not exist here.", "model")


async def _add_pictures(form: FormData, fields: dict[str, Any], body: Edit, queue: Queue) -> None:
    """Store the uploaded pictures and name them in the request's fields."""
    files, masks = uploads(form, "image", "image[]"), uploads(form, "mask")
    if not files:
        raise _wrong("image", "a picture is expected")
    if len(masks) > 1:
        raise _wrong("mask", "one mask is expected, for the first picture")
    cap = queue.settings.limits.picture_bytes
    ids = [(await keep(queue, await file.read(cap + 1), "image")).id for file in files]
    if masks:
        source = ids.pop(0)
        mask = await asyncio.to_thread(_repainted, await masks[0].read(cap + 1), source, queue)
        fields |= {"task": "inpaint", "image": source, "mask": (await keep(queue, mask, "mask")).id}
    bracketed = any(name.startswith("imprompt[images]") for name in form)
    fields["images"] = _image_prompts(ids, fields.get("images", []), each=bracketed)
    if ids and body.input_fidelity is not None:
        fields.setdefault("scale", _FIDELITY[body.input_fidelity])


def _image_prompts(ids: list[str], options: Any, *, each: bool) -> list[dict[str, Any]]:
    """An image prompt for each picture, with the options that ``imprompt.images`` has for it.

    ``each``: there must be options for all of them, as their client leaves empty objects out.
    """
    if (
        not isinstance(options, list)
        or len(options) > len(ids)
        or not all(isinstance(o, dict) for o in options)
    ):
        raise _wrong("imprompt.images", "at most one object of options for each picture is expected")
    if each and len(options) != len(ids):
        text = "say the same options for each picture, or send 'imprompt' as one part of JSON text"
        raise _wrong("imprompt.images", text)
    options = options + [{}] * (len(ids) - len(options))
    return [{PICTURE: name, **option} for name, option in zip(ids, options, strict=True)]


def _repainted(mask: bytes, source: str, queue: Queue) -> bytes:
    """Their mask, transparent where to repaint, as ours: white there. Raises :class:`Problem`."""
    try:
        load_image(mask, max_pixels=queue.settings.limits.picture_pixels)
        size = load_image(queue.store.path(source)).size
    except ImpromptError as error:
        raise _wrong("mask", str(error)) from error
    with Image.open(io.BytesIO(mask)) as opened:
        if "A" not in opened.getbands() and "transparency" not in opened.info:
            raise _wrong("mask", "a PNG with transparency is expected, transparent where to repaint")
        white = ImageOps.invert(opened.convert("RGBA").getchannel("A"))
    if white.size != size:
        raise _wrong("mask", f"it is {white.width}×{white.height}, the picture {size[0]}×{size[1]}")
    return as_bytes(white)


def _wrong(field: str, text: str) -> Problem:
    return refused(field, f"{text}.", "invalid_value", 400)


# ---- out


async def _answer(http: HTTPRequest, queue: Queue, body: Generation, request: Request, kind: str) -> Response:
    suffix = {"jpeg": ".jpg"}.get(body.output_format, f".{body.output_format}")
    if body.stream:
        job, _ = await queue.submit(
            request, http.state.client, suffix=suffix, previews=body.partial_images > 0
        )
        return streamed(_events(queue, job, body, kind))
    job = await drawn(queue, http, request, suffix)
    if body.response_format == "url":
        base = str(http.base_url).rstrip("/")
        data = [{"url": f"{base}/api/v1/pictures/{picture['id']}"} for picture in job.pictures]
    else:
        data = [{"b64_json": text} for text in await encoded(await contents(queue, job.pictures))]
    return JSONResponse({"created": int(job.created), "data": data, **_about(job, body)})


def _about(job: Job, body: Generation) -> dict[str, Any]:
    """What both forms of answer say beside the pictures."""
    return {
        "background": "opaque",
        "output_format": body.output_format,
        "quality": body.quality if body.quality in ("low", "medium", "high") else "medium",
        "size": "{width}x{height}".format(**job.pictures[0]) if job.pictures else "auto",
        "usage": {
            "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        },
    }  # fmt: skip


async def _events(queue: Queue, job: Job, body: Generation, kind: str) -> AsyncIterator[str]:
    """Partial pictures at even distances, then each finished one; a client that goes away cancels."""
    sent = 0
    try:
        async for _ in queue.changes(job):
            due = sent < body.partial_images and job.step * (body.partial_images + 1) >= job.steps * (
                sent + 1
            )
            if due and job.preview:
                partial = {"b64_json": as_base64(job.preview), "partial_image_index": sent}
                yield _event(f"{kind}.partial_image", job, body, partial)
                sent += 1
            else:
                yield ": still drawing\n\n"
        for text in await encoded(await contents(queue, finished(job).pictures)):
            yield _event(f"{kind}.completed", job, body, {"b64_json": text})
    except Problem as problem:
        yield server_sent("error", {"type": "error", **error_body(problem)})
    finally:
        if not job.over and not queue.draining:
            await queue.cancel(job)


def _event(name: str, job: Job, body: Generation, more: dict[str, Any]) -> str:
    data = {"type": name, "created_at": int(time.time()), **more, **_about(job, body)}
    return server_sent(name, data)
