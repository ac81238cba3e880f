"""The journal of jobs, when its folder, its rows or the pictures it knows are not as the server left them."""

import asyncio
import json
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from imprompt.app.server.problems import Problem
from imprompt.app.server.store import Picture, Store
from serving import Running, picture, submit, upload, wait


def test_a_journal_that_cannot_be_written_again_is_kept_until_it_can(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    store = Store(folder, stored_bytes=2**30)
    store.add("one", "me", None, "{}", {})
    shutil.rmtree(folder)
    folder.write_text("in the way")
    for _ in range(2):
        with pytest.raises(Problem) as refused:
            store.add("two", "me", None, "{}", {})
        assert refused.value.status == 503
        assert store.job("one") is not None
    folder.unlink()
    store.add("three", "me", None, "{}", {})
    store.close()
    with sqlite3.connect(folder / "journal.sqlite") as journal:
        assert {row[0] for row in journal.execute("SELECT id FROM jobs")} == {"one", "three"}


def test_what_is_written_first_is_journaled_first(starting: Callable[..., Running]) -> None:
    """A job that is forgotten in the moment in which it ends leaves neither row nor picture behind."""
    running = starting(ready=False, devices=())
    with running.client() as client:
        identity = submit(client)["id"]
        shown = upload(client, picture())["id"]
    queue = running.queue

    async def end_and_forget() -> None:
        job = await queue.find(identity)
        job.pictures = [vars(await queue.blocking(queue.store.find, shown))]
        await queue.cancel(job)
        await queue.forget(job)

    asyncio.run_coroutine_threadsafe(end_and_forget(), running.loop).result(30)
    with running.client() as client:
        assert client.get(f"/api/v1/pictures/{shown}").status_code == 404
        assert client.get(f"/api/v1/jobs/{identity}").status_code == 404


def test_a_picture_that_is_drawn_again_while_it_is_deleted_stays(
    client: httpx.Client, running: Running
) -> None:
    """Another job draws the same picture; the first is forgotten before the journal knows of the second's."""
    asked = {"seed": 77, "steps": 1, "size": [64, 64]}
    first = wait(client, submit(client, **asked)["id"])
    second = submit(client, **asked)["id"]
    store, drawn = running.queue.store, threading.Event()

    async def forget_meanwhile() -> None:
        running.queue.blocking(drawn.wait, 60)
        running.queue.blocking(store.forget, first["id"])
        while not (await running.queue.find(second)).over:
            await asyncio.sleep(0.01)
        drawn.set()

    asyncio.run_coroutine_threadsafe(forget_meanwhile(), running.loop).result(60)
    again = wait(client, second)
    assert [one["id"] for one in again["pictures"]] == [one["id"] for one in first["pictures"]]
    assert all(client.get(one["url"]).status_code == 200 for one in again["pictures"])


def test_jobs_of_another_version_that_are_refused_now_stop_neither_start_nor_history(
    starting: Callable[..., Running], tmp_path: Path
) -> None:
    store = Store(tmp_path / "server", stored_bytes=2**30)
    odd = json.dumps({"prompt": "a cat", "no_longer": 1})
    body = {"pictures": [], "record": json.loads(odd)}
    ids = {state: f"{number:024x}" for number, state in enumerate(("done", "queued", "running"))}
    for state, identity in ids.items():
        store.add(identity, "me", None, odd, body)
        store.update(identity, state, 0, body)
    store.close()
    with starting(ready=False, devices=()).client() as client:
        [drawn] = client.get("/api/v1/history").json()["jobs"]
        assert (drawn["id"], drawn["request"]) == (ids["done"], json.loads(odd))
        for state in ("queued", "running"):
            job = wait(client, ids[state])
            assert (job["state"], job["request"]["prompt"]) == ("failed", "a cat")
            assert "no_longer" in job["error"]["message"]


def test_a_picture_that_vanished_while_its_job_waited_is_named_not_the_disk(
    client: httpx.Client, running: Running
) -> None:
    ahead = submit(client, steps=40, seed=31)["id"]
    shown = upload(client, picture("brown"))["id"]
    behind = submit(client, steps=2, images=[shown])["id"]
    (running.settings.folder / "pictures" / shown[:2] / shown).unlink()
    assert wait(client, ahead)["state"] == "done"
    error = wait(client, behind)["error"]
    assert error["code"] == "bad_picture"
    assert "upload it again" in error["message"]


def test_a_damaged_journal_is_told_as_one(tmp_path: Path) -> None:
    store = Store(tmp_path, stored_bytes=2**30)
    for number in range(200):
        store.register(Picture(f"{number:064x}", "image/png", 1, 1, 1, 1))
    store.close()
    journal = tmp_path / "journal.sqlite"
    journal.write_bytes(journal.read_bytes()[:4096] + b"\xff" * (journal.stat().st_size - 4096))
    store = Store(tmp_path, stored_bytes=2**30)
    with pytest.raises(Problem) as refused:
        store.register(Picture("0" * 64, "image/png", 1, 1, 1, 1))
    assert refused.value.code == "storage"
    store.close()
