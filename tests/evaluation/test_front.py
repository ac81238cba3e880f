"""Fidelity between two ends, the front, the choice; and `imprompt tune` from flags to files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tinydit
from imprompt import generate, tune
from imprompt.app.cli import main
from imprompt.errors import InputError, UsageError
from imprompt.evaluation.front import Fidelity, NormalizedScore, choose, pareto_front
from imprompt.output import read_request
from imprompt.output.record import Record
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request

points = st.lists(st.builds(Fidelity, st.floats(-0.5, 1.5), st.floats(-0.5, 1.5)), min_size=1, max_size=12)


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level,) * 3)


class ByLevel:
    """A measure anyone can follow: dark is the text, bright the picture."""

    name = "level"

    def __call__(self, images):
        level = torch.tensor([image.getpixel((0, 0))[0] / 255 for image in images])
        return 1 - level, level


def test_the_ends_are_0_and_1_and_the_middle_is_between() -> None:
    between = NormalizedScore.between(ByLevel(), [grey(40)], [grey(200)])
    found = [between(images) for images in ([grey(40)], [grey(120)], [grey(80), grey(160)])]
    assert (found[0].text, found[0].picture) == pytest.approx((1, 0))
    assert (found[1].text, found[1].picture) == pytest.approx((0.5, 0.5))
    assert (found[2].text, found[2].picture) == pytest.approx((0.5, 0.5))


def test_ends_that_look_the_same_cannot_be_weighed() -> None:
    with pytest.raises(InputError, match="finds no difference"):
        NormalizedScore.between(ByLevel(), [grey(40)], [grey(41)])
    with pytest.raises(InputError, match="finds no difference"):
        NormalizedScore.between(ByLevel(), [grey(200)], [grey(40)])  # the wrong way round


@given(points)
@settings(deadline=None)
def test_the_front_is_what_nothing_beats_and_everything_else_is_beaten(some: list[Fidelity]) -> None:
    ahead = pareto_front(some)

    def beats(a: Fidelity, b: Fidelity) -> bool:
        return a.text >= b.text and a.picture >= b.picture and (a.text > b.text or a.picture > b.picture)

    for i, one in enumerate(some):
        assert (i in ahead) == (not any(beats(other, one) for other in some))
    assert [some[i].text for i in ahead] == sorted((some[i].text for i in ahead), reverse=True)


@given(points, st.floats(0, 1))
@settings(deadline=None)
def test_what_is_chosen_is_on_the_front_and_has_the_largest_product(
    some: list[Fidelity], prefer: float
) -> None:
    i = choose(some, prefer)
    assert i in pareto_front(some)

    def product(one: Fidelity) -> float:
        return max(one.text, 0) ** (1 - prefer) * max(one.picture, 0) ** prefer

    assert product(some[i]) == pytest.approx(max(map(product, some)))


def test_preferring_one_side_goes_there() -> None:
    some = [Fidelity(1.0, 0.1), Fidelity(0.7, 0.7), Fidelity(0.1, 1.0)]
    assert [choose(some, p) for p in (0.0, 0.5, 1.0)] == [0, 1, 2]
    with pytest.raises(UsageError, match="prefer is 2"):
        choose(some, 2)


class ByDistance:
    """How far from what the text alone draws: a random model and encoder know no more of each other."""

    name = "distance"

    def __init__(self, text_alone):
        self.end = np.stack([np.asarray(image, float) / 255 for image in text_alone])

    def __call__(self, images):
        seen = np.stack([np.asarray(image, float) / 255 for image in images])
        away = torch.from_numpy(np.abs(seen - self.end).mean((1, 2, 3)))
        return 1 - away, away


def test_tuning_writes_the_chosen_request_the_plot_and_the_sheet(tuned_base, pictures, tmp_path) -> None:
    fields = {"base": tuned_base["base"], "adapter": tuned_base["adapter"], "steps": 2, "seed": 3}
    request = Request(prompt="a cat", images=[pictures / "ref.png"], count=2, exact=True, **fields)
    axes = ["scale=0.5,1,2", "end=1,0.5"]

    def measure(text_alone, references):
        return ByDistance(text_alone)

    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "sheet.png").write_text("mine")
    with pytest.raises(InputError, match=r"sheet\.png': imprompt did not make"):
        tune(request, tmp_path / "t", axes=axes, measure=measure)
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["sheet.png"]
    tuned = tune(request, tmp_path / "t", axes=axes, measure=measure, overwrite=True)
    assert {path.name for path in tuned.paths} == {
        "best.png", "best.json", "tune.json", "front.png", "sheet.png",
    }  # fmt: skip
    figures = json.loads((tmp_path / "t" / "tune.json").read_text())
    assert (figures["seeds"], len(figures["settings"])) == (2, 6)
    assert (figures["chosen"], figures["measure"]) == (tuned.label, "distance")
    best = read_request(tmp_path / "t" / "best.png")
    assert best == Record.from_json((tmp_path / "t" / "best.json").read_text(), tmp_path / "t").request
    assert f"scale {best.scale:g}" in tuned.label
    assert Image.open(tmp_path / "t" / "front.png").size == (950, 560)
    again = tune(
        best.replace(images=[pictures / "ref.png"], count=2),
        tmp_path / "p",
        axes=["end=1,0.5"],
        measure=measure,
    )
    assert again.request == read_request(tmp_path / "p" / "best.png")
    assert np.array_equal(
        np.asarray(generate(again.request).images[0]), np.asarray(Image.open(tmp_path / "p" / "best.png"))
    )


def test_a_transformer_is_tuned_without_profiles_of_unets(pictures, tmp_path) -> None:
    base = tinydit.save_base("flux", tmp_path / "flux")
    fields = {"base": str(base), "adapter": str(base / "adapters"), "steps": 1, "size": (32, 32), "seed": 3}
    request = Request(prompt="a cat", images=[pictures / "ref.png"], **fields)
    tune(request, tmp_path / "t", measure=lambda text_alone, references: ByDistance(text_alone))
    figures = json.loads((tmp_path / "t" / "tune.json").read_text())
    assert len(figures["settings"]) == 8
    assert not any("profile" in one["setting"] for one in figures["settings"])


def test_tuning_that_tells_nothing_apart_is_refused(tuned_base, pictures, tmp_path, capsys) -> None:
    words = ["tune", "a cat", "--image", str(pictures / "ref.png"), "--base", tuned_base["base"]]
    words += ["--adapter", tuned_base["adapter"], "--steps", "2", "--seed", "3", "--sweep", "scale=0.5,1"]
    assert main([*words, "--explain"]) == 2
    assert main([*words, "-o", str(tmp_path / "u")]) == 4  # a random encoder tells nothing apart
    assert "finds no difference to weigh" in capsys.readouterr().err
    assert not (tmp_path / "u").exists()


def test_tuning_needs_a_text_and_a_picture(tmp_path) -> None:
    for request in (Request(prompt="a"), Request(images=[ImagePrompt("a.png")])):
        with pytest.raises(UsageError, match="give both"):
            tune(request, tmp_path / "x")
    with pytest.raises(UsageError, match="holds only features"):
        tune(Request(prompt="a", images=[ImagePrompt("a.safetensors")]), tmp_path / "x")
    assert not (tmp_path / "x").exists()
