"""What an adapter's file notes of its image encoder is found on another machine."""

import json
from pathlib import Path

import pytest
import torch

from imprompt.catalog import ASSETS
from imprompt.checkpoints.locate import NOTED_ENCODER, encoder_note, encoder_source, noted_encoder
from imprompt.errors import ModelError
from imprompt.generation.families import find_base
from imprompt.training import TrainConfig
from imprompt.training.start import feature_encoder


def test_the_bundled_encoder_is_noted_by_its_name_not_by_where_it_is_installed() -> None:
    assert encoder_note(str(ASSETS / "image_encoder")) == "emoji"
    config = TrainConfig(data="pictures", output="run")
    place = torch.device("cpu")
    _, name = feature_encoder(config, "linear", find_base("emoji"), None, place, torch.float32)
    assert name == "emoji"


@pytest.mark.parametrize("name", ["h94/IP-Adapter:models/image_encoder", "my/encoder", ""])
def test_other_encoders_are_noted_as_they_are_named(name: str) -> None:
    assert encoder_note(name) == name


def test_a_note_may_be_a_name_of_the_catalogue() -> None:
    (bundled,) = noted_encoder({NOTED_ENCODER: "emoji"})
    assert bundled.path == ASSETS / "image_encoder"
    (published,) = noted_encoder({NOTED_ENCODER: "vit-h"})
    assert (published.repo, published.inside) == ("h94/IP-Adapter", "models/image_encoder")
    assert noted_encoder({}) == noted_encoder({NOTED_ENCODER: "nothing-such"}) == ()


@pytest.mark.parametrize(
    "config", [{"vision_config": []}, {"hidden_size": "wide"}, {"hidden_size": 8, "projection_dim": [1]}]
)
def test_an_encoder_whose_configuration_is_damaged_is_one_line(tmp_path: Path, config: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json of image encoder '.*' is damaged"):
        encoder_source(tmp_path)
