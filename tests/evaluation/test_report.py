"""The report on a tiny random base: complete, repeatable, honest about uncertainty, clear about bad input."""

import json
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import tiny
from imprompt.errors import InputError, ModelError
from imprompt.evaluation import report as reporting
from imprompt.evaluation.judge import Judge, JudgeNetwork
from imprompt.evaluation.metrics import Interval
from imprompt.evaluation.report import Figure, Report, evaluate, export_eval_set, read_eval_set
from imprompt.evaluation.rows import Row, write_rows

CONCEPTS, STYLES = ("cat", "dog", "sun", "new"), ("a", "b")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for place, (concept, style) in enumerate((concept, style) for concept in CONCEPTS for style in STYLES):
        (folder / style).mkdir(exist_ok=True)
        file = folder / style / f"{concept}.png"
        tiny.picture(place).save(file)
        split = (
            "held_out_concept"
            if concept == "new"
            else "held_out_pair"
            if (concept, style) == ("sun", "b")
            else "train"
        )
        captions = {"full": (f"{concept} {style}",), "concept": (concept,), "style": (style,)}
        rows.append(Row(file, captions, {"concept": concept, "style": style}, split))
    write_rows(rows, folder / "metadata.jsonl")
    return folder


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    encoder, processor = tiny.tiny_encoder()
    pipe = tiny.tiny_sd()
    parts = pipe.components | {"image_encoder": encoder, "feature_extractor": processor}
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    state = tiny.random_adapter_state(pipe.unet)
    (folder / "adapters").mkdir()
    flat = {f"{part}.{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}
    save_file(flat, folder / "adapters" / "ip-adapter_tiny.safetensors")
    export_eval_set(data, folder / "eval", cell=32)
    torch.manual_seed(0)
    Judge(JudgeNetwork(4, 2), CONCEPTS, STYLES).save(folder / "judge.safetensors")
    return folder


@pytest.fixture(scope="module")
def report(base):
    return run(base)


def run(base, **values):
    return evaluate(base, n=3, steps=1, grid=[("linear", 0.5), ("linear", 1.0)], quiet=True, **values)


def test_every_figure_is_there_with_its_interval_and_its_pictures(report):
    named = {(figure.name.strip(), figure.adapter, figure.split) for figure in report.figures}
    adapter = "ip-adapter_tiny"
    assert {
        ("vae_psnr_db", None, "held_out"),
        ("base_style", None, "train"),
        ("base_concept_top5", None, "train"),
        ("base_concept_top5", None, "held_out_pair"),
        ("image_only_style", adapter, "held_out"),
        ("image_only_concept_top5", adapter, "held_out"),
        ("image_only_concept_top5", adapter, "held_out_concept"),
        ("image_only_concept_top5", adapter, "held_out_pair"),
        ("style_from_image_concept_from_text", adapter, "held_out"),
        ("similarity_rise", adapter, "held_out"),
        ("bundle_mb", None, ""),
    } <= named
    for figure in report.figures:
        if figure.name != "bundle_mb":
            assert figure.value.low <= figure.value.mean <= figure.value.high, figure


def test_only_the_figure_over_all_held_out_pictures_gets_a_verdict(report):
    judged = [(f.name, f.split) for f in report.figures if f.verdict and f.name.startswith("image_only")]
    assert sorted(judged) == [("image_only_concept_top5", "held_out"), ("image_only_style", "held_out")]


def test_profile_and_scale_are_chosen_on_other_references_than_they_are_measured_on(report):
    sweep = report.settings["sweeps"]["ip-adapter_tiny"]
    assert [(one["profile"], one["scale"]) for one in sweep] == [("linear", 0.5), ("linear", 1.0)]
    assert all(one["both"] <= min(one["concept"], one["style"]) for one in sweep)
    assert len(report.drawn["ip-adapter_tiny linear 0.5"]) == 1
    assert len(report.drawn["ip-adapter_tiny style from image"]) == 2


def test_the_report_reads_as_text_and_as_json(report):
    values = json.loads(report.to_json())
    assert len(values["figures"]) == len(report.figures)
    assert values["settings"]["n"] == 3
    table = report.table()
    assert all(figure.name.strip() in table for figure in report.figures)
    assert "chosen on 1 other references" in table


def test_figures_do_not_depend_on_the_batch(report, base):
    alone = run(base, batch=1)
    for name, images in report.drawn.items():
        for one, other in zip(images, alone.drawn[name], strict=True):
            difference = torch.tensor(list(one.tobytes())) - torch.tensor(list(other.tobytes()))
            assert difference.abs().max() <= 1, name


def test_every_picture_is_drawn_with_its_own_reference(report):
    images = report.drawn["ip-adapter_tiny image only"]
    assert len({image.tobytes() for image in images}) == len(images)


def test_the_size_is_that_of_all_files(report, base):
    size = sum(file.stat().st_size for file in base.rglob("*") if file.is_file()) / 1e6
    assert next(
        figure.value.mean for figure in report.figures if figure.name == "bundle_mb"
    ) == pytest.approx(size)


def test_an_evaluation_set_returns_the_held_out_pictures_exactly(data, base):
    shown = read_eval_set(base / "eval")
    assert {(one.concept, one.style) for one in shown.pictures} == {("new", "a"), ("new", "b"), ("sun", "b")}
    for one in shown.pictures:
        assert one.image.tobytes() == Image.open(data / one.style / f"{one.concept}.png").tobytes()
    assert len(shown.prompts) == 5
    assert "new" not in {prompt.concept for prompt in shown.prompts}
    assert shown.pictures[0].caption("concept") == shown.pictures[0].concept
    with pytest.raises(InputError, match="weather"):
        shown.pictures[0].caption("weather")


def test_an_evaluation_set_needs_held_out_pictures(data, tmp_path):
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    (tmp_path / "a").mkdir()
    tiny.picture(0).save(tmp_path / "a" / "cat.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(lines[0]))
    with pytest.raises(InputError, match="holds out no picture"):
        export_eval_set(tmp_path, tmp_path / "out")


def test_an_evaluation_set_may_hold_some_concepts_only(data, tmp_path):
    shown = read_eval_set(export_eval_set(data, tmp_path / "out", concepts={"sun", "cat"}, cell=32))
    assert {one.concept for one in shown.pictures} == {"sun"}
    assert {one.concept for one in shown.prompts} == {"sun", "cat"}


@pytest.mark.parametrize("damage", ["missing", "no json", "small sheet"])
def test_a_damaged_evaluation_set_is_one_clear_error(base, tmp_path, damage):
    if damage != "missing":
        (tmp_path / "eval.json").write_text(
            "{" if damage == "no json" else (base / "eval" / "eval.json").read_text()
        )
        Image.new("RGB", (32, 32)).save(tmp_path / "sheet.webp")
    with pytest.raises(InputError, match=r"no evaluation set|too small"):
        read_eval_set(tmp_path)


def test_a_folder_without_a_model_is_one_clear_error(base, tmp_path):
    with pytest.raises(ModelError, match=tmp_path.name):
        evaluate(tmp_path, eval_set=read_eval_set(base / "eval"), judge=Judge.load(base))


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [("base_style", 0.99, "aim"), ("base_style", 0.95, "floor"), ("base_style", 0.5, "below"),
     ("bundle_mb", 50, "aim"), ("bundle_mb", 70, "floor"), ("bundle_mb", 95, "below"),
     ("similarity_rise", 1, "")],
)  # fmt: skip
def test_a_figure_is_compared_with_floor_and_aim(name, value, verdict):
    assert Figure(name, Interval(value, math.nan, math.nan, 1)).verdict == verdict


def test_the_command_line_prints_the_table_and_writes_json(base, tmp_path, monkeypatch, capsys):
    report = Report((Figure("base_style", Interval(0.5, 0.4, 0.6, 10)),), {"n": 10})
    asked = {}
    monkeypatch.setattr(
        reporting, "evaluate", lambda base, **values: asked.update(values, base=base) or report
    )
    assert reporting.main(["--base", str(base), "-n", "7", "--json", str(tmp_path / "figures.json")]) == 0
    assert (asked["base"], asked["n"]) == (base, 7)
    assert "base_style" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["figures"][0]["reached"] == "below"
    monkeypatch.undo()
    assert reporting.main(["--base", str(tmp_path)]) == 4
    assert "no evaluation set" in capsys.readouterr().err
