"""Reading captioned pictures: shapes of metadata, and what a damaged row does (nothing but a line)."""

import json

import pytest
from PIL import Image

from imprompt.errors import InputError
from imprompt.evaluation.rows import Row, read_rows, write_rows


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def write(folder, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def test_text_and_captions_and_groups_are_read(folder):
    write(
        folder,
        {"file_name": "a.png", "text": "a cat", "group": "cats"},
        {"file_name": "b.png", "text": ["a dog", "a puppy"], "split": "held_out_pair", "core": True},
        {"file_name": "c.png", "captions": {"style": ["noto style"]}, "groups": {"style": "noto"}},
    )
    rows, rejected = read_rows(folder)
    assert not rejected
    assert rows[0].captions == {"full": ("a cat",)}
    assert rows[0].groups == {"group": "cats"}
    assert rows[0].trainable
    assert rows[1].captions == {"full": ("a dog", "a puppy")}
    assert not rows[1].trainable
    assert rows[1].tags == {"core"}
    assert rows[2].captions == {"style": ("noto style",)}
    assert rows[2].groups == {"style": "noto"}


@pytest.mark.parametrize(
    "damage",
    ["{not json", {"text": "no file name"}, {"file_name": "gone.png"}, {"file_name": "b.png", "text": 7},
     {"file_name": "b.png", "captions": ["a list"]}, {"file_name": "b.png", "split": 3}, "[1, 2]"],
)  # fmt: skip
def test_a_damaged_row_is_left_out_and_named(folder, damage):
    write(folder, damage, {"file_name": "a.png", "text": "a cat"})
    rows, rejected = read_rows(folder)
    assert [row.file.name for row in rows] == ["a.png"]
    assert [item.where for item in rejected] == ["metadata.jsonl:1"]
    assert rejected[0].reason


def test_captions_beside_the_pictures(folder):
    (folder / "a.txt").write_text("a cat\n")
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00bad")
    rows, rejected = read_rows(folder)
    assert [(row.file.name, row.captions) for row in rows] == [("a.png", {"full": ("a cat",)})]
    assert [item.where for item in rejected] == ["b.png", "c.png"]


def test_rows_can_be_chosen_by_a_tag(folder):
    write(folder, {"file_name": "a.png", "core": True}, {"file_name": "b.png", "core": False})
    rows, _ = read_rows(folder, only="core")
    assert [row.file.name for row in rows] == ["a.png"]
    with pytest.raises(InputError, match="rare"):
        read_rows(folder, only="rare")


@pytest.mark.parametrize("make", [lambda f: f / "missing", lambda f: (f / "empty").mkdir() or f / "empty"])
def test_nothing_to_read_is_an_error_that_says_what_is_expected(folder, make):
    with pytest.raises(InputError, match=r"metadata\.jsonl"):
        read_rows(make(folder))


def test_rows_survive_writing_and_reading(folder):
    rows = [
        Row(
            folder / "a.png", {"full": ("a cat", "the cat")}, {"concept": "cat"}, "train", frozenset({"core"})
        ),
        Row(folder / "b.png", {}, {}, "held_out_concept"),
    ]
    write_rows(rows, folder / "metadata.jsonl")
    assert read_rows(folder) == (rows, [])
