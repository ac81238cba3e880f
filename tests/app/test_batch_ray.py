"""``imprompt batch --ray`` on a local Ray of two workers, and the Ray Serve application of ``deploy/``."""

import base64
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from imprompt.app.cli import main
from serving import free_port, picture

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_worker_niceness", "0")  # else they starve on busy cores
    ray.init(num_cpus=3, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def test_two_workers_draw_what_one_process_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ref.png").write_bytes(picture("red"))
    lines = [
        {"id": "shown", "prompt": "an owl", "images": ["ref.png"], "steps": 2, "seed": 1},
        {"id": "plain", "prompt": "a cat", "steps": 2, "seed": 2},
        {"id": "gone", "prompt": "a cat", "images": ["nowhere.png"], "steps": 2},
        {"id": "wide", "prompt": "a cat", "size": [64, 32], "steps": 2, "seed": 3},
    ]
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("\n".join(json.dumps(line) for line in lines))
    assert main(["batch", str(jobs), "-o", str(tmp_path / "ray"), "--ray", "2", "--batch", "1"]) == 1
    assert "gone: images.0.image: there is no file 'nowhere.png'" in capsys.readouterr().err
    assert main(["batch", str(jobs), "-o", str(tmp_path / "plain"), "--batch", "1"]) == 1
    for name in ("shown", "plain", "wide"):
        one, other = (Image.open(tmp_path / folder / f"{name}.png") for folder in ("ray", "plain"))
        assert one.tobytes() == other.tobytes()
    manifest = [json.loads(line) for line in (tmp_path / "ray" / "manifest.jsonl").read_text().splitlines()]
    assert {entry["id"]: entry["state"] for entry in manifest} == {
        "shown": "done", "plain": "done", "wide": "done", "gone": "failed",
    }  # fmt: skip
    assert main(["batch", str(jobs), "-o", str(tmp_path / "ray")]) == 1
    assert "3 of 4 are drawn already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the served application."""
    from ray import serve

    path = ROOT / "deploy" / "ray" / "serve_app.py"
    spec = importlib.util.spec_from_file_location("serve_app", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(module.app, name="imprompt")
    yield f"http://127.0.0.1:{port}/"
    serve.shutdown()


def test_the_ray_serve_application_draws_and_refuses(address: str) -> None:
    request = {"prompt": "an owl", "images": ["@one"], "steps": 2, "seed": 1}
    shown = base64.b64encode(picture("red")).decode()
    with httpx.Client(timeout=300) as client:
        answer = client.post(address, json={"request": request, "pictures": {"@one": shown}})
        assert answer.status_code == 200, answer.text
        assert answer.content.startswith(b"\x89PNG")
        again = client.post(address, json={"request": {**request, "images": []}})
        assert again.content != answer.content
        for body, text in (
            ({"request": request}, "@one"),
            ({"request": {**request, "adapter": "/etc/passwd"}, "pictures": {"@one": shown}}, "not offered"),
            ({"request": {"prompt": "a cat", "colour": "red"}}, "colour"),
            ({"pictures": {}}, "request"),
            ({"request": request, "pictures": {"@one": "!!"}}, "base64"),
            ({"request": request, "pictures": {"@one": base64.b64encode(b"no").decode()}}, "picture"),
        ):
            refused = client.post(address, json=body)
            assert refused.status_code in (400, 422)
            assert text in refused.text
