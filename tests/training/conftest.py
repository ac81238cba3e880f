"""A tiny base with an image encoder, on disk, and folders of captioned pictures."""

import json

import pytest
from diffusers import StableDiffusionPipeline

import tiny
from imprompt.training.config import TrainConfig


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    encoder, processor = tiny.tiny_encoder()
    parts = tiny.tiny_sd().components | {"image_encoder": encoder, "feature_extractor": processor}
    folder = tmp_path_factory.mktemp("base")
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Three styles of two concepts, and one held-out picture."""
    folder = tmp_path / "pictures"
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


@pytest.fixture
def make_config(base, pictures, tmp_path):
    def make(**values):
        defaults = {
            "data": pictures, "base": str(base), "output": tmp_path / "run", "cache": tmp_path / "cache",
            "steps": 4, "batch": 2, "dtype": "float32", "device": "cpu", "quiet": True, "log_every": 1,
            "trackers": (), "lr": 1e-4, "sample_every": 0, "validate_every": 250,
        }  # fmt: skip
        return TrainConfig(**defaults | values)

    return make
