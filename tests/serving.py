"""Starts real servers on 127.0.0.1 for tests, and does as their clients do."""

import asyncio
import io
import re
import socket
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageDraw

from imprompt.app.server.application import create_app
from imprompt.app.server.process import Server
from imprompt.app.server.queue import Queue
from imprompt.app.server.settings import Settings

STEPS = 3


@dataclass
class Running:
    """A server in a thread of this process."""

    settings: Settings
    server: Server
    queue: Queue
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.port}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, verify=False, **options)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.queue.close)
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(settings: Settings, *, ready: bool = True) -> Running:
    """Start a server and wait until it answers, and until a worker is ready."""
    settings = replace(settings, port=free_port())
    app = create_app(settings)
    server = Server(app, settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    headers = {"Authorization": f"Bearer {settings.token}"} if settings.token else {}
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if answers(settings.port, "/readyz" if ready else "/healthz", headers):
            return Running(settings, server, app.state.queue, server.loop, thread)
        assert thread.is_alive()
        time.sleep(0.05)
    raise AssertionError("the server did not start")


def answers(port: int, path: str, headers: dict[str, str] | None = None) -> bool:
    """Whether a server says at ``path`` that all is well."""
    try:
        # verify=False: reading the certificates for each question took longer than the server's start.
        answer = httpx.get(f"http://127.0.0.1:{port}{path}", headers=headers, verify=False)
    except httpx.TransportError:
        return False
    return answer.status_code == 200


def written(folder: Path) -> set[Path]:
    """The pictures in a server's folder, wherever they are: files that are named by their contents."""
    return {path for path in folder.rglob("*") if re.fullmatch("[0-9a-f]{64}", path.name)}


def picture(colour: str = "red", size: tuple[int, int] = (128, 128), form: str = "PNG") -> bytes:
    """A disc on white, as a file."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse(
        (size[0] // 8, size[1] // 8, size[0] * 7 // 8, size[1] * 7 // 8), fill=colour
    )
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def mask(size: tuple[int, int] = (128, 128)) -> Image.Image:
    """White in the middle."""
    image = Image.new("L", size, 0)
    ImageDraw.Draw(image).rectangle(
        (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4), fill=255
    )
    return image


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def upload(client: httpx.Client, content: bytes) -> dict[str, Any]:
    answer = client.post("/api/v1/pictures", files={"file": ("picture.png", content, "image/png")})
    assert answer.status_code == 201, answer.text
    return answer.json()


def submit(client: httpx.Client, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    fields = {"prompt": "a cat", "steps": STEPS, "seed": 1, **fields}
    answer = client.post("/api/v1/jobs", json={"request": fields}, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


def wait(client: httpx.Client, job: str, seconds: float = 180) -> dict[str, Any]:
    """The job when it is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = client.get(f"/api/v1/jobs/{job}").json()
        if found["state"] in ("done", "failed", "cancelled"):
            return found
        time.sleep(0.05)
    raise AssertionError(f"job {job} is not over: {found}")
