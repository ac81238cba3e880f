"""The page in real Chromium: what an artist does with it."""

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from browsing import Open, add_reference, draw, drop, dropped, file, last_request, set_up
from imprompt.output.clips import encode_clip
from serving import Running, picture, submit, wait

pytestmark = [pytest.mark.slow]
AXE = Path(os.environ.get("IMPROMPT_AXE", ".venv/axe/node_modules/axe-core/axe.min.js"))


def test_an_example_draws_with_one_click(opening: Open, shot) -> None:
    page = opening()
    shot(page, "1-welcome")
    page.locator(".example").nth(1).click()
    page.wait_for_selector("progress[value]")
    page.wait_for_selector("img.preview:not([hidden])")
    shot(page, "2-drawing")
    page.wait_for_selector("img.result")
    page.wait_for_selector("#gallery .tile")
    shot(page, "3-drawn")
    assert page.locator("#status").inner_text() == "The picture is ready."


def test_a_reference_with_everything_set_becomes_the_request(opening: Open, running: Running, shot) -> None:
    page = opening()
    set_up(page, "an owl")
    add_reference(page, picture("red"))
    card = page.locator("#references > li").first
    card.get_by_label("Strength").fill("0.8")
    card.get_by_role("radio", name="Style").check()
    card.locator("summary").click()
    card.get_by_label("Acts from").fill("0.25")
    card.get_by_label("Acts from").press("Tab")
    shot(page, "4-reference")
    draw(page)
    (prompt,) = last_request(running)["images"]
    assert (prompt["scale"], prompt["start"], prompt["profile"]) == (0.8, 0.25, "style")


def test_a_transformer_takes_all_of_a_picture(opening: Open) -> None:
    """Layer profiles are of UNets; the engine refuses them elsewhere."""
    page = opening()
    add_reference(page, picture("red"))
    page.locator("#references > li").first.get_by_role("radio", name="Style").check()
    page.evaluate("""() => {
        const draft = JSON.parse(sessionStorage.getItem("imprompt.draft"));
        sessionStorage.setItem("imprompt.draft", JSON.stringify({ ...draft, base: "flux" }));
    }""")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    card = page.locator("#references > li").first
    assert card.get_by_role("radio", name="All").is_checked()
    assert card.get_by_role("radio", name="Style").is_disabled()
    assert (
        page.evaluate("""async () => {
        const { toRequest } = await import("/static/settings.js");
        return toRequest().images[0].profile ?? null;
    }""")
        is None
    )


def test_paints_a_mask_and_redraws_inside_it(opening: Open, running: Running, shot) -> None:
    page = opening()
    page.get_by_role("tab", name="Inpaint").click()
    set_up(page, "a star")
    page.locator("#source input[type=file]").set_input_files([file(picture("blue"))])
    page.get_by_role("button", name="Paint what to redraw").click()
    canvas = page.locator("canvas.paper")
    box = canvas.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1], steps=5)
    page.mouse.up()
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Use this area").click()
    assert page.get_by_role("dialog").get_by_text("Nothing is painted yet.").is_visible()
    canvas.focus()
    for key in ("]", " ", "ArrowRight", " "):  # painting without a mouse
        page.keyboard.press(key)
    shot(page, "5-painter")
    page.get_by_role("button", name="Use this area").click()
    page.get_by_role("button", name="Change the area").wait_for()
    draw(page)
    request = last_request(running)
    assert request["task"] == "inpaint"
    with running.client() as client:
        mask = client.get(f"/api/v1/pictures/{request['mask']}").content
    assert mask.startswith(b"\x89PNG")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_label("How much of the first picture is shown").fill("30")
    shot(page, "6-compare")


def test_a_painted_area_is_inverted_undone_and_zoomed(opening: Open, running: Running) -> None:
    page = opening()
    set_up(page, "an owl", steps=2)
    add_reference(page, picture("red"))
    page.locator("#references summary").first.click()
    page.get_by_role("button", name="Only in one area").click()
    canvas = page.locator("canvas.paper")
    canvas.focus()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Invert").click()
    for name in ("Undo", "Redo"):
        page.get_by_role("button", name=name).click()
    before = canvas.bounding_box()["width"]
    page.get_by_role("button", name="Zoom in").click()
    assert canvas.bounding_box()["width"] > before
    page.get_by_role("button", name="Use this area").click()
    page.get_by_role("button", name="Acts in the painted area", exact=True).wait_for()
    draw(page)
    (prompt,) = last_request(running)["images"]
    with running.client() as client:
        mask = Image.open(io.BytesIO(client.get(f"/api/v1/pictures/{prompt['mask']}").content)).convert("L")
    assert mask.getpixel((0, 0)) == 255
    assert mask.getpixel((mask.width // 2, mask.height // 2)) == 0


def test_one_picture_is_avoided_and_the_shape_of_another_followed(
    opening: Open, running: Running, shot
) -> None:
    page = opening()
    set_up(page, "a house", steps=2)
    for colour in ("red", "green", "blue"):
        add_reference(page, picture(colour))
    for number in (1, 2):
        page.locator("#references > li").nth(number).locator("summary").click()
        page.locator("#references > li").nth(number).get_by_label("Avoid this").check()
    assert page.locator("#references > li.avoid").count() == 1
    page.get_by_text("Follow the shape of a picture").click()
    page.locator("#control input[type=file]").set_input_files([file(picture("black"))])
    page.locator("#control img.map:not([hidden])").wait_for()
    page.locator("#control").scroll_into_view_if_needed()
    shot(page, "12-control")
    draw(page)
    request = last_request(running)
    assert [bool(prompt["negative"]) for prompt in request["images"]] == [True, False]
    assert [control["kind"] for control in request["controls"]] == ["canny"]


def test_a_drawn_picture_is_dragged_back_sent_on_and_pasted(opening: Open, running: Running) -> None:
    with running.client() as client:
        wait(client, submit(client, prompt="a key", seed=41, steps=2)["id"])
    page = opening()
    tile = page.locator("#gallery .tile").first
    tile.hover()
    page.mouse.down()
    page.mouse.move(600, 300, steps=4)
    page.locator("[data-target=restore]").hover()
    page.mouse.up()
    page.get_by_text("Settings restored.").wait_for()
    assert page.input_value("#prompt") == "a key"
    tile.click()
    page.get_by_role("button", name="Edit it").click()
    assert page.get_by_role("tab", name="Edit").get_attribute("aria-selected") == "true"
    assert page.locator("#source .thumb img").is_visible()
    data = dropped(page, picture("green"))
    page.evaluate(
        "(data) => document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: data }))", data
    )
    page.locator("#references > li").first.wait_for()
    draw(page)
    request = last_request(running)
    assert (request["task"], request["seed"], len(request["images"])) == ("edit", 41, 1)


def test_a_video_is_redrawn(opening: Open, running: Running) -> None:
    page = opening()
    page.get_by_role("tab", name="Animate").click()
    set_up(page, "a cat", steps=2)
    frames = [Image.new("RGB", (64, 64), (60 * number, 80, 200)) for number in range(4)]
    video = {"name": "a.mp4", "mimeType": "video/mp4", "buffer": encode_clip(frames, ".mp4", 8, "")}
    page.locator("#source input[type=file]").set_input_files([video])
    page.locator("#source .thumb img").wait_for()
    draw(page)
    request = last_request(running)
    assert (request["task"], request["frames"]) == ("animate", 4)


def test_words_that_the_bundled_model_knows_are_written_by_a_click(opening: Open) -> None:
    page = opening()
    page.locator("#words-hint summary").click()
    page.get_by_role("button", name="owl", exact=True).click()
    for style in ("neon", "clay"):
        page.get_by_role("button", name=f"{style} style", exact=True).click()
    assert page.input_value("#prompt") == "an owl, clay style"


def test_a_dropped_picture_gives_its_settings_back(opening: Open, running: Running) -> None:
    with running.client() as client:
        job = wait(client, submit(client, prompt="a rocket", seed=99, steps=2, size=[128, 96])["id"])
        content = client.get(job["pictures"][0]["url"]).content
    page = opening()
    drop(page, "[data-target=restore]", content)
    page.get_by_text("Settings restored.").wait_for()
    assert page.input_value("#prompt") == "a rocket"
    draw(page)
    request = last_request(running)
    assert (request["seed"], request["steps"], request["size"]) == (99, 2, [128, 96])
    drop(page, "[data-target=restore]", picture("red"))
    page.get_by_text("This picture carries no settings of imprompt.").wait_for()


def test_stops_within_a_step(opening: Open) -> None:
    page = opening()
    set_up(page, steps=150)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_selector("progress[value]")
    page.get_by_role("button", name="Stop").click()
    page.locator("#stage").get_by_text("Stopped.").wait_for()
    page.get_by_role("button", name="Draw", exact=True).wait_for()


def test_stopping_twice_is_as_stopping_once(opening: Open) -> None:
    page = opening()
    sent, held = [], []
    page.on("request", lambda request: sent.append(request.method + request.url.rpartition("/")[2]))
    page.route("**/jobs/*", lambda route: held.append(route) if route.request.method == "DELETE" else None)
    set_up(page, steps=150)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_selector("progress[value]")
    with page.expect_request(lambda request: request.method == "DELETE"):
        page.get_by_role("button", name="Stop").click()
    page.locator("#generate").click()
    held[0].continue_()
    page.locator("#stage").get_by_text("Stopped.").wait_for()
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    assert sent.count("POSTjobs") == 1
    page.get_by_role("button", name="Model and adapter").click()
    page.keyboard.press("Control+Enter")
    assert page.locator("#generate").inner_text() == "Draw"  # not under a dialog


def test_a_proxy_that_passes_no_events_on_hides_neither_the_picture_nor_the_stop(opening: Open) -> None:
    page = opening()
    page.route("**/events", lambda route: route.fulfill(status=502, body="bad gateway"))
    set_up(page, "an owl", steps=2)
    draw(page)
    page.get_by_label("Steps").fill("150")
    page.get_by_label("Steps").press("Tab")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_selector("progress[value]")
    page.get_by_role("button", name="Stop").click()
    page.locator("#stage").get_by_text("Stopped.").wait_for()
    page.get_by_role("button", name="Draw", exact=True).wait_for()


def test_deleting_says_how_many_pictures_go_and_takes_them_out_of_the_form(
    opening: Open, running: Running
) -> None:
    with running.client() as client:
        ids = [wait(client, submit(client, seed=8, steps=1, count=n)["id"])["id"] for n in (3, 1)]
    page = opening()
    asked = []
    page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept()))
    for _ in ids:
        page.locator("#gallery .tile").first.click()
        page.wait_for_selector("img.result")
        page.get_by_role("button", name="Use as reference").click()
        page.locator("#references > li").wait_for()
        page.get_by_role("button", name="Follow its shape").click()
        page.get_by_role("button", name="Edit it").click()
        page.get_by_role("button", name="Delete", exact=True).click()
        page.locator("#stage .welcome").wait_for()
        assert page.locator("#references > li, #control .card, #source .card").count() == 0
    assert asked == ["Delete this picture?", "Delete all 3 pictures of this drawing?"]
    with running.client() as client:
        assert [client.get(f"/api/v1/jobs/{job}").status_code for job in ids] == [404, 404]


def test_several_pictures_are_shown_together_and_stay_in_another_language(opening: Open) -> None:
    page = opening()
    set_up(page, "an owl", steps=1)
    page.get_by_label("How many").fill("2")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#stage .tile").nth(1).click()
    page.get_by_text("Seed 6").wait_for()
    page.get_by_role("button", name="中文").click()
    page.get_by_text("种子 6").wait_for()
    page.get_by_role("button", name="返回").click()
    assert page.locator("#stage .tile").count() == 2
    page.locator("#stage .tile").first.click()
    page.get_by_role("button", name="English").click()
    page.get_by_role("button", name="Compare with").click()
    page.locator("#gallery .tile").nth(1).click()
    assert page.locator("#stage .side").all_inner_texts() == ["an owl · Seed 5", "an owl · Seed 6"]


def test_a_server_that_does_not_answer_is_waited_for(opening: Open) -> None:
    page = opening()
    page.route("**/events", lambda route: route.abort())
    set_up(page, "an owl", steps=2)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#stage").get_by_text("The server does not answer; waiting for it").wait_for()
    page.unroute("**/events")
    page.wait_for_selector("img.result")


def test_a_picture_that_another_page_deleted_is_told(opening: Open, running: Running) -> None:
    with running.client() as client:
        job = wait(client, submit(client, seed=77, steps=1)["id"])
        page = opening()
        client.delete(f"/api/v1/history/{job['id']}")
    page.locator("#gallery .tile").first.click()
    page.get_by_text("This picture is not on the server any more.").wait_for()


def test_compares_strengths_as_a_grid(opening: Open, shot) -> None:
    page = opening()
    set_up(page, "an owl", steps=2)
    add_reference(page, picture("green"))
    page.get_by_role("button", name="Compare strengths").click()
    page.wait_for_selector(".cell:nth-child(5) .tile")
    assert page.locator(".cell figcaption").all_inner_texts()[-1] == "strength 1.00"
    shot(page, "7-strengths")


def test_metadata_is_text_and_never_markup(opening: Open, running: Running) -> None:
    text = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    with running.client() as client:
        wait(client, submit(client, prompt=text, steps=1)["id"])
    page = opening()
    page.locator("#gallery .tile").first.click()
    page.wait_for_selector("img.result")
    assert text in page.locator("#stage .caption").inner_text()
    assert page.title() == "imprompt"


def test_errors_are_told_in_words(opening: Open) -> None:
    page = opening()
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("Say what to draw, or show it a picture.").wait_for()
    page.locator("#reference-drop input[type=file]").set_input_files([file(b"no picture at all")])
    page.locator(".toast.error", has_text="is not a picture that can be read here").wait_for()


def test_settings_survive_a_reload_and_chinese_is_chosen(opening: Open, shot) -> None:
    page = opening()
    page.fill("#prompt", "a house")
    page.get_by_role("button", name="中文").click()
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.input_value("#prompt") == "a house"
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.get_by_role("button", name="绘制", exact=True).is_visible()
    shot(page, "8-chinese")


def test_fits_a_phone(opening: Open, shot) -> None:
    page = opening(375, 780, has_touch=True, is_mobile=True)
    shot(page, "9-phone")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    set_up(page)
    add_reference(page, picture("red"))
    draw(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    shot(page, "10-phone-drawn")


@pytest.mark.parametrize("width", [1360, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opening: Open, scheme: str, width: int, shot) -> None:
    if not AXE.is_file():
        pytest.skip(f"axe-core is not at {AXE}; make test-browser puts it there")
    page = opening(width, color_scheme=scheme, bypass_csp=True)
    add_reference(page, picture("red"))
    page.locator("#references summary").first.click()
    shot(page, f"11-{scheme}-{width}")
    page.add_script_tag(content=AXE.read_text(encoding="utf-8"))

    def serious() -> list[str]:
        found = page.evaluate("axe.run()")["violations"]
        return [
            json.dumps([one["id"], one["nodes"][0]["html"][:200], one["nodes"][0]["failureSummary"][:200]])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]

    assert serious() == []
    page.get_by_role("button", name="Model and adapter").click()
    page.wait_for_selector("dialog[open]")
    assert serious() == []


def test_the_files_of_the_page_are_small_and_its_own() -> None:
    import imprompt.app.server

    files = [
        path for path in (Path(imprompt.app.server.__file__).parent / "static").rglob("*") if path.is_file()
    ]
    assert sum(path.stat().st_size for path in files) < 200_000
    for path in files:
        if path.suffix in (".js", ".css", ".html"):
            assert "https://" not in path.read_text(encoding="utf-8")
