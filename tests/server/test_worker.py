"""The process that draws, from the end of its pipe, and beside others."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from imprompt.app.server import messages as say
from imprompt.app.server import worker
from imprompt.app.server.problems import Problem
from imprompt.generation.engine import Result
from imprompt.schema.request import Request
from serving import Running, submit, wait, written


def task(name: str, **fields: Any) -> say.Task:
    request = Request.from_mapping({"prompt": "a cat", "steps": 1, "seed": 1, **fields})
    return say.Task(name, request.model_dump(mode="json"), ".png", False)


@pytest.mark.parametrize(
    "fault", [EOFError("no more frames"), RuntimeError("?"), Problem(507, "disk_full", "!")]
)
def test_a_fault_while_a_picture_is_written_ends_its_own_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    plain, faults = worker.save, [fault]

    def save(*given: Any, **options: Any) -> list[Path]:
        if faults:
            raise faults.pop()
        return plain(*given, **options)

    monkeypatch.setattr(worker, "save", save)
    ours, theirs = Pipe()
    setup = say.Setup(tmp_path / "pictures", tmp_path / "scratch", "cpu", "auto", "none", "emoji")
    thread = threading.Thread(target=worker.Worker(theirs, setup).run, daemon=True)
    thread.start()
    ours.send(say.Draw((task("one"), task("two"))))
    told = {}
    while ours.poll(120) and not isinstance(message := ours.recv(), say.Free):
        told[getattr(message, "id", "")] = message
    ours.close()
    thread.join(60)
    assert not thread.is_alive()
    assert isinstance(told["one"], say.Failed)
    assert (told["one"].status, told["one"].code) == (
        (507, "disk_full") if isinstance(fault, Problem) else (500, "internal")
    )
    assert isinstance(told["two"], say.Drawn)


def test_how_the_server_keeps_its_models_is_not_noted_to_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine(worker.Engine):
        def run(self, *given: Any, **options: Any) -> Result:
            drawn = super().run(*given, **options)
            return replace(
                drawn, notes=("offload 'adapter' has no effect: there is no image prompt", "other")
            )

    monkeypatch.setattr(worker, "Engine", Engine)
    ours, theirs = Pipe()
    setup = say.Setup(tmp_path / "pictures", tmp_path / "scratch", "cpu", "auto", "none", "emoji")
    thread = threading.Thread(target=worker.Worker(theirs, setup).run, daemon=True)
    thread.start()
    ours.send(say.Draw((task("one"),)))
    told: list[Any] = []
    while ours.poll(120) and not isinstance(message := ours.recv(), say.Free):
        told.append(message)
    ours.close()
    thread.join(60)
    assert [message.notes for message in told if isinstance(message, say.Drawn)] == [("other",)]


@pytest.mark.slow
def test_what_was_drawn_for_a_cancelled_job_is_deleted_while_another_worker_draws(
    starting: Callable[..., Running],
) -> None:
    running = starting(devices=("cpu", "cpu"))
    end = time.monotonic() + 300
    while not all(each.ready for each in running.queue.workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    folder = running.settings.folder

    async def cancel_late() -> None:  # once it is written; the server hears nothing meanwhile
        while not written(folder) and time.monotonic() < end:
            time.sleep(0.01)
        await running.queue.cancel(job)

    with running.client() as client:
        long = submit(client, steps=200, count=16, size=[64, 64])["id"]
        identity = submit(client, {"X-Client-Id": "late"}, steps=4)["id"]
        [job] = running.queue.unfinished("127.0.0.1 late")
        asyncio.run_coroutine_threadsafe(cancel_late(), running.loop).result(300)
        assert client.get(f"/api/v1/jobs/{identity}").json()["state"] == "cancelled"
        while written(folder):
            assert client.get(f"/api/v1/jobs/{long}").json()["state"] == "running"
            time.sleep(0.02)
        assert client.delete(f"/api/v1/jobs/{long}").status_code == 200


@pytest.mark.slow
def test_the_jobs_of_a_killed_worker_are_drawn_by_one_that_is_free(
    starting: Callable[..., Running],
) -> None:
    running = starting(devices=("cpu", "cpu"))
    workers = running.queue.workers
    end = time.monotonic() + 300
    while not all(each.ready for each in workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    with running.client() as client:
        job = submit(client, steps=200)["id"]
        while not (busy := [each for each in workers if each.jobs]):
            time.sleep(0.01)
        assert busy[0].pid is not None
        os.kill(busy[0].pid, signal.SIGKILL)
        while client.get(f"/api/v1/jobs/{job}").json()["state"] == "running" and busy[0].ready:
            time.sleep(0.01)
        while client.get(f"/api/v1/jobs/{job}").json()["state"] == "queued":
            assert not busy[0].ready  # or nobody would have drawn it until the dead one is back
            time.sleep(0.01)
        assert not busy[0].ready
        assert wait(client, job)["state"] == "done"
