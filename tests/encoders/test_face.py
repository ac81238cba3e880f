"""Faces: found, chosen, aligned and embedded by real ONNX models; geometry by independent formulas."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from facemodels import pack, photo, recogniser, scrfd, yunet
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.face import Faces, joined, load, read, save
from imprompt.encoders.face_geometry import TEMPLATE, Face, align, nms, similarity
from imprompt.encoders.face_onnx import OnnxFaces, installed
from imprompt.errors import ImpromptError, InputError, ModelError
from tiny import HIDDEN, tiny_encoder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("packs") / "buffalo_l")


@pytest.fixture(scope="session")
def reader(folder: Path) -> OnnxFaces:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return OnnxFaces.from_folder(folder)


# ---- geometry


@settings(max_examples=50, deadline=None)
@given(
    angle=st.floats(-3.1, 3.1),
    scale=st.floats(0.05, 20),
    shift=st.tuples(st.floats(-500, 500), st.floats(-500, 500)),
)
def test_a_turned_and_scaled_template_is_brought_back_exactly(
    angle: float, scale: float, shift: tuple[float, float]
) -> None:
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = TEMPLATE @ turn.T + np.array(shift)
    found = similarity(points, TEMPLATE)
    np.testing.assert_allclose(points @ found[:, :2].T + found[:, 2], TEMPLATE, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_the_alignment_is_the_least_squares_similarity(seed: int) -> None:
    # x' = a·x − b·y + c, y' = b·x + a·y + d is linear in (a, b, c, d): solve that directly.
    points = np.random.default_rng(seed).normal(0, 30, (5, 2)) + 60
    rows, wanted = [], []
    for (x, y), (u, v) in zip(points, TEMPLATE, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        wanted += [u, v]
    a, b, c, d = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
    np.testing.assert_allclose(similarity(points, TEMPLATE), [[a, -b, c], [b, a, d]], atol=1e-7)


@pytest.mark.parametrize("size", [112, 224])
def test_an_aligned_crop_shows_what_the_transform_says(size: int) -> None:
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((240, 200), Image.Resampling.BICUBIC)
    marks = np.array([[90, 80], [140, 90], [110, 115], [85, 135], [130, 142]], float)
    matrix = similarity(marks, TEMPLATE * size / 112)
    crop = np.asarray(align(image, marks, size)).astype(float)
    source, back = np.asarray(image).astype(float), np.linalg.inv(matrix[:, :2])
    for x, y in ((10, 12), (size // 2, size // 2), (size - 20, 30)):
        u, v = back @ (np.array([x, y]) - matrix[:, 2])  # bilinear, pixel centres at whole numbers
        i, j = int(np.floor(u)), int(np.floor(v))
        s, t = u - i, v - j
        wanted = (1 - t) * ((1 - s) * source[j, i] + s * source[j, i + 1])
        wanted += t * ((1 - s) * source[j + 1, i] + s * source[j + 1, i + 1])
        np.testing.assert_allclose(crop[y, x], wanted, atol=1.01)


def test_landmarks_in_one_point_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be aligned"):
        align(photo(), np.full((5, 2), 3.0))


def test_of_overlapping_faces_the_surest_stays_and_the_largest_comes_first() -> None:
    def face(left: float, side: float, score: float) -> Face:
        return Face((left, 0, left + side, side), score, TEMPLATE)

    kept = nms([face(0, 10, 0.6), face(1, 10, 0.9), face(100, 30, 0.5), face(0, 3, 0.7)])
    assert [(each.box[0], each.score) for each in kept] == [(100, 0.5), (1, 0.9), (0, 0.7)]


# ---- models


def test_faces_are_found_where_they_are_the_largest_first(reader: OnnxFaces) -> None:
    found = reader.find(photo((160, 320, "red"), (480, 160, "green")))
    assert [round(face.box[2] - face.box[0]) for face in found] == [128, 40]
    assert found[0].box == pytest.approx((480 - 64, 160 - 64, 480 + 64, 160 + 64), abs=0.5)
    np.testing.assert_allclose(found[1].landmarks[2], [160, 320], atol=0.5)


def test_a_picture_of_another_size_gives_its_own_pixels(reader: OnnxFaces) -> None:
    image = photo((160, 320, "red")).crop((0, 0, 640, 480)).resize((1280, 960), Image.Resampling.NEAREST)
    (face,) = reader.find(image)
    assert face.box == pytest.approx((280, 600, 360, 680), abs=1)


def test_an_embedding_is_the_recognisers_of_the_aligned_crop(reader: OnnxFaces, tmp_path: Path) -> None:
    matrix = recogniser(tmp_path / "same.onnx")
    image = photo((160, 320, "red"), (480, 160, "green"))
    for number, face in enumerate(reader.find(image)):
        crop = np.asarray(align(image, face.landmarks), np.float64)
        wanted = ((crop.mean((0, 1)) - 127.5) / 127.5) @ matrix
        found = read(reader, image, number)
        assert (found.space, found.patches) == ("buffalo_l", None)
        np.testing.assert_allclose(found.embedding[0].numpy(), wanted, rtol=1e-3, atol=1e-3)


def test_the_look_is_the_encoders_of_the_large_crop(reader: OnnxFaces) -> None:
    image, encoder = photo((480, 160, "green")), ImageEncoder(*tiny_encoder())
    found = read(reader, image, 0, encoder)
    expected = encoder.encode([align(image, reader.find(image)[0].landmarks, 224)])
    assert torch.equal(found.patches, expected.hidden)
    assert torch.equal(found.negative_patches, expected.negative_hidden)


def test_a_permissive_pair_works_and_its_space_is_its_own(tmp_path: Path) -> None:
    yunet(tmp_path / "face_detection_yunet_2023mar.onnx")
    matrix = recogniser(tmp_path / "glintr100.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say of a licence
        reader = OnnxFaces.from_folder(tmp_path, space="auraface")
    image = photo((160, 320, "red"))
    (face,) = reader.find(image)
    assert face.box == pytest.approx((144, 304, 184, 344), abs=0.5)
    found = read(reader, image)
    assert (found.space, tuple(found.embedding.shape)) == ("auraface", (1, 512))
    crop = np.asarray(align(image, face.landmarks), np.float64)
    wanted = ((crop.mean((0, 1)) - 127.5) / 127.5) @ matrix
    np.testing.assert_allclose(found.embedding[0].numpy(), wanted, rtol=1e-3, atol=1e-3)


def test_no_face_and_no_such_face_say_what_was_tried(reader: OnnxFaces) -> None:
    with pytest.raises(
        InputError, match=r"no face was found in 'me\.png' \(640×640\).*640, 480, 320, 256"
    ) as error:
        read(reader, photo(), name="me.png")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="face 1 of 'me': 1 were found"):
        read(reader, photo((160, 320, "red")), 1, name="me")


def test_a_licence_is_said_and_a_folder_without_models_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="buffalo_l are InsightFace's.*non-commercial"):
        OnnxFaces.from_folder(folder)
    with pytest.raises(ModelError, match="no folder of face models at"):
        OnnxFaces.from_folder(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"0 files that are a face detector by name \(no \.onnx file\)"):
        OnnxFaces.from_folder(tmp_path)
    (tmp_path / "det_10g.onnx").write_bytes(b"no model")
    recogniser(tmp_path / "w600k_r50.onnx")
    with pytest.raises(ModelError, match="cannot be opened as an ONNX model"):
        OnnxFaces.from_folder(tmp_path)
    recogniser(tmp_path / "det_10g.onnx")
    with pytest.raises(ModelError, match="cannot be used as the face detector"):
        OnnxFaces.from_folder(tmp_path)
    scrfd(tmp_path / "det_10g.onnx")
    scrfd(tmp_path / "w600k_r50.onnx")
    with pytest.raises(ModelError, match="cannot be used as the face recogniser"):
        OnnxFaces.from_folder(tmp_path)
    recogniser(tmp_path / "w600k_r50.onnx", 128)
    with pytest.raises(ModelError, match="512 numbers out are expected"):
        OnnxFaces.from_folder(tmp_path)


def test_a_pack_is_found_where_insightface_keeps_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSIGHTFACE_HOME", str(folder.parent.parent / "none"))
    assert installed(["buffalo_l"]) is None
    home = folder.parent / "home"
    (home / "models").mkdir(parents=True, exist_ok=True)
    if not (home / "models" / "buffalo_l").exists():
        (home / "models" / "buffalo_l").symlink_to(folder)
    monkeypatch.setenv("INSIGHTFACE_HOME", str(home))
    with pytest.warns(UserWarning, match="non-commercial"):
        found = installed(["antelopev2", "buffalo_l"])
    assert found is not None
    assert found.space == "buffalo_l"


@pytest.mark.parametrize(
    ("folder_name", "recogniser_name", "space"),
    [
        ("antelopev2", "glintr100", "antelopev2"),
        ("AuraFace-v1", "glintr100", "auraface"),
        ("faces", "glintr100", "unknown"),
    ],
)
def test_one_recognisers_name_stands_for_two_spaces(
    folder_name: str, recogniser_name: str, space: str, tmp_path: Path
) -> None:
    place = tmp_path / folder_name
    place.mkdir()
    scrfd(place / "scrfd_10g_bnkps.onnx")
    recogniser(place / f"{recogniser_name}.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert OnnxFaces.from_folder(place).space == space


# ---- files


def test_saved_faces_come_back(tmp_path: Path) -> None:
    for faces in (
        Faces(torch.randn(2, 512), "buffalo_l"),
        Faces(torch.randn(1, 512), "antelopev2", torch.randn(1, 17, HIDDEN), torch.randn(1, 17, HIDDEN)),
    ):
        again = load(save(faces, tmp_path / "me.safetensors"))
        assert again.space == faces.space
        for name in ("embedding", "patches", "negative_patches"):
            one, other = getattr(again, name), getattr(faces, name)
            assert (one is None and other is None) or torch.equal(one, other)


def test_what_holds_no_faces_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"embedding": torch.ones(1, 512)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="holds no faces"):
        load(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="NaN"):
        load(save(Faces(torch.full((1, 512), float("nan")), "x"), tmp_path / "b.safetensors"))
    with pytest.raises(InputError, match="shapes of faces"):
        load(save(Faces(torch.ones(512), "x"), tmp_path / "c.safetensors"))
    embedding, about = torch.ones(2, 512), {"format": "imprompt-faces-1", "space": "x"}
    for wrong in (
        {"embedding": embedding[:0]},
        {"embedding": embedding, "patches": torch.ones(2, 5, 4)},
        {"embedding": embedding, "patches": torch.ones(3, 5, 4), "negative_patches": torch.ones(1, 5, 4)},
        {"embedding": embedding, "patches": torch.ones(2, 5, 4), "negative_patches": torch.ones(1, 6, 4)},
    ):
        save_file(wrong, tmp_path / "d.safetensors", about)
        with pytest.raises(InputError, match="shapes of faces"):
            load(tmp_path / "d.safetensors")
    save_file({"embedding": embedding.int()}, tmp_path / "d.safetensors", about)
    with pytest.raises(InputError, match="whole numbers"):
        load(tmp_path / "d.safetensors")


def test_faces_of_different_models_are_not_joined() -> None:
    one, other = Faces(torch.ones(1, 512), "buffalo_l"), Faces(torch.ones(1, 512), "antelopev2")
    with pytest.raises(ImpromptError, match="antelopev2, buffalo_l"):
        joined([one, other])
