"""A real server with the bundled model, started once for all tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from imprompt.app.server.settings import Settings
from serving import Running, start


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    found = start(Settings(folder=tmp_path_factory.mktemp("server")))
    yield found
    found.stop()


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start further servers, which end with the test."""
    started: list[Running] = []

    def begin(*, ready: bool = True, **changes: Any) -> Running:
        found = start(Settings(**{"folder": tmp_path / "server", **changes}), ready=ready)
        started.append(found)
        return found

    yield begin
    for one in started:
        if one.thread.is_alive():
            one.stop()


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    with running.client() as found:
        yield found
