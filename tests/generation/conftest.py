"""A tiny base on disk with its own image encoder and adapter, a 9-channel one, and pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.generation.engine import Engine


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), channels=4)


@pytest.fixture(scope="session")
def inpainting_base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base9"), channels=9)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """``ref.png`` and ``other.png`` 40×40, ``wide.png`` 64×32, ``mask.png`` 40×40 with a white right half."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name, height, width in (("ref", 40, 40), ("other", 40, 40), ("wide", 32, 64)):
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(
            folder / f"{name}.png"
        )
    mask = np.zeros((40, 40), np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


@pytest.fixture(scope="session")
def engine() -> Engine:
    """One engine for many tests: that it stays sound from request to request is part of what they show."""
    return Engine()


@pytest.fixture(scope="session")
def common(base) -> dict[str, object]:
    """Fields of every request: the tiny base and its adapter, few steps, a seed."""
    return {"base": str(base), "adapter": str(base / "adapters"), "steps": 3, "seed": 5}


def save_base(folder: Path, channels: int) -> Path:
    pipe = tiny.tiny_sd(unet_in_channels=channels)
    encoder, processor = tiny.tiny_encoder()
    pipe.save_pretrained(folder)
    encoder.save_pretrained(folder / "image_encoder")
    processor.save_pretrained(folder / "feature_extractor")
    adapter = IPAdapter.from_state_dict(tiny.random_adapter_state(pipe.unet))
    adapter.save_pretrained(folder / "adapters", "ip-adapter.safetensors")
    return folder
