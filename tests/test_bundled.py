"""The bundled model: plain diffusers loads it; it draws what it is told and shown, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.catalog import ASSETS
from imprompt.data.rows import read_dataset
from imprompt.encoders.images import load_image
from imprompt.evaluation.metrics import cosine
from imprompt.generation.engine import Engine
from imprompt.schema.profiles import layer_weights
from imprompt.schema.request import Request

LAB = Path(__file__).parents[1] / "recipes" / "emoji" / "lab"
sys.path.insert(0, str(LAB))
from bundled_judge import Judge  # noqa: E402

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
def judge():
    return Judge.load(LAB)


def seeded():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("name", ADAPTERS)
def test_diffusers_own_loader_draws_the_same_with_the_bundled_adapters(pipe, shown, name):
    reference = next(iter(shown.values()))
    call = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}
    adapter = IPAdapter.from_pretrained(ASSETS / "adapters" / name)
    adapter.attach(pipe)
    adapter.set_prompt(reference, scale=0.7)
    ours = pipe("an owl, noto style", generator=seeded(), **call).images
    adapter.detach()
    pipe.load_ip_adapter(ASSETS, subfolder="adapters", weight_name=name, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)
    theirs = pipe("an owl, noto style", ip_adapter_image=reference, generator=seeded(), **call).images
    pipe.unload_ip_adapter()
    assert np.abs(ours - theirs).max() <= 1e-4
    assert ours.std() > 0.05


def test_words_name_the_style_that_is_drawn(engine, judge):
    prompts = {
        style: Request(prompt=f"a red heart, {style} style", seed=5, steps=12)
        for style in ("fluent-mono", "fluent-3d", "streamline")
    }
    drawn = [engine.run(request).images[0] for request in prompts.values()]
    assert judge.style(drawn).count("fluent-mono") == 1
    assert sum(told == style for told, style in zip(judge.style(drawn), prompts, strict=True)) >= 2


def test_a_picture_alone_is_a_prompt_that_is_followed(engine, judge, shown):
    keys = [key for key in shown if key[0] in ("pizza", "bus", "star", "frog")][:4]
    pictures = {f"{index}.png": shown[key] for index, key in enumerate(keys)}
    drawn, other = [], []
    for index in range(len(keys)):
        request = Request(images=[f"{index}.png"], seed=11, steps=12)
        drawn.append(engine.run(request, pictures=pictures).images[0])
        wrong = Request(images=[f"{(index + 1) % len(keys)}.png"], seed=11, steps=12)
        other.append(engine.run(wrong, pictures=pictures).images[0])
    truth = judge.embed([shown[key] for key in keys])
    near, far = cosine(judge.embed(drawn), truth), cosine(judge.embed(other), truth)
    assert float((near - far).mean()) > 0.1  # nearer to its own reference than a drawing after another


def test_every_word_of_the_vocabulary_is_a_caption_the_tokenizer_spells_in_few_pieces(pipe):
    words = json.loads((ASSETS / "vocabulary.json").read_text())
    assert len(words["concepts"]) >= 50
    assert len(words["styles"]) == 8
    for concept in words["concepts"]:
        caption = f"a {concept.replace('-', ' ')}, fluent-mono style"
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


def test_a_cold_process_draws_and_repeats_bit_for_bit_without_any_network(tmp_path):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    imprompt = [sys.executable, "-m", "imprompt.app.cli"]

    def say(*words: str) -> None:
        subprocess.run([*imprompt, *words], check=True, cwd=tmp_path, env=environment, capture_output=True)

    say("generate", "a sailboat", "--steps", "4", "--seed", "1", "-o", "first.png")
    say("generate", "an owl", "--image", "first.png", "--steps", "4", "--seed", "2", "-o", "second.png")
    say("generate", "--from", "second.png", "-o", "third.png")
    second, third = (np.asarray(Image.open(Path(tmp_path) / name)) for name in ("second.png", "third.png"))
    assert second.shape == (128, 128, 3)
    assert np.array_equal(second, third)
