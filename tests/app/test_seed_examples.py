"""The README's commands from cache lookup to saved picture, in the published repositories' layout.

Everything lies in a hub cache as downloads leave it, and the hub is offline: what runs here is what runs with
the published weights.
"""

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.app.cli import main

SMALL = ["--size", "32", "--steps", "2", "--seed", "1", "-q"]
COMMANDS = {
    "diner-bear": [
        "generate", "a polar bear sitting in a chair drinking a milkshake", "--image", "diner.png", "--scale",
        "0.6", "--base", "sdxl", "--adapter", "sdxl",
        "--negative", "deformed, ugly, wrong proportion, low res, bad anatomy",
    ],
    "edited": [
        "edit", "bear.png", "best quality, high quality", "--image", "style.png", "--strength", "0.6",
        "--base", "sdxl", "--adapter", "sdxl",
    ],
    "inpainted": [
        "inpaint", "bear.png", "--mask", "mask.png", "a cute gummy bear waving", "--image", "gummy.png",
        "--base", "sdxl-inpaint", "--adapter", "sdxl",
    ],
    "sd15": ["generate", "a bear", "--image", "diner.png", "--base", "sd15"],
    "by-hub-id": [
        "generate", "a bear", "--image", "diner.png", "--base", "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "--adapter", "h94/IP-Adapter/models/ip-adapter_sd15.bin",
    ],
    "faceid-pickle": [
        "generate", "a bear", "--image", "diner.png", "--base", "sd15", "--adapter", "sd15-faceid",
    ],
    "not-cached": ["generate", "a bear", "--image", "diner.png", "--base", "sd15", "--adapter", "sd15-plus"],
}  # fmt: skip


def repository(cache: Path, name: str) -> Path:
    entry = cache / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0" * 40)
    place = entry / "snapshots" / ("0" * 40)
    place.mkdir(parents=True)
    return place


def encoder(folder: Path, pooled: int, hidden: int) -> None:
    tiny.tiny_encoder(pooled, hidden)[0].save_pretrained(folder)  # published ones have no preprocessor file


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    for name, pipe in {
        "stabilityai/stable-diffusion-xl-base-1.0": tiny.tiny_sdxl(),
        "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": tiny.tiny_sdxl(9),
        "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny.tiny_sd(),
    }.items():
        pipe.save_pretrained(repository(cache, name))
    h94, bigg = repository(cache, "h94/IP-Adapter"), tiny.POOLED + 8
    encoder(h94 / "models" / "image_encoder", tiny.POOLED, tiny.HIDDEN)
    encoder(h94 / "sdxl_models" / "image_encoder", bigg, tiny.HIDDEN + 8)
    for family, folder, stem, width in (
        ("sd", "models", "ip-adapter_sd15", tiny.POOLED),
        ("sdxl", "sdxl_models", "ip-adapter_sdxl", bigg),
    ):
        state = tiny.random_adapter_state(tiny.tiny_unet(family), feature_width=width)
        IPAdapter.from_state_dict(state).save_pretrained(h94 / folder, f"{stem}.safetensors")
        torch.save(state, h94 / folder / f"{stem}.bin")
    torch.save(state, repository(cache, "h94/IP-Adapter-FaceID") / "ip-adapter-faceid_sd15.bin")
    return cache


def test_the_seed_examples_run_offline_from_the_hubs_cache(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate(("diner", "bear", "style", "gummy")):
        tiny.picture(i).save(tmp_path / f"{name}.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    codes = {name: main([*words, *SMALL, "-o", f"{name}.png"]) for name, words in COMMANDS.items()}
    said = capsys.readouterr().err.splitlines()
    assert codes == dict.fromkeys(COMMANDS, 0) | {"faceid-pickle": 3, "not-cached": 3}, said
    errors = [line for line in said if line.startswith("imprompt: error")]
    assert len(errors) == 2
    assert "is a pickle" in errors[0]
    assert "imprompt convert" in errors[0]
    assert "ip-adapter-plus_sd15.safetensors" in errors[1]
    drawn = {
        name: np.asarray(Image.open(tmp_path / f"{name}.png")) for name, code in codes.items() if not code
    }
    assert all(pixels.shape == (32, 32, 3) and pixels.std() > 0 for pixels in drawn.values())
    assert np.array_equal(drawn["sd15"], drawn["by-hub-id"])
    assert np.array_equal(drawn["inpainted"][:, :16], np.asarray(Image.open(tmp_path / "bear.png"))[:, :16])
