"""The figures of motion tell stills, motion and flicker apart."""

import json

import pytest
import torch
from PIL import Image

import tiny
from imprompt.errors import InputError
from imprompt.evaluation.judge import Judge, JudgeNetwork
from imprompt.evaluation.motion import frame_change, frame_consistency, read_clips
from imprompt.evaluation.report import EvalSet, Shown, evaluate


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge(JudgeNetwork(2, 1), ["cat", "dog"], ["flat"])


def shifted(pixels: int) -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    image.paste((200, 30, 30), (30 + pixels, 40, 80 + pixels, 90))
    return image


STILL = [shifted(0)] * 4
MOVING = [shifted(3 * i) for i in range(4)]
MOTION = {"frame_consistency", "frame_change", "frame_concept"}
KINDS = ("full", "concept", "style")
FLICKER = [tiny.picture(i, (128, 128)) for i in range(4)]


def test_a_still_changes_nothing_and_flicker_changes_most():
    still, moving, flicker = (frame_change(clip).mean() for clip in (STILL, MOVING, FLICKER))
    assert still == 0
    assert 0 < moving < flicker
    edge = 2 * 3 * 50 * (55 + 225 + 225) / 255 / (3 * 128 * 128)  # two edges of 3 × 50 pixels, red to white
    assert abs(float(moving) - edge) < 1e-3


def test_a_still_is_consistent_with_itself(judge):
    assert torch.allclose(frame_consistency(judge, STILL), torch.ones(3, dtype=torch.float64), atol=1e-5)
    assert frame_consistency(judge, FLICKER).shape == (3,)


def test_without_real_clips_it_says_so(tmp_path):
    with pytest.raises(InputError, match="no real clips"):
        read_clips(tmp_path)
    MOVING[0].save(tmp_path / "a.webp", save_all=True, append_images=MOVING[1:], lossless=True)
    assert len(read_clips(tmp_path)[0]) == 4


def test_the_report_has_the_figures_of_motion_where_the_base_can_move(judge, tmp_path):
    tiny.tiny_sd().save_pretrained(tmp_path)
    shown = tuple(
        Shown(concept, "flat", "held_out_concept", dict.fromkeys(KINDS, (f"a {concept}",)), picture)
        for concept, picture in (("cat", tiny.picture(1)), ("dog", tiny.picture(2)))
    )
    tiny.tiny_motion().save_pretrained(tmp_path / "motion")
    (tmp_path / "motion" / "imprompt.json").write_text(json.dumps({"frames": 2}))
    (tmp_path / "eval" / "clips").mkdir(parents=True)
    MOVING[0].save(tmp_path / "eval/clips/a.webp", save_all=True, append_images=MOVING[1:], lossless=True)
    settings = {"judge": judge, "adapters": {}, "n": 1, "steps": 1, "quiet": True}
    report = evaluate(tmp_path, eval_set=EvalSet(shown, shown), **settings)
    found = {figure.name: figure for figure in report.figures}
    assert found.keys() >= MOTION
    assert "real clips" in found["frame_change"].note
    assert len(report.drawn["clip 1"]) == 2
