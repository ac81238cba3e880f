"""A Ray Serve application: one Engine a replica, requests that arrive together drawn as one batch.

    pip install 'imprompt[serve,ray]'
    serve run deploy.ray.serve_app:app

    curl http://127.0.0.1:8000/ -o owl.png -H 'Content-Type: application/json' \
        -d '{"request": {"prompt": "an owl", "images": ["@one"]}, "pictures": {"@one": "BASE64"}}'

Ray scales, places and restarts replicas; journal, page and the other protocols are `imprompt serve`'s.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

from PIL import Image
from ray import serve
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from imprompt.app.server.bodies import decoded_picture, parsed, read_request
from imprompt.app.server.problems import Problem, problem_of
from imprompt.app.server.settings import Settings
from imprompt.encoders.images import load_image
from imprompt.errors import ImpromptError
from imprompt.generation.engine import Engine, Result
from imprompt.schema.request import Request

SETTINGS = Settings(folder=Path())
"""The base that is served, and what clients may ask for."""


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
        try:
            job = _read(parsed(await http.body(), SETTINGS))
        except (ImpromptError, Problem) as error:
            return _refused(error)
        result = await self.draw(job)
        if isinstance(result, ImpromptError):
            return _refused(result)
        stream = io.BytesIO()
        result.images[0].save(stream, "PNG")
        return Response(stream.getvalue(), media_type="image/png")


def _read(values: dict[str, Any]) -> tuple[Request, dict[str, Image.Image]]:
    """A request and its pictures under their hashes, so that jobs of one batch can share a mapping.

    Raises :class:`ImpromptError` and :class:`Problem`.
    """
    asked, given = values.get("request"), values.get("pictures", {})
    if not isinstance(asked, dict) or not isinstance(given, dict):
        raise Problem(400, "invalid_request", "an object with a request, and perhaps pictures, is expected.")
    contents = {name: decoded_picture(text, name) for name, text in given.items()}
    names = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    pictures = {names[name]: load_image(content) for name, content in contents.items()}
    request = read_request({**_renamed(asked, names), "base": SETTINGS.base, "count": 1}, SETTINGS)
    if missing := set(request.files) - pictures.keys():
        text = f"{', '.join(sorted(missing))} is named and not sent."
        raise Problem(422, "unknown_picture", text, "pictures")
    return request, pictures


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value


def _refused(error: ImpromptError | Problem) -> JSONResponse:
    problem = problem_of(error) if isinstance(error, ImpromptError) else error
    return JSONResponse({"error": problem.to_dict()}, problem.status)


app = Drawing.bind()
