"""Chromium and a real server for the page's tests, which are skipped where there is no Chromium."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from imprompt.app.server.settings import Settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page
from serving import Running, start

SHOTS = Path(os.environ.get("IMPROMPT_SCREENSHOTS", "outputs/browser"))


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    found = start(Settings(folder=tmp_path_factory.mktemp("server")))
    yield found
    found.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed; make test-browser says how")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opening(browser: "Browser", running: Running) -> Iterator[Callable[..., "Page"]]:
    """Open the page; fails the test for any script error or request to elsewhere."""
    contexts, wrong = [], []

    def begin(width: int = 1360, height: int = 860, **options: object) -> "Page":
        context = browser.new_context(viewport={"width": width, "height": height}, locale="en-GB", **options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: elsewhere(request.url))
        page.goto(running.url)
        page.wait_for_selector("html[data-ready]")
        return page

    def elsewhere(url: str) -> None:
        if not url.startswith((running.url, "data:", "blob:")):
            wrong.append(f"asked {url}")

    yield begin
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def shot() -> Callable[["Page", str], None]:
    """Keep a screenshot to look at."""

    def take(page: "Page", name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"{name}.png")

    return take
