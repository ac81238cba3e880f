"""The encoder: its input is what transformers' own processor makes, its output what the model's own gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModel

from imprompt.adapter.prompt import EncodedPictures, PictureEncoder
from imprompt.encoders.clip import Features, ImageEncoder, Preprocessing
from imprompt.errors import InputError, ModelError
from tiny import HIDDEN, PICTURE, POOLED, picture, tiny_encoder

SETTINGS = {
    "as CLIP": {},
    "small": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "crop larger than the picture": {"size": {"shortest_edge": 20}, "crop_size": {"height": 33, "width": 32}},
    "crop smaller": {"size": {"shortest_edge": 40}, "crop_size": {"height": 31, "width": 32}},
    "squashed": {"size": {"height": 30, "width": 34}, "crop_size": {"height": 30, "width": 30}},
    "not cropped": {"size": {"height": 24, "width": 24}, "do_center_crop": False},
    "not resized": {"do_resize": False, "crop_size": {"height": 50, "width": 50}},
    "bilinear": {"resample": 2, "size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}},
    "other colours": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.125]},
    "not normalised": {"do_normalize": False},
    "bytes": {"do_rescale": False, "do_normalize": False},
    "other range": {"rescale_factor": 1 / 127.5},
}


def theirs(processor: CLIPImageProcessorPil, *pictures: Image.Image) -> torch.Tensor:
    return torch.tensor(np.stack(processor(list(pictures)).pixel_values))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("size", [(64, 64), (100, 37), (37, 100), (225, 224), (20, 19), (7, 300)])
def test_pictures_are_prepared_to_the_bit_as_transformers_prepares_them(
    name: str, size: tuple[int, int]
) -> None:
    processor = CLIPImageProcessorPil(**SETTINGS[name])
    ours = Preprocessing.from_config(processor.to_dict())(picture(3, size))
    expected = theirs(processor, picture(3, size))[0].numpy()
    assert ours.dtype == np.float32
    assert np.array_equal(ours, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_any_size_is_prepared_as_transformers_prepares_it(
    width: int, height: int, edge: int, crop_height: int, crop_width: int
) -> None:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": crop_height, "width": crop_width}
    )
    ours = Preprocessing.from_config(processor.to_dict())(picture(1, (width, height)))
    assert np.array_equal(ours, theirs(processor, picture(1, (width, height)))[0].numpy())


def test_settings_may_be_written_as_older_files_write_them() -> None:
    old = {"size": 32, "crop_size": 32, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"}
    assert Preprocessing.from_config(old) == Preprocessing(resize=32, crop=(32, 32))


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"longest_edge": 224}},
        {"size": {"shortest_edge": 224, "longest_edge": 300}},
        {"resample": 77},
        {"image_mean": [0.5]},
        {"crop_size": {"height": 3}},
    ],
)
def test_settings_that_are_not_understood_are_an_error(config: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="preprocessor_config"):
        Preprocessing.from_config(config)


def test_features_are_the_models_own() -> None:
    model, processor = tiny_encoder()
    pictures = [picture(1), picture(2, (90, 40)), picture(3, (20, 50))]
    features = ImageEncoder(model, processor).encode(pictures)
    with torch.no_grad():
        expected = model(theirs(processor, *pictures), output_hidden_states=True)
        zeros = model(torch.zeros(1, 3, PICTURE, PICTURE), output_hidden_states=True)
    assert features.pooled.shape == (3, POOLED)
    assert features.hidden.shape == (3, 17, HIDDEN)
    assert torch.equal(features.pooled, expected.image_embeds)
    assert torch.equal(features.hidden, expected.hidden_states[-2])
    assert torch.equal(features.negative_hidden, zeros.hidden_states[-2])
    assert not features.pooled.requires_grad


def test_a_black_picture_is_not_the_negative() -> None:
    features = ImageEncoder(*tiny_encoder()).encode([Image.new("RGB", (9, 9))])
    assert not torch.allclose(features.hidden, features.negative_hidden, atol=1e-2)


def test_it_is_what_an_adapter_asks_for() -> None:
    encoder = ImageEncoder(*tiny_encoder())
    assert isinstance(encoder, PictureEncoder)
    assert isinstance(encoder.encode([picture()]), EncodedPictures)
    assert (encoder.pooled_width, encoder.hidden_width, encoder.size) == (POOLED, HIDDEN, PICTURE)
    assert encoder.name


def test_colours_hidden_under_transparency_do_not_reach_the_model() -> None:
    hidden = picture(5).convert("RGBA")
    hidden.putalpha(0)
    encoder, white = ImageEncoder(*tiny_encoder()), Image.new("RGB", (PICTURE, PICTURE), "white")
    assert torch.equal(encoder.encode([hidden]).pooled, encoder.encode([white]).pooled)


def test_without_a_processor_clips_own_settings_at_the_models_size_are_used() -> None:
    model, processor = tiny_encoder()
    one, other = ImageEncoder(model, processor), ImageEncoder(model)
    shown = [picture(4, (50, 70))]
    assert torch.equal(one.encode(shown).hidden, other.encode(shown).hidden)


def test_a_cast_encoder_gives_its_negative_in_the_new_format() -> None:
    encoder = ImageEncoder(*tiny_encoder())
    encoder.encode([picture()])
    features = encoder.to(dtype=torch.bfloat16).encode([picture()])
    assert {features.pooled.dtype, features.hidden.dtype, features.negative_hidden.dtype} == {torch.bfloat16}
    encoder.model.float()  # behind its back, as an offloading pipeline does
    assert encoder.encode([picture()]).negative_hidden.dtype == torch.float32


def test_no_picture_is_an_error() -> None:
    with pytest.raises(InputError, match="at least one"):
        ImageEncoder(*tiny_encoder()).encode([])


def test_a_processor_of_another_size_is_an_error_that_names_both() -> None:
    model, _ = tiny_encoder()
    with pytest.raises(ModelError, match=r"32×32.*224×224"):
        ImageEncoder(model, CLIPImageProcessorPil()).encode([picture()])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, processor = tiny_encoder()
    model.save_pretrained(tmp_path / "image_encoder")
    processor.save_pretrained(tmp_path / "image_encoder")
    return tmp_path


def same(one: Features, other: Features) -> bool:
    return torch.equal(one.pooled, other.pooled) and torch.equal(one.hidden, other.hidden)


def test_a_saved_encoder_gives_the_same_features(folder: Path) -> None:
    shown = [picture(1, (40, 60))]
    expected = ImageEncoder(*tiny_encoder()).encode(shown)
    assert same(ImageEncoder.from_pretrained(folder / "image_encoder").encode(shown), expected)
    assert same(ImageEncoder.from_pretrained(folder, "image_encoder").encode(shown), expected)
    assert same(ImageEncoder.from_pretrained(f"{folder}:image_encoder").encode(shown), expected)


def test_settings_come_from_the_feature_extractor_next_to_it(folder: Path) -> None:
    (folder / "image_encoder" / "preprocessor_config.json").unlink()
    plain = ImageEncoder.from_pretrained(folder, "image_encoder").encode([picture(1)])
    assert same(plain, ImageEncoder(*tiny_encoder()).encode([picture(1)]))
    model, processor = tiny_encoder()
    processor.image_mean = [0.0, 0.0, 0.0]
    processor.save_pretrained(folder / "feature_extractor")
    shifted = ImageEncoder.from_pretrained(folder, "image_encoder").encode([picture(1)])
    assert same(shifted, ImageEncoder(model, processor).encode([picture(1)]))
    assert not same(shifted, plain)


def test_number_format_and_place_are_as_asked(folder: Path) -> None:
    encoder = ImageEncoder.from_pretrained(folder / "image_encoder", torch_dtype=torch.float16, device="cpu")
    assert next(encoder.model.parameters()).dtype == torch.float16
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert not encoder.model.training


def test_a_whole_clip_gives_its_vision_tower(tmp_path: Path) -> None:
    model, processor = tiny_encoder()
    config = CLIPConfig(
        vision_config=model.config.to_dict(),
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9},
        projection_dim=POOLED,
    )
    clip = CLIPModel(config)
    clip.vision_model.load_state_dict(model.vision_model.state_dict())
    clip.visual_projection.load_state_dict(model.visual_projection.state_dict())
    clip.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = ImageEncoder.from_pretrained(tmp_path)
    assert loaded.pooled_width == POOLED
    one, other = loaded.encode([picture(1)]), ImageEncoder(model, processor).encode([picture(1)])
    torch.testing.assert_close(one.pooled, other.pooled)
    torch.testing.assert_close(one.hidden, other.hidden)


def test_a_tower_without_projection_is_an_error(tmp_path: Path) -> None:
    CLIPVisionModel(tiny_encoder()[0].config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="visual_projection"):
        ImageEncoder.from_pretrained(tmp_path)


def test_what_is_missing_or_damaged_is_one_clear_error(folder: Path) -> None:
    place = folder / "image_encoder"
    with pytest.raises(ModelError, match="no config"):
        ImageEncoder.from_pretrained(folder)
    with pytest.raises(ModelError, match="cannot be loaded"):
        ImageEncoder.from_pretrained("nobody/nothing-at-all")
    (place / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ModelError, match="no settings"):
        ImageEncoder.from_pretrained(place)
    (place / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        ImageEncoder.from_pretrained(place)
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        ImageEncoder.from_pretrained(place)
    weights.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        ImageEncoder.from_pretrained(place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config)[:-9])
    with pytest.raises(ModelError, match="cannot be loaded"):
        ImageEncoder.from_pretrained(place)
