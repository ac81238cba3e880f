"""Features saved on the command line are those of the pictures, and need no encoder afterwards."""

from pathlib import Path

import pytest
import torch

from imprompt.app.cli import main
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.features import load
from imprompt.errors import UsageError
from imprompt.generation.request import ImageRef, Request
from tiny import picture, tiny_encoder


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    model, processor = tiny_encoder()
    model.save_pretrained(tmp_path / "tower")
    processor.save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def test_embedded_pictures_are_their_features(
    tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in (1, 2):
        picture(i, (50, 30)).save(tmp_path / f"{i}.png")
    target = tmp_path / "both.safetensors"
    words = ["embed", str(tmp_path / "1.png"), str(tmp_path / "2.png"), "--encoder", str(tower)]
    assert main([*words, "-o", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    saved = load(target)
    expected = ImageEncoder(*tiny_encoder()).encode([picture(1, (50, 30)), picture(2, (50, 30))])
    assert torch.equal(saved.features.pooled, expected.pooled)
    assert torch.equal(saved.features.hidden, expected.hidden)
    assert len(saved.pictures) == 2
    assert main([*words, "-o", str(tmp_path / "x.png")]) == 2
    assert main([*words, "-o", str(target), "--framing", "no"]) == 2


def test_every_field_of_an_image_can_be_said_on_the_command_line_and_comes_back() -> None:
    ref = ImageRef.parse(
        "a,b.png,scale=0.5,weight=2,combine=norm average,framing=letterbox,curve=0:1,0.5:0.2,"
        "scaling=K+V,select=0-1,3,start=0.1"
    )
    assert ref == ImageRef(
        path="a,b.png",
        scale=0.5,
        weight=2.0,
        combine="norm-average",
        framing="pad",
        curve="0:1,0.5:0.2",
        scaling="k+v",
        select="0-1,3",
        start=0.1,
    )
    request = Request(images=(ref,))
    assert Request.from_json(request.to_json()) == request


def test_pictures_alike_but_for_their_weight_are_one_prompt() -> None:
    images = tuple(ImageRef(path=f"{i}.png", combine="subtract", weight=1.0 + i) for i in range(3))
    assert len(Request(images=images).groups) == 1
    assert len(Request(images=(*images[:2], ImageRef(path="c.png"))).groups) == 2


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("a.png,combine=subtract", "images: combine: 'subtract'"),
        ("a.png,weight=-1", "images: weights: -1.0 is negative"),
        ("a.png,weight=0", "add up to 0"),
        ("a.png,weight=0.5", "no effect on a picture without others"),
        ("a.safetensors,framing=pad", "no effect on saved features"),
        ("a.safetensors,sharpen=0.5", "sharpen: has no effect on saved features"),
        ("a.png,sharpen=2", "less than or equal to 1"),
        ("a.png,curve=1:0,0:1", "ascending"),
        ("a.png,combine=sum", "combine 'sum' is unknown"),
        ("a.png,select=x", "no token or range"),
    ],
)
def test_steering_without_sense_is_refused_before_anything_is_loaded(image: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Request(images=(ImageRef.parse(image),))


def test_a_face_saved_by_comfyui_becomes_saved_faces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from imprompt.encoders.face import load as load_faces

    torch.save(torch.ones(1, 1, 512), tmp_path / "me.ipadpt")
    torch.save(torch.ones(1, 257, 1280), tmp_path / "picture.ipadpt")
    target = tmp_path / "me.safetensors"
    assert main(["convert", str(tmp_path / "me.ipadpt"), str(target)]) == 0
    assert torch.equal(load_faces(target).embedding, torch.ones(1, 512))
    assert main(["convert", str(tmp_path / "picture.ipadpt"), str(tmp_path / "no.safetensors")]) == 3
    assert "[1, 257, 1280]" in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()
