"""The hub: what fails on the way there is one line with the command to run, and soon."""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imprompt import hub
from imprompt.catalog import adapters, bases
from imprompt.catalog.resolve import resolve
from imprompt.errors import ImpromptError, ModelError, UsageError

ASK = """
import sys
from imprompt import hub
from imprompt.errors import ModelError
hub.TIMEOUT = float(sys.argv[1])
try:
    hub.fetch("some/model", "config.json", what="adapter 'x'", about="45 MB, licence MIT")
except ModelError as error:
    print(error)
"""


def serve(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does ``answer`` with every connection; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            answer(connection)

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    for connection in held:
        connection.close()


def asked(address: str, tmp_path: Path, timeout: float = hub.TIMEOUT, **environment: str) -> str:
    """What a process says that asks the hub at an address."""
    import os

    env = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", **environment}
    command = [sys.executable, "-c", ASK, str(timeout)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout.count("\n") == 1, run.stderr
    return run.stdout.strip()


COMMAND = "Download it with: hf download some/model config.json"


def test_a_cut_connection_is_one_line_with_the_command(tmp_path: Path) -> None:
    for address in serve(lambda connection: connection.close()):
        said = asked(address, tmp_path)
    assert said.startswith("adapter 'x' (some/model: 45 MB, licence MIT) cannot be downloaded from the hub: ")
    assert said.endswith(COMMAND)


def test_a_server_that_never_answers_is_left_after_one_timeout(tmp_path: Path) -> None:
    attempts: list[socket.socket] = []
    for address in serve(attempts.append):
        said = asked(address, tmp_path, timeout=1)
    assert said.endswith(COMMAND)
    assert len(attempts) < 6  # as many as a download makes


def test_no_server_and_offline_are_one_line(tmp_path: Path) -> None:
    said = asked("http://127.0.0.1:9", tmp_path)
    assert said.endswith(COMMAND)
    said = asked("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert "is not on this machine, and the hub cannot be asked" in said
    assert said.endswith(COMMAND)


# ---- names


@pytest.mark.parametrize(
    "name",
    ["./a/b", "../a", "/no/where", "~/none/x", "models/a.safetensors", "a\\b", "C:\\x\\y", "none.safetensors",
     "here/model", "a//b", "owner/", ".hidden/x"],
)  # fmt: skip
def test_what_looks_like_a_path_never_goes_to_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ModelError, match="there is no adapter at") as error:
        resolve(name, "adapter", adapters())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "~nouser-of-that-name/x", ""])
def test_what_can_be_no_name_is_refused(name: str) -> None:
    with pytest.raises(ImpromptError):
        resolve(name, "adapter", adapters())


def test_names_become_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = resolve("sd15-plus", "adapter", adapters())
    assert (source.repo, source.inside) == ("h94/IP-Adapter", "models/ip-adapter-plus_sd15.safetensors")
    assert source.about == "98 MB, licence Apache-2.0"
    source = resolve("me/mine/sub/a.safetensors", "adapter", adapters())
    assert (source.repo, source.inside, source.is_file) == ("me/mine", "sub/a.safetensors", True)
    assert resolve("me/mine:sub", "image encoder", {}).inside == "sub"
    assert resolve("black-forest-labs/FLUX.1-dev", "base", bases()).row is bases()["flux"]
    (tmp_path / "me").mkdir()
    assert resolve("hf:me/mine", "adapter", adapters()).repo == "me/mine"
    with pytest.raises(ModelError):
        resolve("me/mine", "adapter", adapters())
    (tmp_path / "me" / "mine").mkdir()
    assert resolve("me/mine", "adapter", adapters()).path == Path("me/mine")
    bundled = resolve("emoji", "adapter", adapters())
    assert bundled.path is not None
    assert bundled.weights == (bundled.path,)


def test_an_alias_nearly_right_is_told_the_right_one() -> None:
    with pytest.raises(UsageError, match=r"adapter 'sd15-pluss' is unknown; did you mean sd15-plus"):
        resolve("sd15-pluss", "adapter", adapters())
