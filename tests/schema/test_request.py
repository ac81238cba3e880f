"""Requests as records: short forms, older versions, what would have no effect, and how flags are read."""

import json

import pytest
import torch
from PIL import Image

from imprompt.errors import UsageError
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.record import read_flag
from imprompt.schema.request import ControlRef, Request


def test_each_entry_is_one_prompt() -> None:
    request = Request(images=["a.png", ["b.png", "c.png"], {"image": "d.png", "scale": 0.3}])
    assert [prompt.pictures for prompt in request.images] == [("a.png",), ("b.png", "c.png"), ("d.png",)]
    assert Request.from_json(request.to_json()) == request
    assert request.files == ("a.png", "b.png", "c.png", "d.png")


USUAL = {"scale": None, "start": 0.0, "end": 1.0, "weight": 1.0, "at": None, "negative": None}


def old(*images: dict[str, object], **fields: object) -> Request:
    """A request as version 1 wrote it."""
    refs = [{**USUAL, **image} for image in images]
    return Request.from_json(json.dumps({"prompt": "an owl", "images": refs, **fields}))


def test_version_1_made_one_prompt_of_neighbours_that_were_alike() -> None:
    read = old({"path": "a"}, {"path": "b", "weight": 2.0}, {"path": "c", "scale": 0.3}, {"path": "d"})
    assert read.images == (
        ImagePrompt(["a", "b"], weights=[1, 2]),
        ImagePrompt("c", scale=0.3),
        ImagePrompt("d"),
    )
    assert Request.from_json(read.to_json()) == read


def test_version_1_frames_are_kept() -> None:
    keys = old({"path": "a", "at": 0}, {"path": "b", "at": 8}, task="animate")
    assert keys.images == (ImagePrompt(["a", "b"], at=[0, 8]),)
    assert old({"path": "a", "at": "each"}, task="animate").images == (ImagePrompt("a", at="each"),)


def test_what_had_no_effect_in_version_1_is_dropped() -> None:
    assert old({"path": "a", "scale": 0.3}, scale=0.6).scale is None
    assert old({"path": "a", "negative": "b"}, guidance=1.0).images[0].negative is None
    assert old({"path": "a", "negative": "b"}, guidance=3.0).images[0].negative == "b"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"images": [{"image": "a", "scale": 1}], "scale": 0.1}, "scale: has no effect, for each image has"),
        ({"images": [{"image": "a", "negative": "b"}], "guidance": 1}, r"images\.0\.negative: has no effect"),
        ({"images": [{"image": "a", "noise": "fade"}], "guidance": 1}, r"images\.0\.noise: has no effect"),
        ({"images": [ImagePrompt(b"x")]}, r"images\.0\.image: a request holds names only"),
        ({"images": [{"image": "a", "mask": ["b", "c"]}]}, r"images\.0\.mask: a request names one"),
        ({"images": [{"path": "a"}]}, r"images\.0: path: no such field"),
        ({"images": [{"image": "a", "scale": 1e9}]}, "less than or equal to 10"),
        ({"images": [[]]}, "empty list"),
        ({"regions": [{"text": "x", "mask": b"x"}], "prompt": "a"}, r"regions\.0: a request holds texts"),
    ],
)
def test_what_would_have_no_effect_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        Request(**fields)
    assert "\n" not in str(error.value)


def test_one_image_that_takes_the_requests_scale_is_enough() -> None:
    assert Request(images=["a", {"image": "b", "scale": 1}], scale=0.1).scale == 0.1


@pytest.mark.parametrize(
    ("text", "image", "options"),
    [
        ("a, b.png,scale=1", "a, b.png", {"scale": 1}),
        ('"a,scale=1.png",scale=0.5', "a,scale=1.png", {"scale": 0.5}),
        ('"a=b.png"', "a=b.png", {}),
        ("a=b.png", "a=b.png", {}),
        (r'"say \"a,b=c\".png"', 'say "a,b=c".png', {}),
        ('a.png,mask=m.png,text="a dog, size=big",scale=1', "a.png", {"text": "a dog, size=big", "scale": 1}),
        ('a.png,profile={"up": 1, "default": 0}', "a.png", {"profile": {"up": 1, "default": 0}}),
    ],
)
def test_what_holds_commas_and_signs_goes_into_quotes(
    text: str, image: str, options: dict[str, object]
) -> None:
    read = ImagePrompt.parse(text)
    assert read.image == image
    assert {name: getattr(read, name) for name in options} == options


def test_quotes_are_for_all_flags() -> None:
    assert TextRegion.parse('"a dog, size=big",mask=m.png').text == "a dog, size=big"
    assert ControlRef.parse('"canny:a,b=c.png",scale=0.5').path == "a,b=c.png"
    with pytest.raises(UsageError, match="goes into double quotes"):
        read_flag("--image", "a.png,b=c.png", ("scale",))


def test_a_prompt_says_only_what_is_unusual() -> None:
    assert repr(ImagePrompt("a.png", scale=0.5)) == "ImagePrompt(image='a.png', scale=0.5)"


def test_one_of_what_may_be_several_needs_no_list() -> None:
    short = Request(prompt="a", images="a.png", controls="canny:a.png,scale=0.5", loras="l.safetensors")
    assert short == Request(
        prompt="a",
        images=[ImagePrompt("a.png")],
        controls=[ControlRef(kind="canny", path="a.png", scale=0.5)],
        loras=["l.safetensors"],
    )
    assert Request(prompt="a", images=ImagePrompt("a.png", scale=0.3)).images[0].scale == 0.3
    assert Request.from_json('{"prompt": "a", "images": {"image": "a.png"}}').images == short.images
    with pytest.raises(UsageError, match="did you mean 'canny'"):
        Request(prompt="a", controls="cany:a.png")


@pytest.mark.parametrize("images", [Image.new("RGB", (8, 8)), [Image.new("RGB", (8, 8))]])
def test_pictures_in_memory_are_told_where_to_go(images: object) -> None:
    with pytest.raises(UsageError, match=r"^images\.0: a request names files, .* pictures="):
        Request(prompt="a", images=images)


@pytest.mark.parametrize(
    ("said", "name"), [("DPM++ 2M Karras", "dpm++2m-karras"), ("Euler a", "euler-a"), ("UniPC", "unipc")]
)
def test_schedulers_go_by_other_programs_spelling(said: str, name: str) -> None:
    assert Request(prompt="a", scheduler=said).scheduler == name


def test_prompts_with_tensors_are_equal_if_these_are_the_same() -> None:
    masks = [torch.ones(4, 4), torch.zeros(4, 4)]
    prompt = ImagePrompt("a", mask=masks)
    assert prompt == ImagePrompt("a", mask=masks)
    assert prompt != ImagePrompt("a", mask=[torch.ones(4, 4), masks[1]])
    assert prompt != ImagePrompt("a", mask=masks[0])
