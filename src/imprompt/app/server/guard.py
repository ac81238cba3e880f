"""What every HTTP message passes before a route sees it: who may ask, from where, and how much.

Refused are other names than the server's in Host (DNS rebinding), requests that another site's page makes,
missing or wrong tokens, and bodies that are too large or arrive too slowly; the latter are counted while they
arrive, whatever Content-Length says. Headers that do not end are cut off by :class:`TimedProtocol`.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import time
from collections.abc import Callable, MutableMapping
from typing import Any, TypeAlias

import h11
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from imprompt.app.server.door import door
from imprompt.app.server.problems import Problem
from imprompt.app.server.settings import Settings

COOKIE = "imprompt_token"
_OPEN = ("/healthz", "/readyz")  # need no token: whether the server runs, and what keeps it from drawing
_READS = ("GET", "HEAD", "OPTIONS")

ErrorBody: TypeAlias = Callable[[str, Problem], dict[str, Any]]
"""How an error is told under a path: each protocol has its own form."""

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; manifest-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
}


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: Settings, error_body: ErrorBody) -> None:
        self._app, self._settings, self._error_body = app, settings, error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused, pass on what is not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_origin(scope, headers)
            if (welcome := self._welcome(scope)) is not None:
                await welcome(scope, receive, send)
                return
            self._check_token(scope, headers)
            limited = self._limited(scope, headers, receive)
        except Problem as problem:
            await self._refusal(scope, headers, problem)(scope, receive, send)
            return
        await self._app(scope, limited, _with_headers(send))

    def _refusal(self, scope: Scope, headers: Headers, problem: Problem) -> Response:
        """A problem as an answer; a person at the page's address gets a field for the token instead."""
        person = scope["path"] == "/" and "text/html" in headers.get("accept", "")
        if person and problem.code == "unauthorized":
            return door(_HEADERS, wrong="token" in QueryParams(scope["query_string"]))
        return answer(problem, self._error_body(scope["path"], problem))

    # ---- who and from where

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        allowed = self._settings.hosts
        if allowed is not None and _name(host) not in allowed:
            raise Problem(403, "bad_host", "the server is not reached by this name; say --allow-host NAME.")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        own = origin is None or origin.partition("://")[2] == host
        visit = scope["method"] in _READS and headers.get("sec-fetch-mode") == "navigate"
        if not own or (site in ("cross-site", "same-site") and not visit):
            raise Problem(403, "cross_origin", "pages of other sites may not use this server.")

    def _welcome(self, scope: Scope) -> Response | None:
        """``/?token=…`` in the browser: keep the token in a cookie and show the page."""
        if self._settings.token is None or scope["path"] != "/" or not scope["query_string"]:
            return None
        given = QueryParams(scope["query_string"]).get("token", "")
        if not self._matches(given):
            return None
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, given, httponly=True, samesite="strict", max_age=30 * 24 * 3600)
        return response

    def _check_token(self, scope: Scope, headers: Headers) -> None:
        scope.setdefault("state", {})["client"] = _client(scope, headers)
        if self._settings.token is None or scope["path"] in _OPEN:
            return
        if not any(map(self._matches, _tokens(HTTPConnection(scope)))):
            raise Problem(
                401, "unauthorized",
                "send the server's token as 'Authorization: Bearer TOKEN', or open /?token=TOKEN.",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _matches(self, given: str) -> bool:
        token = self._settings.token or ""
        return hmac.compare_digest(_digest(given), _digest(token))

    # ---- how much

    def _limited(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """``receive`` that ends with a :class:`Problem` where the body is too large or too slow."""
        limits = self._settings.limits
        path = scope["path"]
        cap = limits.json_bytes
        if path.startswith(("/v1/", "/sdapi/", "/controlnet/")):
            cap = limits.body_bytes
        elif path == "/api/v1/pictures":
            cap = limits.picture_bytes + 64 * 1024
        too_large = Problem(
            413, "too_large", f"the body is larger than {cap // 1024} kB.", headers={"Connection": "close"}
        )
        stated = headers.get("content-length", "0")
        if not stated.isdigit() or int(stated) > cap:
            raise too_large
        end = time.monotonic() + limits.body_seconds
        received, complete = 0, False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError as error:
                raise Problem(
                    408, "too_slow", f"the body did not arrive within {limits.body_seconds:g} s.",
                    headers={"Connection": "close"},
                ) from error  # fmt: skip
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > cap:
                raise too_large
            return message

        return limited


def answer(problem: Problem, body: MutableMapping[str, Any]) -> JSONResponse:
    """A problem as an HTTP answer."""
    return JSONResponse(body, problem.status, {**_HEADERS, **problem.headers})


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending


def _name(host: str) -> str:
    """A Host header without its port, in lower case."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).lower()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _tokens(http: HTTPConnection) -> list[str]:
    """Tokens that a request carries: the page's cookie, bearer, the password of basic authentication."""
    found = [http.cookies.get(COOKIE, "")]
    scheme, _, value = http.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        found.append(value.strip())
    elif scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):  # no password
            found.append(base64.b64decode(value, validate=True).decode().partition(":")[2])
    return found


def _client(scope: Scope, headers: Headers) -> str:
    """Whose turn it is: the name a client gives itself in X-Client-Id, and its address."""
    address = (scope.get("client") or ("",))[0]
    name = headers.get("x-client-id", "")
    return f"{address} {name[:64]}" if name.isascii() and name.isprintable() else address


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a limit on how long headers may take to arrive."""

    header_seconds = 15.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection is open; its first request is awaited."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self.transport.close)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
