"""Maps taken from pictures: against OpenCV, hand-made drawings, and with tiny models of the hub's kinds."""

import gc
import sys
import weakref

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import DPTConfig, DPTForDepthEstimation, DPTForSemanticSegmentation, DPTImageProcessor

import tiny
from imprompt.errors import InputError, ModelError, UsageError
from imprompt.generation import annotate as module
from imprompt.generation.annotate import annotate, annotate_frames, edges


def drawing(lines: int, ground: int, size: int = 64) -> Image.Image:
    image = Image.new("RGB", (size, size), (ground,) * 3)
    pen = ImageDraw.Draw(image)
    pen.line((8, 8, 50, 40), fill=(lines,) * 3, width=3)
    pen.ellipse((20, 30, 44, 54), outline=(lines,) * 3, width=3)
    return image


def test_canny_is_opencvs_with_the_published_thresholds():
    picture = tiny.picture(1, (96, 64))
    found = annotate("canny", drawing(0, 255))
    assert np.array_equal(np.asarray(found)[..., 0], cv2.Canny(np.asarray(drawing(0, 255)), 100, 200))
    assert found.mode == "RGB"
    few, many = (np.asarray(edges(picture, *pair)).mean() for pair in ((100, 200), (10, 20)))
    assert few <= many
    assert edges(picture).size == (96, 64)


def test_canny_of_an_even_picture_would_have_no_effect_and_says_so():
    with pytest.raises(InputError, match="no edge"):
        annotate("canny", Image.new("RGB", (32, 32), "white"))


def test_without_opencv_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match=r"imprompt\[control\].*none:PATH"):
        annotate("canny", drawing(0, 255))


@pytest.mark.parametrize("kind", ["lineart", "scribble"])
def test_a_drawing_becomes_bright_lines_on_black_whichever_way_it_was_drawn(kind):
    dark, light = (np.asarray(annotate(kind, drawing(*pair))) for pair in ((0, 255), (255, 0)))
    assert np.array_equal(dark, light)
    assert dark.max() == 255
    assert np.array_equal(dark[..., 0] > 127, np.asarray(drawing(0, 255))[..., 0] < 128)


def test_a_scribble_has_no_shades_and_line_art_keeps_them():
    soft = drawing(0, 255).resize((48, 48), Image.Resampling.BICUBIC)
    assert set(np.unique(annotate("scribble", soft))) == {0, 255}
    assert len(np.unique(annotate("lineart", soft))) > 2


@pytest.mark.parametrize("kind", ["lineart", "scribble"])
def test_what_is_no_line_drawing_is_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with pytest.raises(InputError, match=f"{kind} takes a line drawing.*canny"):
        annotate(kind, Image.fromarray(noise))
    with pytest.raises(InputError, match="no line"):
        annotate(kind, Image.new("RGB", (32, 32), "white"))


@pytest.mark.parametrize("kind", ["tile", "none"])
def test_finished_maps_and_tiles_are_the_picture(kind):
    picture = tiny.picture(1, (40, 24))
    assert np.array_equal(np.asarray(annotate(kind, picture)), np.asarray(picture))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Tiny random models in place of the hub's, through the same loaders."""
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32,
        patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        num_labels=150, readout_type="ignore",
    )  # fmt: skip
    processor = DPTImageProcessor(size={"height": 32, "width": 32}, ensure_multiple_of=8)
    torch.manual_seed(0)
    for kind, model in (("depth", DPTForDepthEstimation), ("seg", DPTForSemanticSegmentation)):
        model(config).save_pretrained(tmp_path / kind)
        processor.save_pretrained(tmp_path / kind)
        monkeypatch.setitem(module.MODELS, kind, (str(tmp_path / kind), "tiny"))
    return tmp_path


def test_depth_is_grey_over_the_whole_range_in_the_pictures_size(hub):
    found = np.asarray(annotate("depth", tiny.picture(1, (48, 40))))
    assert found.shape == (40, 48, 3)
    assert (found[..., 0] == found[..., 1]).all()
    assert (found.min(), found.max()) == (0, 255)
    assert np.array_equal(found, np.asarray(annotate("depth", tiny.picture(1, (48, 40)))))


def test_segments_are_in_ade20ks_colours(hub):
    palette = bytes.fromhex(module._ADE20K)
    assert len(palette) == 450
    known = {tuple(palette[i : i + 3]) for i in range(0, 450, 3)}
    assert {
        (120, 120, 120),
        (180, 120, 120),
        (6, 230, 230),
        (150, 5, 61),
    } < known  # wall, building, sky, person
    found = annotate("seg", tiny.picture(1, (48, 40)))
    assert found.size == (48, 40)
    assert {colour for _, colour in found.getcolors()} <= known


@pytest.mark.parametrize("kind", ["depth", "seg"])
def test_the_frames_of_a_clip_share_one_model_which_is_given_back(hub, monkeypatch, kind):
    models, loading = [], module._loaded

    def loaded(*words):
        processor, model = loading(*words)
        models.append(weakref.ref(model))
        return processor, model

    monkeypatch.setattr(module, "_loaded", loaded)
    frames = [tiny.picture(i, (48, 40)) for i in range(3)]
    found = annotate_frames(kind, frames)
    gc.collect()
    assert [model() for model in models] == [None]
    assert [np.asarray(one).tolist() for one in found] == [
        np.asarray(annotate(kind, f)).tolist() for f in frames
    ]


def test_a_frame_without_an_edge_is_black_and_a_clip_without_any_is_refused():
    empty = Image.new("RGB", (64, 64), "white")
    some = annotate_frames("canny", [empty, drawing(0, 255)])
    assert [bool(one.getbbox()) for one in some] == [False, True]
    with pytest.raises(InputError, match="no edge"):
        annotate_frames("canny", [empty, empty])


def test_a_model_that_cannot_be_had_is_named_with_its_licence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"Depth-Anything-V2-Small-hf.*Apache-2\.0.*none:PATH") as said:
        annotate("depth", tiny.picture(1))
    assert "\n" not in str(said.value)
