"""How edge agreement is counted, and the figures of a ControlNet on a tiny random base."""

import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import tiny
from controls import saved, tiny_controlnet, tiny_t2i
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import InputError
from imprompt.evaluation import control as measuring
from imprompt.evaluation.control import FOLDER, SCALES, control_figures, edge_f1
from imprompt.evaluation.judge import Judge, JudgeNetwork
from imprompt.evaluation.report import EvalSet, Shown, evaluate
from imprompt.generation.annotate import edges


def square(left: int, size: int = 64) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).rectangle((left, 16, left + 24, 40), fill="black")
    return image


def test_edges_agree_wholly_with_their_own_map_and_not_with_another_place():
    assert edge_f1(square(10), edges(square(10))) == 1.0
    assert edge_f1(square(11), edges(square(10))) == 1.0  # within a pixel
    assert edge_f1(square(11), edges(square(10)), near=0) < 1.0
    assert edge_f1(square(36), edges(square(10))) < 0.5


def test_agreement_is_the_harmonic_mean_of_precision_and_recall():
    both = np.minimum(np.asarray(square(4)), np.asarray(square(36)))
    picture, one = Image.fromarray(both), edges(square(4))
    assert edge_f1(square(4), one) == 1.0
    assert edge_f1(picture, one) == pytest.approx(2 * 0.5 / 1.5, abs=0.02)  # recall 1, precision a half


def test_a_picture_without_edges_agrees_only_with_an_empty_map():
    even = Image.new("RGB", (64, 64), "white")
    empty = Image.new("RGB", (64, 64))
    assert edge_f1(even, empty) == 1.0
    assert edge_f1(even, edges(square(10))) == 0.0
    assert edge_f1(square(10), empty) == 0.0


@pytest.fixture(scope="module")
def pipe():
    encoder, processor = tiny.tiny_encoder()
    parts = tiny.tiny_sd().components | {"image_encoder": encoder, "feature_extractor": processor}
    made = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge(JudgeNetwork(2, 2), ("cat", "dog"), ("a", "b"))


@pytest.fixture(scope="module")
def shown():
    pictures = []
    for concept, style, left in (("cat", "a", 4), ("dog", "b", 8), ("cat", "b", 6), ("dog", "a", 2)):
        captions = {"full": (f"{concept} {style}",), "concept": (concept,), "style": (style,)}
        image = square(left).resize((32, 32))
        pictures.append(Shown(concept, style, "held_out_pair", captions, image))
    return EvalSet(tuple(pictures), ())


def test_all_figures_are_there_without_and_with_an_image_prompt(pipe, judge, shown, tmp_path):
    net = tmp_path / FOLDER
    saved(tiny_controlnet(), net)
    adapter = IPAdapter.from_state_dict(tiny.random_adapter_state(pipe.unet))
    before = dict(pipe.unet.attn_processors)
    figures, drawn = control_figures(pipe, net, judge, shown, ("tiny", adapter), n=3, steps=1, batch=2)
    assert [(figure.name, figure.adapter) for figure in figures] == [
        (name, prompted)
        for prompted in (None, "tiny")
        for name in (
            *(f"edge_f1_control_{scale:g}" for scale in SCALES),
            "edge_f1_rise",
            "control_style_kept",
        )
    ]
    assert all(0 <= figure.value.mean <= 1 for figure in figures if figure.name.startswith("edge_f1_control"))
    assert all(len(images) == 3 for images in drawn.values())
    assert dict(pipe.unet.attn_processors) == before
    off, on = (np.asarray(drawn[f"base control {scale}"][0]) for scale in ("0", "1"))
    text = f"{shown.pictures[0].caption('concept')}, {shown.pictures[1].caption('style')}"
    plain = pipe(
        text, num_inference_steps=1, guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
        width=32, height=32,
    ).images[0]  # fmt: skip
    assert np.abs(off.astype(int) - np.asarray(plain)).max() <= 1  # drawn in a batch
    assert not np.array_equal(off, on)


def test_style_kept_is_the_ratio_and_unknown_where_there_was_none(pipe, judge, shown, tmp_path, monkeypatch):
    net = tmp_path / FOLDER
    saved(tiny_controlnet(), net)
    answers = iter([["b", "a", "a"], ["b", "b", "a"], ["b", "b", "b"]])  # right are b, a, a
    monkeypatch.setattr(Judge, "style", lambda *_: next(answers))
    figures, _ = control_figures(pipe, net, judge, shown, n=3, steps=1)
    kept = next(figure for figure in figures if figure.name == "control_style_kept")
    assert kept.value.mean == pytest.approx(1 / 3)
    assert kept.verdict == "below"
    monkeypatch.setattr(Judge, "style", lambda *_: ["c"] * 3)
    figures, _ = control_figures(pipe, net, judge, shown, n=3, steps=1)
    assert math.isnan(figures[-1].value.mean)


def test_an_evaluation_set_of_one_style_is_refused(pipe, judge, shown, tmp_path):
    saved(tiny_controlnet(), tmp_path / FOLDER)
    with pytest.raises(InputError, match="different styles"):
        control_figures(pipe, tmp_path / FOLDER, judge, EvalSet(shown.pictures[:1], ()), n=3, steps=1)


def test_the_entry_and_the_report_have_the_figures_and_what_is_missing_is_said(
    pipe, judge, shown, tmp_path, monkeypatch, capsys
):
    pipe.save_pretrained(tmp_path)
    judge.save(tmp_path / "judge.safetensors")
    saved(tiny_controlnet(), tmp_path / FOLDER)
    state = tiny.random_adapter_state(pipe.unet)
    flat = {f"{part}.{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}
    (tmp_path / "adapters").mkdir()
    save_file(flat, tmp_path / "adapters" / "tiny.safetensors")
    monkeypatch.setattr(measuring, "read_eval_set", lambda _: shown)
    sheet = tmp_path / "sheet.png"
    words = ["--base", str(tmp_path), "-n", "2", "--steps", "1", "--sheet", str(sheet)]
    assert measuring.main(words) == 0
    assert "edge_f1_control_0.5" in capsys.readouterr().out
    assert Image.open(sheet).size == (64, 8 * 32)
    both = EvalSet(shown.pictures, shown.pictures)
    report = evaluate(tmp_path, eval_set=both, judge=judge, n=2, steps=1, grid=[("linear", 1.0)], quiet=True)
    assert {"edge_f1_control_1", "control_style_kept"} <= {figure.name for figure in report.figures}
    saved(tiny_t2i(), tmp_path / FOLDER)
    (tmp_path / FOLDER / "diffusion_pytorch_model.safetensors").unlink()
    assert measuring.main(words) == 3
    assert capsys.readouterr().err.startswith("error: control ")
