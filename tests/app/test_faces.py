"""A face adapter on the command line: photo, face model, embed, and what a picture says it was made of."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

import tiny
from facemodels import pack, photo
from faces import face_state
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.app.cli import main
from imprompt.app.embedding import encoder_of
from imprompt.app.tuning import tune
from imprompt.encoders.clip import ImageEncoder
from imprompt.generation.families import find_base
from imprompt.schema.request import Request


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
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    code, _, err = say(
        capsys, place, "generate", "--image", str(place / "sky.png"), *model, *common, "-o", "c.png"
    )
    assert (code, f"no face was found in '{place / 'sky.png'}' (640×640)" in err) == (4, True)
    assert not Path("c.png").exists()
    embed = (
        "embed",
        str(place / "sky.png"),
        "--base",
        "BASE",
        "--adapter",
        "FACEID",
        *model,
        "-o",
        "d.safetensors",
    )
    assert f"no face was found in '{place / 'sky.png'}'" in say(capsys, place, *embed)[2]
    for flag, value in (("sharpen", "0.5"), ("framing", "pad")):
        code, _, err = say(capsys, place, *embed, f"--{flag}", value)
        assert (code, f"{flag}: has no effect on adapter" in err) == (2, True), err


def test_a_face_adapter_is_measured_on_the_pictures_with_a_face(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INSIGHTFACE_HOME", str(tmp_path / "none"))
    (tmp_path / "shown").mkdir()
    for name in ("me", "sky"):
        shutil.copy(place / f"{name}.png", tmp_path / "shown")
    few = ("--base", "BASE", "--adapter", "FACEID", "--samples", "1", "--steps", "1", "--scales", "")
    shown = str(tmp_path / "shown")
    report = ("--json", str(tmp_path / "report.json"))
    code, _, err = say(capsys, place, "evaluate", shown, *few, "--face-model", "PACK", *report)
    assert code == 0, err
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["settings"]["pictures"] == 1
    assert "left out, since no face was found: 1 (shown/sky.png)" in found["notes"]
    assert any(figure["name"] == "face identity" for figure in found["figures"])
    assert "imprompt: the face models buffalo_l are InsightFace's" in err
    assert "UserWarning" not in err

    code, _, err = say(capsys, place, "evaluate", shown, *few)
    assert (code, "reads faces: put InsightFace's pack" in err) == (2, True)

    shutil.copytree(place / "buffalo_l", tmp_path / "home" / "models" / "buffalo_l")
    monkeypatch.setenv("INSIGHTFACE_HOME", str(tmp_path / "home"))
    loaded: list[str] = []
    plain = IPAdapter.from_pretrained

    def counting(name: str, **options: Any) -> IPAdapter:
        loaded.append(name)
        return plain(name, **options)

    monkeypatch.setattr(IPAdapter, "from_pretrained", counting)
    code, _, err = say(capsys, place, "evaluate", shown, *few, *report, "--overwrite")
    assert code == 0, err
    assert len(loaded) == 2  # for the encoder that scores, and to draw; faces need its header alone
    installed = json.loads((tmp_path / "report.json").read_text())
    assert (installed["figures"], installed["notes"]) == (found["figures"], found["notes"])

    (tmp_path / "shown" / "me.png").unlink()
    code, _, err = say(capsys, place, "evaluate", shown, *few, "--face-model", "PACK")
    assert (code, "no face was found in any of the 1 pictures" in err) == (4, True)


def test_settings_of_a_face_are_tuned_against_the_text_alone_which_reads_none(
    place: Path, tmp_path: Path
) -> None:
    class Brightness:
        name = "brightness"

        def __call__(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
            level = torch.tensor([float(np.asarray(image).mean()) for image in images])
            return level, 1 - level

    request = Request(
        prompt="a man", images=[place / "me.png"], base=str(place / "base"), face_model=place / "buffalo_l",
        adapter=str(place / "ip-adapter-faceid-plusv2_tiny.safetensors"), steps=2, seed=1, size=32,
    )  # fmt: skip
    tuned = tune(request, tmp_path, axes=["scale=0.5,1"], measure=lambda *_: Brightness(), say=lambda _: None)
    assert tuned.request.face_model == request.face_model
    assert tuned.request.scale in (0.5, 1)


def test_an_adapter_of_embeddings_alone_is_tuned_by_the_encoder_of_the_base(tmp_path: Path) -> None:
    place = find_base("emoji").path
    assert place is not None
    unet = UNet2DConditionModel.from_pretrained(place / "unet")
    adapter = IPAdapter.from_state_dict(face_state(unet), variant="faceid")
    path = adapter.save_pretrained(tmp_path, "faceid.safetensors")
    own = ImageEncoder.from_pretrained(place / "image_encoder")
    picture = photo((160, 320, "red"))
    assert torch.equal(encoder_of("emoji", str(path)).encode([picture]).pooled, own.encode([picture]).pooled)
