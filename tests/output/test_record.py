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
from imprompt.io import check_path
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


def test_a_record_written_through_a_linked_folder_is_read_by_either_name(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "disk" / "deep" / "out").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "out").symlink_to(tmp_path / "disk" / "deep" / "out")
    monkeypatch.chdir(tmp_path / "work")
    Image.new("RGB", (8, 8)).save("ref.png")
    text = Record(Request(images=["ref.png"], seed=1)).to_json(Path("out"))
    for folder in (Path("out"), tmp_path / "work" / "out", tmp_path / "disk" / "deep" / "out"):
        (name,) = Record.from_json(text, folder).request.files
        assert Path(name).samefile("ref.png"), folder
    picture = with_record(tmp_path / "disk" / "deep" / "out" / "a.png", text)
    Path("a.png").symlink_to(picture)  # of the picture itself
    assert Path(*output.read_request("a.png").files).samefile("ref.png")
    by_links = text.replace("../../../work/ref.png", "../ref.png")  # as records once named it
    assert by_links != text
    assert Record.from_json(by_links, Path("out")).request.files == ("ref.png",)


def test_a_linked_picture_keeps_its_own_name(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "blob", "PNG")
    (tmp_path / "ref.png").symlink_to(tmp_path / "blob")
    assert "./ref.png" in Record(Request(images=[str(tmp_path / "ref.png")], seed=1)).to_json(tmp_path)


def models(folder: str = "") -> Request:
    """A request whose models are files of a folder."""
    return Request(
        prompt="a", base=f"{folder}base", adapter=f"{folder}a.safetensors",
        images=["ref.png", {"image": "ref.png", "adapter": f"{folder}b.safetensors"}], seed=1,
        quantize=f"{folder}q.gguf", face_model=f"{folder}faces",
        controls=[{"kind": "none", "path": "ref.png", "model": f"{folder}net:depth"}],
        loras=[f"{folder}l.safetensors"], embeddings=[f"{folder}e.safetensors"],
        fingerprints={
            f"base {folder}base": "1", f"adapter {folder}b.safetensors": "2",
            f"lora {folder}l.safetensors": "3",
            f"image encoder of {folder}b.safetensors": "4", f"control {folder}net": "5", "adapter emoji": "6",
        },
    )  # fmt: skip


def test_models_given_by_a_relative_path_are_found_from_any_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("base", "net", "faces"):
        (tmp_path / "nets" / name).mkdir()
    for name in ("a.safetensors", "b.safetensors", "l.safetensors", "e.safetensors", "q.gguf"):
        (tmp_path / "nets" / name).touch()
    monkeypatch.chdir(tmp_path)
    text = Record(models("nets/")).to_json(Path("out"))
    assert str(tmp_path) not in text
    assert Record.from_json(text, Path("out")).request == models("nets/")
    monkeypatch.chdir("/")
    assert Record.from_json(text, tmp_path / "out").request == models(f"{tmp_path}/nets/")


def test_names_of_models_that_are_no_relative_path_are_recorded_as_given(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("emoji", "hf", "int8", "owner"):  # folders that are called like aliases
        Path(name).mkdir()
    Path("away.safetensors").touch()
    for fields in (
        {"base": "emoji"}, {"base": "hf:owner/name"}, {"base": "owner/name"},
        {"quantize": "int8"}, {"base": str(tmp_path / "away.safetensors")}, {"base": "~/a.safetensors"},
        {"loras": ["owner/name/file.safetensors"]},
    ):  # fmt: skip
        request = Request(prompt="a", seed=1, **fields)
        text = Record(request).to_json(tmp_path / "out")
        assert json.loads(text)["request"] == json.loads(request.to_json())
        assert Record.from_json(text, tmp_path / "out").request == request


def test_a_picture_whose_name_begins_with_a_tilde_is_found_again(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "~x.png")
    for given in ("./~x.png", str(tmp_path / "~x.png"), "out/../~x.png"):
        for folder in (Path(), tmp_path, Path("out")):
            text = Record(Request(images=[given], seed=1)).to_json(folder)
            (name,) = Record.from_json(text, folder).request.files
            assert check_path(name).samefile(tmp_path / "~x.png"), (given, folder)
