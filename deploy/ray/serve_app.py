"""A Ray Serve application: one Engine a replica, requests that arrive together drawn as one batch.

    pip install imprompt 'ray[serve]'
    serve run deploy.ray.serve_app:app

    curl http://127.0.0.1:8000/ -o owl.png -H 'Content-Type: application/json' \
        -d '{"request": {"prompt": "an owl", "images": ["@one"]}, "pictures": {"@one": "BASE64"}}'

Ray scales, places and restarts replicas; journal, page and the other protocols are `imprompt serve`'s.
"""

import base64
import binascii
import hashlib
import io
from typing import Any

from PIL import Image
from ray import serve
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from imprompt.encoders.images import load_image
from imprompt.errors import ImpromptError, UsageError
from imprompt.generation.engine import Engine, Result
from imprompt.schema.request import Request

_BODY_BYTES = 64 * 2**20
_SERVED = {"base": "emoji"}
"""Fields that clients may not choose here."""


@serve.deployment(
    ray_actor_options={"num_cpus": 1},  # num_gpus=1 where there are any
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8},
    max_ongoing_requests=32,
)
class Drawing:
    """Draws requests, up to eight at once."""

    def __init__(self) -> None:
        self.engine = Engine()

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.02)
    async def draw(self, jobs: list[tuple[Request, dict[str, Image.Image]]]) -> list[Result | ImpromptError]:
        """A result for each job, or its error; jobs that fit are drawn as one batch."""
        pictures: dict[str, Image.Image] = {}
        for _, own in jobs:
            pictures |= own
        try:
            return list(self.engine.run_batch([request for request, _ in jobs], pictures=pictures))
        except ImpromptError:
            return [self._alone(request, pictures) for request, _ in jobs]

    def _alone(self, request: Request, pictures: dict[str, Image.Image]) -> Result | ImpromptError:
        try:
            return self.engine.run(request, pictures=pictures)
        except ImpromptError as error:
            return error

    async def __call__(self, http: HTTPRequest) -> Response:
        """``{"request": {…}, "pictures": {"@NAME": "BASE64"}}`` → a PNG."""
        body = await http.body()
        try:
            if len(body) > _BODY_BYTES:
                raise UsageError(f"the body is larger than {_BODY_BYTES >> 20} MB.")
            job = _read(await http.json())
        except (ImpromptError, ValueError) as error:
            return _refused(error)
        result = await self.draw(job)
        if isinstance(result, ImpromptError):
            return _refused(result)
        stream = io.BytesIO()
        result.images[0].save(stream, "PNG")
        return Response(stream.getvalue(), media_type="image/png")


def _read(values: Any) -> tuple[Request, dict[str, Image.Image]]:
    """A request and its pictures under their hashes, so that jobs of one batch can share a mapping.

    Raises :class:`ImpromptError`.
    """
    if not isinstance(values, dict) or not isinstance(values.get("request"), dict):
        raise UsageError("the body must be an object with a request.")
    pictures, names = {}, {}
    for name, text in values.get("pictures", {}).items():
        if not name.startswith("@"):
            raise UsageError(f"pictures: '{name}' must begin with @.")
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, TypeError) as error:
            raise UsageError(f"pictures: '{name}' is not base64.") from error
        names[name] = hashlib.sha256(content).hexdigest()
        pictures[names[name]] = load_image(content)
    request = Request.from_mapping({**_renamed(values["request"], names), **_SERVED, "count": 1})
    if missing := set(request.files) - pictures.keys():
        raise UsageError(f"pictures: {', '.join(sorted(missing))} is named and not sent.")
    return request, pictures


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value


def _refused(error: Exception) -> JSONResponse:
    status = error.http_status if isinstance(error, ImpromptError) else 400
    return JSONResponse({"error": {"code": type(error).__name__, "message": str(error)}}, status)


app = Drawing.bind()
