"""A tiny base with an image encoder, on disk, and folders of captioned pictures."""

import json
import shutil
from functools import partial

import pytest
from diffusers import StableDiffusionPipeline

import tiny
from facemodels import photo
from imprompt.training import preview
from imprompt.training.config import TrainConfig
from imprompt.training.trainer import train


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    encoder, processor = tiny.tiny_encoder()
    parts = tiny.tiny_sd().components | {"image_encoder": encoder, "feature_extractor": processor}
    folder = tmp_path_factory.mktemp("base")
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def write_pictures(folder):
    """Three styles of two concepts, and one held-out picture."""
    folder.mkdir()
    lines = []
    for number in range(7):
        name, concept, style = f"{number}.png", "cat" if number < 3 else "dog", ("a", "b", "c")[number % 3]
        tiny.picture(number, (40, 32)).save(folder / name)
        captions = {"full": [f"{concept} {style}"], "concept": [concept], "style": [style]}
        split = "held_out_pair" if number == 6 else "train"
        groups = {"concept": concept, "style": style}
        lines.append({"file_name": name, "captions": captions, "groups": groups, "split": split})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config_in(folder, **values):
    """A short training on the pictures in a folder."""
    defaults = {
        "data": folder / "pictures", "output": folder / "run", "cache": folder / "cache",
        "steps": 4, "batch": 2, "dtype": "float32", "device": "cpu", "quiet": True, "log_every": 1,
        "trackers": (), "lr": 1e-4, "sample_every": 0, "validate_every": 250,
    }  # fmt: skip
    return TrainConfig(**defaults | values)


@pytest.fixture(autouse=True)
def _sheets_of_few_steps(monkeypatch):
    monkeypatch.setattr(preview, "STEPS", 3)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def face_pictures(pictures):
    """The same with a face each, of another colour, except for the third."""
    for number in range(7):
        # As large as references are kept, on places that the detector's grid meets.
        spots = [] if number == 2 else [(160 + 32 * number, 256, "red")]
        photo(*spots, size=(512, 512), colour=20 + 10 * number).save(pictures / f"{number}.png")
    return pictures


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """One for many runs, each of which finds in it what others have encoded of the same pictures."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def make_config(base, cache, pictures, tmp_path):
    return partial(config_in, tmp_path, base=str(base), cache=cache)


@pytest.fixture(scope="session")
def plain(base, shared_cache, tmp_path_factory):
    """The file of a run with the settings of ``make_config()``."""
    folder = tmp_path_factory.mktemp("plain")
    write_pictures(folder / "pictures")
    return train(config_in(folder, base=str(base), cache=shared_cache))


@pytest.fixture
def begun(plain, make_config):
    """``make_config()``, whose run has taken its four steps: a copy of ``plain``."""
    config = make_config()
    shutil.copytree(plain.parent, config.output)
    return config


@pytest.fixture(scope="session")
def exact(base, tmp_path_factory):
    """The file of a run whose weights are saved as they were trained, in float32."""
    folder = tmp_path_factory.mktemp("exact")
    write_pictures(folder / "pictures")
    return train(config_in(folder, base=str(base), steps=2, save_dtype="float32"))


@pytest.fixture(scope="session")
def mixed():
    """Settings of a run in which all that is random takes part."""
    return {
        "references": [("self", 0.5), ("style", 0.5)], "views": 2, "schedule": "cosine", "warmup": 2,
        "flip": 0.5, "accumulate": 2, "noise_offset": 0.1, "steps": 6,
    }  # fmt: skip


@pytest.fixture(scope="session")
def whole(base, mixed, tmp_path_factory):
    """The file of a run with ``mixed`` settings that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    write_pictures(folder / "pictures")
    return train(config_in(folder, base=str(base), **mixed))
