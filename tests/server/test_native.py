"""The native API: what a client sends, and what it gets."""

import io
import json
import re
from pathlib import Path

import httpx
import pytest
from PIL import Image

from imprompt.app.server.capabilities import capabilities
from imprompt.app.server.settings import Settings
from imprompt.output import read_request
from imprompt.output.clips import encode_clip
from imprompt.schema.request import Request
from serving import STEPS, Running, encoded, mask, picture, submit, upload, wait


def test_health_is_told_without_a_model(running: Running) -> None:
    assert httpx.get(f"{running.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{running.url}/readyz").json() == {"status": "ready"}


def test_a_job_draws_what_it_says_and_carries_its_request(client: httpx.Client, tmp_path) -> None:
    job = wait(client, submit(client)["id"])
    assert job["state"] == "done"
    assert job["step"] == job["steps"] == STEPS
    answer = client.get(f"/api/v1/jobs/{job['id']}/pictures/0")
    assert answer.headers["content-type"] == "image/png"
    file = tmp_path / "drawn.png"
    file.write_bytes(answer.content)
    again = read_request(file)
    assert (again.prompt, again.seed, again.steps) == ("a cat", 1, STEPS)
    assert client.get(job["pictures"][0]["url"]).content == answer.content
    small = Image.open(io.BytesIO(client.get(job["pictures"][0]["thumbnail"]).content))
    assert small.format == "WEBP"


def test_a_picture_prompts_and_its_id_is_its_hash(client: httpx.Client) -> None:
    shown = upload(client, picture("blue"))
    assert upload(client, picture("blue"))["id"] == shown["id"]
    assert (shown["width"], shown["height"], shown["type"]) == (128, 128, "image/png")
    job = wait(client, submit(client, images=[shown["id"]], scale=0.7)["id"])
    plain = wait(client, submit(client)["id"])
    assert job["state"] == "done"
    assert job["pictures"][0]["id"] != plain["pictures"][0]["id"]
    assert shown["id"] in json.dumps(job["request"])


def test_the_same_request_draws_the_same_file(client: httpx.Client) -> None:
    first, second = (wait(client, submit(client, seed=11)["id"]) for _ in range(2))
    assert first["pictures"][0]["id"] == second["pictures"][0]["id"]


def test_a_drawn_picture_gives_its_settings_back(client: httpx.Client) -> None:
    shown = upload(client, picture("green"))
    job = wait(client, submit(client, images=[shown["id"]], seed=5)["id"])
    content = client.get(job["pictures"][0]["url"]).content
    back = upload(client, content)
    assert back["request"]["seed"] == 5
    assert back["missing"] == []
    again = wait(client, submit(client, **{k: v for k, v in back["request"].items() if v is not None})["id"])
    assert again["pictures"][0]["id"] == job["pictures"][0]["id"]


def test_inpainting_keeps_what_the_mask_does_not_cover(client: httpx.Client) -> None:
    source, where = upload(client, picture("red")), upload(client, encoded(mask()))
    job = wait(client, submit(client, task="inpaint", image=source["id"], mask=where["id"])["id"])
    drawn = Image.open(io.BytesIO(client.get(job["pictures"][0]["url"]).content)).convert("RGB")
    before = Image.open(io.BytesIO(picture("red")))
    assert drawn.crop((0, 0, 30, 128)).tobytes() == before.crop((0, 0, 30, 128)).tobytes()
    assert drawn.tobytes() != before.tobytes()


def test_messages_name_pictures_by_the_first_digits_of_their_ids(client: httpx.Client) -> None:
    source, nowhere = upload(client, picture("red")), upload(client, encoded(Image.new("L", (128, 128))))
    job = wait(client, submit(client, task="inpaint", image=source["id"], mask=nowhere["id"])["id"])
    assert f"'{nowhere['id'][:12]}…' is black everywhere" in job["error"]["message"]


def test_a_clip_is_one_animated_picture(client: httpx.Client) -> None:
    job = wait(client, submit(client, task="animate", frames=4, steps=2)["id"])
    assert job["state"] == "done", job["error"]
    clip = Image.open(io.BytesIO(client.get(job["pictures"][0]["url"]).content))
    assert (clip.format, clip.n_frames) == ("WEBP", 4)


def events(client: httpx.Client, job: str) -> list[tuple[str, dict]]:
    found = []
    with client.stream("GET", f"/api/v1/jobs/{job}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("event: "):
                found.append((line[7:], {}))
            elif line.startswith("data: "):
                found[-1] = (found[-1][0], json.loads(line[6:]))
    return found


def test_events_tell_every_step_with_previews_and_end_with_the_job(client: httpx.Client) -> None:
    told = events(client, submit(client, steps=8, seed=21)["id"])
    names = [name for name, _ in told]
    assert names[-1] == "done"
    steps = [data["step"] for name, data in told if name == "step"]
    assert steps == sorted(steps)
    assert max(steps) == 8
    previews = [data["preview"] for name, data in told if name == "step" and "preview" in data]
    assert previews
    assert previews[0].startswith("data:image/webp;base64,")
    assert told[-1][1]["pictures"]


def test_a_running_job_stops_and_stopping_it_twice_is_as_once(client: httpx.Client) -> None:
    job = submit(client, steps=150, seed=3)["id"]
    with client.stream("GET", f"/api/v1/jobs/{job}/events") as stream:
        for line in stream.iter_lines():
            if line == "event: step":
                break
    for _ in range(2):
        answer = client.delete(f"/api/v1/jobs/{job}")
        assert answer.status_code == 200
        assert answer.json()["state"] == "cancelled"
    after = wait(client, submit(client)["id"])
    assert after["state"] == "done"
    finished = client.delete(f"/api/v1/jobs/{after['id']}")
    assert (finished.status_code, finished.json()["error"]["code"]) == (409, "finished")


def test_an_idempotency_key_gives_the_same_job(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "order-66"}
    first = submit(client, headers)
    body = {"request": {"prompt": "a cat", "steps": STEPS, "seed": 1}}
    again = client.post("/api/v1/jobs", json=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (200, first["id"])
    body["request"]["seed"] = 2
    other = client.post("/api/v1/jobs", json=body, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "key_reused")
    wait(client, first["id"])


def test_history_is_newest_first_and_forgets(client: httpx.Client) -> None:
    ids = [wait(client, submit(client, seed=seed)["id"])["id"] for seed in (31, 32)]
    page = client.get("/api/v1/history?limit=2").json()
    assert [job["id"] for job in page["jobs"]] == ids[::-1]
    older = client.get(f"/api/v1/history?limit=1&before={page['jobs'][0]['number']}").json()
    assert older["jobs"][0]["id"] == ids[0]
    url = page["jobs"][0]["pictures"][0]["url"]
    assert client.delete(f"/api/v1/history/{ids[1]}").status_code == 204
    assert client.get(url).status_code == 404
    assert client.get(f"/api/v1/jobs/{ids[1]}").status_code == 404


def test_capabilities_say_what_an_added_base_is(tmp_path: Path) -> None:
    """By its files, if they are here; of others nothing is known, and nothing is downloaded."""
    config = {"_class_name": "FluxTransformer2DModel", "joint_attention_dim": 4096, "guidance_embeds": True}
    (tmp_path / "mine" / "transformer").mkdir(parents=True)
    (tmp_path / "mine" / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    bases = {"mine": str(tmp_path / "mine"), "other": "somebody/model"}
    rows = {row["name"]: row for row in capabilities(Settings(tmp_path, bases=bases))["bases"]}
    known = ("family", "multiple", "profiles", "size")
    assert [rows["mine"][name] for name in known] == ["flux", 16, False, 1024]
    assert [rows["other"][name] for name in known] == [None, None, True, None]


def test_capabilities_say_what_is_here(client: httpx.Client) -> None:
    offered = client.get("/api/v1/capabilities").json()
    bundled = next(row for row in offered["bases"] if row["name"] == "emoji")
    assert (bundled["here"], bundled["licence"]) == (True, "Apache-2.0")
    rows = {row["name"]: row for row in offered["bases"]}
    assert not rows["sdxl"]["offered"]
    assert [rows[name]["multiple"] for name in ("emoji", "flux", "sd35")] == [8, 16, 16]
    assert [rows[name]["profiles"] for name in ("emoji", "flux", "sd35")] == [True, False, False]
    for table in (offered["controls"], offered["motions"]):
        assert (
            {row["name"] for row in table if row["offered"]}
            >= {row["name"] for row in table if row["here"]}
            > set()
        )
    assert offered["request"]["properties"]["prompt"]
    assert "style" in offered["profiles"]


def test_a_controls_map_is_shown_before_drawing(client: httpx.Client) -> None:
    pytest.importorskip("cv2")
    shown = upload(client, picture("black"))
    answer = client.post("/api/v1/maps", json={"kind": "canny", "picture": shown["id"]})
    assert answer.status_code == 201
    edges = Image.open(io.BytesIO(client.get(answer.json()["url"]).content)).convert("L")
    assert edges.getextrema() == (0, 255)


def moving(frames: int = 4) -> list[Image.Image]:
    return [Image.new("RGB", (64, 48), (60 * number, 80, 200)) for number in range(frames)]


@pytest.mark.parametrize(("count", "fps"), [(4, 8), (6, 24)])
def test_a_video_becomes_an_animated_picture_that_can_be_redrawn_at_its_pace(
    client: httpx.Client, count: int, fps: int
) -> None:
    shown = upload(client, encode_clip((2 * moving())[:count], ".mp4", fps, ""))
    assert (shown["type"], shown["width"], shown["height"], shown["frames"]) == ("image/webp", 64, 48, count)
    job = wait(client, submit(client, task="animate", video=shown["id"], size=[64, 48], steps=2)["id"])
    assert job["state"] == "done", job["error"]
    assert (job["request"]["frames"], job["request"]["fps"]) == (count, fps)


def test_a_video_longer_than_a_clip_may_be_is_refused(client: httpx.Client) -> None:
    long = encode_clip(moving(1) * 129, ".mp4", 30, "")
    answer = client.post("/api/v1/pictures", files={"file": ("a.mp4", long, "video/mp4")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_picture")
    assert "the video has 129 frames; at most 128 are read" in answer.json()["error"]["message"]


def test_a_clip_drawn_as_mp4_has_a_thumbnail_and_can_be_shown_again(client: httpx.Client) -> None:
    body = {"request": {"prompt": "a cat", "task": "animate", "frames": 4, "steps": 1, "size": [64, 64]}}
    job = wait(client, client.post("/api/v1/jobs", json={**body, "format": "mp4"}).json()["id"])
    (clip,) = job["pictures"]
    assert (clip["type"], clip["width"], clip["frames"]) == ("video/mp4", 64, 4)
    assert Image.open(io.BytesIO(client.get(clip["thumbnail"]).content)).format == "WEBP"
    again = wait(client, submit(client, task="animate", video=clip["id"], size=[64, 64], steps=2)["id"])
    assert again["state"] == "done", again["error"]


def test_a_picture_shown_twice_is_encoded_once(client: httpx.Client) -> None:
    def remembered() -> float:
        lines = client.get("/metrics").text.splitlines()
        (line,) = (one for one in lines if one.startswith("imprompt_feature_cache_hits_total{"))
        return float(line.rpartition(" ")[2])

    shown = upload(client, picture("teal"))["id"]
    wait(client, submit(client, images=[shown], seed=51)["id"])
    before = remembered()
    wait(client, submit(client, images=[shown], seed=52)["id"])
    assert remembered() > before


def test_metrics_count_what_was_drawn(client: httpx.Client) -> None:
    wait(client, submit(client)["id"])
    text = client.get("/metrics").text
    assert 'imprompt_jobs_total{state="done"}' in text
    assert "imprompt_queue_length 0.0" in text
    assert 'imprompt_worker_memory_bytes{device="auto"}' in text
    assert "a cat" not in text


def test_jobs_of_one_kind_are_drawn_together_and_each_as_alone(client: httpx.Client) -> None:
    shown = upload(client, picture("purple"))["id"]
    wanted = [
        {"prompt": "an owl", "seed": 41, "images": [{"image": shown, "scale": 0.3}]},
        {"prompt": "a house", "seed": 42, "images": [shown]},
        {"prompt": "", "seed": 43, "images": [shown]},
    ]
    blocker = submit(client, steps=12)
    jobs = [submit(client, **fields) for fields in wanted]
    wait(client, blocker["id"])
    together = [wait(client, job["id"]) for job in jobs]
    alone = [wait(client, submit(client, **fields)["id"]) for fields in wanted]
    assert {job["batch"] for job in together} == {3}
    assert {job["batch"] for job in alone} == {1}
    for one, other in zip(together, alone, strict=True):
        pair = [Image.open(io.BytesIO(client.get(job["pictures"][0]["url"]).content)) for job in (one, other)]
        apart = [abs(a - b) for a, b in zip(*(image.convert("RGB").tobytes() for image in pair), strict=True)]
        assert max(apart) <= 2


def test_pictures_come_in_the_format_asked_for(client: httpx.Client) -> None:
    body = {"request": {"prompt": "a cat", "steps": STEPS, "seed": 1}, "format": "webp"}
    job = wait(client, client.post("/api/v1/jobs", json=body).json()["id"])
    assert job["pictures"][0]["type"] == "image/webp"
    body["format"] = "gif"
    refused = client.post("/api/v1/jobs", json=body)
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, "format")
    body["request"] |= {"task": "animate", "fps": 60}
    refused = client.post("/api/v1/jobs", json=body)
    assert (refused.status_code, refused.json()["error"]["field"]) == (400, "fps")


def test_files_are_sent_in_parts_and_only_when_they_are_not_known(client: httpx.Client) -> None:
    content = picture("red")
    url = f"/api/v1/pictures/{upload(client, content)['id']}"
    whole = client.get(url)
    etag = whole.headers["ETag"]
    assert whole.content == content
    assert client.get(url, headers={"If-None-Match": f'"other", {etag}'}).status_code == 304
    part = client.get(url, headers={"Range": "bytes=10-19", "If-Range": etag})
    assert (part.status_code, part.content) == (206, content[10:20])
    assert part.headers["Content-Range"] == f"bytes 10-19/{len(content)}"
    assert client.get(url, headers={"Range": "bytes=10-19", "If-Range": '"other"'}).content == content
    assert client.get(url, headers={"Range": f"bytes={len(content)}-"}).status_code == 416
    head = client.head(url)
    assert (head.content, head.headers["Content-Length"]) == (b"", str(len(content)))
    small = client.get(f"{url}?thumbnail=true")
    assert small.headers["ETag"] != etag
    known = {"If-None-Match": small.headers["ETag"]}
    assert client.get(f"{url}?thumbnail=true", headers=known).status_code == 304


def test_the_openapi_document_describes_requests_and_names_nothing_that_is_missing(
    client: httpx.Client,
) -> None:
    document = client.get("/api/v1/openapi.json").json()
    schemas = document["components"]["schemas"]
    body = document["paths"]["/api/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    named = re.findall(r'"\$ref": "([^"]*)"', json.dumps(document))
    assert body["properties"]["request"]["$ref"] in named
    assert {name.removeprefix("#/components/schemas/") for name in named} <= set(schemas)
    assert set(schemas["Request"]["properties"]) == set(Request.model_fields)


def test_a_query_parameter_that_is_not_read_is_refused_with_those_that_are(client: httpx.Client) -> None:
    answer = client.get("/api/v1/history", params={"limits": 3})
    error = answer.json()["error"]
    assert (answer.status_code, error["field"], error["code"]) == (422, "limits", "unknown_parameter")
    assert error["message"] == "limits: no such query parameter; known here: limit, before."
    answer = client.post("/api/v1/jobs?wait=true", json={"request": {"prompt": "a cat"}})
    assert answer.json()["error"]["message"] == "wait: no such query parameter; this route has none."
    assert client.get("/api/v1/history", params={"limit": 3}).status_code == 200
