"""Steering through whole requests: what a request says is what is drawn, and comes back from files."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import controls
import tiny
from imprompt import output
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.app.cli import main
from imprompt.app.embedding import embed
from imprompt.errors import UsageError
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.request import Request


def drawn(engine, common, *images, **fields):
    result = engine.run(Request(prompt="a cat", images=images, **common, **fields))
    return np.asarray(result.images[0]).astype(int)


@pytest.mark.parametrize(
    "said",
    [
        {"framing": "pad"},
        {"framing": "tile"},
        {"sharpen": 0.9},
        {"curve": "fade-out"},
        {"scaling": "k+v-penalty"},
        {"select": "0-1"},
        {"noise": "shuffle:0.8"},
        {"negative": "other.png"},
    ],
)
def test_every_word_changes_the_picture_and_repeats_from_its_file(engine, common, pictures, tmp_path, said):
    if "negative" in said:
        said = {"negative": str(pictures / said["negative"])}
    path = str(pictures / "wide.png")
    plain = drawn(engine, common, ImagePrompt(path), scale=1)
    result = engine.run(Request(prompt="a cat", images=[ImagePrompt(path, **said)], scale=1, **common))
    assert not np.array_equal(np.asarray(result.images[0]), plain)
    (saved,) = output.save(result, tmp_path / "x.png")
    again = engine.run(output.read_request(saved))
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(result.images[0]))


def test_silence_in_any_word_is_no_adapter(engine, common, pictures):
    plain = {key: value for key, value in common.items() if key != "adapter"}
    alone = np.asarray(engine.run(Request(prompt="a cat", **plain)).images[0]).astype(int)
    path = str(pictures / "ref.png")
    for silent in ({"curve": "0:0"}, {"scale": 0, "scaling": "k+mean-v-penalty"}, {"start": 0.5, "end": 0.5}):
        prompt = ImagePrompt(path, **{"scale": 1, **silent})
        assert np.array_equal(drawn(engine, common, prompt), alone)


def test_pictures_are_subtracted_in_the_order_given(engine, common, pictures):
    names = [str(pictures / f"{n}.png") for n in ("ref", "other")]
    one, other = (ImagePrompt(order, combine="subtract") for order in (names, names[::-1]))
    assert not np.array_equal(drawn(engine, common, one), drawn(engine, common, other))


def test_noise_is_the_same_for_every_picture_of_a_request(engine, common, pictures):
    images = [ImagePrompt(str(pictures / "ref.png"), noise="gaussian")]
    second = engine.run(Request(images=images, count=2, exact=True, **common)).images[1]
    alone = engine.run(Request(images=images, **{**common, "seed": common["seed"] + 1})).images[0]
    assert np.array_equal(np.asarray(second), np.asarray(alone))


def test_an_embedded_picture_draws_what_the_picture_draws(engine, common, base, pictures, tmp_path):
    saved = embed([pictures / "ref.png"], tmp_path / "ref.safetensors", encoder=str(base / "image_encoder"))
    shown = drawn(engine, common, ImagePrompt(str(pictures / "ref.png")))
    result = engine.run(Request(prompt="a cat", images=[saved], **common))
    assert np.array_equal(np.asarray(result.images[0]), shown)
    assert result.provenance["encoder"] == "none"
    of_picture = engine.run(Request(prompt="a cat", images=[pictures / "ref.png"], **common))
    assert of_picture.provenance["encoder"] == f"{base.name}/image_encoder"
    assert str(saved) in result.request.hashes


def test_a_file_of_several_pictures_is_all_of_them(engine, common, base, pictures, tmp_path):
    two = [pictures / "ref.png", pictures / "other.png"]
    saved = embed(two, tmp_path / "two.safetensors", encoder=str(base / "image_encoder"))
    for combine in ("concat", "subtract", "average"):
        both = ImagePrompt(two, combine=combine)
        file = ImagePrompt(saved, combine=combine)
        assert np.array_equal(drawn(engine, common, file), drawn(engine, common, both))
    three = ImagePrompt([saved, two[0]], weights=[0.5, 2])
    each = ImagePrompt([*two, two[0]], weights=[0.5, 0.5, 2])
    # Its pictures are projected apart from the other or with it, which rounds differently: the tokens are
    # equal to six digits, and the drawn values but for a few, by 1 of 255.
    adapter = IPAdapter.from_pretrained(base / "adapters", image_encoder=base / "image_encoder")
    shown = []
    for prompt in (three, each):
        adapter.set_prompt(prompt)
        shown.append(adapter.samples[0][0])
    torch.testing.assert_close(shown[0].tokens, shown[1].tokens, rtol=1e-6, atol=1e-6)
    assert torch.equal(shown[0].log_weight_bias, shown[1].log_weight_bias)
    again, wanted = drawn(engine, common, three), drawn(engine, common, each)
    assert np.abs(again - wanted).max() <= 1
    assert np.mean(again != wanted) < 0.001
    exchanged = drawn(engine, common, ImagePrompt([saved, two[0]], weights=[2, 0.5]))
    assert np.mean(exchanged != wanted) > 0.1
    one = embed(two[:1], tmp_path / "one.safetensors", encoder=str(base / "image_encoder"))
    with pytest.raises(UsageError, match="two at least; got 1"):
        drawn(engine, common, ImagePrompt(str(one), combine="subtract"))


def test_a_picture_of_which_much_is_cut_off_is_told(engine, common, pictures):
    result = engine.run(Request(prompt="a", images=[pictures / "wide.png"], **common))
    assert any("50% lies outside" in note for note in result.notes)
    framed = [ImagePrompt(str(pictures / "wide.png"), framing="squash")]
    assert not engine.run(Request(prompt="a", images=framed, **common)).notes


def test_explaining_draws_the_same_and_says_where(engine, common, pictures):
    half = torch.zeros(32, 32)
    half[:, :16] = 255
    mask = Image.fromarray(half.numpy().astype(np.uint8))
    request = Request(
        prompt="a cat", images=[ImagePrompt(str(pictures / "ref.png"), mask="left")], scale=1, **common
    )
    plain = engine.run(request, pictures={"left": mask})
    told = engine.run(request, pictures={"left": mask}, explain=True)
    assert np.array_equal(np.asarray(told.images[0]), np.asarray(plain.images[0]))
    (found,) = told.attributions
    assert len(found.steps) == 3
    width = found.maps.shape[-1]
    assert found.maps[0, :, : width // 2 - 1].mean() > 0
    assert not found.maps[0, :, width // 2 + 1 :].any()
    with pytest.raises(UsageError, match="no image prompt"):
        engine.run(Request(prompt="a", **{k: v for k, v in common.items() if k != "adapter"}), explain=True)


def test_the_command_line_explains(common, pictures, tmp_path, capsys):
    words = [
        "generate",
        "a cat",
        "--image",
        f"{pictures / 'wide.png'},framing=pad,curve=0:1,1:0.5",
        "--explain",
    ]
    words += [
        "--base",
        common["base"],
        "--adapter",
        common["adapter"],
        "--steps",
        "2",
        "--seed",
        "1",
        "--json",
    ]
    assert main([*words, "-o", str(tmp_path / "cat.png")]) == 0
    said = json.loads(capsys.readouterr().out)
    names = [path.rsplit("/", 1)[-1] for path in said["files"]]
    assert names == ["cat.png", "cat-where-1.png", "cat-when-1.png"]
    assert said["request"]["images"][0]["curve"] == "0:1,1:0.5"
    assert all((tmp_path / name).is_file() for name in names)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"noise": "fog"}, "noise 'fog' is unknown"),
        ({"noise": "fade:2"}, "not a number from 0 to 1"),
        ({"noise": "fade", "negative": "b.png"}, "no negative"),
    ],
)
def test_noise_without_sense_is_refused(fields, said):
    with pytest.raises(UsageError, match=said):
        Request(images=[ImagePrompt("a.png", **fields)])


# ---- regions, guidance of its own, several adapters, weights by layer


def test_a_region_says_its_own_text_and_comes_back_from_its_file(engine, common, pictures, tmp_path):
    there = {"image": str(pictures / "ref.png"), "mask": str(pictures / "mask.png"), "scale": 0}
    silent = drawn(engine, common, ImagePrompt(**there))
    request = Request(
        prompt="a cat", images=[ImagePrompt(**there, text="a dog, noto", feather=0.2)], **common
    )
    result = engine.run(request)
    assert not np.array_equal(np.asarray(result.images[0]), silent)
    (saved,) = output.save(result, tmp_path / "x.png")
    read = output.read_request(saved)
    assert (read.images[0].text, read.images[0].feather) == ("a dog, noto", 0.2)
    assert np.array_equal(np.asarray(engine.run(read).images[0]), np.asarray(result.images[0]))


def test_texts_have_places_without_a_picture_or_an_adapter(engine, common, pictures, tmp_path, capsys):
    plain = {name: value for name, value in common.items() if name != "adapter"}
    mask = str(pictures / "mask.png")
    alone = np.asarray(engine.run(Request(prompt="a cat", **plain)).images[0])
    request = Request(prompt="a cat", regions=[TextRegion(text="a dog, noto", mask=mask)], **plain)
    result = engine.run(request)
    assert result.request.adapter is None
    assert mask in result.request.hashes
    assert not np.array_equal(np.asarray(result.images[0]), alone)
    (saved,) = output.save(result, tmp_path / "x.png")
    again = engine.run(output.read_request(saved))
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(result.images[0]))
    assert np.array_equal(np.asarray(engine.run(Request(prompt="a cat", **plain)).images[0]), alone)
    words = ["generate", "a cat", "--region", f"a dog, noto,mask={mask}", "--base", plain["base"]]
    words += ["--steps", "3", "--seed", "5", "-o", str(tmp_path / "y.png")]
    assert main(words) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "y.png")), np.asarray(result.images[0]))
    capsys.readouterr()
    swept = ["--exact", "--sweep", "region.text=a cat|a dog, noto"]
    assert main([*words[:-1], str(tmp_path / "z.png"), *swept]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "z-2.png")), np.asarray(result.images[0]))


def test_texts_with_a_place_act_beside_pictures_edits_and_controls(engine, common, pictures, tmp_path):
    mask, ref = str(pictures / "mask.png"), str(pictures / "ref.png")
    regions = [TextRegion(text="a dog", mask=mask, feather=0.1)]
    shown = [ImagePrompt(ref, mask=mask, scale=0.5), ImagePrompt(str(pictures / "other.png"))]
    net = tmp_path / "net"
    controls.saved(controls.tiny_controlnet(), net)
    for fields in (
        {"images": shown},
        {"images": shown, "image_guidance": 3},
        {"images": shown, "task": "edit", "image": ref},
        {"task": "inpaint", "image": ref, "mask": mask, "images": shown},
        {"controls": [{"kind": "none", "path": ref, "model": str(net)}], "images": shown},
    ):
        own = common if "images" in fields else {k: v for k, v in common.items() if k != "adapter"}
        one, other = (
            np.asarray(engine.run(Request(prompt="a cat", regions=some, **fields, **own)).images[0])
            for some in (regions, ())
        )
        assert not np.array_equal(one, other), fields


@pytest.mark.parametrize(
    ("region", "said"),
    [
        ("a dog", "mask: a region needs one"),
        (",mask=m.png", "text is empty"),
        ("a dog,mask=m.png,scale=1", "unknown option 'scale'; known are mask, feather"),
        ("a dog,mask=m.png,feather=2", "feather: input should be less than or equal to 1"),
    ],
)
def test_a_text_without_a_place_is_refused(region, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        TextRegion.parse(region)


def test_the_image_has_guidance_of_its_own(engine, common, pictures):
    path = str(pictures / "ref.png")
    ordinary = drawn(engine, common, path, guidance=4, scale=1)
    assert np.abs(drawn(engine, common, path, guidance=4, image_guidance=4, scale=1) - ordinary).max() <= 1
    assert not np.array_equal(drawn(engine, common, path, guidance=4, image_guidance=9, scale=1), ordinary)
    assert np.array_equal(drawn(engine, common, path, guidance=4, scale=1), ordinary)  # and it is off again
    with pytest.raises(UsageError, match="image_guidance: has no effect without an image prompt"):
        Request(prompt="a", image_guidance=3)


def test_adapters_of_one_request_add_up(engine, common, base, pictures):
    second = base / "second"  # the encoder lies beside it
    pipe = tiny.tiny_sd()
    state = tiny.random_adapter_state(pipe.unet, "plus", seed=9)
    IPAdapter.from_state_dict(state).save_pretrained(second)
    ref, other = str(pictures / "ref.png"), str(pictures / "other.png")
    both = drawn(engine, common, ref, ImagePrompt(other, adapter=str(second)), scale=1)
    assert not np.array_equal(both, drawn(engine, common, ref, scale=1))
    silent = drawn(engine, common, ref, ImagePrompt(other, adapter=str(second), scale=0), scale=1)
    assert np.array_equal(silent, drawn(engine, common, ref, scale=1))
    own = {name: value for name, value in common.items() if name != "adapter"}
    result = engine.run(Request(images=[ImagePrompt(other, adapter=str(second))], **own))
    assert result.request.adapter is None
    assert result.provenance["adapter"] == "ip-adapter"
    with pytest.raises(UsageError, match="each image names its own"):
        Request(images=[ImagePrompt(other, adapter=str(second))], adapter="x")


@pytest.mark.parametrize(
    "said",
    [
        "0.5,0,1,1",
        "up_blocks.1:1,default:0",
        '{"down": {"block_0": 1}, "default": 0}',
        "composition-precise:0.5",
    ],
)
def test_weights_by_layer_are_said_in_a_request_and_come_back(engine, common, pictures, tmp_path, said):
    ref = ImagePrompt.parse(f"{pictures / 'ref.png'},profile={said},scale=1")
    request = Request(images=[ref], **common)
    assert Request.from_json(request.to_json()) == request
    result = engine.run(request)
    (saved,) = output.save(result, tmp_path / "x.png")
    read = output.read_request(saved)
    assert read.images == result.request.images
    assert np.array_equal(np.asarray(engine.run(read).images[0]), np.asarray(result.images[0]))


def test_weights_of_zero_in_every_layer_are_no_adapter(engine, common, pictures):
    path = str(pictures / "ref.png")
    none = drawn(engine, common, ImagePrompt(path, profile=(0, 0, 0, 0)), scale=1)
    assert np.array_equal(none, drawn(engine, common, ImagePrompt(path), scale=0))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("a.png,text=a dog", "text: has no effect without a mask"),
        ("a.png,feather=0.1", "feather: has no effect without a mask"),
        ("a.png,mask=m.png,feather=7", "feather: input should be less than or equal to 1"),
        ("a.png,profile=1,x,0", "profile '1,x,0': 'x' is not a number"),
        ("a.png,profile=1,nan,0", "weight 1 is nan; a finite number"),
        ("a.png,profile=side:1,default:0", "'side' names no blocks"),
        ("a.png,profile=style:2", "'style' takes no factor"),
        ("a.png,profile=styles", "did you mean 'style'"),
        ('a.png,profile={"up": "x"}', "up is 'x'; a finite number"),
        ('a.png,profile={"up"', "not valid JSON"),
    ],
)
def test_regions_and_weights_without_sense_are_refused_at_once(image, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        Request(images=(ImagePrompt.parse(image),))


def test_a_list_of_the_wrong_length_says_both_lengths(engine, common, pictures):
    ref = ImagePrompt(str(pictures / "ref.png"), profile=(1, 0))
    with pytest.raises(UsageError, match="profile has 2 weights; this base takes 4"):
        engine.run(Request(images=[ref], **common))
