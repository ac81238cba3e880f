"""Reading what clients send: JSON within limits, multipart, base64 pictures, and requests that stay inside.

No client names a file, a folder, a URL or a device of the server: pictures are ids of the store, models are
names that the server offers.
"""

import base64
import binascii
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, model_validator
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest

from imprompt import catalog
from imprompt.app.server.problems import Problem, problem_of, refused
from imprompt.app.server.settings import Settings
from imprompt.app.server.store import ID
from imprompt.errors import ImpromptError, UsageError
from imprompt.io import read_json
from imprompt.schema.request import Request

Fields = TypeVar("Fields", bound=BaseModel)
_OWN = ("device", "dtype", "offload", "quantize", "compile", "face_model", "hashes", "embeddings")
"""Fields that are the server's own affair."""
_PIECE = 1 << 20
"""Characters of base64 decoded at once, between which other threads may run; a multiple of 4."""
_DATA_URL = re.compile(r"data:image/(?:png|jpeg|webp|gif|bmp|avif|\*);base64,", re.IGNORECASE)


async def json_body(http: HTTPRequest, settings: Settings) -> dict[str, Any]:
    """The JSON object in the body. Raises :class:`Problem`."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise Problem(415, "media_type", "the body must be JSON, with Content-Type: application/json.")
    return parsed(await http.body(), settings)


def parsed(text: bytes | str, settings: Settings) -> dict[str, Any]:
    """A JSON object, within the limits. Raises :class:`Problem`."""
    limits = settings.limits
    try:
        found: dict[str, Any] = read_json(
            text, "body", error=UsageError, max_bytes=limits.body_bytes, max_depth=limits.json_depth
        )
    except UsageError as error:
        raise Problem(400, "bad_json", str(error)) from error
    return found


class Body(BaseModel):
    """The fields of a body. One that is null counts as left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if value is not None}
        return values


def checked(
    model: type[Fields], values: object, *, status: int = 422, code: str = "invalid_request"
) -> Fields:
    """The values as a model. Raises :class:`Problem` that names the first field at fault."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        field, message = first_fault(error.errors())
        raise Problem(status, code, message, field) from error


def first_fault(faults: Sequence[Any]) -> tuple[str, str]:
    """The field and the message of the first of pydantic's errors."""
    field = ".".join(str(part) for part in faults[0]["loc"])
    return field, f"{field}: {faults[0]['msg']}."


def described(
    model: type[BaseModel],
    *,
    kind: str = "application/json",
    files: Sequence[str] = (),
    records: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """For the OpenAPI schema: a body of the model's fields, and of files, the first of which is required.

    ``records``: fields whose schema is one of the document's own.
    """
    schema = model.model_json_schema()
    for name, record in (records or {}).items():
        schema["properties"][name] = {"$ref": f"#/components/schemas/{record}"}
    schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
    schema["required"] = [*schema.get("required", ()), *files[:1]]
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


@asynccontextmanager
async def form_body(http: HTTPRequest, settings: Settings, *files: str) -> AsyncIterator[FormData]:
    """The parts of a multipart body, with no other ``files`` than these. Raises :class:`Problem`."""
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Problem(415, "media_type", "the body must be multipart/form-data.")
    parts = settings.limits.parts
    try:
        form = await http.form(max_files=parts, max_fields=parts, max_part_size=settings.limits.json_bytes)
    except (HTTPException, ValueError, KeyError) as error:
        detail = f" ({error.detail})" if isinstance(error, HTTPException) else ""
        text = f"the body is no valid multipart/form-data{detail}."
        raise Problem(400, "bad_multipart", text) from error
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name not in files:
                raise refused(name[:80], f"files are sent as {' or '.join(files)}.", "unknown_parameter")
        yield form
    finally:
        await form.close()


def texts(form: FormData) -> dict[str, list[str]]:
    """The parts that are no files: all values of each name, in order."""
    found: dict[str, list[str]] = {}
    for name, value in form.multi_items():
        if isinstance(value, str):
            found.setdefault(name, []).append(value)
    return found


def uploads(form: FormData, *names: str) -> list[UploadFile]:
    """The files among the parts with one of these names, in order."""
    return [value for name, value in form.multi_items() if name in names and isinstance(value, UploadFile)]


def decoded_picture(value: object, field: str) -> bytes:
    """The bytes of a picture in base64, bare or as a data URL. Raises :class:`Problem`."""
    if not isinstance(value, str) or not value:
        raise refused(field, "a picture in base64 is expected.", "bad_picture")
    if value.startswith("data:"):
        match = _DATA_URL.match(value[:64])
        if match is None:
            raise refused(field, "this data URL is no picture in base64.", "bad_picture")
        value = value[match.end() :]
    elif "://" in value[:16]:
        raise refused(field, "pictures are not fetched from URLs; send base64.", "bad_picture")
    try:
        return b"".join(
            base64.b64decode(value[start : start + _PIECE], validate=True)
            for start in range(0, len(value), _PIECE)
        )
    except (binascii.Error, ValueError) as error:
        raise refused(field, f"this is not base64 ({error}).", "bad_picture") from error


def read_request(values: Mapping[str, Any], settings: Settings) -> Request:
    """A client's request, valid and within what the server offers. Raises :class:`Problem`."""
    values = dict(values)
    values.setdefault("base", settings.base)
    for name in _OWN:
        default = Request.model_fields[name].get_default(call_default_factory=True)
        if values.pop(name, default) not in (default, None, [], {}):
            raise refused(name, "this is decided by the server; leave it out.", "not_offered")
    try:
        request = Request.from_mapping(values)
    except ImpromptError as error:
        problem = problem_of(error)
        problem.status = 422
        raise problem from error
    _check_names(request, settings)
    _check_limits(request, settings)
    for name in request.files:
        if not ID.fullmatch(name):
            text = f"'{name[:80]}' is no picture's id; upload the picture first."
            raise Problem(422, "unknown_picture", text, "images")
    return request


def _check_names(request: Request, settings: Settings) -> None:
    """Raises :class:`Problem` for models that the server does not offer."""
    adapters = settings.known_adapters
    named: list[tuple[str, str | None, Mapping[str, object]]] = [
        ("base", request.base, settings.known_bases),
        ("adapter", request.adapter, adapters),
        *(("images.adapter", each.adapter, adapters) for each in request.images),
        *(("loras.path", each.path, settings.loras) for each in request.loras),
        *(("controls.model", each.model, catalog.controls()) for each in request.controls),
        ("motion", request.motion, catalog.motions()),
    ]
    for field, name, known in named:
        if name is not None and name not in known:
            raise refused(field, f"'{name[:80]}' is not offered by this server.", "not_offered")


def _check_limits(request: Request, settings: Settings) -> None:
    """Raises :class:`Problem` for more work than one job may make."""
    limits = settings.limits
    asked: list[tuple[str, int | None, int]] = [
        ("count", request.count, limits.count),
        ("steps", request.steps, limits.steps),
        ("frames", request.frames, limits.frames),
        ("size", max(request.size) if request.size else None, limits.side),
    ]
    for field, value, most in asked:
        if value is not None and value > most:
            raise refused(field, f"{value} is asked, this server draws {most}.", "over_limit")
