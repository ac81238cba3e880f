"""Features saved on the command line are those of the pictures, and need no encoder afterwards."""

from pathlib import Path

import pytest
import torch

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.app.cli import main
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.features import load
from imprompt.errors import EncoderMismatch, UsageError
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request
from tiny import picture, random_adapter_state, tiny_encoder, tiny_unet


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
    said = capsys.readouterr()
    assert (said.out.strip(), said.err) == (str(target), "")
    saved = load(target)
    expected = ImageEncoder(*tiny_encoder()).encode([picture(1, (50, 30)), picture(2, (50, 30))])
    assert torch.equal(saved.features.pooled, expected.pooled)
    assert torch.equal(saved.features.hidden, expected.hidden)
    assert len(saved.pictures) == 2
    assert saved.encoder == f"{tmp_path.name}/tower"  # the way to it is nobody else's business
    assert main([*words, "-o", str(target)]) == 0
    for users in (tmp_path / "users.safetensors", tower / "model.safetensors", tmp_path / "1.png"):
        if not users.exists():
            users.write_text("mine")
        before = users.read_bytes()
        assert main([*words, "-o", str(users)]) == (2 if users.suffix == ".png" else 4)
        assert users.read_bytes() == before
    assert "holds no saved features; give another name, or --overwrite" in capsys.readouterr().err
    assert main([*words, "-o", str(tmp_path / "users.safetensors"), "--overwrite"]) == 0
    assert torch.equal(load(tmp_path / "users.safetensors").features.pooled, saved.features.pooled)
    assert main([*words, "-o", str(tmp_path / "x.png")]) == 2
    assert main([*words, "-o", str(target), "--framing", "no"]) == 2


def test_every_field_of_an_image_can_be_said_on_the_command_line_and_comes_back() -> None:
    ref = ImagePrompt.parse(
        "a,b.png,scale=0.5,weight=2,combine=norm average,framing=letterbox,curve=0:1,0.5:0.2,"
        "scaling=K+V,select=0-1,3,start=0.1"
    )
    assert ref == ImagePrompt(
        "a,b.png",
        scale=0.5,
        weights=[2.0],
        combine="norm-average",
        framing="pad",
        curve="0:1,0.5:0.2",
        scaling="k+v",
        select="0-1,3",
        start=0.1,
    )
    request = Request(images=(ref,))
    assert Request.from_json(request.to_json()) == request


def test_a_picture_more_belongs_to_the_prompt_before_it() -> None:
    prompt = ImagePrompt.parse("0.png,combine=subtract", also=["1.png,weight=2", "2.png,weight=3"])
    assert prompt == ImagePrompt(["0.png", "1.png", "2.png"], combine="subtract", weights=[1, 2, 3])
    with pytest.raises(UsageError, match=r"--also '1\.png,weight=': 'weight' is empty"):
        ImagePrompt.parse("0.png", also=["1.png,weight="])
    with pytest.raises(UsageError, match=r"--also '1\.png,scale=2': unknown option 'scale'"):
        ImagePrompt.parse("0.png", also=["1.png,scale=2"])


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("a.png,combine=subtract", "combine: 'subtract'"),
        ("a.png,weight=-1", "weights: -1.0 is negative"),
        ("a.png,weight=0", "add up to 0"),
        ("a.png,weight=0.5", "weights: 0.5 has no effect on a single picture; use scale"),
        ("a.safetensors,framing=pad", "no effect on saved features"),
        ("a.safetensors,sharpen=0.5", "sharpen: has no effect on saved features"),
        ("a.png,sharpen=2", "less than or equal to 1"),
        ("a.png,curve=1:0,0:1", "ascending"),
        ("a.png,combine=sum", "combine 'sum' is unknown"),
        ("a.png,select=x", "not a token or range"),
        ("a.png,weight=", "'weight' is empty; weight=VALUE is expected"),
        ("a.png,at=,scale=1", "'at' is empty"),
        ('a.png,profile=""', "'profile' is empty"),
        ("a.png,noise=fade:", "strength '' is not a number"),
    ],
)
def test_steering_without_sense_is_refused_before_anything_is_loaded(image: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Request(images=(ImagePrompt.parse(image),))


def test_a_face_saved_by_comfyui_becomes_saved_faces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from imprompt.encoders.face import load as load_faces

    torch.save(torch.ones(1, 1, 512), tmp_path / "me.ipadpt")
    target = tmp_path / "me.safetensors"
    target.write_text("mine")
    assert main(["convert", str(tmp_path / "me.ipadpt"), str(target)]) == 4
    assert main(["convert", str(tmp_path / "me.ipadpt"), str(target), "--variant", "faceid"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "holds no saved features; give another name, or --overwrite" in said[0]
    assert "--variant: has no effect on an .ipadpt file" in said[1]
    assert target.read_text() == "mine"
    assert main(["convert", str(tmp_path / "me.ipadpt"), str(target), "--overwrite"]) == 0
    assert main(["convert", str(tmp_path / "me.ipadpt"), str(target)]) == 0
    assert torch.equal(load_faces(target).embedding, torch.ones(1, 512))


@pytest.mark.parametrize("by", ["comfyui", "diffusers"])
@pytest.mark.parametrize("kind", ["linear", "plus"])
def test_features_that_others_saved_are_shown_as_the_picture(
    kind: str, by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = ImageEncoder(*tiny_encoder())
    made = tower.encode([picture(1), picture(2)])
    positive, negative = (
        (made.hidden, made.negative_hidden)
        if kind == "plus"
        else (made.pooled, torch.zeros_like(made.pooled[:1]))
    )
    source, target = tmp_path / "two.ipadpt", tmp_path / "two.safetensors"
    halves = torch.stack([negative.expand_as(positive), positive])
    torch.save(positive.half() if by == "comfyui" else [halves.half()], source)
    assert main(["convert", str(source), str(target)]) == 0

    state = random_adapter_state(tiny_unet(), kind)
    adapter = IPAdapter.from_state_dict(state, image_encoder=tower)
    adapter.set_prompt([picture(1), picture(2)])
    (expected,) = adapter.samples[0]
    alone = IPAdapter.from_state_dict(state)
    alone.set_prompt(str(target))
    (shown,) = alone.samples[0]
    torch.testing.assert_close(shown.tokens, expected.tokens, atol=2e-2, rtol=0)  # saved in half precision
    if kind == "linear" or by == "diffusers":
        assert shown.negative is not None
        torch.testing.assert_close(shown.negative, expected.negative, atol=2e-2, rtol=0)
    else:  # ComfyUI keeps the negative half in a file of its own
        assert shown.negative is None
        torch.save(made.negative_hidden, source)
        assert main(["convert", str(source), str(tmp_path / "negative.safetensors")]) == 0
        beside = alone.load_features(tmp_path / "negative.safetensors")
        alone.set_prompt(str(target), negative=beside.hidden)
        torch.testing.assert_close(alone.samples[0][0].negative, expected.negative, atol=2e-2, rtol=0)
    capsys.readouterr()
    other = IPAdapter.from_state_dict(random_adapter_state(tiny_unet(), kind, feature_width=40))
    with pytest.raises(EncoderMismatch, match=r"encoder 'of two\.ipadpt'.*needs \w+ features of width 40"):
        other.set_prompt(str(target))


def test_published_widths_name_their_encoder(tmp_path: Path) -> None:
    for shape, name in (((1, 257, 1280), "CLIP ViT-H/14"), ((1, 1280), "CLIP ViT-bigG/14")):
        torch.save(torch.ones(shape), tmp_path / "a.ipadpt")
        assert main(["convert", str(tmp_path / "a.ipadpt"), str(tmp_path / "a.safetensors")]) == 0
        assert load(tmp_path / "a.safetensors").encoder == name


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": torch.ones(1, 4)}, "(dict)"),
        ([torch.ones(2, 1, 4), torch.ones(2, 1, 4)], "(list)"),
        (torch.full((1, 4), float("nan")), "NaN"),
        (torch.ones(1, 4, dtype=torch.int64), "[1, 4]"),
        (ImagePrompt, "holds more than tensors"),
    ],
)
def test_another_content_is_refused_and_leaves_no_file(
    content: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "no.ipadpt")
    assert main(["convert", str(tmp_path / "no.ipadpt"), str(tmp_path / "no.safetensors")]) == 3
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "no.safetensors").exists()
