"""Into a face adapter: photos, embeddings and saved faces mean the same; what does not fit is refused."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from facemodels import pack, photo
from faces import face_state, person
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.catalog import adapters
from imprompt.checkpoints.checkpoint import read
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.face import Faces, save
from imprompt.encoders.face_onnx import OnnxFaces
from imprompt.errors import EncoderMismatch, ImpromptError, InputError, UsageError
from imprompt.schema.prompt import ImagePrompt
from tiny import picture, random_adapter_state, tiny_encoder, tiny_unet

PHOTO = photo((160, 320, "red"), (480, 160, "green"))


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> OnnxFaces:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return OnnxFaces.from_folder(pack(tmp_path_factory.mktemp("packs") / "buffalo_l"))


@pytest.fixture(scope="session")
def encoder() -> ImageEncoder:
    return ImageEncoder(*tiny_encoder())


def adapter(
    reader: OnnxFaces | None, variant: str = "faceid", encoder: ImageEncoder | None = None
) -> IPAdapter:
    state = face_state(tiny_unet("sdxl"), variant, rank=None if variant == "faceid-raw" else 4)
    known = None if variant == "portrait" else variant
    return IPAdapter(read(state, variant=known), image_encoder=encoder, face_embedder=reader)


def tokens(of: IPAdapter, *, negative: bool = False) -> torch.Tensor:
    row = of.samples[0][0]
    return row.negative if negative else row.tokens


@pytest.mark.parametrize("variant", ["faceid", "faceid-raw", "faceid-plus", "faceid-plusv2", "portrait"])
def test_a_photo_and_what_was_made_of_it_mean_the_same(
    variant: str, reader: OnnxFaces, encoder: ImageEncoder, tmp_path: Path
) -> None:
    mine = adapter(reader, variant, encoder if "plus" in variant else None)
    mine.set_prompt(PHOTO)
    expected, negative = tokens(mine), tokens(mine, negative=True)
    faces = mine.encode([PHOTO])
    saved = save(faces, tmp_path / "me.safetensors")
    embedding = faces.embedding if variant == "faceid-raw" else torch.nn.functional.normalize(faces.embedding)
    ways = [faces, str(saved)] + ([] if "plus" in variant else [embedding, embedding[0]])
    without = adapter(None, variant)
    for way in ways:
        without.set_prompt(way)
        torch.testing.assert_close(tokens(without), expected)
        torch.testing.assert_close(tokens(without, negative=True), negative)


def test_which_face_is_read_can_be_said(reader: OnnxFaces) -> None:
    mine = adapter(reader)
    shown = {}
    for face in ("largest", 0, 1, "1"):
        mine.set_prompt(PHOTO, face=face)
        shown[str(face), type(face)] = tokens(mine)
    first, zero, one, also = shown.values()
    assert torch.equal(first, zero)
    assert torch.equal(one, also)
    assert not torch.equal(first, one)
    with pytest.raises(InputError, match="face 2 of 'the given picture': 2 were found"):
        mine.set_prompt(PHOTO, face=2)
    with pytest.raises(InputError, match="no face was found"):
        mine.set_prompt(photo())
    assert torch.equal(tokens(mine), also), "the prompt before stays"


def test_the_frame_of_a_clip_that_shows_no_face_is_named(reader: OnnxFaces, tmp_path: Path) -> None:
    path = tmp_path / "me.webp"
    frames = [PHOTO, photo((160, 320, "red")), photo(), photo()]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    with pytest.raises(InputError, match=r"no face was found in '.*me\.webp, frame 2'"):
        adapter(reader).set_prompt(str(path), at="each")


def test_several_photos_stand_side_by_side_or_are_averaged(reader: OnnxFaces) -> None:
    mine = adapter(reader)
    photos = [PHOTO, photo((160, 320, "red"), colour=130)]
    mine.set_prompt(photos)
    assert len(tokens(mine)) == 8
    each = torch.nn.functional.normalize(mine.encode(photos).embedding)
    mine.set_prompt(photos, combine="average")
    mean = torch.nn.functional.normalize(each.mean(0, keepdim=True))
    torch.testing.assert_close(tokens(mine), mine.projection(mean)[0])


def test_s_scale_is_the_looks_share(reader: OnnxFaces, encoder: ImageEncoder) -> None:
    mine = adapter(reader, "faceid-plusv2", encoder)
    mine.set_prompt(PHOTO, s_scale=0.0)
    faces = mine.projection.norm(
        mine.projection.proj(torch.nn.functional.normalize(mine.encode([PHOTO]).embedding)).unflatten(
            -1, (4, -1)
        )
    )
    torch.testing.assert_close(tokens(mine), faces[0])
    mine.set_prompt(PHOTO)
    assert not torch.allclose(tokens(mine), faces[0])
    assert mine.projection.s_scale == 1.0


REFUSED = [
    (
        "faceid",
        person(length=23.0),
        {},
        UsageError,
        r"of length 1; the given ones have length 23\..*normalize",
    ),
    ("faceid-raw", person(), {}, UsageError, r"as the face model gives them.*length 1\..*face\.embedding"),
    ("faceid", torch.ones(1, 256), {}, EncoderMismatch, "width 512"),
    ("faceid-plus", person(), {}, EncoderMismatch, "crop's hidden states"),
    ("faceid", person(), {"s_scale": 1.0}, UsageError, "belongs to FaceID-PlusV2"),
    ("faceid", PHOTO, {"framing": "pad"}, UsageError, "reads the face alone"),
    ("faceid", person(), {"face": 1}, UsageError, "face: has no effect on features"),
    ("faceid", PHOTO, {"face": "left"}, UsageError, "'largest' is expected"),
    ("faceid", Faces(torch.ones(1, 512), "buffalo_l", None, None), {}, None, ""),
]


@pytest.mark.parametrize(("variant", "shown", "fields", "error", "message"), REFUSED)
def test_what_does_not_fit_a_face_adapter_is_refused(
    variant: str,
    shown: object,
    fields: dict,
    error: type[ImpromptError] | None,
    message: str,
    reader: OnnxFaces,
) -> None:
    mine = adapter(reader, variant)
    if error is None:
        mine.set_prompt(shown, **fields)
        return
    with pytest.raises(error, match=message):
        mine.set_prompt(shown, **fields)
    assert mine.samples == ()


def test_a_face_adapter_without_a_face_model_says_where_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSIGHTFACE_HOME", "/nowhere")
    with pytest.raises(EncoderMismatch, match=r"pack buffalo_l .*non-commercial.*--face-model"):
        adapter(None).set_prompt(PHOTO)


def test_whole_pictures_features_are_no_faces_and_faces_no_features(
    reader: OnnxFaces, encoder: ImageEncoder
) -> None:
    with pytest.raises(EncoderMismatch, match="reads a face's embedding"):
        adapter(reader).set_prompt(encoder.encode([picture(1)]))
    plain = IPAdapter.from_state_dict(random_adapter_state(tiny_unet()), image_encoder=encoder)
    with pytest.raises(EncoderMismatch, match="was given face embeddings"):
        plain.set_prompt(Faces(person(), "buffalo_l"))
    with pytest.raises(UsageError, match="reads whole pictures"):
        plain.set_prompt(picture(1), face=1)
    with pytest.raises(UsageError, match="leave the face model out"):
        plain.face_embedder = reader
    with pytest.raises(EncoderMismatch, match="face embeddings alone"):
        adapter(reader, "faceid", encoder)


def test_another_face_models_embeddings_are_refused_though_they_are_as_wide(reader: OnnxFaces) -> None:
    row = adapters()["sdxl-instantid"]
    known = replace(
        read(face_state(tiny_unet("sdxl"), "faceid-raw", rank=None), variant="faceid-raw"), published=row
    )
    with pytest.raises(
        EncoderMismatch, match=r"face embeddings of antelopev2 and cannot read those of buffalo_l"
    ):
        IPAdapter(known, face_embedder=reader)
    mine = IPAdapter(known)
    with pytest.raises(EncoderMismatch, match="those of auraface"):
        mine.set_prompt(Faces(person(length=20.0), "auraface"))
    mine.set_prompt(Faces(person(length=20.0), "antelopev2"))


def test_a_face_may_be_the_negative_too(reader: OnnxFaces) -> None:
    mine = adapter(reader)
    mine.set_prompt(PHOTO, face=0, negative=photo((160, 320, "red"), colour=200))
    shown = tokens(mine, negative=True)
    mine.set_prompt(ImagePrompt(image=PHOTO, negative=mine.encode([photo((160, 320, "red"), colour=200)])))
    torch.testing.assert_close(tokens(mine, negative=True), shown)
