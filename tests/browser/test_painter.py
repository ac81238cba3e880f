"""Painting masks in real Chromium, with a mouse and with fingers."""

import pytest

from browsing import Open, file
from serving import picture

pytestmark = [pytest.mark.slow]


def paint_over(page, size: tuple[int, int]):
    """Open the painter over a picture of this size; gives its sheet."""
    page.get_by_role("tab", name="Inpaint").click()
    page.locator("#source input[type=file]").set_input_files([file(picture("blue", size))])
    page.get_by_role("button", name="Paint what to redraw").click()
    canvas = page.locator("canvas.paper")
    canvas.wait_for()
    return canvas


@pytest.mark.parametrize("view", [(390, 844), (844, 390), (1440, 900)])
def test_the_sheet_has_the_pictures_proportions_and_can_be_seen_whole(
    opening: Open, view: tuple[int, int], shot
) -> None:
    page = opening(*view, has_touch=True)
    canvas = paint_over(page, (300, 900))
    box = canvas.bounding_box()
    assert box["height"] / box["width"] == pytest.approx(3, rel=0.02)
    assert page.get_by_role("button", name="Use this area").bounding_box()["y"] < view[1] - 40
    shot(page, f"13-painter-{view[0]}")
    for _ in range(3):
        page.get_by_role("button", name="Zoom in").click()
    large = canvas.bounding_box()
    assert large["height"] / large["width"] == pytest.approx(3, rel=0.02)
    assert large["width"] / box["width"] == pytest.approx(1.5**3, rel=0.02)
    page.evaluate("document.querySelector('.easel').scrollTo(0, 0)")  # nothing lies beyond its left edge
    assert canvas.bounding_box()["x"] >= page.locator(".easel").bounding_box()["x"] - 1


def test_two_fingers_move_the_sheet_and_paint_nothing(opening: Open) -> None:
    page = opening(390, 844, has_touch=True, is_mobile=True)
    canvas = paint_over(page, (300, 300))
    for _ in range(3):
        page.get_by_role("button", name="Zoom in").click()
    easel = page.locator(".easel").bounding_box()
    before = canvas.bounding_box()
    fingers = page.context.new_cdp_session(page)
    x, y = easel["x"] + easel["width"] / 2, easel["y"] + easel["height"] / 2

    def touch(kind: str, *points: tuple[float, float]) -> None:
        named = [{"x": a, "y": b, "id": number} for number, (a, b) in enumerate(points)]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": named})

    touch("touchStart", (x, y))
    touch("touchStart", (x, y), (x + 60, y))
    for step in range(1, 6):
        touch("touchMove", (x - 10 * step, y), (x + 60 - 10 * step, y))
    touch("touchEnd")
    assert canvas.bounding_box()["x"] == pytest.approx(before["x"] - 50, abs=12)
    page.get_by_role("button", name="Use this area").click()
    page.get_by_role("dialog").get_by_text("Nothing is painted yet.").wait_for()


def test_what_is_painted_is_not_lost_without_a_question(opening: Open) -> None:
    page = opening()
    canvas = paint_over(page, (200, 200))
    page.keyboard.press("Escape")
    canvas.wait_for(state="detached")  # nothing was painted, so nothing is asked
    page.get_by_role("button", name="Paint what to redraw").click()
    answers, asked = [False, True], []

    def answer(dialog) -> None:
        asked.append(dialog.message)
        dialog.accept() if answers.pop(0) else dialog.dismiss()

    page.on("dialog", answer)
    canvas.focus()
    page.keyboard.press("Space")
    page.mouse.click(5, 5)
    assert canvas.is_visible()
    page.get_by_role("button", name="Close").click()
    canvas.wait_for(state="detached")
    assert asked == ["Leave without using what you painted?"] * 2
