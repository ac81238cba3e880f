"""Sweeps: what is swept, in which order, what is refused, and the files that come of it."""

import json

import numpy as np
import pytest
from PIL import Image

import imprompt
from imprompt.app.cli import main
from imprompt.errors import UsageError
from imprompt.generation.sweep import expand, read_axis
from imprompt.output import read_request
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request

TWO = Request(prompt="a", images=[ImagePrompt("a.png"), ImagePrompt("b.png", start=0.5)], seed=3)


def swept(request: Request, *axes: str) -> tuple[Request, ...]:
    return expand(request, [read_axis(axis) for axis in axes]).requests


def test_the_product_is_drawn_with_the_first_axis_fastest() -> None:
    made = swept(TWO, "scale=0.2,1", "profile=style,linear")
    assert [(one.scale, one.images[0].profile) for one in made] == [
        (0.2, "style"),
        (1.0, "style"),
        (0.2, "linear"),
        (1.0, "linear"),
    ]
    assert {one.seed for one in made} == {3}


def test_fields_of_images_are_set_on_all_or_on_one() -> None:
    assert [tuple(r.end for r in one.images) for one in swept(TWO, "end=0.6,0.9")] == [(0.6, 0.6), (0.9, 0.9)]
    assert [tuple(r.scale for r in one.images) for one in swept(TWO, "image2.scale=0.1")] == [(None, 0.1)]
    curves = swept(TWO, "curve=fade-in|0:1,1:0")
    assert [one.images[0].curve for one in curves] == ["fade-in", "0:1,1:0"]
    assert [one.size for one in swept(TWO, "size=64x64,128")] == [(64, 64), (128, 128)]


def test_all_that_a_request_has_several_of_is_swept() -> None:
    request = TWO.replace(
        regions=[{"text": "a dog", "mask": "m.png"}],
        controls=[{"kind": "canny", "path": "e.png"}],
        loras=["x.safetensors", "y.safetensors"],
    )
    said = swept(request, "region.text=a cat|a dog, noto")
    assert [one.regions[0].text for one in said] == ["a cat", "a dog, noto"]
    assert [one.controls[0].scale for one in swept(request, "control1.scale=0,1")] == [0, 1]
    assert [one.loras[1].weight for one in swept(request, "lora2.weight=0,1")] == [0, 1]
    assert {one.loras[0].weight for one in swept(request, "lora2.weight=0,1")} == {1}


def test_several_pictures_are_a_last_axis_and_share_their_seeds() -> None:
    made = swept(TWO.replace(count=2, seed=None), "steps=1,2")
    assert [one.steps for one in made] == [1, 2, 1, 2]
    assert made[0].seed == made[1].seed == made[2].seed - 1
    assert all(one.count == 1 for one in made)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (["scale"], "write FIELD=VALUE"),
        (["scale="], "write FIELD=VALUE"),
        (["scale=1,,2"], "write FIELD=VALUE"),
        (["scale=1,1"], "given twice"),
        (["scale=1", "scale=2"], "swept twice"),
        (["colour=red"], "no field 'colour'"),
        (["count=1,2"], "no field 'count'"),
        (["scale=1,many"], "scale: input should be a valid number"),
        (["profile=style,styles"], "did you mean 'style'"),
        (["image3.scale=1"], "there are 2 images"),
        (["images=a.png,b.png"], r"sweep a field of each image, such as image\.image=A,B"),
        (["image=a.png,b.png"], r"belongs to edit and inpaint\. .*sweep image\.image"),
        (["mask=a.png,b.png"], r"belongs to inpaint\. .*sweep image\.mask"),
        (["image.colour=1"], "known are prompt.*image.scale.*region.text"),
        (["control.scale=1"], "there is no control to change"),
        (["seed=" + ",".join(map(str, range(300)))], "256 pictures"),
    ],
)
def test_a_sweep_without_sense_is_refused_before_anything_is_drawn(axes: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        swept(TWO, *axes)


def test_a_sweep_without_effect_is_refused() -> None:
    own = Request(images=[ImagePrompt("a.png", scale=1)])
    with pytest.raises(UsageError, match="every image has its own"):
        swept(own, "scale=0,1")
    with pytest.raises(UsageError, match="there is no image to change"):
        swept(Request(prompt="a"), "profile=style")
    with pytest.raises(UsageError, match="leave --count out"):
        swept(TWO.replace(count=2), "seed=1,2")


def test_python_sweeps_by_the_packages_name_with_an_engine_of_its_own(common, pictures, tmp_path) -> None:
    request = Request(prompt="a cat", images=[pictures / "ref.png"], exact=True, **{**common, "steps": 1})
    results, files = imprompt.sweep(request, ["scale=0,2"], str(tmp_path / "s.png"))
    assert [path.name for path in files] == ["s-1.png", "s-2.png", "s-grid.png"]
    alone = imprompt.generate(results[1].request)
    assert np.array_equal(np.asarray(alone.images[0]), np.asarray(Image.open(files[1])))


def test_the_command_line_writes_each_picture_and_the_page(common, pictures, tmp_path, capsys) -> None:
    words = ["generate", "a cat", "--image", str(pictures / "ref.png"), "--base", common["base"]]
    words += ["--adapter", common["adapter"], "--steps", "1", "--seed", "5", "--json", "--exact"]
    line = [*words, "--sweep", "scale=0,1,2", "--sweep", "profile=linear,ease-out"]
    assert main([*line, "-o", str(tmp_path / "s.png")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [one["request"]["scale"] for one in said["pictures"]] == [0, 1, 2, 0, 1, 2]
    assert said["grid"].endswith("s-grid.png")
    assert Image.open(said["grid"]).width > 3 * 96
    last = said["pictures"][-1]["files"][0]
    assert last.endswith("s-6.png")
    read = read_request(last)
    assert (read.scale, read.images[0].profile, read.seed) == (2, "ease-out", 5)
    assert main([*words, "--scale", "2", "-o", str(tmp_path / "t.png")]) == 0
    capsys.readouterr()
    third = np.asarray(Image.open(tmp_path / "s-3.png"))
    assert np.array_equal(third, np.asarray(Image.open(tmp_path / "t.png")))
    assert main([*line, "--explain"]) == 2
    (tmp_path / "r.json").write_text(read.to_json())
    assert main(["generate", "--from", str(tmp_path / "r.json"), "-o", str(tmp_path / "u.png")]) == 0
    assert np.array_equal(np.asarray(Image.open(last)), np.asarray(Image.open(tmp_path / "u.png")))
