"""The form in real Chromium: what is typed, restored and chosen is asked for, or refused in words."""

import pytest

from browsing import Open, add_reference, draw, drop, file, last_request, set_up
from serving import Running, picture, submit, upload, wait

pytestmark = [pytest.mark.slow]


def drawn(running: Running, **fields: object) -> None:
    """A picture in the history that was drawn with these fields."""
    with running.client() as client:
        wait(client, submit(client, **{"steps": 1, **fields})["id"])


def restore(page) -> None:
    page.locator("#gallery .tile").first.click()
    page.get_by_role("button", name="Restore its settings").click()
    page.get_by_text("Settings restored.").wait_for()


def test_a_restored_picture_draws_again_whatever_its_numbers(opening: Open, running: Running) -> None:
    """Numbers beside a field's steps, in parts of the form that are closed, must not hold the drawing up."""
    with running.client() as client:
        shown = {"image": upload(client, picture("red"))["id"], "scale": 0.33, "start": 0.13, "end": 0.91}
    drawn(running, guidance=7.3, size=[136, 120], scheduler="unipc", images=[{**shown, "sharpen": 0.5}])
    page = opening()
    restore(page)
    kept = "Also kept from the restored picture: "
    assert page.locator("#look").get_by_text(kept).inner_text() == f"{kept}scheduler"
    assert page.locator("#references").get_by_text(kept).inner_text() == f"{kept}sharpen"
    draw(page)
    request = last_request(running)
    assert (request["guidance"], request["size"], request["scheduler"]) == (7.3, [136, 120], "unipc")
    assert {name: request["images"][0][name] for name in shown} == shown
    assert request["images"][0]["sharpen"] == 0.5
    page.locator("#references").get_by_role("button", name="Leave out").click()
    page.locator("#look").get_by_role("button", name="Leave out").click()
    draw(page)
    request = last_request(running)
    assert (request["scheduler"], request["images"][0]["sharpen"]) == (None, 0)


def test_a_picture_that_the_server_has_no_longer_is_left_out_of_what_is_restored(
    opening: Open, running: Running
) -> None:
    """The server deletes pictures that nobody used for long; the drawing would only fail for them."""
    with running.client() as client:
        kept, gone = (upload(client, picture(colour))["id"] for colour in ("red", "orange"))
    drawn(running, prompt="a key", images=[{"image": kept}, {"image": gone}, {"image": kept, "mask": gone}])
    running.queue.store.path(gone).unlink()
    page = opening()
    page.locator("#gallery .tile").first.click()
    page.get_by_role("button", name="Restore its settings").click()
    page.get_by_text("Settings restored, but 1 of its pictures are not on this server.").wait_for()
    draw(page)
    shown = [(prompt["image"], prompt["mask"]) for prompt in last_request(running)["images"]]
    assert shown == [(kept, None), (kept, None)]


def test_numbers_are_rounded_and_kept_within_limits(opening: Open, running: Running) -> None:
    page = opening()
    set_up(page)
    most = str(2**53 - 1)
    for label, typed, kept in (("Steps", "2.4", "2"), ("Word weight", "99", "30"), ("Seed", "1e300", most)):
        field = page.get_by_label(label, exact=True)
        field.fill(typed)
        field.press("Tab")
        assert field.input_value() == kept
    page.get_by_text("Fine tuning").click()
    draw(page)
    request = last_request(running)
    assert (request["steps"], request["guidance"], request["seed"]) == (2, 30, 2**53 - 1)


def test_what_a_restored_picture_needs_is_never_exchanged(opening: Open, running: Running) -> None:
    """Another base in its place would draw another picture."""
    drawn(running, prompt="a key", seed=6)
    page = opening()
    lost = "f" * 64
    request = last_request(running) | {"base": "mine", "regions": [{"text": "a cat", "mask": lost}]}
    request["controls"] = [{"path": lost, "kind": "canny"}]
    asked = page.evaluate(
        """async ([request, lost]) => {
            const { fromRequest, toRequest } = await import("/static/settings.js");
            fromRequest(request, [lost]);
            (await import("/static/look.js")).render();
            return toRequest();
        }""",
        [request, lost],
    )
    assert (asked["base"], asked.get("regions"), asked.get("controls")) == ("mine", None, None)
    assert page.locator("#model").inner_text() == "Model: mine"
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator(".toast.error", has_text="base: 'mine' is not offered by this server.").wait_for()


def test_all_controls_of_a_restored_picture_are_asked_for_again(opening: Open) -> None:
    page = opening()
    control = {"path": "a" * 64, "kind": "canny", "scale": 1, "start": 0, "end": 1, "favor": "prompt"}
    asked = page.evaluate(
        """async (controls) => {
            const { fromRequest, toRequest } = await import("/static/settings.js");
            fromRequest({ task: "generate", prompt: "a cat", base: "emoji", controls });
            return toRequest().controls;
        }""",
        [control, {**control, "path": "b" * 64, "kind": "depth"}],
    )
    assert [(one["kind"], one["favor"]) for one in asked] == [("canny", "prompt"), ("depth", "prompt")]


def test_the_strength_chosen_by_itself_goes_by_the_words(opening: Open) -> None:
    page = opening()
    add_reference(page, picture("red"))
    shown = page.locator("#references output").first
    assert shown.inner_text() == "1.00 · auto"
    page.locator("#prompt").press_sequentially("an owl")
    assert shown.inner_text() == "0.60 · auto"
    page.fill("#prompt", "")
    assert shown.inner_text() == "1.00 · auto"


def test_a_text_runs_in_its_own_direction(opening: Open) -> None:
    page = opening()
    for text, direction in (("بومة", "rtl"), ("ふくろう 🦉", "ltr")):
        page.fill("#prompt", text)
        assert page.evaluate("getComputedStyle(document.getElementById('prompt')).direction") == direction


def test_files_that_cannot_be_taken_are_named_and_the_others_taken(opening: Open, running: Running) -> None:
    page = opening()
    most = 2**20 * 32
    long_name = "ein sehr langer Name " * 6 + ".png"
    files = [
        file(picture("red"), "good.png"),
        file(b"\0\0\0\x18ftypheic", "IMG_2041.heic"),
        {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"},
        file(b"\x89PNG", long_name),
    ]
    page.locator("#reference-drop input[type=file]").set_input_files(files)
    page.locator(".toast.error", has_text="IMG_2041.heic: ").get_by_text("save it as PNG or JPEG").wait_for()
    page.get_by_text("notes.txt: this is neither a picture nor a video.").wait_for()
    page.locator(".toast.error", has_text=f"{long_name[:30]}…{long_name[-14:]}: ").wait_for()
    assert page.locator("#references > li").count() == 1
    page.evaluate(
        """(size) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(size)], "scan.png", { type: "image/png" }));
            const field = document.querySelector("#reference-drop input[type=file]");
            field.files = data.files;
            field.dispatchEvent(new Event("change"));
        }""",
        most + 1,
    )
    page.get_by_text("scan.png: it has 33 MB; a picture has at most 32 MB here.").wait_for()


def test_drawing_waits_for_pictures_that_are_still_being_sent(opening: Open) -> None:
    page = opening()
    page.fill("#prompt", "an owl")
    held = []
    page.route("**/api/v1/pictures", lambda route: held.append(route))
    page.locator("#reference-drop input[type=file]").set_input_files([file(picture("red"), "large.png")])
    page.get_by_text("Sending large.png …").wait_for()
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("A picture is still on its way to the server; draw when it is here.").wait_for()
    assert page.locator("#generate").inner_text() == "Draw"
    held[0].continue_()
    page.locator("#references > li").wait_for()
    assert page.get_by_text("Sending large.png …").count() == 0


def test_a_control_acts_in_its_part_of_the_drawing(opening: Open, running: Running) -> None:
    page = opening()
    set_up(page, "a house", steps=2)
    page.get_by_text("Follow the shape of a picture").click()
    page.locator("#control input[type=file]").set_input_files([file(picture("black"))])
    page.locator("#control img.map:not([hidden])").wait_for()
    page.locator("#control").get_by_label("Acts to").fill("0.5")
    page.locator("#control").get_by_label("Acts to").press("Tab")
    draw(page)
    (control,) = last_request(running)["controls"]
    assert (control["start"], control["end"]) == (0, 0.5)


def test_a_still_is_no_clip_and_is_told_so_at_once(opening: Open) -> None:
    page = opening()
    page.get_by_role("tab", name="Animate").click()
    page.locator("#source input[type=file]").set_input_files([file(picture("red"))])
    page.get_by_text("This is a still, and a clip has several frames.").wait_for()
    assert page.locator("#source .card").count() == 0


def test_a_picture_is_dropped_as_a_shape_to_follow(opening: Open) -> None:
    page = opening()
    drop(page, "[data-target=asControl]", picture("black"))
    page.locator("#control .card").wait_for()


def test_all_of_a_wide_picture_is_seen_and_the_note_names_it_as_the_page_does(
    opening: Open, running: Running
) -> None:
    page = opening()
    set_up(page)
    add_reference(page, picture("red", (400, 128)))
    draw(page)
    assert page.get_by_text("Picture 1: 68% lies outside the centre square").is_visible()
    page.locator("#references summary").first.click()
    select = page.get_by_label("What is seen of it: Picture 1")
    field, card = select.bounding_box(), page.locator("#references > li").bounding_box()
    assert field["x"] + field["width"] < card["x"] + card["width"]
    select.select_option("pad")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_role("button", name="Stop").wait_for()
    page.wait_for_selector("img.result")
    assert last_request(running)["images"][0]["framing"] == "pad"
    assert page.get_by_text("lies outside the centre square").count() == 0
    page.get_by_role("button", name="Restore its settings").click()
    page.get_by_text("Settings restored.").wait_for()
    page.locator("#references summary").first.click()
    assert page.get_by_label("What is seen of it: Picture 1").input_value() == "pad"
    assert page.get_by_text("Also kept").count() == 0
