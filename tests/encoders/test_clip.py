"""The encoder: its input is what transformers' own processor makes, its output what the model's own gives."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from imprompt.encoders.clip import Features, ImageEncoder
from imprompt.errors import InputError, ModelError
from tiny import HIDDEN, PICTURE, POOLED, picture, tiny_encoder

GOLDEN = {
    ("clip", (64, 64)): "be217efb8fda22e4",
    ("small", (64, 64)): "39ced9ae9820b0a0",
    ("clip", (100, 37)): "641baf73c1849ca3",
    ("small", (100, 37)): "d9a4eb2ce341a434",
    ("clip", (7, 300)): "b79ecf8d564a583e",
    ("small", (7, 300)): "e18615802c53d289",
    ("clip", (225, 224)): "fc8c912164763f34",
    ("small", (225, 224)): "5b82a39d91e0b087",
}
"""(settings, size of the picture) → start of the sha256 of what imprompt 0.1 made of it, itself equal to what
transformers' slow processor made."""
SMALL = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def theirs(processor: CLIPImageProcessorPil, *pictures: Image.Image) -> torch.Tensor:
    return torch.tensor(np.stack(processor(list(pictures)).pixel_values))


def encoder(settings: object, size: int = PICTURE) -> ImageEncoder:
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, projection_dim=4, num_hidden_layers=2, num_attention_heads=1,
        image_size=size, patch_size=size // 2,
    )  # fmt: skip
    return ImageEncoder(CLIPVisionModelWithProjection(config).eval(), settings)


@pytest.mark.parametrize(("kind", "size"), GOLDEN)
def test_pictures_are_prepared_to_the_bit_as_ever(kind: str, size: tuple[int, int]) -> None:
    made = encoder({}, 224) if kind == "clip" else encoder(SMALL)
    pixels = made.prepare([picture(3, size)])[0].numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == GOLDEN[kind, size]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([8, 16, 32]))
def test_any_size_is_prepared_as_transformers_prepares_it(width: int, height: int, side: int) -> None:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=[0.5, 0.4, 0.3]
    )
    ours = encoder(processor, side).prepare([picture(1, (width, height))])
    assert torch.equal(ours, theirs(processor, picture(1, (width, height))))


def test_without_settings_the_usual_ones_at_the_models_size_are_used() -> None:
    shown = [picture(4, (50, 70))]
    assert torch.equal(encoder(None).prepare(shown), encoder(SMALL).prepare(shown))


def test_settings_may_be_written_as_older_files_write_them() -> None:
    old = {"size": 32, "crop_size": 32, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"}
    shown = [picture(1, (50, 40))]
    assert torch.equal(encoder(old).prepare(shown), encoder(SMALL).prepare(shown))


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"longest_edge": 224}},
        {"resample": 77},
        {"image_mean": [0.5]},
        {"crop_size": {"height": 3}},
        {"size": "large"},
    ],
)
def test_settings_that_are_not_understood_are_an_error(config: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="preprocessor_config") as error:
        encoder(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 40_000)])
def test_a_very_long_picture_takes_little_memory_and_shows_its_middle(size: tuple[int, int]) -> None:
    resource = pytest.importorskip("resource")
    made = encoder({}, 224)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = made.prepare([Image.new("RGB", size, "red")])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    long = Image.new("RGB", size, "white")
    middle = tuple((side // 2 - 400, side // 2 + 400) if side > 900 else (0, side) for side in size)
    long.paste("red", (middle[0][0], middle[1][0], middle[0][1], middle[1][1]))
    assert torch.equal(made.prepare([long]), whole)


def siglip() -> SiglipVisionModel:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=PICTURE,
        patch_size=8,
    )  # fmt: skip
    return SiglipVisionModel(config).eval()


def test_siglips_features_are_the_models_own_and_its_negative_is_zeros() -> None:
    model, processor = siglip(), SiglipImageProcessorPil(size={"height": PICTURE, "width": PICTURE})
    pictures = [picture(1, (90, 40)), picture(2, (20, 50))]
    made = ImageEncoder(model)
    features = made.encode(pictures)
    with torch.no_grad():
        pixels = torch.tensor(np.stack(processor(pictures).pixel_values))
        expected = model(pixels, output_hidden_states=True)
    assert (made.pooled_width, made.hidden_width, made.size) == (24, 24, PICTURE)
    assert torch.equal(features.pooled, expected.pooler_output)
    assert torch.equal(features.hidden, expected.hidden_states[-2])
    assert features.last is not None
    assert torch.equal(features.last, expected.last_hidden_state)
    assert not features.negative_hidden.any()
    assert features.negative_hidden.shape == (1, 16, 24)


def test_a_saved_siglip_gives_the_same_features(tmp_path: Path) -> None:
    siglip().save_pretrained(tmp_path)
    shown = [picture(1, (40, 60))]
    assert torch.equal(ImageEncoder.from_pretrained(tmp_path).encode(shown).hidden,
                       ImageEncoder(siglip()).encode(shown).hidden)  # fmt: skip


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    place = folder / "image_encoder"
    (place / "model.safetensors").unlink()
    torch.save(tiny_encoder()[0].state_dict(), place / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        ImageEncoder.from_pretrained(place)


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
    with pytest.raises(ModelError, match=r"image encoder 'nobody/nothing-at-all'.*is not on this machine"):
        ImageEncoder.from_pretrained("nobody/nothing-at-all")
    (place / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ModelError, match="an object is expected"):
        ImageEncoder.from_pretrained(place)
    (place / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
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
    with pytest.raises(ModelError, match="not valid JSON"):
        ImageEncoder.from_pretrained(place)
