"""Where the program's output leads: narrow encodings, full devices, closed pipes, bytes that are no text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compiled import start


def run(*words: str, out: int | object = subprocess.PIPE, **variables: str) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        [sys.executable, "-m", "imprompt", *words], stdout=out, stderr=subprocess.PIPE, check=False,
        env=os.environ | variables,
    )  # fmt: skip
    return done.returncode, done.stdout or b"", done.stderr


FORKED = """
import os, sys
from imprompt.app.cli import main

encoding, *files = sys.argv[1:4]
del sys.argv[1:4]
for number, file in enumerate(files, 1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
sys.stdout.reconfigure(encoding=encoding)
sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")  # as Python has it
code = main()
sys.stdout.flush()
os._exit(code)
"""


def run_forked(folder: Path, encoding: str, *words: str) -> tuple[int | None, bytes, bytes]:
    """A command that needs torch, in a process that has imported it already."""
    files = folder / f"{encoding}.out", folder / f"{encoding}.err"
    child, _ = start(FORKED, encoding, *files, *words, folder=folder)
    child.join()
    return child.exitcode, *(file.read_bytes() for file in files)


@pytest.mark.parametrize("words", [("models",), ("--version",), ("profiles", "--help")])
def test_an_output_on_a_full_device_is_one_line(words):
    with Path("/dev/full").open("wb") as full:
        code, _, err = run(*words, out=full)
    assert code == 4
    assert err == b"imprompt: error: cannot write to the standard output (No space left on device).\n"


NARROW = [
    ("ascii", "--help"), ("ascii", "generate", "--help"), ("ascii", "profiles", "linear"),
    ("cp1252", "profiles", "linear"),
]  # fmt: skip


@pytest.mark.xdist_group("compiled")
@pytest.mark.parametrize(("encoding", "words"), [(row[0], row[1:]) for row in NARROW])
def test_an_encoding_without_our_letters_gets_similar_ones(encoding, words, tmp_path):
    def printed(encoding):
        if words[0] == "profiles":
            return run_forked(tmp_path, encoding, *words)
        return run(*words, PYTHONIOENCODING=encoding)

    code, out, err = printed(encoding)
    assert (code, err) == (0, b"")
    usual = printed("utf-8")[1].decode()
    shown = out.decode(encoding)
    assert shown != usual
    assert shown.count("\n") == usual.count("\n")
    assert shown.count("?") == usual.count("?")
    if words[0] == "profiles":
        assert "linear  88|8|8888\n" in shown


@pytest.mark.xdist_group("compiled")
def test_an_error_about_letters_that_the_terminal_lacks_is_one_line(tmp_path):
    code, _, err = run_forked(tmp_path, "ascii", "generate", "熊猫", "--base", "无")
    assert (code, err.count(b"\n")) == (2, 1)
    assert err.startswith(rb"imprompt: error: base '\u65e0' is unknown")


def test_nobody_reads_on_is_no_message():
    reading, writing = os.pipe()
    os.close(reading)
    code, _, err = run("models", out=writing)
    os.close(writing)
    assert (code, err) == (1, b"")


def test_an_error_stream_that_was_closed_is_not_replaced_by_the_output():
    words = f"{sys.executable} -m imprompt info none.png 2>&-"
    told = subprocess.run(words, shell=True, stdout=subprocess.PIPE, check=False)
    assert (told.returncode, told.stdout) == (4, b"")


def test_an_error_that_nobody_can_be_told_keeps_its_code():
    with Path("/dev/full").open("wb") as full:
        words = [sys.executable, "-m", "imprompt", "info", "none.png"]
        assert subprocess.run(words, stderr=full, check=False).returncode == 4
