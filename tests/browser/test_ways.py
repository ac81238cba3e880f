"""Ways of using the page other than one tab and a mouse: keys alone, double clicks, two tabs, less motion."""

import re
import threading

import pytest

from browsing import Open, add_reference, draw, file, last_request, set_up
from serving import Running, picture

pytestmark = [pytest.mark.slow]

NAME = "(({ ariaLabel, id, value }) => ariaLabel || id || value)(document.activeElement)"


def test_the_focus_stays_where_the_keyboard_left_it(opening: Open) -> None:
    page = opening()
    focused = lambda: page.evaluate(NAME)  # noqa: E731

    page.get_by_role("tab", name="Inpaint").focus()
    page.keyboard.press("Enter")
    assert focused() == "tab-inpaint"
    page.keyboard.press("ArrowLeft")
    assert focused() == "tab-edit"
    page.get_by_role("radio", name="Square").focus()
    page.keyboard.press("ArrowRight")
    assert focused() == "tall"
    page.get_by_label("Width").focus()
    page.keyboard.type("192")
    page.keyboard.press("Tab")
    page.wait_for_timeout(100)
    assert focused() == "Height"

    add_reference(page, picture("red"))
    add_reference(page, picture("blue"))
    page.locator("#references summary").first.focus()
    page.keyboard.press("Enter")
    page.get_by_label("Avoid this").first.focus()
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.closest('.card.avoid') !== null")
    page.get_by_role("button", name="Remove: Picture 1").focus()
    page.keyboard.press("Enter")
    assert focused() == "Remove: Picture 1"  # of the other one, which is the first now
    page.keyboard.press("Enter")
    assert focused() == "Drop, paste or choose a picture"

    page.locator("#model").focus()
    page.keyboard.press("Enter")
    page.get_by_role("radio", name=re.compile("its own choice")).focus()
    page.keyboard.press("Escape")
    assert focused() == "Model: emoji. Model and adapter"


def test_a_picture_is_opened_and_left_with_keys_alone(opening: Open) -> None:
    page = opening()
    set_up(page)
    page.get_by_label("How many").fill("2")
    draw(page)
    page.get_by_role("button", name="Picture 2").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Back").wait_for()
    assert page.evaluate(NAME) == "Picture"  # the stage, from which Tab goes on to what can be done with it
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Picture 2").wait_for()


def test_a_double_click_draws_once(opening: Open, running: Running) -> None:
    page = opening()
    page.locator(".example").nth(2).dblclick()
    page.wait_for_selector("img.result")
    set_up(page, "a star")
    page.get_by_role("button", name="Draw", exact=True).dblclick()
    page.get_by_role("button", name="Stop").wait_for()
    page.wait_for_selector("img.result[alt*='a star']")
    assert last_request(running)["prompt"] == "a star"


def test_two_tabs_draw_and_keep_their_own_words(opening: Open) -> None:
    first = opening()
    set_up(first, "a cat", steps=15)
    first.get_by_role("button", name="Draw", exact=True).click()
    first.get_by_text("of 15").wait_for()
    second = first.context.new_page()
    second.goto(first.url)
    second.wait_for_selector("html[data-ready]")
    assert second.get_by_role("button", name="Draw", exact=True).is_visible()
    second.fill("#prompt", "a star")
    draw(second)
    second.wait_for_selector("img.result[alt*='a star']")
    first.wait_for_selector("img.result[alt*='a cat']")
    first.reload()
    first.wait_for_selector("html[data-ready]")
    assert first.input_value("#prompt") == "a cat"


def test_a_drawing_finished_while_the_page_was_away_is_shown(opening: Open, running: Running) -> None:
    page = opening()
    set_up(page, "a rocket", steps=10)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("of 10").wait_for()
    page.goto("about:blank")
    with running.client() as client:
        while client.get("/api/v1/history?limit=1").json()["jobs"][0]["request"]["prompt"] != "a rocket":
            page.wait_for_timeout(100)
    page.goto(running.url)
    page.wait_for_selector("img.result[alt*='a rocket']")


def test_a_file_on_its_way_can_be_given_up(opening: Open) -> None:
    page = opening()
    let_go = threading.Event()
    page.route("**/api/v1/pictures", lambda route: None if not let_go.is_set() else route.continue_())
    page.locator("#reference-drop input[type=file]").set_input_files([file(picture(), "large.png")])
    page.get_by_text("Sending large.png").wait_for()
    page.get_by_role("button", name="Do not send it").click()
    let_go.set()
    add_reference(page, picture("blue"))
    assert page.locator("#references > li").count() == 1
    assert page.locator(".toast").count() == 0
    set_up(page)
    draw(page)


def test_who_asked_for_less_motion_gets_less(opening: Open, running: Running) -> None:
    page = opening(390, 844, reduced_motion="reduce")
    set_up(page)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_selector(".shimmer")
    assert page.evaluate("document.querySelector('#stage').getBoundingClientRect().top") >= 0  # there at once
    assert page.evaluate("getComputedStyle(document.querySelector('.shimmer')).animationName") == "none"
    page.wait_for_selector("img.result")
