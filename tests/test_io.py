"""Files are written whole or not at all; what is read is checked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import FrameType

import pytest

import imprompt.io
from imprompt.errors import InputError, UsageError
from imprompt.io import (
    check_file,
    check_path,
    fingerprint,
    printable,
    read_json,
    seed_for,
    sha256,
    write_all,
    write_atomic,
    write_folder,
)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_file_is_written_with_its_folder(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "new" / "a.txt", b"one", overwrite=False)
    assert path.read_bytes() == b"one"
    assert names(path.parent) == ["a.txt"]


def test_what_is_there_stays_unless_overwriting(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "a.txt", b"one", overwrite=False)
    with pytest.raises(FileExistsError):
        write_atomic(path, b"two", overwrite=False)
    assert path.read_bytes() == b"one"
    write_atomic(path, lambda stream: stream.write(b"two") and None, overwrite=True)
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["a.txt"]


def test_a_link_is_replaced_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("precious")
    link = tmp_path / "link.txt"
    link.symlink_to(outside)
    with pytest.raises(FileExistsError):
        write_atomic(link, b"new", overwrite=False)
    write_atomic(link, b"new", overwrite=True)
    assert outside.read_text() == "precious"
    assert not link.is_symlink()
    assert link.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    old = write_atomic(tmp_path / "a.txt", b"old", overwrite=False)

    def fail(stream: object) -> None:
        raise error

    with pytest.raises(error):
        write_atomic(old, fail, overwrite=True)
    with pytest.raises(error):
        write_all({tmp_path / "b.txt": b"b", tmp_path / "c.txt": fail}, overwrite=False)
    assert names(tmp_path) == ["a.txt"]
    assert old.read_bytes() == b"old"


def test_several_files_take_their_places_together_or_not_at_all(tmp_path: Path) -> None:
    write_atomic(tmp_path / "b.txt", b"mine", overwrite=False)
    with pytest.raises(FileExistsError):
        write_all({tmp_path / "a.txt": b"a", tmp_path / "b.txt": b"b"}, overwrite=False)
    assert names(tmp_path) == ["b.txt"]
    assert (tmp_path / "b.txt").read_bytes() == b"mine"


def test_a_folder_that_is_replaced_keeps_what_is_not_ours(tmp_path: Path) -> None:
    def ours(path: Path) -> bool:
        return path.suffix == ".png"

    folder = write_folder(tmp_path / "frames", {"1.png": b"1", "2.png": b"2"})
    with pytest.raises(FileExistsError):
        write_folder(folder, {"1.png": b"new"})
    (folder / "notes.txt").write_text("mine")
    (folder / "sub").mkdir()
    write_folder(folder, {"1.png": b"new", "notes.txt": b"x"}, is_ours=ours)
    assert (folder / "notes-1.txt").read_text() == "mine"
    assert names(folder) == ["1.png", "notes-1.txt", "notes.txt", "sub"]
    assert (folder / "1.png").read_bytes() == b"new"
    assert names(tmp_path) == ["frames"]


def test_a_folder_that_is_interrupted_at_any_line_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    """As a signal handler does, raise at each line of io.py in turn."""
    place, number, ended = tmp_path / "frames", 0, False

    def tracer(frame: FrameType, event: str, _: object) -> object:
        nonlocal lines
        if frame.f_code.co_filename != imprompt.io.__file__:
            return None
        if event == "line":
            lines += 1
            if lines == number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return tracer

    while not ended:
        write_folder(place, {"1.png": b"old"}, is_ours=lambda path: path.suffix == ".png")
        (place / "mine.txt").write_bytes(b"kept")
        number, lines = number + 1, 0
        sys.settrace(tracer)
        try:
            write_folder(place, {"1.png": b"new"}, is_ours=lambda path: path.suffix == ".png")
            ended = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert names(tmp_path) == ["frames"], number
        assert (place / "1.png").read_bytes() in (b"old", b"new")
        kept = [path.read_bytes() for path in place.iterdir() if path.suffix == ".txt"]
        assert set(kept) == {b"kept"}
        shutil.rmtree(place)
    assert number > 30


def test_a_linked_folder_is_not_replaced(tmp_path: Path) -> None:
    real = write_folder(tmp_path / "real", {"1.png": b"1"})
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(FileExistsError):
        write_folder(tmp_path / "link", {"1.png": b"2"}, is_ours=lambda path: True)
    assert (real / "1.png").read_bytes() == b"1"


def test_a_signal_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import signal, sys, time
        from pathlib import Path
        from imprompt.io import write_all
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        def slow(stream):
            print("writing", flush=True)
            time.sleep(30)
        folder = Path(sys.argv[1])
        write_all({folder / "a.txt": b"new", folder / "b.txt": slow}, overwrite=True)
        """
    )
    write_atomic(tmp_path / "a.txt", b"old", overwrite=False)
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) != 0
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"old"


def test_one_of_two_processes_gets_the_name(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        from imprompt.io import write_atomic
        got = 0
        for number in range(200):
            try:
                write_atomic(Path(sys.argv[1]) / f"{number}.txt", sys.argv[2].encode(), overwrite=False)
                got += 1
            except FileExistsError:
                pass
        print(got)
        """
    )
    children = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path, name], stdout=subprocess.PIPE)
        for name in ("one", "two")
    ]
    got = [int(child.communicate(timeout=60)[0]) for child in children]
    assert sum(got) == 200
    written = [(tmp_path / f"{number}.txt").read_text() for number in range(200)]
    assert [written.count("one"), written.count("two")] == got
    assert len(names(tmp_path)) == 200


NAMES = {
    "empty": "",
    "NUL": "a\0b.png",
    "surrogate": "\ud800.png",
    "long": "x" * 256 + ".png",
    "long in UTF-8": "ä" * 130 + ".png",
    "deep": "x/" * 3000,
    "nobody": "~nouser/x.png",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names_that_no_file_can_have_are_one_line(name: str, tmp_path: Path) -> None:
    for check in (check_path, check_file, sha256, lambda path: write_atomic(path, b"", overwrite=True)):
        with pytest.raises(InputError) as caught:
            check(name)
        message = str(caught.value)
        assert message == printable(message)
        assert len(message) < 300


def test_pipes_folders_and_missing_files_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {"pipe": "pipe", ".": "folder", "no.png": "no file", "pipe/x": "no file"}.items():
        with pytest.raises(InputError, match=reason):
            check_file(tmp_path / name)
    assert check_file(tmp_path, folder=True) == tmp_path


BAD_JSON: dict[str, str | bytes] = {
    "empty": "",
    "cut": '{"a": [1, 2',
    "deep": "[" * 3000 + "]" * 3000,
    "very deep": '{"a":' * 200_000,
    "twice": '{"a": 1, "a": 2}',
    "NaN": '{"a": NaN}',
    "infinite": '{"a": -Infinity}',
    "digits": "1" * 5000,
    "array": "[1]",
    "null": "null",
    "surrogate": '{"a": "\\ud800"}',
    "surrogate key": '{"\\udfff": 1}',
    "latin": b'{"a": "\xe4"}',
    "large": '{"a": "' + "x" * 3000 + '"}',
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_bad_json_is_one_line(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^record: [^\n]{10,200}\.$"):
        read_json(text, "record", error=UsageError, max_bytes=2000 if len(text) == 3009 else 10_000_000)
    file = tmp_path / "file.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    if len(text) != 3009:
        with pytest.raises(InputError):
            read_json(file, "record")


def test_good_json_is_read(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, {"ü": "😀"}]}
    assert read_json(json.dumps(value), "record") == value
    file = tmp_path / "file.json"
    file.write_text("\ufeff" + json.dumps(value, ensure_ascii=False), "utf-8")
    assert read_json(file, "record") == value
    assert read_json("[1]", "record", expect=(list, int)) == [1]


def test_printable_text_cannot_steer_a_terminal_or_forge_a_line() -> None:
    assert printable("a\x1b[2J\r\nmade by me\u2028\x9b\u202e\ud800") == (
        r"a\x1b[2J\r\nmade by me\u2028\x9b\u202e\ud800"
    )
    assert printable("Bär 🐻 👩‍🚀 熊") == "Bär 🐻 👩‍🚀 熊"


def test_hashes_follow_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"abc")
    assert sha256(one) == sha256(two)
    assert sha256(one) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    before = fingerprint(one, two)
    two.write_bytes(b"abd")
    assert sha256(one) != sha256(two)
    assert fingerprint(one, two) != before
    assert len(before) == 12


def test_seeds_are_stable_and_apart() -> None:
    assert seed_for(7, 3) == 10
    assert seed_for(2**53 - 1, 1) == 0
    assert seed_for(7, 3, "dropout") == seed_for(7, 3, "dropout")
    drawn = {seed_for(seed, index, use) for seed in range(20) for index in range(20) for use in ("a", "b")}
    assert len(drawn) == 800


@pytest.mark.parametrize(
    "address", ["https://example.org/cat.png", "s3://bucket/cat.png", Path("http://a/b.png")]
)
def test_an_address_is_no_file(address: str | Path) -> None:
    with pytest.raises(InputError, match=r"picture: .* is an address; save the file"):
        check_file(address, "picture")
