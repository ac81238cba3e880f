"""Restarts, killed workers and shutdown: no accepted job is lost, none is drawn twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from serving import Running, answers, free_port, submit, wait

pytestmark = pytest.mark.slow


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_worker_comes_back_and_tries_its_jobs_once_more(starting: Callable[..., Running]) -> None:
    """Two jobs of one batch: one is drawn after its worker's death, the other dies twice."""
    running = starting(ready=False)
    worker = running.queue.workers[0]

    def kill_while_drawing(client: httpx.Client, job: str) -> None:
        until(lambda: worker.ready and client.get(f"/api/v1/jobs/{job}").json()["step"] > 0, 600)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda: not worker.ready)

    with running.client() as client:
        assert client.get("/readyz").status_code == 503  # so that the first two are one batch
        dying, again = (submit(client, steps=30, seed=seed)["id"] for seed in (1, 2))
        behind = submit(client, size=[64, 64])["id"]
        for _ in range(2):
            kill_while_drawing(client, dying)
        failed = wait(client, dying, 300)
        assert (failed["state"], failed["error"]["code"]) == ("failed", "worker_died")
        found = wait(client, again, 300)
        assert (found["state"], found["batch"]) == ("done", 1)
        assert wait(client, behind, 300)["state"] == "done"
        assert "imprompt_worker_deaths_total 2.0" in client.get("/metrics").text


def serve(folder: Path, port: int) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "imprompt.app.cli",
        "serve",
        "--port",
        str(port),
        "--folder",
        str(folder),
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_sigterm_finishes_what_is_drawn_and_the_next_server_draws_the_rest(
    tmp_path: Path, starting: Callable[..., Running]
) -> None:
    port = free_port()
    first = serve(tmp_path, port)
    until(lambda: answers(port, "/readyz"), 600)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, verify=False) as client:
        running = submit(client, steps=20)["id"]
        # Another size, so that they are no batch.
        waiting = [submit(client, seed=seed, size=[64, 64 + 8 * seed])["id"] for seed in range(2)]
        until(lambda: client.get(f"/api/v1/jobs/{running}").json()["step"] > 0)
        first.send_signal(signal.SIGTERM)
        until(lambda: not answers(port, "/readyz"))
        refused = client.post("/api/v1/jobs", json={"request": {"prompt": "late"}})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
    assert first.wait(120) == 0
    assert first.stderr is not None
    hello, *log = first.stderr.read().splitlines()
    assert hello.startswith("imprompt: http://127.0.0.1")
    told = [json.loads(line) for line in log]
    assert [line["job"] for line in told if line["message"] == "job"] == [running]
    assert not any("a cat" in line for line in log)
    with starting(folder=tmp_path).client() as client:
        for job in [running, *waiting]:
            assert wait(client, job)["state"] == "done"
        history = [job["id"] for job in client.get("/api/v1/history").json()["jobs"]]
        assert sorted(history) == sorted([running, *waiting])
        assert 'imprompt_jobs_total{state="done"} 2.0' in client.get("/metrics").text


def test_the_port_that_the_system_chose_is_told(tmp_path: Path) -> None:
    server = serve(tmp_path, 0)
    assert server.stderr is not None
    try:
        hello = server.stderr.readline()
        port = int(re.fullmatch(r"imprompt: http://127\.0\.0\.1:(\d+)/\n", hello)[1])
        until(lambda: answers(port, "/healthz"))
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


def test_the_servers_own_process_loads_no_torch() -> None:
    """It is there at once, small, and never stops for the garbage of two hundred thousand objects."""
    asks = (
        "import sys, pathlib\n"
        "from imprompt.app.server.process import serve\n"
        "from imprompt.app.server.capabilities import capabilities\n"
        "from imprompt.app.server.settings import Settings\n"
        "capabilities(Settings(folder=pathlib.Path('nowhere')))\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()))"
    )
    told = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_two_servers_do_not_share_a_folder_and_ctrl_c_ends_one(tmp_path: Path) -> None:
    one = free_port()
    first = serve(tmp_path, one)
    try:
        until(lambda: answers(one, "/healthz"), 120)
        second = serve(tmp_path, free_port())
        _, told = second.communicate(timeout=120)
        assert second.returncode != 0
        assert "in use by another server" in told
    finally:
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 0
