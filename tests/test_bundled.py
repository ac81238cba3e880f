"""The bundled model: plain diffusers loads it; it draws what it is told and shown, offline."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.app.cli import main
from imprompt.catalog import ASSETS
from imprompt.data.read import read_dataset
from imprompt.encoders.images import load_image
from imprompt.generation.engine import Engine
from imprompt.schema.profiles import layer_weights
from imprompt.schema.request import Request

ADAPTERS = ("ip-adapter_emoji.safetensors", "ip-adapter-plus_emoji.safetensors")


@pytest.fixture  # a new one each time: diffusers' own unloading takes the image encoder with it
def pipe():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ASSETS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def engine():
    return Engine()


@pytest.fixture(scope="module")
def shown():
    """Held-out pictures by (concept, style)."""
    rows = read_dataset(ASSETS / "eval").rows
    return {(row.groups["concept"], row.groups["style"]): load_image(row.read()) for row in rows}


@pytest.fixture(scope="module")
def outside(shown):
    """Pictures made otherwise than anything that the model was trained on, by name."""
    return {name: image for (name, style), image in shown.items() if style == "outside"}


def lab(image):
    """CIELAB (H, W, 3): L 0…100, a and b -128…127."""
    return cv2.cvtColor(np.float32(image.convert("RGB")) / 255, cv2.COLOR_RGB2LAB)


def border(image):
    """The median colour of the outermost four pixels."""
    pixels = lab(image)
    edge = [pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]]
    return np.median(np.concatenate([part.reshape(-1, 3) for part in edge]), 0)


def colours_apart(one, two):
    """Mean distance (CIE76) from each pixel to the nearest of the other picture, both ways."""
    a, b = (lab(image.resize((16, 16), Image.Resampling.BOX)).reshape(-1, 3) for image in (one, two))
    far = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return (far.min(0).mean() + far.min(1).mean()) / 2


def seeded():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("name", ADAPTERS)
def test_diffusers_own_loader_draws_the_same_with_the_bundled_adapters(pipe, shown, name):
    reference = next(iter(shown.values()))
    call = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}
    adapter = IPAdapter.from_pretrained(ASSETS / "adapters" / name)
    adapter.attach(pipe)
    adapter.set_prompt(reference, scale=0.7)
    ours = pipe("an owl, neon style", generator=seeded(), **call).images
    adapter.detach()
    pipe.load_ip_adapter(ASSETS, subfolder="adapters", weight_name=name, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)
    theirs = pipe("an owl, neon style", ip_adapter_image=reference, generator=seeded(), **call).images
    pipe.unload_ip_adapter()
    assert np.abs(ours - theirs).max() <= 1e-4
    assert ours.std() > 0.05


def drawn(engine, prompt="", shown=(), seeds=(5,), pictures=None, **fields):
    """Pictures of one request with each of ``seeds``, in five steps; ``shown`` are PIL images, or records
    that name some of ``pictures``."""
    pictures = pictures or {f"{number}": image for number, image in enumerate(shown)}
    images = [one if isinstance(one, dict) else {"image": f"{number}"} for number, one in enumerate(shown)]
    requests = [
        Request.from_mapping({"prompt": prompt, "images": images, "seed": seed, "steps": 5, **fields})
        for seed in seeds
    ]
    return [result.images[0] for result in engine.run_batch(requests, pictures=pictures)]


def test_words_name_the_look_that_is_drawn(engine):
    blueprint, neon, plain = (
        np.mean([border(image) for image in drawn(engine, f"a cat{said}", seeds=range(5))], 0)
        for said in (", blueprint style", ", neon style", " on a white background, flat style")
    )
    assert blueprint[2] < -15  # blue
    assert neon[0] < plain[0] - 10  # darker


def test_a_picture_gives_its_colours_to_what_the_words_name(engine, outside):
    names = ("red disc", "blue disc", "yellow disc on navy", "sunset")
    far = np.array(
        [
            [np.mean([colours_apart(image, outside[other]) for image in images]) for other in names]
            for name in names
            for images in [drawn(engine, "a cat", [outside[name]], range(3))]
        ]
    )
    assert (far.argmin(1) == np.arange(len(names))).all()
    cats = drawn(engine, "a cat", seeds=range(3))
    plain = [np.mean([colours_apart(image, outside[name]) for image in cats]) for name in names]
    assert (far.diagonal() < np.array(plain)).all()


def test_a_picture_alone_is_a_prompt_that_is_followed(engine, shown):
    keys = [("cactus", "neon"), ("tulip", "blueprint"), ("pig", "clay"), ("penguin", "silhouette")]
    far = np.array(
        [
            [np.mean([colours_apart(image, shown[other]) for image in images]) for other in keys]
            for key in keys
            for images in [drawn(engine, "", [shown[key]], range(3))]
        ]
    )
    assert (far.argmin(1) == np.arange(len(keys))).all()


def test_two_pictures_with_masks_colour_their_own_halves(engine, outside):
    halves = {side: Image.new("L", (128, 128), 0) for side in ("left", "right")}
    halves["left"].paste(255, (0, 0, 64, 128))
    halves["right"].paste(255, (64, 0, 128, 128))
    for prompt in ("", "a cat"):
        right = 0
        for left, other in (("red disc", "blue disc"), ("blue disc", "red disc")):
            shown = [{"image": left, "mask": "left"}, {"image": other, "mask": "right"}]
            for image in drawn(engine, prompt, shown, range(4), outside | halves):
                b = lab(image)[..., 2]  # blue is negative
                bluer = b[:, :64].mean() - b[:, 64:].mean()
                right += bool(bluer > 0) == (left == "red disc")
        assert right >= 7, prompt


def test_every_word_of_the_vocabulary_is_a_caption_the_tokenizer_spells_in_few_pieces(pipe):
    words = json.loads((ASSETS / "vocabulary.json").read_text())
    assert len(words["concepts"]) >= 50
    assert len(words["styles"]) == 12
    for concept in words["concepts"]:
        caption = f"a {concept.replace('-', ' ')}, stained glass style"
        assert len(pipe.tokenizer(caption).input_ids) <= pipe.tokenizer.model_max_length


def test_style_profiles_act_where_the_bundled_model_was_measured_to_keep_its_style(pipe):
    layers = cross_attentions(pipe.unet)

    def acting(profile):
        weights = layer_weights(profile, layers).weights
        return {
            layer.name.partition(".transformer")[0] for layer, w in zip(layers, weights, strict=True) if w
        }

    last = {"up_blocks.2.attentions.0", "up_blocks.2.attentions.1"}
    assert acting("style") == {"up_blocks.2.attentions.1"}
    assert acting("style transfer") == last | {"up_blocks.1.attentions.1"}
    assert not acting("composition") & acting("style transfer")


def test_nothing_that_was_held_out_is_in_the_vocabulary():
    words = set(json.loads((ASSETS / "vocabulary.json").read_text())["concepts"])
    record = json.loads((ASSETS / "eval" / "eval.json").read_text())
    held_out = {
        picture["concept"] for picture in record["pictures"] if picture["split"] == "held_out_concept"
    }
    assert held_out
    assert not held_out & words


def test_everything_bundled_is_safetensors_in_half_precision_and_fits_the_budget():
    from safetensors import safe_open

    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 90e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for path in ASSETS.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kinds = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
        assert kinds <= {"torch.float16", "torch.int64"}, path


def test_a_cold_process_draws_and_another_repeats_bit_for_bit_without_any_network(
    engine, tmp_path, monkeypatch
):
    """The other one is this, in which much was drawn before."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # how sums are split
    monkeypatch.chdir(tmp_path)
    drawn(engine, "a sailboat", seeds=(1,), steps=4)[0].save("first.png")
    words = ["generate", "an owl", "--image", "first.png", "--steps", "4", "--seed", "2", "-o", "second.png"]
    subprocess.run([sys.executable, "-m", "imprompt.app.cli", *words], check=True, capture_output=True)
    assert main(["generate", "--from", "second.png", "-o", "third.png"]) == 0
    second, third = (np.asarray(Image.open(name)) for name in ("second.png", "third.png"))
    assert second.shape == (128, 128, 3)
    assert np.array_equal(second, third)
