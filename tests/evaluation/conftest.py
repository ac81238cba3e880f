"""The tiny base on disk and the pictures of tests/generation, for what is measured through whole requests."""

from pathlib import Path

import pytest

import tiny
from imprompt.adapter.ipadapter import IPAdapter


@pytest.fixture(scope="session")
def tuned_base(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("base")
    pipe, (encoder, processor) = tiny.tiny_sd(), tiny.tiny_encoder()
    pipe.save_pretrained(folder)
    encoder.save_pretrained(folder / "image_encoder")
    processor.save_pretrained(folder / "feature_extractor")
    IPAdapter.from_state_dict(tiny.random_adapter_state(pipe.unet)).save_pretrained(folder / "adapters")
    return {"base": str(folder), "adapter": str(folder / "adapters")}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    tiny.picture(1).save(folder / "ref.png")
    return folder
