"""A face adapter on the command line: photo, face model, embed, and what a picture says it was made of."""

import json
from pathlib import Path

import pytest

import tiny
from facemodels import pack, photo
from faces import face_state
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.app.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL base, FaceID-PlusV2 with the image encoder beside it, face models, and photos."""
    folder = tmp_path_factory.mktemp("faces")
    pipe = tiny.tiny_sdxl()
    pipe.save_pretrained(folder / "base")
    model, processor = tiny.tiny_encoder()
    model.save_pretrained(folder / "image_encoder")
    processor.save_pretrained(folder / "image_encoder")
    state = face_state(pipe.unet, "faceid-plusv2")
    adapter = IPAdapter.from_state_dict(state, variant="faceid-plusv2")
    adapter.save_pretrained(folder, "ip-adapter-faceid-plusv2_tiny.safetensors")
    pack(folder / "buffalo_l")
    photo((160, 320, "red"), (480, 160, "green")).save(folder / "me.png")
    photo().save(folder / "sky.png")
    return folder


def say(capsys: pytest.CaptureFixture[str], place: Path, *words: str) -> tuple[int, str, str]:
    names = {"BASE": "base", "FACEID": "ip-adapter-faceid-plusv2_tiny.safetensors", "PACK": "buffalo_l"}
    return (
        main([str(place / names[word]) if word in names else word for word in words]),
        *capsys.readouterr(),
    )


def test_a_face_is_drawn_from_a_photo_and_from_what_was_embedded_of_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = (
        "--base",
        "BASE",
        "--adapter",
        "FACEID",
        "--steps",
        "2",
        "--seed",
        "1",
        "--size",
        "32",
        "--json",
    )
    model = ("--face-model", "PACK")
    me = f"{place / 'me.png'},face=1,s_scale=0.5"
    code, out, err = say(capsys, place, "generate", "a man", "--image", me, *model, *common, "-o", "a.png")
    assert code == 0, err
    said = json.loads(out)
    assert any("non-commercial" in note for note in said["notes"])
    assert said["request"]["images"][0]["s_scale"] == 0.5
    embed = ("embed", str(place / "me.png"), "--base", "BASE", "--adapter", "FACEID", *model, "--face", "1")
    code, _, err = say(capsys, place, *embed, "-o", "me.safetensors")
    assert code == 0, err
    code, _, err = say(
        capsys, place, "generate", "a man", "--image", "me.safetensors,s_scale=0.5", *common, "-o", "b.png"
    )
    assert code == 0, err
    from PIL import Image

    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    code, _, err = say(
        capsys, place, "generate", "--image", str(place / "sky.png"), *model, *common, "-o", "c.png"
    )
    assert (code, "no face was found in" in err) == (4, True)
    assert not Path("c.png").exists()
