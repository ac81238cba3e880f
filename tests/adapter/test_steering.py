"""What a prompt's fields do to a whole UNet: combining, shares, curves, scalings, tokens, saved files."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from imprompt.adapter.attention import SiteProcessor
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.features import Saved, fingerprint, load, save
from imprompt.encoders.framing import encode
from imprompt.errors import EncoderMismatch, InputError, UsageError
from imprompt.schema.options import COMBINES, SCALINGS
from imprompt.schema.prompt import ImagePrompt
from tiny import POOLED, TEXT_WIDTH, picture, random_adapter_state, tiny_encoder, tiny_unet


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return tiny_unet("sd")


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return ImageEncoder(*tiny_encoder(), name="tiny")


@pytest.fixture(scope="module")
def adapter(unet: UNet2DConditionModel, encoder: ImageEncoder) -> IPAdapter:
    made = IPAdapter.from_state_dict(random_adapter_state(unet), image_encoder=encoder)
    made.attach(unet)
    return made


@torch.no_grad()
def draw(unet: UNet2DConditionModel, t: float = 500.0, rows: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 5, TEXT_WIDTH, generator=random)
    return unet(sample.expand(rows, -1, -1, -1), t, text.expand(rows, -1, -1)).sample


@pytest.fixture
def plain(unet: UNet2DConditionModel, adapter: IPAdapter) -> Tensor:
    adapter.clear_prompt()
    return draw(unet)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    "nothing",
    [
        {"scale": 0.0},
        {"start": 0.4, "end": 0.4},
        {"start": 0.6},  # closed at this step
        {"curve": [(0.0, 0.0)]},
        {"curve": "0.5:0,1:1"},  # nothing yet at this step
        {"profile": {"default": 0.0}},
    ],
)
def test_zero_strength_in_any_form_is_no_adapter_bit_for_bit(
    unet: UNet2DConditionModel, adapter: IPAdapter, plain: Tensor, nothing: dict[str, object], scaling: str
) -> None:
    adapter.set_prompt(picture(1), scaling=scaling, **nothing)  # type: ignore[arg-type]
    assert torch.equal(draw(unet), plain)


def test_defaults_are_what_they_were(unet: UNet2DConditionModel, adapter: IPAdapter, plain: Tensor) -> None:
    adapter.set_prompt([picture(1), picture(2, (40, 24))])
    before = draw(unet)
    adapter.set_prompt(
        [picture(1), picture(2, (40, 24))],
        combine="concat",
        weights=[1.0, 1.0],
        framing="center",
        curve="constant",
        scaling="V only",
    )
    assert torch.equal(draw(unet), before)
    assert not torch.equal(before, plain)


@pytest.mark.parametrize("rule", [rule for rule in COMBINES if rule != "concat"])
def test_combined_pictures_are_their_combined_features(
    unet: UNet2DConditionModel, adapter: IPAdapter, encoder: ImageEncoder, rule: str
) -> None:
    from imprompt.adapter.combine import combine

    shown = [picture(1), picture(2)]
    adapter.set_prompt(shown, combine=rule, weights=[1.0, 0.5])
    drawn = draw(unet)
    adapter.set_prompt(ImagePrompt(features=combine(encoder.encode(shown).pooled, rule, [1.0, 0.5])))
    assert torch.equal(draw(unet), drawn)


def test_a_share_of_two_is_the_picture_twice(unet: UNet2DConditionModel, adapter: IPAdapter) -> None:
    adapter.set_prompt([picture(1), picture(1), picture(2)])
    twice = draw(unet)
    adapter.set_prompt([picture(1), picture(2)], weights=[2.0, 1.0])
    torch.testing.assert_close(draw(unet), twice, rtol=1e-4, atol=1e-5)
    adapter.set_prompt([picture(1), picture(2)], weights=[0.0, 1.0])
    without = draw(unet)
    adapter.set_prompt(picture(2))
    torch.testing.assert_close(draw(unet), without, rtol=1e-4, atol=1e-5)


def test_a_curve_is_its_factor_at_each_timestep(unet: UNet2DConditionModel, adapter: IPAdapter) -> None:
    for t, factor in ((900.0, 0.1), (250.0, 0.75)):
        adapter.set_prompt(picture(1), curve="fade-in", scale=0.8)
        faded = draw(unet, t)
        adapter.set_prompt(picture(1), scale=0.8 * factor)
        torch.testing.assert_close(draw(unet, t), faded, rtol=1e-4, atol=1e-5)


def test_rows_at_timesteps_of_their_own_have_their_own_windows(
    unet: UNet2DConditionModel, adapter: IPAdapter
) -> None:
    adapter.set_prompt([ImagePrompt(image=picture(1), end=0.5), ImagePrompt(image=picture(2), start=0.5)])
    random = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 5, TEXT_WIDTH, generator=random)
    times = torch.tensor([900.0, 100.0])
    with torch.no_grad():
        together = unet(sample, times, text).sample
        for row in range(2):
            alone = unet(sample[row : row + 1], times[row], text[row : row + 1]).sample
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_curves_keep_the_very_tensors_while_steps_go_by(
    unet: UNet2DConditionModel, adapter: IPAdapter
) -> None:
    adapter.set_prompt(picture(1), curve="smooth-out")
    processors = [p for p in unet.attn_processors.values() if isinstance(p, SiteProcessor)]
    draw(unet, 900.0)
    kvs = [p.image_kvs for p in processors]
    draw(unet, 100.0)
    assert all(a is b for a, b in zip(kvs, (p.image_kvs for p in processors), strict=True))


def test_samples_of_one_batch_have_their_own_steering(unet: UNet2DConditionModel, adapter: IPAdapter) -> None:
    prompts = [
        ImagePrompt(image=[picture(1), picture(2)], weights=[3.0, 1.0], scale=0.6),
        ImagePrompt(image=picture(3), scaling="k+mean-v-penalty", curve="fade-out"),
        ImagePrompt(image=[picture(1), picture(4)], combine="subtract", scaling="k+v", scale=0.5),
    ]
    adapter.set_batch(prompts)
    together = draw(unet, rows=3)
    for i, prompt in enumerate(prompts):
        adapter.set_prompt(prompt)
        torch.testing.assert_close(draw(unet)[0], together[i], rtol=1e-4, atol=2e-5)


def test_scalings_differ_and_agree_at_full_strength(unet: UNet2DConditionModel, adapter: IPAdapter) -> None:
    drawn = {}
    for scaling in SCALINGS:
        adapter.set_prompt(picture(1), scaling=scaling, scale=0.5)
        drawn[scaling] = draw(unet)
    assert len({tuple(d.flatten().tolist()) for d in drawn.values()}) == len(SCALINGS)
    adapter.set_prompt(picture(1), scaling="k+v")
    whole = draw(unet)
    adapter.set_prompt(picture(1))
    assert torch.equal(draw(unet), whole)


def test_selected_tokens_are_those_tokens(unet: UNet2DConditionModel, adapter: IPAdapter) -> None:
    tokens = torch.randn(2, 4, TEXT_WIDTH, generator=torch.Generator().manual_seed(5))
    adapter.set_prompt(ImagePrompt(tokens=tokens, select="0,2-3"))
    chosen = draw(unet)
    adapter.set_prompt(ImagePrompt(tokens=tokens[:, [0, 2, 3]]))
    assert torch.equal(draw(unet), chosen)
    with pytest.raises(UsageError, match="no token 4; a picture has 4"):
        adapter.set_prompt(picture(1), select=[4])


def test_saved_features_stand_for_their_picture_without_an_encoder(
    unet: UNet2DConditionModel, adapter: IPAdapter, encoder: ImageEncoder, tmp_path: Path
) -> None:
    wide = picture(2, (60, 24))
    saved = Saved(encode(encoder, [wide], "pad"), "tiny", fingerprint(encoder.model), ("00",), "pad")
    path = save(saved, tmp_path / "wide.safetensors")
    again = load(path)
    assert (again.encoder, again.fingerprint, again.pictures, again.framing) == (
        "tiny",
        saved.fingerprint,
        ("00",),
        "pad",
    )
    adapter.set_prompt(wide, framing="pad")
    shown = draw(unet)
    adapter.image_encoder = None
    adapter.set_prompt(path)
    assert torch.equal(draw(unet), shown)
    adapter.image_encoder = encoder
    adapter.set_prompt([path, picture(1)], combine="average")
    assert not torch.equal(draw(unet), shown)


def test_a_file_of_features_after_pictures_has_a_weight_of_its_own(
    unet: UNet2DConditionModel, adapter: IPAdapter, encoder: ImageEncoder, tmp_path: Path
) -> None:
    saved = Saved(encode(encoder, [picture(2), picture(3)], "crop"), "tiny", "0" * 12, ("00", "01"), "crop")
    path = save(saved, tmp_path / "two.safetensors")
    adapter.set_prompt([picture(n) for n in range(4)], weights=[1, 0.5, 2, 2])
    shown = draw(unet)
    adapter.set_prompt([picture(0), picture(1), path], weights=[1, 0.5, 2])
    assert torch.allclose(draw(unet), shown, atol=1e-5)


def test_features_of_another_encoder_are_refused_by_name(adapter: IPAdapter, tmp_path: Path) -> None:
    other = ImageEncoder(*tiny_encoder(POOLED + 8), name="other")
    path = save(Saved(other.encode([picture()]), "other", "", (), "crop"), tmp_path / "x.safetensors")
    with pytest.raises(
        EncoderMismatch, match=r"features of encoder 'other' .*needs pooled features of width 24"
    ):
        adapter.set_prompt(path)


def test_files_that_hold_no_features_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"pooled": torch.zeros(1, 3)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, said in (("other", "no picture's features"), ("broken", "truncated"), ("absent", "no file")):
        with pytest.raises(InputError, match=said):
            load(tmp_path / f"{name}.safetensors")
    nan = Saved(ImageEncoder(*tiny_encoder()).encode([picture()]), "t", "", (), "crop")
    nan.features.pooled[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        load(save(nan, tmp_path / "nan.safetensors"))


def test_a_fingerprint_does_not_depend_on_the_number_format() -> None:
    model, _ = tiny_encoder()
    other, _ = tiny_encoder(seed=8)
    assert fingerprint(model) == fingerprint(model.half()) != fingerprint(other)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": "a.png", "combine": "subtract"}, "combine: 'subtract'"),
        ({"image": ["a.png", "b.png"], "weights": [1.0]}, "weights: 1 are given for 2"),
        ({"image": "a.png", "framing": "paddd"}, "did you mean 'pad'"),
        ({"image": "a.png", "curve": "0:1,2:0"}, "outside 0 to 1"),
        ({"image": "a.png", "scaling": "k"}, "scaling 'k' is unknown"),
        ({"image": "a.png", "select": "3-1"}, "names no token"),
        ({"features": torch.zeros(1, 4), "framing": "pad"}, "framing: has no effect on features"),
        ({"tokens": torch.zeros(1, 4, 4), "combine": "add"}, "acts on features"),
    ],
)
def test_bad_steering_is_said_at_once(fields: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ImagePrompt(**fields)  # type: ignore[arg-type]


def test_what_is_watched_is_drawn_as_ever_and_measured(
    unet: UNet2DConditionModel, adapter: IPAdapter
) -> None:
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    prompts = [ImagePrompt(image=picture(1), mask=left), ImagePrompt(image=picture(2), start=0.6)]
    adapter.set_prompt(prompts)
    unwatched = [draw(unet, t) for t in (900.0, 100.0)]
    with adapter.recording() as recorder:
        recording = [draw(unet, t) for t in (900.0, 100.0)]
    assert all(torch.equal(a, b) for a, b in zip(unwatched, recording, strict=True))
    found = recorder.result()
    assert found.steps == pytest.approx((0.1, 0.9))
    assert found.maps.shape == (2, 8, 8)
    assert found.maps[0, :, :4].min() > 0
    assert not found.maps[0, :, 5:].any()
    assert not found.strength[1, 0].any()
    assert (found.strength[1, 1] > 0).all()
    adapter.set_prompt(prompts[0].replace(scale=2.0))
    with adapter.recording() as recorder:
        draw(unet, 900.0)
    # The query is other behind the first layer, so only there is the length exactly twice.
    torch.testing.assert_close(recorder.result().strength[0, 0, 0], 2 * found.strength[0, 0, 0])


def test_nothing_shown_is_nothing_to_explain(unet: UNet2DConditionModel, adapter: IPAdapter) -> None:
    adapter.clear_prompt()
    with adapter.recording() as recorder:
        draw(unet)
    with pytest.raises(UsageError, match="nothing to explain"):
        recorder.result()
