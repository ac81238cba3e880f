"""What the program sets before torch starts its threads, and what it leaves to the user."""

import json
import os
import subprocess
import sys

import pytest

from imprompt.app.threads import thread_settings

SHORT = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_waiting_is_short_unless_the_user_says_how_to_wait(tmp_path, name):
    assert thread_settings({}, tmp_path / "none") == SHORT
    assert thread_settings({name: "ACTIVE"}, tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max 100000", None), ("150000 100000", "1"), ("20000 100000", "1"), ("99999900000 100000", None)],
)
def test_a_container_starts_as_many_threads_as_its_quota_pays_for(tmp_path, quota, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    file = tmp_path / "cpu.max"
    file.write_text(quota + "\n")
    assert thread_settings({}, file).get("OMP_NUM_THREADS") == threads
    assert "OMP_NUM_THREADS" not in thread_settings({"OMP_NUM_THREADS": "3"}, file)


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "1"}])
def test_the_program_sets_it_before_torch_is_there_and_a_call_from_python_sets_nothing(given):
    script = (
        "import json, os, sys; from imprompt.app.cli import main;"
        "main(['--version']); before = dict(os.environ); sys.argv = ['imprompt', '--version']; main();"
        "print(json.dumps([before, dict(os.environ), 'torch' in sys.modules]))"
    )
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    ended = subprocess.run([sys.executable, "-c", script], env=clean | given, capture_output=True, text=True)
    before, after, imported = json.loads(ended.stdout.splitlines()[-1])
    assert not imported
    assert given.items() <= before.items()
    assert not before.keys() & SHORT.keys()
    added = {name: value for name, value in after.items() if name not in before}
    assert added.keys() >= (set() if given else SHORT.keys())
    assert all(after[name] == value for name, value in given.items())
    assert not given or not added
