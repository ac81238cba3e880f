"""Runs the application in uvicorn: one process, signals that drain first, and headers with a time limit."""

import asyncio
import contextlib
import signal
import socket
import sys
import threading
import webbrowser
from dataclasses import replace
from types import FrameType

import uvicorn
from fastapi import FastAPI

from imprompt.app.server.application import create_app
from imprompt.app.server.guard import TimedProtocol
from imprompt.app.server.queue import Queue
from imprompt.app.server.settings import Settings
from imprompt.errors import UsageError


class Server(uvicorn.Server):
    """uvicorn that, on SIGTERM, lets running jobs finish while it still answers."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        timed = type("Timed", (TimedProtocol,), {"header_seconds": settings.limits.header_seconds})
        config = uvicorn.Config(
            app, host=settings.host, port=settings.port, http=timed, ws="none", lifespan="on",
            access_log=False, log_config=None, server_header=False, date_header=False, proxy_headers=False,
            limit_concurrency=512, timeout_keep_alive=15, timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=32 * 1024,
        )  # fmt: skip
        super().__init__(config)
        self._app, self._drain_seconds = app, settings.limits.drain_seconds
        self.loop: asyncio.AbstractEventLoop | None = None
        """Where the application runs, once it does."""
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Note the loop that signals are handed to."""
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM: drain, then end. SIGINT, or a second signal: end now, jobs stay in the journal."""
        queue: Queue | None = getattr(self._app.state, "queue", None)
        if queue is None or self.loop is None:
            super().handle_exit(sig, frame)
        elif sig == signal.SIGTERM and not queue.draining:
            self.loop.call_soon_threadsafe(self._drain, queue, sig, frame)
        else:
            self.loop.call_soon_threadsafe(queue.close)
            super().handle_exit(sig, frame)

    def _drain(self, queue: Queue, sig: int, frame: FrameType | None) -> None:
        async def drain() -> None:
            await queue.drain(self._drain_seconds)
            queue.close()
            uvicorn.Server.handle_exit(self, sig, frame)

        self._draining = asyncio.get_running_loop().create_task(drain())


def serve(settings: Settings, *, open_page: bool = False) -> int:
    """Serve until a signal ends it; returns the exit code. Raises :class:`UsageError` for a port in use."""
    settings = replace(settings, port=_free_port(settings))
    server = Server(create_app(settings), settings)
    shown = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    page = f"http://{f'[{shown}]' if ':' in shown else shown}:{settings.port}/"
    print(f"imprompt: {page}" + (" (add ?token=… once)" if settings.token else ""), file=sys.stderr)
    if open_page:
        address = page + (f"?token={settings.token}" if settings.token else "")
        opening = threading.Timer(1.0, webbrowser.open, [address])
        opening.daemon = True
        opening.start()
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again that ended it
        server.run()
    return 0 if server.started else 1


def _free_port(settings: Settings) -> int:
    """The port to listen at, which for 0 the system chooses. Raises :class:`UsageError` for one in use."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host.strip("[]"), settings.port))
            return int(probe.getsockname()[1])
        except OSError as error:
            raise UsageError(
                f"cannot listen at {settings.host}:{settings.port} ({error.strerror}); say another --port."
            ) from error
