"""Where the program's output leads: narrow encodings, full devices, closed pipes, bytes that are no text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*words: str, out: int | object = subprocess.PIPE, **variables: str) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        [sys.executable, "-m", "imprompt", *words], stdout=out, stderr=subprocess.PIPE, check=False,
        env=os.environ | variables,
    )  # fmt: skip
    return done.returncode, done.stdout or b"", done.stderr


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


@pytest.mark.parametrize(("encoding", "words"), [(row[0], row[1:]) for row in NARROW])
def test_an_encoding_without_our_letters_gets_similar_ones(encoding, words):
    code, out, err = run(*words, PYTHONIOENCODING=encoding)
    assert (code, err) == (0, b"")
    usual = run(*words, PYTHONIOENCODING="utf-8")[1].decode()
    shown = out.decode(encoding)
    assert shown != usual
    assert shown.count("\n") == usual.count("\n")
    assert shown.count("?") == usual.count("?")
    if words[0] == "profiles":
        assert "linear  88|8|8888\n" in shown


def test_an_error_about_letters_that_the_terminal_lacks_is_one_line():
    code, _, err = run("generate", "熊猫", "--base", "无", PYTHONIOENCODING="ascii")
    assert (code, err.count(b"\n")) == (2, 1)
    assert err.startswith(rb"imprompt: error: base '\u65e0' is unknown")


def test_nobody_reads_on_is_no_message():
    reading, writing = os.pipe()
    os.close(reading)
    code, _, err = run("models", out=writing)
    os.close(writing)
    assert (code, err) == (1, b"")


def test_an_error_that_nobody_can_be_told_keeps_its_code():
    with Path("/dev/full").open("wb") as full:
        words = [sys.executable, "-m", "imprompt", "info", "none.png"]
        assert subprocess.run(words, stderr=full, check=False).returncode == 4
