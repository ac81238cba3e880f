"""What a client asks for that the server has not, and parts that no route reads, are told, not ignored."""

import base64
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import constants
from PIL import Image

from imprompt.app.server import messages as say
from imprompt.app.server import worker
from imprompt.app.server.settings import Settings
from imprompt.schema.request import Request
from serving import encoded, mask, picture, start, upload


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server without workers that knows a base of its own."""
    root = tmp_path_factory.mktemp("idle")
    running = start(Settings(root / "served", devices=(), bases={"mine": str(root)}), ready=False)
    with running.client() as client:
        yield client
    running.stop()


@pytest.mark.parametrize(
    ("fields", "field", "command"),
    [
        ({"base": "sd15"}, "base", "hf download"),
        ({"base": "mine", "adapter": "sd15-plus"}, "images.adapter", "ip-adapter-plus_sd15.safetensors"),
        ({"base": "mine", "images": [{"adapter": "sd15"}]}, "images.adapter", "ip-adapter_sd15.safetensors"),
        ({"base": "mine", "controls": [{"kind": "canny", "model": "sd15-canny"}]}, "controls.model", "canny"),
        ({"base": "mine", "task": "animate", "motion": "animatediff"}, "motion", "animatediff"),
    ],
)
def test_a_model_that_is_not_here_is_not_downloaded_for_a_client(
    idle: httpx.Client, fields: dict, field: str, command: str
) -> None:
    shown = upload(idle, picture())["id"]
    fields = {"prompt": "a cat", "images": [{}], **fields}
    fields["images"] = [{"image": shown, **each} for each in fields["images"]]
    fields["controls"] = [{"path": shown, **each} for each in fields.get("controls", ())]
    answer = idle.post("/api/v1/jobs", json={"request": fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["field"]) == (422, "not_here", field)
    assert command in error["message"]


@pytest.mark.parametrize(
    ("change", "asks"),
    [({}, False), ({"download": True}, True), ({"names": {"bases": {"emoji": "owner/emoji"}}}, True)],
)
def test_a_worker_asks_the_hub_only_with_download_or_for_its_own_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, asks: bool
) -> None:
    seen = []

    class Engine:
        features = SimpleNamespace(hits=0, misses=0)

        def run(self, *_: object, **__: object) -> None:
            seen.append(not constants.HF_HUB_OFFLINE)
            raise RuntimeError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(worker, "Engine", Engine)
    sent: list[object] = []
    heard: list[object] = [say.Draw((say.Task("one", REQUEST, ".png", False),)), say.Stop()]
    pipe = SimpleNamespace(send=sent.append, recv=lambda: heard.pop(0), poll=lambda: False)
    setup = say.Setup(tmp_path, tmp_path, "cpu", "auto", "none", "emoji", **change)
    worker.Worker(pipe, setup).run()  # type: ignore[arg-type]
    assert seen == [True, asks]  # the base that the server was started with may be downloaded


def test_a_job_may_not_download_because_another_of_its_batch_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    class Engine:
        features = SimpleNamespace(hits=0, misses=0)

        def run(self, *requests: Request, **_: object) -> None:
            for request in requests:
                seen.setdefault(request.seed, not constants.HF_HUB_OFFLINE)
            raise RuntimeError

        def run_batch(self, requests: list[Request], **_: object) -> None:
            self.run(*requests)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(worker, "Engine", Engine)
    shown = "ab" * 32
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / shown).write_bytes(picture())
    tasks = []
    for seed, adapter in enumerate(("sd15", "mine", "sd15-plus", "mine"), 1):
        fields = {**REQUEST, "seed": seed, "images": [{"image": shown, "adapter": adapter}]}
        request = Request.from_mapping(fields).model_dump(mode="json")
        tasks.append(say.Task(str(seed), request, ".png", False))
    sent: list[object] = []
    heard: list[object] = [say.Draw(tuple(tasks)), say.Stop()]
    pipe = SimpleNamespace(send=sent.append, recv=lambda: heard.pop(0), poll=lambda: False)
    names = {"adapters": {"mine": "owner/name/adapter.safetensors"}}
    setup = say.Setup(tmp_path, tmp_path, "cpu", "auto", "none", "emoji", names=names)
    worker.Worker(pipe, setup).run()  # type: ignore[arg-type]
    assert seen == {0: True, 1: False, 2: True, 3: False, 4: True}
    failed = [message.id for message in sent if isinstance(message, say.Failed)]
    assert sorted(failed) == ["1", "2", "3", "4"]


REQUEST = {"prompt": "a cat", "base": "emoji", "adapter": None, "images": [], "seed": 1}


def transparent() -> bytes:
    image = Image.new("RGBA", (128, 128), "white")
    image.putalpha(mask())
    return encoded(image)


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ([("image", picture()), ("mask", transparent()), ("mask", transparent())], "mask"),
        ([("image", picture()), ("reference", picture())], "reference"),
        ([("image", picture()), ("prompt", "another")], "prompt"),
    ],
)
def test_parts_that_an_edit_would_not_read_are_refused(idle: httpx.Client, parts: list, field: str) -> None:
    named = [("prompt", (None, "a cat"))]
    named += [(name, (None, part) if isinstance(part, str) else ("a.png", part)) for name, part in parts]
    answer = idle.post("/v1/images/edits", files=named)
    assert (answer.status_code, answer.json()["error"]["param"]) in ((400, field), (422, field)), answer.text


def test_parts_that_an_upload_would_not_read_are_refused(idle: httpx.Client) -> None:
    for other in ((None, "x"), ("a.png", picture())):
        answer = idle.post("/api/v1/pictures", files=[("file", ("a.png", picture())), ("mask", other)])
        assert (answer.status_code, answer.json()["error"]["field"]) == (422, "mask")


@pytest.mark.parametrize(
    "change",
    [
        {"enable_hr": True}, {"s_churn": 0.5}, {"latent_mask": "x"},
        {"alwayson_scripts": {"other": {"args": [1]}}},
        {"override_settings": {"CLIP_stop_at_last_layers": 2}}, {"override_settings": {"eta_ddim": 0.5}},
    ],
)  # fmt: skip
def test_their_settings_that_are_not_here_are_to_be_left_out(idle: httpx.Client, change: dict) -> None:
    answer = idle.post("/sdapi/v1/txt2img", json={"prompt": "a cat", **change})
    assert answer.status_code == 422
    assert answer.json()["detail"].endswith("; leave it out.")


@pytest.mark.parametrize("model", ["y", "anny", "h"])
def test_a_controls_name_is_no_end_of_another(idle: httpx.Client, model: str) -> None:
    unit = {"module": "canny", "model": model, "image": base64.b64encode(picture()).decode()}
    sent = {"prompt": "a cat", "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    answer = idle.post("/sdapi/v1/txt2img", json=sent)
    assert (answer.status_code, answer.json()["field"]) == (422, "controls.model"), answer.text
