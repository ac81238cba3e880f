"""What tests of the page do with it again and again."""

import base64
from collections.abc import Callable

from serving import Running

Open = Callable[..., object]
"""Opens the page at a width and a height; see tests/browser/conftest.py."""


def set_up(page, prompt: str = "a cat", steps: int = 3) -> None:
    """Say what to draw, in few steps, with a seed."""
    page.fill("#prompt", prompt)
    page.get_by_text("Fine tuning").click()
    page.get_by_label("Steps").fill(str(steps))
    page.get_by_label("Seed", exact=True).fill("5")
    page.get_by_label("Seed", exact=True).press("Tab")


def draw(page) -> None:
    page.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_selector("img.result, .cell .tile")


def file(content: bytes, name: str = "picture.png") -> dict[str, object]:
    return {"name": name, "mimeType": "image/png", "buffer": content}


def add_reference(page, content: bytes) -> None:
    count = page.locator("#references > li").count()
    page.locator("#reference-drop input[type=file]").set_input_files([file(content)])
    page.locator("#references > li").nth(count).wait_for()


def last_request(running: Running) -> dict:
    with running.client() as client:
        return client.get("/api/v1/history?limit=1").json()["jobs"][0]["request"]


def dropped(page, content: bytes):
    """A file as the desktop or the clipboard hands it over."""
    return page.evaluate_handle(
        """([text]) => {
            const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            return data;
        }""",
        [base64.b64encode(content).decode()],
    )


def drop(page, selector: str, content: bytes) -> None:
    """Drop a file as the desktop does: enter the window, then drop on a target."""
    data = dropped(page, content)
    page.dispatch_event("body", "dragenter", {"dataTransfer": data})
    page.wait_for_selector(selector)
    page.dispatch_event(selector, "drop", {"dataTransfer": data})
