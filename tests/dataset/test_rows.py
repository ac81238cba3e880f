"""Reading captioned pictures: every form people have, and what a damaged record does (nothing but a line)."""

import errno
import io
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from imprompt.catalog import ASSETS
from imprompt.data.read import read_dataset
from imprompt.encoders.images import load_image
from imprompt.errors import InputError
from imprompt.evaluation.config import EvaluateConfig
from imprompt.training.config import TrainConfig


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def write(folder, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def captions(data):
    return {row.file.name: row.captions.get("full") for row in data.rows}


def test_text_and_captions_and_groups_are_read(folder):
    write(
        folder,
        {"file_name": "a.png", "text": "a cat", "group": "cats"},
        {"file_name": "b.png", "text": ["a dog", "a puppy"], "split": "held_out_pair", "core": True},
        {"file_name": "c.png", "captions": {"style": ["noto style"]}, "groups": {"style": "noto"}},
    )
    data = read_dataset(folder)
    rows = data.rows
    assert not data.rejected
    assert rows[0].captions == {"full": ("a cat",)}
    assert rows[0].groups == {"group": "cats"}
    assert rows[0].trainable
    assert rows[1].captions == {"full": ("a dog", "a puppy")}
    assert not rows[1].trainable
    assert rows[1].tags == {"core"}
    assert rows[2].captions == {"style": ("noto style",)}
    assert rows[2].groups == {"style": "noto"}


@pytest.mark.parametrize("name", ["caption", "prompt", "description"])
def test_the_caption_field_is_guessed_and_said(folder, name):
    write(folder, {"file_name": "a.png", name: "a cat"}, {"image": "b.png", name: "a dog"})
    data = read_dataset(folder / "metadata.jsonl")
    assert captions(data) == {"a.png": ("a cat",), "b.png": ("a dog",)}
    assert data.notes == [f"captions are read from the field '{name}' (2)"]


def test_records_without_any_caption_are_refused_not_trained_on_empty_text(folder):
    write(folder, {"file_name": "a.png", "legend": "a cat"}, {"file_name": "b.png"})
    with pytest.raises(InputError, match=r"none of the 2 pictures .* text, caption, prompt"):
        read_dataset(folder)
    assert [row.caption for row in read_dataset(folder, captions="optional").rows] == ["", ""]


def test_a_csv_and_the_references_json_list_are_read(folder):
    (folder / "metadata.csv").write_text('file_name,prompt\na.png,"a cat, sitting"\nb.png,\n')
    data = read_dataset(folder)
    assert captions(data) == {"a.png": ("a cat, sitting",), "b.png": None}
    assert "1 of 2 pictures have no caption" in data.notes
    listed = folder / "data.json"
    listed.write_text(json.dumps([{"image_file": "c.png", "text": "a sun"}]))
    assert captions(read_dataset(listed)) == {"c.png": ("a sun",)}
    listed.write_text("{}")
    with pytest.raises(InputError, match="list of records"):
        read_dataset(listed)


def test_a_webdataset_shard_is_read_and_its_pictures_without_unpacking(folder):
    with tarfile.open(folder / "0000.tar", "w") as tar:
        for key, text in (("x", b"a cat"), ("y", None)):
            tar.add(folder / "a.png", f"{key}.png")
            about = json.dumps({"caption": "a dog"}).encode() if text is None else text
            info = tarfile.TarInfo(f"{key}.json" if text is None else f"{key}.txt")
            info.size = len(about)
            tar.addfile(info, io.BytesIO(about))
        tar.addfile(tarfile.TarInfo("z.txt"))
    data = read_dataset(folder / "0000.tar")
    assert captions(data) == {"x.png": ("a cat",), "y.png": ("a dog",)}
    assert [row.read() for row in data.rows] == [(folder / "a.png").read_bytes()] * 2
    assert [item.where for item in data.rejected] == ["0000.tar/z"]
    (folder / "bad.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match="not a readable tar file"):
        read_dataset(folder / "bad.tar")


def test_of_several_pictures_and_captions_in_a_record_of_a_shard_the_first_counts_and_is_noted(folder):
    with tarfile.open(folder / "0.tar", "w") as tar:
        tar.add(folder / "a.png", "x.png")
        for name, content in (("x.jpg", b"no picture"), ("x.caption", b"a dog"), ("x.txt", b"a cat")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data = read_dataset(folder / "0.tar")
    assert captions(data) == {"x.png": ("a cat",)}  # as in a folder, where .txt goes before .caption
    assert data.notes == ["records with several pictures: 1; the first of each is used"]


def test_a_pattern_of_webdataset_names_shards_and_says_which_are_missing(folder):
    for name in ("a-008", "a-009", "a-010", "b-9", "b-10", "{x,y}"):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            tar.add(folder / "a.png", f"{name}.png")
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))

    def shown(pattern):
        return [row.caption for row in read_dataset(folder / pattern).rows]

    assert shown("a-{008..010}.tar") == ["a-008", "a-009", "a-010"]
    assert shown("{a,a}-0{08,10}.tar") == ["a-008", "a-010"] * 2
    assert shown("b-{9..10}.tar") == ["b-9", "b-10"]
    assert shown("{x,y}.tar") == ["{x,y}"]
    with pytest.raises(InputError, match=r"names 4 shards, of which 1 are not there, first '.*a-011.tar'"):
        shown("a-{008..011}.tar")
    for wrong in ("{9..8}", "{0..999999999999}"):
        with pytest.raises(InputError, match="it counts up, and at most 100,000"):
            shown(f"a-{wrong}.tar")


def test_a_shards_json_says_split_group_and_tags_as_a_metadata_file_does(folder):
    about = json.dumps(
        {"text": "a cat", "split": "val", "group": "cats", "core": True, "repeats": 3}
    ).encode()
    with tarfile.open(folder / "0000.tar", "w") as tar:
        tar.add(folder / "a.png", "x.png")
        info = tarfile.TarInfo("x.json")
        info.size = len(about)
        tar.addfile(info, io.BytesIO(about))
    row = read_dataset(folder / "0000.tar", only="core").rows[0]
    assert not row.trainable
    assert (row.groups, row.repeats, row.captions) == ({"group": "cats"}, 3, {"full": ("a cat",)})


def test_koyha_folders_have_repeats_and_name_their_class(tmp_path):
    for name, text in (("3_red fox", None), ("1_owl", "an owl at night")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
        if text:
            (tmp_path / name / "1.caption").write_text(text)
    data = read_dataset(tmp_path)
    found = {row.groups["group"]: (row.caption, row.repeats) for row in data.rows}
    assert found == {"owl": ("an owl at night", 1), "red fox": ("red fox", 3)}
    assert "take their folder's name" in data.notes[0]


def test_a_folder_that_begins_with_a_date_has_no_repeats(tmp_path):
    """20,240,101 of each picture would fill the memory."""
    (tmp_path / "20240101_party").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "20240101_party" / "1.png")
    (tmp_path / "20240101_party" / "1.txt").write_text("a cake")
    (row,) = read_dataset(tmp_path).rows
    assert (row.repeats, row.caption, row.groups) == (1, "a cake", {})


def test_a_group_without_a_name_is_none(folder):
    """Pictures of no style are not of one style."""
    record = {"text": "a cat", "groups": {"style": None, "kind": ""}, "group": ""}
    write(folder, record | {"file_name": "a.png"}, record | {"file_name": "b.png", "group": 7})
    assert [row.groups for row in read_dataset(folder).rows] == [{}, {"group": "7"}]


def test_the_bundled_sheet_is_a_dataset_too():
    data = read_dataset(ASSETS / "eval")
    assert {row.split for row in data.rows} <= {"held_out_concept", "held_out_pair"}
    assert Image.open(io.BytesIO(data.rows[0].read())).size == (128, 128)


@pytest.mark.parametrize(
    "damage",
    ["{not json", {"text": "no file name"}, {"file_name": "gone.png"}, {"file_name": "b.png", "text": 7},
     {"file_name": "b.png", "captions": 7}, {"file_name": "b.png", "split": 3}, "[1, 2]", "\x00\x01"],
)  # fmt: skip
def test_a_damaged_row_is_left_out_and_named(folder, damage):
    write(folder, damage, {"file_name": "a.png", "text": "a cat"})
    data = read_dataset(folder)
    assert [row.file.name for row in data.rows] == ["a.png"]
    assert [item.where for item in data.rejected] == ["metadata.jsonl:1"]
    assert data.rejected[0].reason


DEEP = '{"file_name": "b.png", "text": ' + "[" * 100_000


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ('{"file_name": "b.png", "repeats": Infinity}', "repeats must be a whole number from 1, given inf"),
        ({"file_name": "b.png", "repeats": 0}, "repeats .* given 0"),
        ({"file_name": "b.png", "repeats": -3}, "repeats .* given -3"),
        ({"file_name": "b.png", "repeats": 2.7}, "repeats .* given 2.7"),
        ({"file_name": "b.png", "repeats": [2]}, "repeats .* given \\[2\\]"),
        ({"image": "b" * 300, "text": "a cat"}, "name too long"),
        ({"image": "\ud800.png", "text": "a cat"}, "missing|half of a character|surrogates"),
        ({"file_name": "b.png", "text": "a \ud800 cat"}, r"half of a character: 'a \\ud800 cat'"),
        ({"file_name": "b.png", "group": "\ud800"}, "half of a character"),
        (DEEP, "recursion"),
        ({"file_name": "b.png", "captions": {"full": None}}, "text or a list of texts, given .*None"),
        ({"file_name": "b.png", "groups": ["q"]}, "groups must be an object of names by kind, given"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_used_says_why(folder, damage, says):
    write(folder, damage, {"file_name": "a.png", "text": "a cat"})
    data = read_dataset(folder)
    assert [row.file.name for row in data.rows] == ["a.png"]
    (item,) = data.rejected
    assert re.search(says, item.reason, re.IGNORECASE)
    str(item).encode()


def test_a_damaged_record_of_a_shard_says_why(folder):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for key, about in (("x", b'{"text": "a cat"}'), ("y", b'{"text": "b", "repeats": Infinity}')):
            tar.add(folder / "a.png", f"{key}.png")
            info = tarfile.TarInfo(f"{key}.json")
            info.size = len(about)
            tar.addfile(info, io.BytesIO(about))
    data = read_dataset(folder / "0.tar")
    assert captions(data) == {"x.png": ("a cat",)}
    assert [str(item) for item in data.rejected] == [
        "0.tar/y: repeats must be a whole number from 1, given inf; if it means something else, give "
        "ignore=repeats"
    ]


def test_a_json_list_of_endless_depth_is_no_valid_json(folder):
    (folder / "data.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not valid JSON"):
        read_dataset(folder / "data.json")


def test_repeats_may_be_text_as_a_csv_has_them(folder):
    (folder / "metadata.csv").write_text("file_name,text,repeats\na.png,a cat,3\nb.png,a dog,\n")
    assert [row.repeats for row in read_dataset(folder).rows] == [3, 1]


def test_a_csv_caption_with_a_comma_outside_quotes_is_left_out_not_cut(folder):
    (folder / "metadata.csv").write_text('file_name,text\na.png,a red, round apple\nb.png,"a red, big dog"\n')
    data = read_dataset(folder)
    assert captions(data) == {"b.png": ("a red, big dog",)}
    (item,) = data.rejected
    assert item.where == "metadata.csv:2"
    assert "double quotes" in item.reason


def test_a_damaged_line_of_a_table_is_named_by_its_place_in_the_file(folder):
    (folder / "metadata.csv").write_text('file_name,text\na.png,"a red\napple"\n\ngone.png,a dog\n')
    data = read_dataset(folder)
    assert captions(data) == {"a.png": ("a red\napple",)}
    assert [item.where for item in data.rejected] == ["metadata.csv:5"]


def test_a_split_may_be_in_any_case(folder):
    records = [{"file_name": f"{name}.png", "text": name, "split": name} for name in "ab"]
    write(folder, records[0] | {"split": "Train"}, records[1] | {"split": "TEST"})
    assert [row.trainable for row in read_dataset(folder).rows] == [True, False]


def test_a_folder_that_cannot_be_read_is_told_not_passed_over(folder, monkeypatch):
    """Who tests as root may read every folder, so the system's refusal is made here."""
    (folder / "locked").mkdir()
    (folder / "lost+found").mkdir()  # at the root of a disk, for its owner alone
    listing = os.scandir

    def refused(path):
        if str(path).endswith(("locked", "lost+found")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(InputError, match=r"folder '.*locked' cannot be read \(Permission denied\)"):
        read_dataset(folder, captions="optional")
    (folder / "locked").rmdir()
    assert len(read_dataset(folder, captions="optional").rows) == 3


def test_an_empty_caption_does_not_hide_one_of_another_field(folder):
    write(folder, {"file_name": "a.png", "text": "", "caption": "a cat"}, {"file_name": "b.png", "text": " "})
    data = read_dataset(folder)
    assert [row.caption for row in data.rows] == ["a cat", ""]
    assert "captions are read from the field 'caption' (1)" in data.notes


def test_pictures_behind_a_link_to_a_folder_are_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for place in (tmp_path / "elsewhere", tmp_path / "mine"):
        place.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(place / "a.png")
        (place / "a.txt").write_text(place.name)
    (tmp_path / "mine" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / "linked again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "mine")
    data = read_dataset(tmp_path / "mine")
    assert sorted(row.caption for row in data.rows) == ["elsewhere", "mine"]


def test_captions_beside_the_pictures(folder):
    (folder / "a.txt").write_text("a cat\n")
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00bad")
    data = read_dataset(folder)
    assert [(row.file.name, row.captions) for row in data.rows] == [("a.png", {"full": ("a cat",)})]
    assert [item.where for item in data.rejected] == ["b.png", "c.png"]


@pytest.mark.parametrize(
    "text",
    [b"\xef\xbb\xbfa cat\r\n", b"a cat\r\n", b"\r\n  a cat \n"],
    ids=["byte order mark", "CRLF", "blanks"],
)
def test_a_caption_is_its_text_however_it_was_saved(folder, text):
    (folder / "a.txt").write_bytes(text)
    with tarfile.open(folder / "0.tar", "w") as tar:
        tar.add(folder / "a.png", "x.png")
        tar.add(folder / "a.txt", "x.txt")
    (folder / "tars").mkdir()
    shard = (folder / "0.tar").rename(folder / "tars" / "0.tar")
    assert captions(read_dataset(folder)) == {"a.png": ("a cat",)}
    assert captions(read_dataset(shard)) == {"x.png": ("a cat",)}


@pytest.mark.parametrize(
    ("picture", "caption"),
    [("1.JPEG", "1.txt"), ("1.Jpg", "1.TXT"), ("1.WEBP", "1.Caption"), ("1.PNG", "1.PNG.txt"),
     ("a.b v1.AVIF", "a.b v1.txt"), ("1.jfif", "1.txt"), ("1.jp2", "1.txt")],
)  # fmt: skip
def test_suffixes_may_be_in_any_case_and_the_captions_may_follow_the_pictures(tmp_path, picture, caption):
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    forms = {".jpg": "JPEG", ".jfif": "JPEG", ".jp2": "JPEG2000"}
    suffix = (inside / picture).suffix.lower()
    Image.new("RGB", (16, 16), "red").save(inside / picture, forms.get(suffix, suffix[1:].upper()))
    (inside / caption).write_text("a square")
    data = read_dataset(tmp_path)
    assert captions(data) == {picture: ("a square",)}
    assert load_image(data.rows[0].read()).size == (16, 16)


def test_hidden_files_and_what_earlier_runs_drew_are_no_pictures(folder):
    (folder / "a.txt").write_text("a cat")
    for name in ("._a.png", ".thumbs/a.png", "__MACOSX/a.png", "runs/mine/samples/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
    (folder / "runs" / "mine" / "run.json").touch()
    with tarfile.open(folder.parent / f"{folder.name}.tar", "w") as tar:
        for name in ("a.png", "a.txt", "._a.png"):
            tar.add(folder / name, f"./{name}")
    data = read_dataset(folder)
    assert captions(data) == {"a.png": ("a cat",)}
    assert [item.where for item in data.rejected] == ["b.png", "c.png"]
    packed = read_dataset(folder.parent / f"{folder.name}.tar")
    assert captions(packed) == {"a.png": ("a cat",)}
    assert not packed.rejected


def test_formats_that_are_not_read_are_told_not_passed_over(folder):
    (folder / "a.txt").write_text("a cat")
    (folder / "IMG_1.HEIC").touch()
    rejected = {item.where: item.reason for item in read_dataset(folder).rejected}
    assert rejected["IMG_1.HEIC"] == ".HEIC is not read here; convert it to PNG or JPEG"


def test_pictures_without_any_caption_are_told_what_to_write(folder):
    (folder / "a.txt").write_text(" \n\t")
    with pytest.raises(InputError, match=r"none of the 3 pictures .* for 'a\.png' into 'a\.txt'"):
        read_dataset(folder)


@pytest.mark.parametrize("name", ["a.png", "photo.heic", "pictures.zip", "captions.txt"])
def test_a_file_that_is_no_data_is_named_as_what_it_is(folder, name):
    (folder / name).touch()
    with pytest.raises(InputError, match=rf"{name}' is (one picture|a file of the kind).*; give a folder"):
        read_dataset(folder / name)


def test_a_table_with_semicolons_and_windows_paths_is_read(folder):
    (folder / "in").mkdir()
    (folder / "b.png").rename(folder / "in" / "b.png")
    (folder / "metadata.csv").write_bytes(
        "\ufefffile_name;text\r\na.png;a cat, sitting\r\nin\\b.png;a dog".encode()
    )
    assert captions(read_dataset(folder)) == {"a.png": ("a cat, sitting",), "b.png": ("a dog",)}


def test_a_record_without_a_picture_says_what_it_has(folder):
    write(folder, {"name": "a.png", "text": "a cat"}, {"file_name": "b.png", "text": "a dog"})
    (item,) = read_dataset(folder).rejected
    assert item.reason.startswith("no picture: one of file_name, ")
    assert item.reason.endswith("is expected, given name, text")


def test_pictures_that_the_metadata_does_not_name_are_counted(folder):
    write(folder, {"file_name": "a.png", "text": "a cat"}, {"file_name": "a.png", "text": "a pet"})
    assert read_dataset(folder).notes == [
        "pictures that the folder's metadata does not name are not used (2)"
    ]


def test_an_imagefolder_may_have_a_folder_for_each_split(folder):
    for number, split in enumerate(("train", "test")):
        (folder / split).mkdir()
        (folder / f"{'ab'[number]}.png").rename(folder / split / "1.png")
        write(folder / split, {"file_name": "1.png", "text": split}, {"file_name": "gone.png", "text": "x"})
    (folder / "c.png").unlink()
    data = read_dataset(folder)
    assert [(row.name, row.caption, row.trainable) for row in data.rows] == [
        ("test/1.png", "test", False),
        ("train/1.png", "train", True),
    ]
    assert [item.where for item in data.rejected] == ["test/metadata.jsonl:2", "train/metadata.jsonl:2"]
    assert data.notes == ["pictures of 'test' are held out (1)"]


def test_rows_can_be_chosen_by_a_tag(folder):
    write(folder, {"file_name": "a.png", "text": "x", "core": True}, {"file_name": "b.png", "core": False})
    assert [row.file.name for row in read_dataset(folder, only="core").rows] == ["a.png"]
    with pytest.raises(InputError, match="rare"):
        read_dataset(folder, only="rare")


@pytest.mark.parametrize("make", [lambda f: f / "missing", lambda f: (f / "empty").mkdir() or f / "empty"])
def test_nothing_to_read_is_an_error_that_says_what_is_expected(folder, make):
    with pytest.raises(InputError, match=r"metadata\.jsonl"):
        read_dataset(make(folder))


# ---- Hugging Face datasets


@pytest.fixture
def hugging_face(folder):
    """Makes a dataset of the package ``datasets`` from columns; ``image`` are pictures."""
    datasets = pytest.importorskip("datasets", reason="reads Hugging Face datasets")

    def make(**columns):
        made = datasets.Dataset.from_dict(columns)
        return made.cast_column("image", datasets.Image()) if "image" in columns else made

    return make


def test_a_saved_dataset_is_read_and_a_record_without_a_picture_is_an_empty_one(folder, hugging_face):
    pictures = [str(folder / "a.png"), None]
    hugging_face(image=pictures, text=["a cat", "a dog"]).save_to_disk(folder / "saved")
    data = read_dataset(folder / "saved")
    assert [(row.caption, row.trainable) for row in data.rows] == [("a cat", True), ("a dog", True)]
    assert load_image(data.rows[0].read()).size == (4, 4)
    with pytest.raises(InputError, match="empty"):
        load_image(data.rows[1].read())


def test_a_record_of_a_dataset_says_what_those_of_a_metadata_file_say(folder, hugging_face):
    hugging_face(
        image=[str(folder / "a.png")] * 2, text=["a cat", "a dog"], split=["train", "test"],
        core=[True, False], group=["cats", None], repeats=[3, 1], size=[4, 4],
    ).save_to_disk(folder / "saved")  # fmt: skip
    first, second = read_dataset(folder / "saved").rows
    assert (first.groups, first.repeats, first.tags, first.trainable) == (
        {"group": "cats"},
        3,
        {"core"},
        True,
    )
    assert (second.groups, second.repeats, second.tags, second.trainable) == ({}, 1, set(), False)
    (row,) = read_dataset(folder / "saved", only="core").rows
    assert row.caption == "a cat"


def test_columns_that_mean_something_else_are_named_and_can_be_ignored(folder, hugging_face):
    hugging_face(
        image=[str(folder / "a.png")] * 2, text=["a cat", "a dog"], split=[0, 1], repeats=[0.5, 0],
    ).save_to_disk(folder / "saved")  # fmt: skip
    with pytest.raises(InputError, match=r"given 0; if it means something else, give ignore=split"):
        read_dataset(folder / "saved")
    with pytest.raises(InputError, match=r"given 0.5; if it means something else, give ignore=repeats"):
        read_dataset(folder / "saved", ignore=["split"])
    rows = read_dataset(folder / "saved", ignore=["split", "repeats"]).rows
    assert [(row.caption, row.trainable, row.repeats) for row in rows] == [
        ("a cat", True, 1),
        ("a dog", True, 1),
    ]
    with pytest.raises(InputError, match="one named text, caption, prompt are expected"):
        read_dataset(folder / "saved", ignore=["split", "repeats", "text"])


def test_fields_of_any_record_are_ignored_and_one_that_is_not_there_is_an_error(folder):
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "a cat", "split": ["x"], "new": true}'
    )
    (row,) = read_dataset(folder, ignore=["split", "new"]).rows
    assert (row.caption, row.trainable, row.tags) == ("a cat", True, frozenset())
    with pytest.raises(InputError, match=r"ignore: no record of .* has a field 'spilt'"):
        read_dataset(folder, ignore=["split", "spilt"])
    with pytest.raises(InputError, match="ignore: 'file_name' names a record's picture"):
        read_dataset(folder, ignore=["file_name"])


def test_fields_to_ignore_are_given_as_a_text_or_a_list(tmp_path):
    for given in ("split,repeats", "split, repeats", ["split", "repeats"]):
        assert TrainConfig(data="x", output=tmp_path, ignore=given).ignore == ("split", "repeats")
        assert EvaluateConfig(ignore=given).ignore == ("split", "repeats")


def test_a_caption_of_a_dataset_that_is_no_text_is_left_out_and_named(folder, hugging_face):
    pictures = [str(folder / "a.png")] * 2
    hugging_face(image=pictures, caption=[["a cat", None], ["a dog"]]).save_to_disk(folder / "saved")
    data = read_dataset(folder / "saved")
    assert [row.caption for row in data.rows] == ["a dog"]
    assert "caption must be text or a list of texts" in data.rejected[0].reason
    hugging_face(image=pictures, text=[1, 2]).save_to_disk(folder / "numbers")
    with pytest.raises(InputError, match=r"no usable picture .*00000000: a caption must be text"):
        read_dataset(folder / "numbers")


def test_of_a_dataset_with_splits_one_is_read_and_the_others_are_named(folder, hugging_face):
    import datasets

    splits = {split: hugging_face(image=[str(folder / "a.png")], text=[split]) for split in ("test", "train")}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    data = read_dataset(folder / "saved")
    assert [row.caption for row in data.rows] == ["train"]
    assert data.notes[0] == "the split 'train' is read, and no other of test, train"


def test_columns_of_another_kind_are_told_with_their_kinds(folder, hugging_face):
    hugging_face(picture=[b"1"], text=["a"]).save_to_disk(folder / "saved")
    with pytest.raises(InputError, match=r"columns picture \(binary\), text \(string\); .*cast_column"):
        read_dataset(folder / "saved")


@pytest.mark.parametrize("plain", [True, False])
def test_parquet_files_are_read_with_the_pictures_inside(folder, hugging_face, plain):
    """As the hub gives them, and as other programs write them, which do not say that a column is pictures."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="writes Parquet")
    (folder / "parts").mkdir()
    files = [folder / "parts" / f"{n}.parquet" for n in range(2)]
    for n, file in enumerate(files):
        made = hugging_face(image=[str(folder / "a.png")], text=[f"cat {n}"])
        made.to_parquet(file)  # with the bytes of the pictures
        if plain:
            parquet.write_table(parquet.read_table(file).replace_schema_metadata(None), file)
    whole, part = read_dataset(folder / "parts"), read_dataset(files[1])
    assert [row.caption for row in whole.rows] == ["cat 0", "cat 1"]
    assert [row.caption for row in part.rows] == ["cat 1"]
    assert load_image(part.rows[0].read()).size == (4, 4)
    files[0].write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        read_dataset(files[0])


def test_parquet_files_of_another_split_are_not_trained_on(folder, hugging_face):
    (folder / "parts").mkdir()
    for split in ("train", "test"):
        made = hugging_face(image=[str(folder / "a.png")], text=[split])
        made.to_parquet(folder / "parts" / f"{split}-00000-of-00001.parquet")
    data = read_dataset(folder / "parts")
    assert [row.caption for row in data.rows] == ["train"]
    assert data.notes[0] == "the split 'train' is read, and no other of train, test"


def test_a_configuration_of_a_dataset_is_read_by_its_name(folder, hugging_face):
    for name in ("one", "two"):
        (folder / "kinds" / name).mkdir(parents=True)
        made = hugging_face(image=[str(folder / "a.png")], text=[name])
        made.to_parquet(folder / "kinds" / name / "train.parquet")
    listed = [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in ("one", "two")]
    (folder / "kinds" / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n")
    data = read_dataset(f"hf:{folder / 'kinds'}:two")
    assert [row.caption for row in data.rows] == ["two"]
    with pytest.raises(InputError, match=r"configurations one, two; write hf:.*:one, or"):
        read_dataset(f"hf:{folder / 'kinds'}")


def test_a_dataset_of_the_hub_needs_a_name():
    with pytest.raises(InputError, match="write hf:owner/name"):
        read_dataset("hf:")


def test_pictures_here_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("./~a.png")
    Path("./~a.txt").write_text("a cat")
    (row,) = read_dataset(".").rows
    assert load_image(row.file).size == (8, 8)
