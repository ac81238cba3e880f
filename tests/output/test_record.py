"""The record inside a file: where its pictures are, what old ones and hostile ones say."""

import io
import json
import os
from pathlib import Path

import av
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imprompt import output
from imprompt.errors import InputError, UsageError
from imprompt.output.record import Record
from imprompt.schema.request import Request


def with_record(path: Path, text: str) -> Path:
    info = PngInfo()
    info.add_itxt("imprompt", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_pictures_are_named_relative_to_the_file_and_found_again(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "shown").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("ref.png", "mask.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "shown" / name)
    ref, mask = str(tmp_path / "shown" / "ref.png"), str(tmp_path / "shown" / "mask.png")
    request = Request(
        task="inpaint", image=ref, mask=mask, images=[ref], controls=[{"kind": "canny", "path": ref}],
        regions=[{"text": "a", "mask": mask}], seed=1, hashes={ref: "0" * 64},
    )  # fmt: skip
    text = Record(request).to_json(tmp_path / "out")
    assert str(tmp_path) not in text
    assert "../shown/ref.png" in text
    assert Record.from_json(text, tmp_path / "out").request == request
    moved = tmp_path / "elsewhere"
    tmp_path.joinpath("shown").rename(moved)
    tmp_path.joinpath("deep").mkdir()
    moved.rename(tmp_path / "deep" / "shown")
    (tmp_path / "deep" / "out").mkdir()
    again = Record.from_json(text, tmp_path / "deep" / "out").request
    assert again.image == str(tmp_path / "deep" / "shown" / "ref.png")
    assert list(again.hashes) == [again.image]
    monkeypatch.chdir(tmp_path / "deep" / "out")
    assert Record.from_json(text, Path()).request.image == "../shown/ref.png"


def test_names_of_no_file_stay_as_they_are(tmp_path: Path) -> None:
    request = Request(images=["photo of me"], prompt="ref.png", seed=1)
    Image.new("RGB", (8, 8)).save(tmp_path / "ref.png")
    text = Record(request).to_json(tmp_path)
    assert Record.from_json(text, tmp_path).request == request
    (tmp_path / "photo of me").touch()  # made later, beside the picture
    assert Record.from_json(text, tmp_path).request == request


def test_a_record_of_version_1_names_pictures_as_they_were_given(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "ref.png")
    text = json.dumps({"imprompt": 1, "request": {"prompt": "an owl", "image": "ref.png", "task": "edit"}})
    assert output.read_request(with_record(tmp_path / "a.png", text)).image == "ref.png"


BAD = {
    "text": "hello",
    "array": "[]",
    "other object": '{"a": 1}',
    "no request": '{"imprompt": 2}',
    "version as text": '{"imprompt": "2", "request": {}}',
    "version true": '{"imprompt": true, "request": {}}',
    "newer": '{"imprompt": 99, "request": {"prompt": "x"}}',
    "deep": '{"imprompt": 2, "request": {"prompt": ' + "[" * 3000 + "]" * 3000 + "}}",
    "unknown field": '{"imprompt": 2, "request": {"prompt": "x", "colour": 1}}',
    "dtype a list": '{"imprompt": 2, "request": {"prompt": "x", "dtype": []}}',
    "NaN": '{"imprompt": 2, "request": {"prompt": "x", "scale": NaN}}',
    "surrogate": '{"imprompt": 2, "request": {"prompt": "\\ud800"}}',
    "null request": '{"imprompt": 2, "request": null}',
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_bad_records_are_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError):
        Record.from_json(text)
    with pytest.raises(InputError) as caught:
        output.read_record(with_record(tmp_path / "a.png", text))
    assert "\n" not in str(caught.value)


def test_provenance_of_another_kind_is_no_error() -> None:
    text = '{"imprompt": 2, "request": {"prompt": "x"}, "provenance": [1]}'
    assert Record.from_json(text).provenance == {}


def test_what_is_shown_of_a_record_can_neither_steer_a_terminal_nor_forge_lines() -> None:
    hostile = "owl\x1b[2J\x1b]0;x\x07\r\nmade with   imprompt 9, adapter yours\u2028\u202egnp"
    shown = Record(Request(prompt=hostile, seed=1), {"imp\nrompt": "1\x1b[0m"}).lines()
    assert sum(line.startswith("made with") for line in shown) == 1
    for line in shown:
        assert line.isprintable()
    assert any("owl\\x1b[2J" in line for line in shown)


def test_local_files_are_listed(tmp_path: Path) -> None:
    request = Request(task="edit", image="/etc/pass\x1bwd.png", images=["b.png"], seed=1)
    assert Record(request).local_files() == ["/etc/pass\\x1bwd.png", "b.png"]


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(InputError, match="pipe"):
        output.read_record(tmp_path / "a.mp4")


def test_pictures_of_others_carry_no_request(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], comment=b"made by me")
    memory = io.BytesIO()
    with av.open(memory, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.metadata["comment"] = "my holiday"
        container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (16, 16)))))
        container.mux(stream.encode(None))
    (tmp_path / "a.mp4").write_bytes(memory.getvalue())
    for name in ("a.png", "a.gif", "a.mp4"):
        with pytest.raises(InputError, match="carries no request"):
            output.read_record(tmp_path / name)
    for name, data in {"b.png": b"text", "b.mp4": b"\0\0\0\x18ftypisom" + b"\0" * 100, "c.png": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=r"is not a PNG|damaged"):
            output.read_record(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="carry no request"):
        output.read_record(tmp_path / "empty")
