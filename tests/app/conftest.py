"""A user's folder with a tiny base, and the command line in it."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import tiny
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.app import cli, drawing
from imprompt.generation.engine import Engine


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny base (``base``, with encoder and adapter), ``ref.png``, ``mask.png``."""
    folder = tmp_path_factory.mktemp("user")
    pipe, (encoder, processor) = tiny.tiny_sd(), tiny.tiny_encoder()
    pipe.register_modules(image_encoder=encoder, feature_extractor=processor)  # as the bundled model has it
    pipe.save_pretrained(folder / "base")
    adapter = IPAdapter.from_state_dict(tiny.random_adapter_state(pipe.unet))
    adapter.save_pretrained(folder / "base", "adapter.safetensors")
    likes = {"steps": 2, "guidance": 3.0, "adapter": str(folder / "base" / "adapter.safetensors")}
    (folder / "base" / "defaults.json").write_text(json.dumps(likes))
    tiny.picture(1, (32, 32)).save(folder / "ref.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(folder / "mask.png")
    Image.new("L", (32, 32)).save(folder / "black.png")
    return folder


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine(quiet=True)


@pytest.fixture
def say(place, tmp_path, monkeypatch, capsys, engine):
    """Runs a command in an empty folder with the pictures; returns exit code, stdout and stderr."""
    monkeypatch.setattr(drawing, "make_engine", lambda args: engine)  # loads the base once
    for name in ("ref.png", "mask.png", "black.png"):
        shutil.copy(place / name, tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main([word.replace("BASE", str(place / "base")) for word in words])
        return code, *capsys.readouterr()

    return run
