"""Maps taken from pictures: against OpenCV, hand-made drawings, and with tiny models of the hub's kinds."""

import gc
import sys
import weakref

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    DPTConfig,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
    DPTImageProcessor,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    VitPoseImageProcessor,
)

import tiny
from facemodels import pack, photo
from imprompt.encoders.face_onnx import OnnxFaces
from imprompt.errors import InputError, ModelError, UsageError
from imprompt.generation import annotate as module
from imprompt.generation.annotate import annotate, annotate_frames, edges, face_keypoints, skeletons


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


PERSON = {  # COCO's joints of someone facing us, arms away from the body: x, y
    "nose": (100, 40), "left eye": (106, 34), "right eye": (94, 34), "left ear": (114, 38),
    "right ear": (86, 38), "left shoulder": (130, 80), "right shoulder": (70, 80), "left elbow": (160, 110),
    "right elbow": (40, 110), "left wrist": (180, 150), "right wrist": (20, 150), "left hip": (118, 160),
    "right hip": (82, 160), "left knee": (122, 205), "right knee": (78, 205), "left ankle": (126, 245),
    "right ankle": (74, 245),
}  # fmt: skip


def skeleton(**scores: float) -> np.ndarray:
    joints = [(*place, scores.get(name.replace(" ", "_"), 0.9)) for name, place in PERSON.items()]
    return np.asarray(skeletons([np.array(joints, dtype=np.float32)], (200, 256)))


def test_a_skeleton_has_openposes_colours_at_its_joints_and_limbs():
    drawn = skeleton()
    joints = {  # as published: hues from red at the nose on; the neck is between the shoulders
        PERSON["nose"]: (255, 0, 0), (100, 80): (255, 85, 0), PERSON["right shoulder"]: (255, 170, 0),
        PERSON["right wrist"]: (170, 255, 0), PERSON["left shoulder"]: (85, 255, 0),
        PERSON["left wrist"]: (0, 255, 85), PERSON["right hip"]: (0, 255, 170),
        PERSON["right ankle"]: (0, 170, 255), PERSON["left hip"]: (0, 85, 255),
        PERSON["left ankle"]: (85, 0, 255), PERSON["right eye"]: (170, 0, 255),
        PERSON["left eye"]: (255, 0, 255), PERSON["right ear"]: (255, 0, 170),
        PERSON["left ear"]: (255, 0, 85),
    }  # fmt: skip
    assert {(x, y): tuple(drawn[y, x]) for x, y in joints} == joints
    limbs = {  # in their middles: neck to right shoulder, to left shoulder, right forearm, left shin, to nose
        (85, 80): (153, 0, 0), (115, 80): (153, 51, 0), (30, 130): (153, 153, 0), (124, 225): (0, 51, 153),
        (100, 60): (0, 0, 153),
    }  # fmt: skip
    assert {(x, y): tuple(drawn[y, x]) for x, y in limbs} == limbs
    assert not drawn[5, 5].any()


def test_joints_that_are_not_seen_are_left_out_with_their_limbs():
    drawn = skeleton(left_wrist=0.1, right_shoulder=0.2)
    for x, y in (PERSON["left wrist"], (170, 130), PERSON["right shoulder"], (55, 95), (100, 80), (91, 120)):
        assert not drawn[y, x].any()
    assert drawn[PERSON["left elbow"][1], PERSON["left elbow"][0]].any()


def test_a_skeleton_is_as_thick_as_its_picture_is_large():
    joints = np.array([(*place, 0.9) for place in PERSON.values()], dtype=np.float32)
    small = np.asarray(skeletons([joints * (2, 2, 1)], (400, 512))).any(-1).mean()
    large = np.asarray(skeletons([joints * (8, 8, 1)], (1600, 2048))).any(-1).mean()
    assert abs(large / small - 1) < 0.25


@pytest.fixture
def people(tmp_path, monkeypatch):
    """A tiny detector that sees one person in all of the picture, and a tiny ViTPose all of whose joints are
    where it is bright; both in the layout of the hub's, weights set by hand."""
    pytest.importorskip("scipy")
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[8, 8, 8], encoder_hidden_dim=16, d_model=16,
        decoder_in_channels=[16, 16, 16], encoder_ffn_dim=16, decoder_ffn_dim=16, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=1, num_denoising=0,
        id2label={0: "person", 1: "dog"}, label2id={"person": 0, "dog": 1},
    )  # fmt: skip
    detector = RTDetrForObjectDetection(config)
    for name, parameter in detector.named_parameters():
        with torch.no_grad():
            if "class_embed" in name:
                parameter.copy_(torch.tensor([9.0, -9.0]) if name.endswith("bias") else 0 * parameter)
            if "decoder.bbox_embed.0.layers.2" in name:  # no shift; as wide and high as can be
                parameter.copy_(torch.tensor([0.0, 0, 9, 9]) if name.endswith("bias") else 0 * parameter)
    detector.save_pretrained(tmp_path / "person")
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "person")

    pose = VitPoseForPoseEstimation(
        VitPoseConfig(
            backbone_config=VitPoseBackboneConfig(
                hidden_size=2, num_hidden_layers=1, num_attention_heads=1, mlp_ratio=1, out_indices=[1]
            ),
            num_labels=17,
        )
    )
    with torch.no_grad():
        for name, parameter in pose.named_parameters():
            parameter.zero_()
            if "projection.weight" in name:  # of a patch: its brightness, and the reverse
                parameter[0], parameter[1] = 1 / parameter[0].numel(), -1 / parameter[0].numel()
            if "layernorm.weight" in name:
                parameter.fill_(1)
            if name == "head.conv.weight":
                parameter[:, 0, 1, 1] = 1
    pose.save_pretrained(tmp_path / "pose")
    VitPoseImageProcessor().save_pretrained(tmp_path / "pose")
    for kind in ("person", "pose"):
        monkeypatch.setitem(module.MODELS, kind, (str(tmp_path / kind), "tiny"))


@pytest.mark.parametrize("place", [(50, 44), (30, 60), (56, 26)])
def test_a_pose_is_drawn_where_the_joints_are_found(people, place):
    x, y = place
    picture = Image.new("RGB", (96, 96))
    picture.paste((255, 255, 255), (x - 9, y - 9, x + 9, y + 9))
    left, top, right, bottom = annotate("pose", picture).getbbox()
    assert max(abs((left + right) / 2 - x), abs((top + bottom) / 2 - y)) < 6


def test_a_picture_without_anybody_is_refused(people, monkeypatch):
    monkeypatch.setattr(module, "MIN_SCORE", 0.9999)  # the detector's person has sigmoid(9)
    with pytest.raises(InputError, match="pose finds nobody"):
        annotate("pose", tiny.picture(1, (96, 96)))


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match=r"pose needs SciPy.*imprompt\[control\].*none:PATH"):
        annotate("pose", tiny.picture(1))


def test_a_model_that_cannot_be_had_is_named_with_its_licence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"Depth-Anything-V2-Small-hf.*Apache-2\.0.*none:PATH") as said:
        annotate("depth", tiny.picture(1))
    assert "\n" not in str(said.value)


POINTS = np.array([[60.4, 70.6], [110.2, 66.9], [84.7, 100.3], [66.1, 130.8], [104.9, 128.2]])


def test_the_points_of_a_face_are_drawn_as_instantid_was_trained():
    """``draw_kps`` of the published code, written out again."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    expected = np.zeros([192, 160, 3])
    for limb in np.array([[0, 2], [1, 2], [3, 2], [4, 2]]):
        x, y = POINTS[limb][:, 0], POINTS[limb][:, 1]
        length = ((x[0] - x[1]) ** 2 + (y[0] - y[1]) ** 2) ** 0.5
        angle = np.degrees(np.arctan2(y[0] - y[1], x[0] - x[1]))
        polygon = cv2.ellipse2Poly(
            (int(np.mean(x)), int(np.mean(y))), (int(length / 2), 4), int(angle), 0, 360, 1
        )
        expected = cv2.fillConvexPoly(expected.copy(), polygon, colours[limb[0]])
    expected = (expected * 0.6).astype(np.uint8)
    for point, colour in zip(POINTS, colours, strict=True):
        expected = cv2.circle(expected.copy(), (int(point[0]), int(point[1])), 10, colour, -1)
    drawn = face_keypoints(POINTS, (160, 192))
    assert drawn.size == (160, 192)
    assert np.array_equal(np.asarray(drawn), expected)


@pytest.mark.filterwarnings("ignore:the face models")
def test_the_largest_face_of_a_picture_is_drawn(tmp_path):
    folder = pack(tmp_path / "buffalo_l")
    scene = photo((160, 320, "red"), (400, 160, "green"))
    drawn = np.asarray(annotate("face", scene, face_model=str(folder)))
    largest, other = OnnxFaces.from_folder(folder).find(scene)
    assert largest.area > other.area
    assert np.array_equal(drawn, np.asarray(face_keypoints(largest.landmarks, scene.size)))
    assert drawn[320:340, 160:180].max() == 0
    with pytest.raises(InputError, match="no face"):
        annotate("face", Image.new("RGB", (64, 64)), face_model=str(folder))
