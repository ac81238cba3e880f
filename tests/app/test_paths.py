"""Files of strange names and in strange places, as arguments and in what pictures remember."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from imprompt.io import sha256
from imprompt.output import read_request

ODD = {
    "tilde": "~x.png", "user": "~nobody/x.png", "space": "a b.png", "quotes": "'q\".png", "dash": "-x.png",
    "apart": "e\u0301.png", "composed": "\u00e9.png", "line": "two\nlines.png", "percent": "50%.png",
    "option": "a,scale=2.png", "bracket": "[0].png", "emoji": "\U0001f98a.png", "backslash": "a\\b.png",
}  # fmt: skip
DRAW = ("generate", "a cat", "--base", "BASE", "--seed", "1")


def quoted(path: str) -> str:
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def drawn(path: str | Path) -> bytes:
    return Image.open(path).tobytes()


@pytest.mark.parametrize("name", ODD.values(), ids=ODD.keys())
def test_pictures_of_any_name_are_shown_written_and_repeated(say, tmp_path, monkeypatch, name):
    Path(tmp_path, name).parent.mkdir(exist_ok=True)
    shutil.copy("ref.png", tmp_path / name)
    for number, given in enumerate((f"./{name}", str(tmp_path / name))):
        code, _, err = say(*DRAW, "--image", quoted(given), "-o", f"{given}.{number}.png")
        assert code == 0, err
        code, _, err = say("generate", "--from", f"{given}.{number}.png", "-o", f"./again{number}.png")
        assert code == 0, err
        assert drawn(tmp_path / f"{name}.{number}.png") == drawn(f"again{number}.png")
    assert {path.name for path in tmp_path.iterdir()} >= {"again0.png", Path(name).parts[0]}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert say("generate", "--from", "../again0.png")[0] == 0


def test_a_home_folder_of_nobody_is_one_line_that_names_the_file(say):
    Path("~x.png").touch()
    code, _, err = say(*DRAW, "--image", "~x.png")
    assert (code, "there is no home folder '~x.png' (a file: ./~x.png)" in err) == (4, True)


def test_a_file_of_requests_and_its_folder_may_begin_with_a_tilde(say, place):
    Path("~jobs.jsonl").write_text(
        json.dumps({"prompt": "a", "base": str(place / "base"), "images": ["./~x.png"], "seed": 1})
    )
    shutil.copy("ref.png", "./~x.png")
    code, _, err = say("batch", "./~jobs.jsonl", "-o", "./~out")
    assert code == 0, err
    assert Path(read_request("./~out/000001.png").files[0]).samefile("./~x.png")


def test_a_picture_drawn_with_models_here_is_repeated_from_elsewhere(say, place, tmp_path, monkeypatch):
    shutil.copytree(place / "base", "mine")
    Path("mine/adapter.safetensors").rename("own.safetensors")
    Path("out").mkdir()
    words = ("generate", "a cat", "--image", "ref.png", "--seed", "1")
    code, _, err = say(*words, "--base", "mine", "--adapter", "own.safetensors", "-o", "out/a.png")
    assert code == 0, err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    code, _, err = say("generate", "--from", "../out/a.png", "-o", "b.png")
    assert code == 0, err
    assert drawn("../out/a.png") == drawn("b.png")
    code, _, err = say("generate", "--from", "b.png", "--steps", "3", "-o", "c.png")  # and from that one
    assert code == 0, err
    weights = Path("../own.safetensors").read_bytes()
    Path("../own.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
    code, _, err = say("generate", "--from", "b.png")
    assert (code, "its weights are not those" in err) == (3, True)


def test_the_settings_that_tune_chose_are_drawn_from_any_folder(say, tmp_path, monkeypatch):
    Image.new("RGB", (64, 64), "red").save("red.png")
    code, _, err = say(
        "tune", "a cat", "--image", "red.png", "--seed", "1", "--count", "1", "--steps", "3",
        "--exact", "--sweep", "scale=0.5,1", "-o", "deep/tuned",
    )  # fmt: skip
    assert code == 0, err
    assert str(tmp_path) not in Path("deep/tuned/best.json").read_text()
    monkeypatch.chdir("deep")
    shutil.copy("../mask.png", "red.png")  # another picture of that name
    code, _, err = say("generate", "--from", "tuned/best.json", "-o", "again.png")
    assert code == 0, err
    assert drawn("tuned/best.png") == drawn("again.png")


NAMED = (
    "generate a --image NAME", "generate a --from NAME", "generate a --from NAME.json",
    "generate a -o NAME.png", "generate a --quantize NAME.gguf --base BASE",
    "generate a --adapter NAME --image ref.png", "generate a --lora NAME --base BASE",
    "animate a --video NAME", "tune a --image ref.png -o NAME", "info NAME", "inspect NAME",
    "convert NAME new.safetensors", "convert NAME.ipadpt new.safetensors", "embed NAME -o a.safetensors",
    "embed ref.png -o NAME.safetensors", "profiles --base NAME", "demo -o NAME", "batch NAME -o out",
    "batch ref.png -o NAME", "train NAME", "train NAME.toml", "train ref.png --out NAME", "evaluate NAME",
    "evaluate -o NAME", "evaluate --json NAME", "evaluate --prompts NAME", "serve --folder NAME",
    "serve --loras NAME",
)  # fmt: skip


@pytest.mark.parametrize("line", NAMED)
def test_names_that_no_file_can_have_are_one_line_in_every_command(say, tmp_path, line):
    before = set(tmp_path.iterdir())
    for name, reason in {"x" * 300: "is too long", "~nouser/x": "there is no home folder '~nouser'"}.items():
        code, out, err = say(*line.replace("NAME", name).split())
        assert (code in (2, 3, 4), out) == (True, ""), err
        assert err.startswith("imprompt: error: "), err
        assert (err.count("\n"), reason in err) == (1, True), err
    assert set(tmp_path.iterdir()) == before


def test_a_user_without_a_home_draws_and_is_asked_where_to_keep_things(say, monkeypatch):
    monkeypatch.setenv("HOME", "~nobody-of-that-name")
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "IMPROMPT_FEATURE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = say(*DRAW, "--image", "ref.png")
    assert code == 0, err
    Path("large").write_bytes(bytes(16_000_000))
    assert sha256("large") == hashlib.sha256(bytes(16_000_000)).hexdigest()
    code, _, err = say("serve", "--port", "1")
    assert (code, err.count("\n"), "--folder: say where" in err) == (2, 1, True)
    assert say("doctor")[0] == 0


def test_a_folder_that_was_deleted_is_one_line(say, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir("gone")
    (tmp_path / "gone").rmdir()
    for line in ("generate a", "batch jobs.jsonl -o out", "info a.png", "demo"):
        code, _, err = say(*line.split())
        assert (code, err.count("\n"), "the current folder is not there any more" in err) == (4, 1, True), err
    assert say("generate", "--help")[0] == 0


@pytest.mark.parametrize(
    "line",
    [
        "generate a --image NAME",
        "edit NAME a",
        "generate a --adapter NAME --image ref.png",
        "generate a --lora NAME",
        "generate a --control canny:NAME",
    ],
)
def test_a_name_that_no_record_could_hold_is_refused_before_drawing(say, line):
    code, _, err = say(*line.replace("NAME", "a\udcff.png").split())
    assert (code, err.count("\n"), r"'a\udcff.png' is not valid Unicode" in err) == (2, 1, True), err


def test_names_that_begin_with_a_dash_follow_two_dashes(say):
    shutil.copy("ref.png", "-x.png")
    assert "(A file: ./-x.png)" in say("info", "-x.png")[2]
    assert "(A file: ./-x.png)" in say(*DRAW, "--image", "-x.png")[2]
    code, _, err = say("info", "--", "-x.png")
    assert (code, "'-x.png' carries no request" in err) == (4, True)
    code, out, err = say("edit", "--base", "BASE", "-o", "a.png", "--", "-x.png", "--help")
    assert (code, out) == (0, "a.png\n"), err
    assert (read_request("a.png").image, read_request("a.png").prompt) == (str(Path("-x.png")), "--help")


def test_an_edited_record_is_named_with_what_is_wrong_in_it(say):
    for wrong, reason in {
        '{"imprompt": 2}': "'r.json': its record is not one of imprompt's",
        '{"imprompt": 2, "request": {"size": {"a": 1}}}': "'r.json': size: input should be a list, got",
        '{"imprompt": 2, "request": {"loras": [5]}}': "'r.json': loras.0: input should be an object",
    }.items():
        Path("r.json").write_text(wrong)
        code, _, err = say("generate", "--from", "r.json")
        assert (code, reason in err) == (2, True), err


def test_a_picture_of_proportions_that_cannot_be_drawn_asks_for_a_size(say):
    Image.new("RGB", (20_000, 1)).save("wide.png")
    code, _, err = say("edit", "wide.png", "a", "--base", "BASE")
    assert (code, "a picture of 20000×1 would be drawn at" in err, "--size" in err) == (2, True, True), err
    assert say("edit", "wide.png", "a", "--base", "BASE", "--size", "32")[0] == 0
