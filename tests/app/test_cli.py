"""The command line as a user meets it: verbs, flags, files, exit codes, one-line errors, quick answers."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from compiled import start
from controls import saved, tiny_controlnet
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.output import read_request
from imprompt.schema.prompt import ImagePrompt


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_the_three_tasks_draw_into_free_names(say):
    code, out, err = say("generate", "a cat", "--image", "ref.png", "--base", "BASE", "--seed", "1")
    assert (code, out) == (0, "generate.png\n")
    assert re.search(r"1 × 32×32, seed 1, 2 steps", err)
    assert say("generate", "--image", "ref.png", "--base", "BASE", "--seed", "1")[1] == "generate-1.png\n"
    assert say("edit", "ref.png", "a cat", "--base", "BASE", "--strength", "0.6")[1] == "edit.png\n"
    inpaint = ("inpaint", "ref.png", "a cat", "--mask", "mask.png", "--image", "ref.png", "--base", "BASE")
    assert say(*inpaint)[1] == "inpaint.png\n"
    assert np.array_equal(pixels("inpaint.png")[:, :16], pixels("ref.png")[:, :16])


def test_several_pictures_go_to_a_new_folder_with_json_on_stdout(say):
    words = ("generate", "a", "--base", "BASE", "--count", "2", "--seed", "3", "--json", "-o", "new/")
    code, out, err = say(*words)
    said = json.loads(out)
    assert (code, err) == (0, "")
    assert said["files"] == ["new/generate-1.png", "new/generate-2.png"]
    assert said["request"]["steps"] == 2
    assert said["timings"].keys() == {"load", "encode", "draw"}
    assert read_request("new/generate-2.png").seed == 4


def test_a_picture_is_repeated_and_varied_from_its_file(say):
    say("generate", "a cat", "--image", "ref.png,scale=0.7", "--base", "BASE", "-o", "first.png")
    assert say("generate", "--from", "first.png", "-o", "again.png")[0] == 0
    assert np.array_equal(pixels("first.png"), pixels("again.png"))
    assert say("generate", "--from", "first.png", "--steps", "3", "-o", "varied.png")[0] == 0
    first, varied = read_request("first.png"), read_request("varied.png")
    assert varied == first.replace(steps=3)
    assert not np.array_equal(pixels("first.png"), pixels("varied.png"))
    code, _, err = say("edit", "--from", "first.png")
    assert (code, "imprompt generate --from first.png" in err) == (2, True)


def test_a_repeated_pictures_own_scale_is_not_overruled_in_silence(say):
    say("generate", "a cat", "--image", "ref.png,scale=0.7", "--base", "BASE", "-o", "first.png")
    code, _, err = say("generate", "--from", "first.png", "--scale", "0.1")
    assert (code, "scale: has no effect, for each image has its own" in err) == (2, True)
    say("generate", "a cat", "--image", "ref.png", "--base", "BASE", "-o", "second.png")
    assert say("generate", "--from", "second.png", "--scale", "0.1", "-o", "weak.png")[0] == 0
    assert not np.array_equal(pixels("second.png"), pixels("weak.png"))


def test_a_repeated_picture_says_what_it_reads_and_changed_files_need_force(say):
    say("generate", "a cat", "--image", "ref.png", "--base", "BASE", "-o", "first.png")
    assert "imprompt: --from reads ref.png\n" in say("generate", "--from", "first.png", "-o", "again.png")[2]
    tiny.picture(5, (32, 32)).save("ref.png")
    assert say("generate", "--from", "first.png")[0] == 4
    assert say("generate", "--from", "first.png", "--force", "-o", "forced.png")[0] == 0
    assert not np.array_equal(pixels("first.png"), pixels("forced.png"))


def test_a_picture_from_elsewhere_downloads_nothing_unless_trusted(say):
    request = {"prompt": "a", "base": "nobody/nothing-at-all", "steps": 2, "seed": 1}
    Path("hostile.json").write_text(json.dumps(request))
    code, _, err = say("generate", "--from", "hostile.json")
    assert code == 3
    assert re.search(r"names a model that is not on this machine; --trust downloads it", err)


def test_a_path_with_commas_and_equals_signs_is_quoted(say):
    Path("a,scale=2.png").write_bytes(Path("ref.png").read_bytes())
    words = ("generate", "a", "--base", "BASE", "--image")
    assert say(*words, '"a,scale=2.png",scale=0.5', "--also", "ref.png,weight=2", "-o", "x.png")[0] == 0
    (prompt,) = read_request("x.png").images
    assert (prompt.pictures, prompt.scale, prompt.weights) == (("a,scale=2.png", "ref.png"), 0.5, (1.0, 2.0))
    code, _, err = say(*words, "a,scale=2.png,scale=1")
    assert (code, "'scale' is given twice" in err) == (2, True)


def test_info_tells_what_a_picture_was_made_with(say):
    say("generate", "a cat", "--image", "ref.png", "--base", "BASE", "--seed", "9", "-o", "cat.png")
    code, out, _ = say("info", "cat.png")
    assert code == 0
    assert re.search(r"^prompt +a cat$", out, re.M)
    assert re.search(r"^seed +9$", out, re.M)
    assert json.loads(say("info", "cat.png", "--json")[1])["request"]["images"][0]["image"] == "ref.png"


def test_a_bundled_adapter_is_inspected_by_its_alias(say):
    code, out, _ = say("inspect", "emoji-plus", "--json")
    assert code == 0
    assert "emoji" in json.loads(out)["fits"]


def test_an_adapter_is_inspected_and_a_pickled_one_converted(say, place):
    adapter = place / "base" / "adapter.safetensors"
    code, out, _ = say("inspect", str(adapter), "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == 4
    torch.save(IPAdapter.from_pretrained(adapter).state_dict(), "old.bin")
    assert say("generate", "a", "--image", "ref.png", "--adapter", "old.bin", "--base", "BASE")[0] == 3
    assert say("convert", "old.bin", "new.safetensors")[0] == 0
    code, _, err = say("generate", "--image", "ref.png", "--adapter", "new.safetensors", "--base", "BASE")
    assert code == 0, err
    Path("mine").mkdir()
    shutil.copy(adapter, "mine")
    assert say("convert", "mine", "-o", "run.safetensors")[0] == 0
    assert Path("run.safetensors").is_file()
    for words in (["old.bin"], ["old.bin", "a.safetensors", "-o", "b.safetensors"]):
        code, _, err = say("convert", *words)
        assert (code, "say imprompt convert old.bin NAME.safetensors" in err) == (2, True)


def test_models_lists_names_with_their_licences(say):
    code, out, _ = say("models")
    assert code == 0
    assert "sdxl-inpaint" in out
    assert "CreativeML OpenRAIL-M" in out
    only = json.loads(say("models", "sd15", "--json")[1])
    assert list(only["bases"]) == ["sd15"]
    assert {row["family"] for row in only["adapters"].values()} == {"sd15"}


def test_the_vocabulary_is_printed(say):
    code, out, _ = say("models", "emoji", "--vocabulary", "--json")
    assert code == 0
    assert json.loads(out).keys() >= {"concepts", "styles"}
    words = say("models", "emoji", "--vocabulary")[1].splitlines()[0].split(": ")[1].split(", ")
    assert words == [name.replace("-", " ") for name in json.loads(out)["concepts"]]


REFUSED = [
    (
        2,
        "scale: has no effect, for each image has its own",
        "generate a --image ref.png,scale=1.5 --scale 0.1",
    ),
    (2, "--also 'ref.png': it adds to the --image before it", "generate a --also ref.png"),
    (2, "--force and --trust have no effect without --from", "generate a --force"),
    (2, "--image: 'https://a.b/c.png' is a web address", "generate a --image https://a.b/c.png"),
    (2, "no command 'generat'; did you mean 'generate'", "generat"),
    (2, "steps", "generate a --steps many"),
    (2, "--steps: has no effect, for steps is swept (steps=…)", "generate a --steps 2 --sweep steps=1,2"),
    (
        2,
        "profile= of --image: has no effect, for profile is swept (image2.profile=…)",
        "generate a --image ref.png --image ref.png,profile=style --sweep image2.profile=linear,style",
    ),
    (2, "--scale: has no effect, for scale is swept", "tune a --image ref.png --scale 0.5"),
    (2, "end= of --image: has no effect, for end is swept", "tune a --image ref.png,end=0.5"),
    (
        2,
        "--encoder and --base both name an encoder",
        "embed ref.png -o f.safetensors --encoder e --base sd15",
    ),
    (2, "--set lr: it is set twice", "train . --lr 1e-4 --set lr=2e-4"),
    (2, "--set lr: it is set twice", "train . --set lr=1e-4 --set lr=2e-4"),
    (2, "--set captions.self: it is set twice", "train . --set captions.self=[] --set captions.self=[]"),
    (2, "--overwrite: there is no file to write", "evaluate . --overwrite"),
    (2, "--ray -1: 1 or more is expected", "batch requests.jsonl -o drawn --ray -1"),
    (2, "--device: string should match", "batch requests.jsonl -o drawn --device foo"),
    (2, "--token: give at least 8 characters", "serve --token= --device cpu"),
    (2, "--token @ref.png: the file holds no text", "serve --token @ref.png --device cpu"),
    (2, "--model 'a=y': the name is given twice", "serve --model a=x --model a=y --device cpu"),
    (2, "--loras '.': there is no .safetensors file in it", "serve --loras . --device cpu"),
    (2, "--drain nan: 0 or more is expected", "serve --drain nan --device cpu"),
    (2, "a name without http:// and port", "serve --allow-host http://a.b --device cpu"),
    (2, "a name without http:// and port", "serve --allow-host a.b:80 --device cpu"),
    (
        2,
        "--allow-host: with a token any name is answered",
        "serve --host 0.0.0.0 --token 12345678 --allow-host a --device cpu",
    ),
    (2, "unrecognized arguments: --stesp 3; did you mean --steps", "generate a --stesp 3"),
    (2, "; it is an option of each picture: --image PATH,profile=…", "generate a --profile style"),
    (2, "here it is --guidance", "generate a --cfg-scale 3"),
    (2, "here it is --scale", "generate a --image ref.png --ip_adapter_scale 1"),
    (2, "--denoising-strength 1; it belongs to imprompt edit", "generate a --denoising-strength 1"),
    (2, "no command 'img2img'; here it is imprompt edit", "img2img ref.png a"),
    (2, "it belongs to imprompt inpaint", "generate a --mask m.png"),
    (2, "a command is missing; write: imprompt generate owl --image ref.png", "owl --image ref.png"),
    (2, "write: imprompt inpaint --image ref.png --mask m.png", "--image ref.png --mask m.png"),
    (2, "--seed -1: leave --seed out for a random one", "generate a --seed -1"),
    (2, "'ref.png' is a picture and stands where the text does", "edit ref.png ref.png"),
    (2, "each picture has a flag of its own: --image ref.png", "generate a --image ref.png ref.png"),
    (2, "unrecognized arguments: cat; a text of several words stands in quotes", "generate a cat --seed 1"),
    (2, "write: imprompt edit ref.png owl (or generate --image ref.png)", "ref.png owl"),
    (2, "curl -LO 'https://a.b/c.png'", "edit https://a.b/c.png a"),
    (3, "no base", "generate a --size 32X32 --base ./missing/folder"),
    (2, "prompt: give a text", "generate"),
    (2, "scale", "generate a --image ref.png --scale nan"),
    (2, "unknown option 'weigth'", "generate a --image ref.png,weigth=2"),
    (2, "mask: the task 'inpaint' needs a mask, white where the picture is redrawn", "inpaint ref.png a"),
    (2, "the picture to start from comes first, then the text: imprompt edit PICTURE house", "edit house"),
    (4, "image: there is no file 'house.png'", "edit house.png"),
    (4, "there is no file", "batch gone.jsonl -o drawn"),
    (2, "base 'sd51' is unknown; did you mean sd", "generate a --base sd51"),
    (2, "must end in .png", "generate a --base BASE -o cat.gif"),
    (2, "only the bundled model", "models sd15 --vocabulary"),
    (2, "--commercial: has no effect on --vocabulary", "models --vocabulary --commercial"),
    (3, "no base", "generate a --base ./missing/folder"),
    (3, "opens no pickles", "generate a --base ref.png"),
    (
        3,
        "adapter 'sdxl' is for sdxl bases; base 'emoji' is of the family emoji. See imprompt models",
        "generate a --image ref.png --adapter sdxl",
    ),
    (4, "images.0.image: there is no file 'gone.png'", "generate a --image gone.png --base BASE"),
    (4, "images.0.mask: there is no file 'gone.png'", "generate a --image ref.png,mask=gone.png --base BASE"),
    (4, "regions.0.mask: 'black.png' is black", "generate a --region b,mask=black.png --base BASE"),
    (2, "curve: nan in point", "generate a --image ref.png,curve=0:nan --base BASE"),
    (2, "there is no token 99", "generate a --image ref.png,select=99 --base BASE"),
    (
        2,
        "'subtract' takes the first picture minus",
        "generate a --image ref.png,combine=subtract --base BASE",
    ),
    (2, "profile has 2 weights; this base takes", "generate a --image ref.png,profile=1,0 --base BASE"),
    (2, "start: 0.9 lies after end 0.2", "generate a --image ref.png,start=0.9,end=0.2 --base BASE"),
    (4, "carries no request", "info ref.png"),
    (4, "is a folder", "info ."),
    (4, "is not a writable folder", "generate a --base BASE -o ref.png/x.png"),
    (4, "'ref.png': what is there is read", "edit ref.png a --base BASE -o ./ref.png --overwrite"),
    (4, "is read in this run", "generate a --image ref.png,mask=mask.png -o mask.png --overwrite"),
]


@pytest.mark.parametrize(("code", "message", "line"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_is_wrong_is_one_line_and_an_exit_code(say, code, message, line):
    before = set(Path().iterdir())
    found, out, err = say(*line.split())
    assert (found, out) == (code, "")
    assert err.startswith("imprompt: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("users", "words"),
    [
        ("owl-when-1.png", "generate a --image ref.png --explain -o owl.png"),
        ("owl-2-where-1.png", "generate a --image ref.png --count 2 --explain -o owl.png"),
        ("owl-grid.png", "generate a --sweep steps=1,2 -o owl.png"),
        ("owl-control-1-canny.png", "generate a --control canny:ref.png --save-control -o owl.png"),
        ("owl/sheet.png", "tune a --image ref.png -o owl"),
        ("owl/best.json", "tune a --image ref.png -o owl"),
    ],
)
def test_a_users_file_in_the_way_of_any_page_is_said_before_a_model_is_looked_for(say, users, words):
    Path(users).parent.mkdir(exist_ok=True)
    Path(users).write_text("mine")
    before = set(Path().rglob("*"))
    line = [*words.split(), "--base", "./missing/folder"]
    code, out, err = say(*line)
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert f"cannot write '{users}': imprompt did not make" in err
    assert say(*line, "--overwrite")[0] == 3  # only the base is missing
    assert set(Path().rglob("*")) == before
    assert Path(users).read_text() == "mine"


def test_a_demo_that_would_replace_a_users_clip_writes_nothing(say):
    Path("sheet").mkdir()
    Path("sheet/a-star-bouncing.gif").write_text("mine")
    code, out, err = say("demo", "-o", "sheet")
    assert (code, out, "a-star-bouncing.gif': imprompt did not make" in err) == (4, "", True)
    assert [path.name for path in Path("sheet").iterdir()] == ["a-star-bouncing.gif"]


def test_a_page_in_the_way_of_a_free_name_is_no_matter(say):
    Path("generate-where-1.png").write_text("mine")
    words = ["generate", "a", "--image", "ref.png", "--base", "BASE", "--explain"]
    code, out, _ = say(*words)
    assert code == 0
    assert out.split() == ["generate-1.png", "generate-1-where-1.png", "generate-1-when-1.png"]


def test_a_failed_drawing_leaves_the_older_picture_and_no_parts(say):
    say("generate", "a", "--base", "BASE", "--seed", "1", "-o", "cat.png")
    before = Path("cat.png").read_bytes()
    Path("broken.png").write_bytes(Path("ref.png").read_bytes()[:200])
    code, _, err = say("generate", "a", "--image", "broken.png", "--base", "BASE", "-o", "cat.png")
    assert (code, "broken.png" in err) == (4, True)
    assert Path("cat.png").read_bytes() == before
    assert not list(Path().glob(".*.part"))


AT_A_TERMINAL = """
import os, sys
from imprompt.app.cli import main

place, terminal = sys.argv[1:3]
del sys.argv[1:3]
os.chdir(place)
os.dup2(os.open("out.txt", os.O_WRONLY | os.O_CREAT), 1)
os.dup2(os.open(terminal, os.O_RDWR | os.O_NOCTTY), 2)
main()
"""


@pytest.mark.xdist_group("compiled")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_drawing_ends_with_130_and_no_file(say, place, tmp_path, sent):
    here, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    words = ["generate", "a", "--steps", "1000", "--base", place / "base"]
    running, _ = start(AT_A_TERMINAL, tmp_path, os.ttyname(terminal), *words, folder=tmp_path)
    printed = b""
    while b"/1000" not in printed:  # the progress bar: it draws
        printed += os.read(here, 1000)
    os.close(terminal)
    os.kill(running.pid, sent)
    while chunk := read_terminal(here):
        printed += chunk
    running.join()
    os.close(here)
    assert (running.exitcode, Path("out.txt").read_text()) == (130, "")
    assert printed.endswith(b"imprompt: interrupted\r\n")
    assert not list(Path().glob("*generate*"))


def read_terminal(terminal: int) -> bytes:
    """What a program prints there; nothing once it has ended, which Linux tells by an error."""
    try:
        return os.read(terminal, 1000)
    except OSError:
        return b""


def test_what_a_request_needs_may_be_given_and_swept(say):
    words = ["--seed", "1", "--steps", "1", "--size", "32x32", "--base", "BASE"]
    code, out, err = say("generate", "a cat", "--sweep", "prompt=a cat,an owl", *words)
    assert (code, len(out.split())) == (0, 3), err


def test_debug_after_two_dashes_is_no_flag(say):
    code, _, err = say("info", "--", "--debug")
    assert code == 4
    assert "there is no file '--debug'" in err


def test_debug_shows_where_an_error_came_from(say):
    from imprompt.errors import InputError

    with pytest.raises(InputError, match=r"gone\.png"):
        say("info", "gone.png", "--debug")


def test_a_fault_of_ours_is_one_line_too(say, monkeypatch):
    monkeypatch.setattr("imprompt.output.read_record", lambda _: 1 / 0)
    code, out, err = say("info", "ref.png")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"imprompt: error: unexpected ZeroDivisionError: .*--debug.*\n", err)


def test_help_sets_every_option_apart_from_what_it_is_for(say):
    code, out, _ = say("animate", "--help")
    assert code == 0
    listed = out.partition("options of --image:")[2].partition("options of --region:")[0]
    names = {line.split()[0] for line in listed.splitlines() if re.match(r"  \w", line)}
    assert names == set(ImagePrompt.model_fields) - {"image", "features", "tokens", "weights"} | {"weight"}
    assert "Python" not in listed


def test_a_new_folder_is_an_output_when_its_name_says_so(say):
    code, _, err = say("generate", "a", "--base", "BASE", "-o", "new")
    assert code == 2
    assert "in / for a new folder" in err
    code, out, _ = say("generate", "a", "--base", "BASE", "-o", "new/")
    assert (code, out) == (0, "new/generate.png\n")


@pytest.mark.parametrize(
    ("line", "absent"),
    [
        ("--help", {"torch", "diffusers", "transformers", "pydantic", "PIL"}),
        ("generate --help", {"torch", "diffusers", "transformers"}),
        ("generate a --steps many", {"torch", "diffusers", "transformers"}),
        ("info cat.png", {"torch", "diffusers", "transformers"}),
        ("models", {"torch", "diffusers", "transformers"}),
        ("inspect emoji-plus", {"torch", "diffusers", "transformers"}),
    ],
)
def test_quick_commands_import_nothing_heavy(say, line, absent):
    if "cat.png" in line:
        say("generate", "a", "--base", "BASE", "-o", "cat.png")
    script = (
        "import sys; from imprompt.app.cli import main; code = main(sys.argv[1:]);"
        f"print('HEAVY', sorted({absent!r} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    ended = subprocess.run([sys.executable, "-c", script, *line.split()], capture_output=True, text=True)
    assert ended.returncode == (2 if "many" in line else 0), ended.stderr
    assert "HEAVY []" in ended.stderr


def test_the_installed_program_answers_and_leaves_with_its_code(say):
    program = Path(sys.executable).with_name("imprompt")
    ended = subprocess.run([program, "generate"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("imprompt: error: prompt: give a text")


def test_a_control_is_followed_saved_and_repeated(say, place):
    net = saved(tiny_controlnet(), place / "net")
    words = ("generate", "a", "--base", "BASE", "--seed", "1", "-o", "out.png")
    code, out, err = say(*words, "--control", f"canny:ref.png,scale=0.8,model={net}", "--save-control")
    assert (code, out) == (0, "out.png\nout-control-1-canny.png\n"), err
    assert read_request("out.png").controls[0].scale == 0.8
    assert say("generate", "--from", "out.png", "-o", "again.png")[0] == 0
    assert np.array_equal(pixels("out.png"), pixels("again.png"))
    code, _, err = say(*words, "--save-control")
    assert (code, "no control to save" in err) == (2, True)
    code, _, err = say(*words, "--control", "canny=ref.png")
    assert (code, "KIND:PATH is expected" in err) == (2, True)


def test_models_lists_controls_with_kinds_and_licences(say):
    out = say("models")[1]
    assert re.search(r"sd15-depth +sd15 +depth; 723 MB; OpenRAIL; lllyasviel/control_v11f1p_sd15_depth", out)
    only = json.loads(say("models", "sdxl-union", "--json")[1])
    assert (only["bases"], only["adapters"], list(only["controls"])) == ({}, {}, ["sdxl-union"])
    assert only["controls"]["sdxl-union"]["modes"]["depth"] == 1


def test_frames_asked_for_again_replace_the_earlier_ones_and_a_users_folder_gets_a_file(say, tmp_path):
    tiny.tiny_motion().save_pretrained(tmp_path / "motion")
    words = ("animate", "a", "--base", "BASE", "--motion", "motion", "--frames", "2", "-q", "-o")
    for seed in ("1", "2"):
        code, out, err = say(*words, "walk", "--seed", seed)
        assert (code, out) == (0, "walk\n")
        assert f"imprompt: 1 × 2 frames of 32×32, seed {seed}, " in err
        assert read_request("walk").seed == int(seed)
    Path("mine").mkdir()
    shutil.copy("ref.png", "mine/0001.png")
    assert say(*words, "mine")[:2] == (0, "mine/animate.gif\n")
    assert np.array_equal(pixels("mine/0001.png"), pixels("ref.png"))


@pytest.mark.parametrize("pace", [("--fps", "60"), ("--video", "fast.webp")])
def test_a_pace_that_a_gif_cannot_hold_is_refused_before_loading(say, pace):
    frames = [tiny.picture(i, (32, 32)) for i in range(3)]
    frames[0].save("fast.webp", save_all=True, append_images=frames[1:], duration=10, lossless=True)
    code, out, err = say("animate", "a", *pace, "--base", "./missing", "-o", "x.gif")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"imprompt: error: fps: a GIF shows at most 50 frames.*\n", err)
