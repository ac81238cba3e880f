"""What strangers and broken programs send: the documented answer, nothing lost, and the next job is fine."""

import contextlib
import io
import json
import shutil
import socket
import sqlite3
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from imprompt.app.cli import main
from imprompt.app.server.settings import Limits, Settings
from imprompt.app.server.store import Store
from imprompt.catalog import ASSETS
from imprompt.errors import UsageError
from serving import Running, free_port, picture, start, submit, upload, wait, written

JSON = {"Content-Type": "application/json"}
JOB = {"request": {"prompt": "a cat", "steps": 2, "seed": 1}}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with short patience, small caps and no worker, started once for all tests."""
    limits = Limits(header_seconds=1, body_seconds=2, json_bytes=64 * 1024, picture_bytes=256 * 1024)
    running = start(Settings(tmp_path_factory.mktemp("quick"), devices=(), limits=limits), ready=False)
    yield running
    running.stop()


def raw(running: Running, sent: bytes, *, seconds: float = 10) -> bytes:
    """What the server answers to bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", urlsplit(running.url).port), timeout=seconds) as connection:
        connection.sendall(sent)
        found = b""
        while chunk := connection.recv(65536):
            found += chunk
    return found


def head(running: Running, path: str, *lines: str) -> bytes:
    host = f"Host: 127.0.0.1:{running.settings.port}"
    return "\r\n".join([f"POST {path} HTTP/1.1", host, *lines, "", ""]).encode()


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_endless_bodies_are_cut_off(quick: Running) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(10_000):  # 10 GB, were they read
            yield b" " * 1_000_000

    start = time.monotonic()
    with quick.client() as client:
        try:
            answer = client.post(
                "/api/v1/jobs", content=endless(), headers={"Content-Type": "application/json"}
            )
            assert code(answer) == (413, "too_large")
        except httpx.WriteError:  # closed while we were still sending
            pass
        assert client.get("/healthz").status_code == 200
    assert time.monotonic() - start < 20
    stated = head(quick, "/api/v1/jobs", "Content-Type: application/json", "Content-Length: 10000000000")
    assert b" 413 " in raw(quick, stated).split(b"\r\n")[0]


def test_slow_headers_and_slow_bodies_are_cut_off(quick: Running) -> None:
    assert raw(quick, b"POST /api/v1/jobs HTTP/1.1\r\nHost: 127") == b""
    short = head(quick, "/api/v1/jobs", "Content-Type: application/json", "Content-Length: 100") + b"{"
    assert b" 408 " in raw(quick, short).split(b"\r\n")[0]


def test_wrong_lengths_and_nonsense_are_answered(quick: Running) -> None:
    long = head(
        quick, "/api/v1/jobs", "Content-Type: application/json", "Content-Length: 2", "Connection: close"
    )
    assert b" 422 " in raw(quick, long + b"{}garbage after the body").split(b"\r\n")[0]
    assert b" 400 " in raw(quick, b"\x16\x03\x01\x02 this is no HTTP\r\n\r\n").split(b"\r\n")[0]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[1]",
        b'{"request": {"prompt": "a cat", "scale": NaN}}',
        b'{"request": {"prompt": "a cat", "guidance": Infinity}}',
        b'{"request": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b"[" * 60_000,
        b'{"request": {"prompt": "\xff\xfe"}}',
    ],
)
def test_bodies_that_are_no_sound_json_are_400(quick: Running, body: bytes) -> None:
    with quick.client() as client:
        answer = client.post("/api/v1/jobs", content=body, headers=JSON)
        assert code(answer) == (400, "bad_json")


def test_multipart_of_many_parts_or_broken_is_400(quick: Running) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    many = b"".join(b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' for _ in range(5000))
    with quick.client() as client:
        assert code(client.post("/api/v1/pictures", content=many, headers=kind)) == (400, "bad_multipart")
        broken = b'--x\r\nContent-Disposition: form-data; name="file"; filename="../../a"\r\n\r\n'
        answer = client.post("/api/v1/pictures", content=broken, headers=kind)
        assert answer.status_code in (400, 422)
        none = {"Content-Type": "multipart/form-data"}
        assert code(client.post("/api/v1/pictures", content=b"x", headers=none)) == (400, "bad_multipart")
        assert code(client.post("/api/v1/pictures", content=b"x")) == (415, "media_type")


def bomb(side: int) -> bytes:
    """A PNG whose header promises side² pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * 1_000_000)
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        b"GIF89a",
        picture()[:200],
        bomb(50_000),
        b"%PDF-1.7",
        b"\0" * 1000,
    ],
    ids=["empty", "svg", "gif-head", "truncated", "bomb", "pdf", "zeros"],
)
def test_what_is_no_picture_is_refused(quick: Running, content: bytes) -> None:
    with quick.client() as client:
        answer = client.post("/api/v1/pictures", files={"file": ("../../etc/passwd", content)})
        assert code(answer) == (422, "bad_picture")


def test_a_picture_over_the_cap_is_413(quick: Running) -> None:
    with quick.client() as client:
        answer = client.post("/api/v1/pictures", files={"file": ("a.png", b"x" * 300_000)})
        assert code(answer) == (413, "too_large")


def test_the_name_of_a_file_says_nothing(quick: Running) -> None:
    with quick.client() as client:
        for name in ("../../x.png", "con.png", "a\u202egnp.exe", "x" * 300):
            answer = client.post("/api/v1/pictures", files={"file": (name, picture(), "text/html")})
            assert answer.status_code == 201
            found = client.get(answer.json()["url"])
            assert found.headers["content-type"] == "image/png"
            assert found.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(("form", "kind"), [("MPO", "image/jpeg"), ("PPM", "image/x-portable-anymap")])
def test_whatever_picture_can_be_read_is_kept(quick: Running, form: str, kind: str) -> None:
    shown, file = Image.new("RGB", (40, 24), "blue"), io.BytesIO()
    second = {"save_all": True, "append_images": [shown]} if form == "MPO" else {}  # as cameras write it
    shown.save(file, form, **second)
    with quick.client() as client:
        answer = client.post("/api/v1/pictures", files={"file": ("photo", file.getvalue())})
        assert answer.status_code == 201, answer.text
        kept = answer.json()
        assert (kept["type"], kept["width"], kept["height"], kept["frames"]) == (kind, 40, 24, 1)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"steps": 100_000}, "steps"),
        ({"steps": 999}, "steps"),
        ({"count": 99}, "count"),
        ({"size": [4096, 4096]}, "size"),
        ({"size": [127, 127]}, "size"),
        ({"base": "/etc/passwd"}, "base"),
        ({"base": "someone/model"}, "base"),
        ({"base": "sdxl"}, "base"),
        ({"images": ["../../secret.png"]}, "images"),
        ({"images": ["https://example.org/a.png"]}, "images"),
        ({"images": ["0" * 64]}, "images"),
        ({"images": [{"scale": "strong"}]}, "images.0"),
        ({"loras": ["/tmp/x.safetensors"]}, "loras.path"),
        ({"device": "cuda:7"}, "device"),
        ({"quantize": "x.gguf"}, "quantize"),
        ({"compile": "full"}, "compile"),
        ({"speed": "quick"}, "speed"),
        ({"face_model": "/tmp"}, "face_model"),
        ({"prompt": 7}, "prompt"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_requests_outside_what_is_offered_name_the_field(
    client: httpx.Client, fields: dict, field: str
) -> None:
    answer = client.post("/api/v1/jobs", json={"request": {"prompt": "a cat", **fields}})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"].startswith(field.split(".")[0])
    assert str(Path.home()) not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/jobs/" + "0" * 24,
        "/api/v1/jobs/../../etc/passwd",
        "/api/v1/jobs/%2e%2e%2fetc",
        "/api/v1/pictures/" + "0" * 64,
        "/api/v1/pictures/..%2f..%2fjournal.sqlite",
        "/static/../guard.py",
        "/static/%2e%2e/guard.py",
        "/nothing",
    ],
)
def test_what_is_not_there_is_said(running: Running, path: str) -> None:
    lines = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{running.settings.port}\r\nConnection: close\r\n\r\n"
    first, _, rest = raw(running, lines.encode()).partition(b"\r\n")
    assert first.split()[1] in (b"404", b"422")
    assert json.loads(rest.rpartition(b"\r\n\r\n")[2])["error"]["code"]


@pytest.mark.parametrize(
    "payload", ["!!!", "aGVsbG8=", "data:text/html;base64,PGI+", "file:///etc/passwd", 7, None]
)
def test_base64_that_is_no_picture_is_422(client: httpx.Client, payload: object) -> None:
    answer = client.post("/sdapi/v1/img2img", json={"prompt": "x", "init_images": [payload]})
    assert (answer.status_code, answer.json()["error"]) == (422, "bad_picture")


def test_other_names_and_other_sites_are_kept_out(client: httpx.Client) -> None:
    assert code(client.get("/api/v1/history", headers={"Host": "evil.example"})) == (403, "bad_host")
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert code(client.post("/api/v1/jobs", json=JOB, headers=headers)) == (403, "cross_origin")
    own = {"Origin": str(client.base_url).rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    assert client.get("/api/v1/history", headers=own).status_code == 200
    assert "access-control-allow-origin" not in client.get("/", headers=own).headers


def test_a_token_is_needed_where_one_is_set(starting: Callable[..., Running]) -> None:
    running = starting(ready=False, devices=(), token="open sesame")
    with running.client() as client:
        assert client.get("/healthz").status_code == 200
        assert code(client.get("/api/v1/history")) == (401, "unauthorized")
        assert code(client.get("/api/v1/history", headers={"Authorization": "Bearer wrong"}))[0] == 401
        assert (
            client.get("/api/v1/history", headers={"Authorization": "Bearer open sesame"}).status_code == 200
        )
        assert client.get("/api/v1/history", auth=("anyone", "open sesame")).status_code == 200
        welcome = client.get("/?token=open%20sesame")
        assert (welcome.status_code, welcome.headers["location"]) == (303, "/")
        assert "httponly" in welcome.headers["set-cookie"].lower()
        assert client.get("/api/v1/history").status_code == 200  # by the cookie


def test_a_browser_without_the_token_is_asked_for_it(starting: Callable[..., Running]) -> None:
    running = starting(ready=False, devices=(), token="open sesame")
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    with running.client(headers=browser) as client:
        answer = client.get("/")
        assert answer.status_code == 401
        assert answer.headers["Content-Type"].startswith("text/html")
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert '<input id="token" name="token" type="password"' in answer.text
        assert "not this server's token" not in answer.text
        wrong = client.get("/?token=<script>")
        assert wrong.status_code == 401
        assert "not this server's token" in wrong.text
        assert "<script>" not in wrong.text
        assert client.get("/api/v1/history").json()["error"]["code"] == "unauthorized"
        assert client.get("/?token=open+sesame").status_code == 303  # as the form sends it
        assert client.get("/").status_code == 200
    with running.client() as program:
        assert program.get("/").json()["error"]["code"] == "unauthorized"


def test_other_addresses_need_a_token(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--token"):
        Settings(folder=tmp_path, host="0.0.0.0").check()
    Settings(folder=tmp_path, host="0.0.0.0", token="long enough").check()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"port": 99_999}, "--port"), ({"port": -1}, "--port"), ({"base": "/models/mine"}, "--model NAME"),
        ({"devices": ("foo",)}, "--device"), ({"dtype": "float7"}, "--dtype"),
        ({"token": "schlüssel1"}, "--token"),
        ({"limits": Limits(batch=0)}, "--batch"), ({"limits": Limits(queue=-1)}, "--queue"),
    ],
)  # fmt: skip
def test_settings_that_cannot_serve_are_refused_at_the_start(tmp_path: Path, wrong: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Settings(tmp_path, **wrong).check()
    Settings(tmp_path, base="mine", bases={"mine": "/models/mine"}).check()


def test_a_servers_name_may_be_written_in_capitals(tmp_path: Path) -> None:
    assert "studio.lan" in (Settings(tmp_path, allowed_hosts=("Studio.LAN",)).hosts or ())


def test_a_full_queue_is_429_with_when_to_come_back(starting: Callable[..., Running]) -> None:
    running = starting(ready=False, devices=(), limits=Limits(queue=3, client_share=2))
    with running.client() as client:
        jobs = [submit(client, seed=seed)["id"] for seed in range(2)]
        refused = client.post("/api/v1/jobs", json=JOB)
        assert code(refused) == (429, "client_share")
        assert int(refused.headers["retry-after"]) >= 1
        jobs.append(submit(client, {"X-Client-Id": "another"}, seed=9)["id"])
        assert code(client.post("/api/v1/jobs", json=JOB, headers={"X-Client-Id": "third"})) == (
            429,
            "queue_full",
        )
        for job in jobs:
            assert client.delete(f"/api/v1/jobs/{job}").json()["state"] == "cancelled"
        assert client.post("/api/v1/jobs", json=JOB).status_code == 202


def test_jobs_sent_at_once_do_not_exceed_a_clients_share(starting: Callable[..., Running]) -> None:
    running = starting(ready=False, devices=(), limits=Limits(queue=40, client_share=10))

    def post(_: int) -> int:
        with running.client() as client:
            return client.post("/api/v1/jobs", json=JOB).status_code

    with ThreadPoolExecutor(25) as threads:
        statuses = list(threads.map(post, range(25)))
    assert (statuses.count(202), statuses.count(429)) == (10, 15)


def test_pictures_may_vanish_while_the_server_runs(client: httpx.Client, running: Running) -> None:
    shown = upload(client, picture("orange"))
    shutil.rmtree(running.settings.folder / "pictures")
    answer = client.post("/api/v1/jobs", json={"request": {"prompt": "a cat", "images": [shown["id"]]}})
    assert code(answer) == (422, "unknown_picture")
    assert wait(client, submit(client, seed=77)["id"])["state"] == "done"
    assert upload(client, picture("orange"))["id"] == shown["id"]


def test_the_whole_folder_may_vanish_and_the_journal_is_written_again(
    starting: Callable[..., Running],
) -> None:
    running = starting(ready=False, devices=())
    with running.client() as client:
        before = submit(client, seed=1)["id"]
        shutil.rmtree(running.settings.folder)
        after = submit(client, seed=2)["id"]
        assert upload(client, picture())["width"] == 128
        assert client.delete(f"/api/v1/jobs/{before}").json()["state"] == "cancelled"
    running.stop()
    with sqlite3.connect(running.settings.folder / "journal.sqlite") as journal:
        states = dict(journal.execute("SELECT id, state FROM jobs"))
    assert states == {before: "cancelled", after: "queued"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 700 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)]
    if subprocess.run(mounting, check=False).returncode:
        pytest.skip("mounting a small disk needs more rights")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_accepts_nothing_and_loses_nothing(starting: Callable[..., Running], disk: Path) -> None:
    running = starting(ready=False, devices=(), folder=disk)
    stream = io.BytesIO()
    Image.effect_noise((1000, 1000), 80).save(stream, "PNG")
    with running.client() as client:
        full = client.post("/api/v1/pictures", files={"file": ("a.png", stream.getvalue())})
        assert code(full) == (507, "disk_full")
        kept = upload(client, picture())
        assert client.get(kept["url"]).content == picture()
        assert client.get("/api/v1/history").status_code == 200
    running.stop()


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)


def test_a_full_disk_is_read_and_freed(disk: Path) -> None:
    store = Store(disk, stored_bytes=2**30)
    stream = io.BytesIO()
    Image.effect_noise((250, 250), 80).save(stream, "PNG")
    drawn, shown = store.keep(stream.getvalue()), store.keep(picture())
    store.add("job", "me", None, "{}", {})
    store.update("job", "done", 1, {"pictures": [{"id": drawn.id}]}, [drawn])
    with pytest.raises(OSError, match="No space"):
        fill(disk / "full")
    for _ in range(50):
        assert store.find(shown.id) == shown
    store.forget("job")
    assert store.job("job") is None
    assert store.find(drawn.id) is None
    store.close()


def test_what_an_ended_server_left_half_done_is_swept_away(
    starting: Callable[..., Running], tmp_path: Path
) -> None:
    folder = tmp_path / "server"
    orphan, other = folder / "pictures" / "ab" / ("ab" * 32), folder / "pictures" / "ab" / "notes.txt"
    half = folder / "scratch" / "imprompt-1" / "picture.png"
    for path in (orphan, other, half):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    starting(ready=False, devices=())
    assert [path.exists() for path in (orphan, other, half)] == [False, True, False]


def test_a_picture_drawn_for_a_cancelled_job_is_not_kept(client: httpx.Client, running: Running) -> None:
    """Cancelled when its picture is written, and the server has not heard of it yet."""

    def placed() -> set[Path]:
        return written(running.settings.folder)

    def cancel_in_the_moment() -> None:  # on the server's loop, which hears nothing meanwhile
        end = time.monotonic() + 60
        while placed() == before and time.monotonic() < end:
            time.sleep(0.01)
        with contextlib.suppress(StopIteration):
            running.queue.cancel(job).send(None)

    before = placed()
    identity = submit(client, {"X-Client-Id": "late"}, seed=4242, steps=40)["id"]
    [job] = running.queue.unfinished("127.0.0.1 late")
    running.loop.call_soon_threadsafe(cancel_in_the_moment)
    assert wait(client, identity)["state"] == "cancelled"
    after = wait(client, submit(client, seed=4243, steps=1)["id"])
    assert {path.name for path in placed() - before} == {picture["id"] for picture in after["pictures"]}


@pytest.mark.parametrize("spoil", ["used", "file", "noise"])
def test_a_folder_that_cannot_be_used_is_told_in_a_line(tmp_path: Path, spoil: str, capsys) -> None:
    folder = tmp_path / "server"
    if spoil == "file":
        folder.write_text("x")
    else:
        folder.mkdir()
        if spoil == "noise":
            (folder / "journal.sqlite").write_bytes(b"no database" * 500)
    first = Store(folder, stored_bytes=1) if spoil == "used" else None
    command = ["serve", "--folder", str(folder), "--port", str(free_port()), "--device", "cpu"]
    assert main(command) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("imprompt: error: ")
    assert "--folder" in told[-1]
    if first is not None:
        first.close()


@pytest.mark.slow
def test_a_worker_without_its_base_is_not_ready(starting: Callable[..., Running], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    running = starting(ready=False, base="mine", bases={"mine": str(empty)}, devices=("cpu",))
    with running.client() as client:
        job = wait(client, submit(client)["id"])  # is told what is wrong
        assert job["state"] == "failed"
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")
        for told in (answer.json()["reason"], job["error"]["message"]):
            assert "'mine' is no base: a diffusers folder has a model_index.json" in told
            assert str(tmp_path) not in told
        shutil.copytree(ASSETS, empty, dirs_exist_ok=True)
        assert wait(client, submit(client)["id"])["state"] == "done"
        assert client.get("/readyz").json() == {"status": "ready"}


def test_the_page_is_asked_for_its_head_and_known_files_are_not_sent_again(quick: Running) -> None:
    with quick.client() as client:
        assert client.head("/healthz").status_code == 200
        page = client.head("/")
        assert (page.status_code, page.content) == (200, b"")
        known = {"If-None-Match": f'"other", W/{page.headers["etag"]}'}
        assert client.get("/", headers=known).status_code == 304
        assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_an_upload_that_the_client_gives_up_is_no_fault_of_the_server(
    starting: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    running = starting(ready=False, devices=())
    head = (
        "POST /api/v1/pictures HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 300000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", running.settings.port)) as given_up:
        given_up.sendall(head.encode() + bytes(100_000))
        time.sleep(0.5)
    with running.client() as client:
        time.sleep(0.5)
        assert client.get("/healthz").status_code == 200
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
