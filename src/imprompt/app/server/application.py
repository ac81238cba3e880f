"""The FastAPI application: routes of all protocols, the page, health and metrics, and one form of errors."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from imprompt import __version__
from imprompt.app.server import a1111, a1111_controlnet, native, openai
from imprompt.app.server.bodies import first_fault
from imprompt.app.server.capabilities import capabilities
from imprompt.app.server.guard import Guard, answer
from imprompt.app.server.metrics import Metrics
from imprompt.app.server.problems import Problem, problem_of
from imprompt.app.server.protocols import unchanged
from imprompt.app.server.queue import Queue
from imprompt.app.server.settings import Settings
from imprompt.app.server.store import Store
from imprompt.errors import ImpromptError
from imprompt.schema.request import Request

STATIC = Path(__file__).parent / "static"
_NOT_READY = "loading, shutting down, or failed: the default base cannot be loaded"
_TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml", ".webp": "image/webp",
    ".webmanifest": "application/manifest+json",
}  # fmt: skip


def create_app(settings: Settings) -> FastAPI:
    """The server as an ASGI application; its workers start and end with its lifespan.

    Raises :class:`~imprompt.errors.UsageError` for settings that would serve strangers without a token, and
    for a folder that cannot be used.
    """
    settings.check()
    store = Store(settings.folder, stored_bytes=settings.limits.stored_bytes)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        metrics = Metrics()
        app.state.queue = queue = Queue(settings, store, metrics)
        metrics.watch(queue)
        await queue.start()
        # What a first request would import, imported beside; the server answers meanwhile.
        warming = asyncio.create_task(asyncio.to_thread(_warm_up, settings))
        watching = asyncio.create_task(queue.watch_loop())
        yield
        watching.cancel()
        await asyncio.wait([warming])
        await queue.stop()

    app = FastAPI(
        title="imprompt", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        openapi_url="/api/v1/openapi.json",
        middleware=[Middleware(Guard, settings=settings, error_body=error_body)],
    )  # fmt: skip
    app.state.settings = settings
    for router in (native.router, openai.router, a1111.router, a1111_controlnet.router):
        app.include_router(router)
    _add_plain_routes(app)
    _add_page(app)
    _add_errors(app)
    _describe_requests(app)
    return app


def _warm_up(settings: Settings) -> None:
    """Import what a first request would, and let the garbage collector never look at all that again."""
    capabilities(settings)
    gc.freeze()


def error_body(path: str, problem: Problem) -> dict[str, Any]:
    """An error in the form of the protocol that the path belongs to."""
    if path.startswith("/v1/"):
        return openai.error_body(problem)
    if path.startswith(("/sdapi/", "/controlnet/")):
        return a1111.error_body(problem)
    return {"error": problem.to_dict()}


def _add_plain_routes(app: FastAPI) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """The server runs."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], responses={503: {"description": _NOT_READY}})
    async def readyz() -> JSONResponse:
        """A worker has loaded its model; else what it waits for, and of ``failed`` the reason."""
        queue: Queue = app.state.queue
        if queue.ready:
            return JSONResponse({"status": "ready"})
        if queue.draining or queue.problem is None:
            return JSONResponse({"status": "draining" if queue.draining else "loading"}, 503)
        return JSONResponse({"status": "failed", "reason": queue.problem}, 503)

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        queue: Queue = app.state.queue
        return Response(queue.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    """The page's files; only those that are there when the server starts."""
    files = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*") if path.is_file()}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    @app.api_route("/static/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(http: HTTPRequest, name: str = "index.html") -> Response:
        if name not in files:
            raise Problem(404, "not_found", "there is no such page.")
        path = files[name]
        headers = {"Cache-Control": "no-cache"}
        found = FileResponse(path, media_type=_TYPES[path.suffix], headers=headers, stat_result=path.stat())
        headers["ETag"] = found.headers["etag"]
        return Response(None, 304, headers) if unchanged(http, headers["ETag"]) else found


def _describe_requests(app: FastAPI) -> None:
    """Put the schema of a request, which routes read by themselves, into the OpenAPI document."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        request = Request.model_json_schema(ref_template="#/components/schemas/{model}")
        found = plain()
        found["components"]["schemas"] |= {**request.pop("$defs"), "Request": request}
        return found

    app.openapi = openapi  # type: ignore[method-assign]


def _add_errors(app: FastAPI) -> None:
    def told(http: HTTPRequest, problem: Problem) -> Response:
        return answer(problem, error_body(http.url.path, problem))

    @app.exception_handler(Problem)
    async def problem(http: HTTPRequest, error: Problem) -> Response:
        return told(http, error)

    @app.exception_handler(ImpromptError)
    async def own(http: HTTPRequest, error: ImpromptError) -> Response:
        return told(http, problem_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HTTPRequest, error: RequestValidationError) -> Response:
        field, message = first_fault([{**error.errors()[0], "loc": error.errors()[0]["loc"][1:]}])
        return told(http, Problem(422, "invalid_request", message, field))

    @app.exception_handler(HTTPException)
    async def plain(http: HTTPRequest, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "error")
        found = Problem(error.status_code, code, f"{error.detail}.", headers=dict(error.headers or {}))
        return told(http, found)

    @app.exception_handler(ClientDisconnect)
    async def gone(http: HTTPRequest, error: ClientDisconnect) -> Response:
        return Response(None, 499)  # nobody reads it; without it, the log calls it a fault of the server

    @app.exception_handler(Exception)
    async def unexpected(http: HTTPRequest, error: Exception) -> Response:
        text = f"an unexpected {type(error).__name__}; the server's log says more."
        return told(http, Problem(500, "internal", text))
