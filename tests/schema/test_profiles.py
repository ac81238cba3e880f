"""Profiles against the published formulas, written again here; lists, patterns, and UNets of other shapes."""

import math
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st

from imprompt.adapter.backbones.base import Site
from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.errors import UsageError
from imprompt.schema.profiles import PROFILES, layer_weights, read_profile, roles
from tiny import tiny_unet


def unet_of(family: str) -> UNet2DConditionModel:
    """The published UNets' layer structure, without weights."""
    sdxl = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
    }
    with torch.device("meta"):
        return UNet2DConditionModel(**({"cross_attention_dim": 768} if family == "sd15" else sdxl))


@cache
def layers_of(family: str) -> tuple[Site, ...]:
    return cross_attentions(unet_of(family))


@pytest.fixture
def sd15() -> tuple[Site, ...]:
    return layers_of("sd15")


@pytest.fixture
def sdxl() -> tuple[Site, ...]:
    return layers_of("sdxl")


def by_t(profile: object, layers: tuple[Site, ...]) -> list[float]:
    weights = {}
    for layer, weight in zip(layers, layer_weights(profile, layers).weights, strict=True):
        assert weights.setdefault(layer.block_index, weight) == weight
    return [weights[t] for t in range(len(weights))]


def only(weights: dict[int, float], count: int) -> list[float]:
    return [weights.get(t, 0.0) for t in range(count)]


def test_published_numbers_follow_diffusers_order_and_t_follows_execution(
    sd15: tuple[Site, ...], sdxl: tuple[Site, ...]
) -> None:
    assert [layer.index for layer in sd15] == list(range(1, 32, 2))
    assert [layer.index for layer in sdxl] == list(range(1, 140, 2))
    sd15_places = {layer.index: (layer.block, layer.block_index, layer.level, layer.width) for layer in sd15}
    assert sd15_places[11] == ("down_blocks.2.attentions.1", 5, 2, 1280)
    assert sd15_places[13] == ("up_blocks.1.attentions.0", 7, 2, 1280)
    assert sd15_places[27] == ("up_blocks.3.attentions.1", 14, 0, 320)
    assert sd15_places[31] == ("mid_block.attentions.0", 6, 3, 1280)
    blocks = {layer.block: layer.block_index for layer in sdxl}
    assert [blocks[name] for name in ("down_blocks.2.attentions.1", "mid_block.attentions.0")] == [3, 4]
    style = [layer.index for layer in sdxl if layer.block == "up_blocks.0.attentions.1"]
    assert style == list(range(69, 88, 2))
    assert [layer.level for layer in sdxl if layer.block_index in (0, 2, 4, 5, 8)][:1] == [1]


def test_map_profiles_of_sdxl_are_the_published_blocks(sdxl: tuple[Site, ...]) -> None:
    expected = {
        "linear": [1.0] * 11,
        "style transfer": only({6: 1}, 11),
        "composition": only({3: 1}, 11),
        "strong style transfer": [float(t != 3) for t in range(11)],
        "style and composition": only({3: 1, 6: 1}, 11),
        "strong style and composition": [1.0] * 11,
        "style transfer precise": only({3: 1, 6: 1}, 11),
        "composition precise": [1.0 if t in (3, 6) else 0.1 for t in range(11)],
        "style": only({6: 1}, 11),
        "layout": only({3: 1}, 11),
        "weak input": [0.2] * 4 + [1.0] * 7,
        "weak middle": [1.0] * 4 + [0.2] + [1.0] * 6,
        "weak output": [1.0] * 5 + [0.2] * 6,
        "strong middle": [0.2] * 4 + [1.0] + [0.2] * 6,
    }
    assert {name: by_t(name, sdxl) for name in expected} == expected


def test_map_profiles_of_sd15_are_the_published_blocks(sd15: tuple[Site, ...]) -> None:
    style = dict.fromkeys((0, 1, 2, 3, *range(9, 16)), 1.0)
    expected = {
        "style transfer": only(style, 16),
        "style-comfy": only(style, 16),
        "composition": only({4: 0.25, 5: 1}, 16),
        "strong style transfer": [float(t not in (4, 5)) for t in range(16)],
        "style and composition": only(style | {4: 0.25, 5: 1}, 16),
        "composition precise": [{4: 0.25, 6: 0.1, 7: 0.1, 8: 0.1}.get(t, 1.0) for t in range(16)],
        "style": only({7: 1, 8: 1, 9: 1}, 16),
        "layout": only({4: 1, 5: 1, 6: 1}, 16),
    }
    assert {name: by_t(name, sd15) for name in expected} == expected


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_ramps_follow_their_formula(family: str, request: pytest.FixtureRequest) -> None:
    layers = request.getfixturevalue(family)
    count = 16 if family == "sd15" else 11
    for t in range(count):
        assert by_t("ease in", layers)[t] == pytest.approx(0.05 + 0.95 * (1 - t / count))
        assert by_t("ease out", layers)[t] == pytest.approx(0.05 + 0.95 * t / count)
        centre = abs(t - count / 2) / (count / 2)
        assert by_t("ease in-out", layers)[t] == pytest.approx(0.05 + 0.95 * (1 - centre))
        assert by_t("reverse in-out", layers)[t] == pytest.approx(0.05 + 0.95 * centre)


def test_precise_profiles_negate_where_the_image_must_not_act(sdxl: tuple[Site, ...]) -> None:
    style, composition = (
        layer_weights(f"{name} precise", sdxl) for name in ("style transfer", "composition")
    )
    assert {layer.block_index for layer, on in zip(sdxl, style.negated, strict=True) if on} == {3}
    assert {layer.block_index for layer, on in zip(sdxl, composition.negated, strict=True) if on} == set(
        range(11)
    ) - {3}
    assert not any(layer_weights("style", sdxl).negated)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_any_unet_has_roles_by_position(family: str) -> None:
    layers = cross_attentions(tiny_unet(family))
    found = roles(layers)
    kinds = {layer.block_index: layer.kind for layer in layers}
    assert {kinds[t] for t in found.composition} == {"input"}
    assert max(found.composition.values()) == 1
    assert {kinds[t] for t in found.instant_style} == {"output"}
    assert found.style
    for name in PROFILES:
        assert any(layer_weights(name, layers).weights), f"{name} would do nothing"


@given(st.lists(st.floats(-2, 2), min_size=16, max_size=16))
def test_a_list_is_read_in_execution_order(weights: list[float]) -> None:
    assert by_t(weights, layers_of("sd15")) == weights


def test_a_list_may_name_every_layer_of_sdxl(sdxl: tuple[Site, ...]) -> None:
    weights = layer_weights([float(i) for i in range(70)], sdxl).weights
    place = {layer.name: weight for layer, weight in zip(sdxl, weights, strict=True)}
    assert place["down_blocks.1.attentions.0.transformer_blocks.1.attn2"] == 1
    assert place["mid_block.attentions.0.transformer_blocks.0.attn2"] == 24  # 4 + 20 input layers before it
    assert place["up_blocks.1.attentions.2.transformer_blocks.1.attn2"] == 69


def test_patterns_and_diffusers_nested_form_agree(sdxl: tuple[Site, ...]) -> None:
    pattern = {"up_blocks.0.attentions.1": 0.7, "down_blocks.2": 0.2, "default": 0.0}
    nested = {"up": {"block_0": [0.0, 0.7, 0.0]}, "down": {"block_2": [0.2, 0.2]}, "default": 0.0}
    expected = only({2: 0.2, 3: 0.2, 6: 0.7}, 11)
    assert by_t(pattern, sdxl) == by_t(nested, sdxl) == expected
    assert by_t({"*.attentions.1.*": 1.0, "default": 0}, sdxl) == only(dict.fromkeys((1, 3, 6, 9), 1.0), 11)
    longest_wins = {"up_blocks": 0.1, "up_blocks.0.attentions.1": 0.9, "default": 0.0}
    assert by_t(longest_wins, sdxl)[5:8] == [0.1, 0.9, 0.1]


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("styl", "style"),
        ("nonsense", "ease-in-out"),
        ([1.0] * 15, "takes 16"),
        ([math.nan] * 16, "finite"),
        ({"up_blocks": 1.0}, "down_blocks.0.attentions.0"),
        ({"default": 1.0, "up_blocks.7": 1.0}, "up_blocks.7"),
        ({"default": 1.0, "up": {"block_1": [1.0]}}, "has 3 attentions"),
        ({"default": "much"}, "finite"),
        ("up_blocks.1:1, up_blocks.1:0,default:0", r"'up_blocks\.1' is given twice"),
        ('{"up_blocks.1": 1, "up_blocks.1": 0, "default": 0}', "a key occurs twice"),
        ('{"up": {"block_1": 1}, "up_blocks.1": 0, "default": 0}', r"'up_blocks\.1' twice"),
        ('{"up": ', "not valid JSON"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(
    profile: object, message: str, sd15: tuple[Site, ...]
) -> None:
    with pytest.raises(UsageError, match=message):
        layer_weights(profile, sd15)


def test_names_do_not_care_about_case_and_separators() -> None:
    assert {read_profile(name) for name in ("Style Transfer", "style_transfer", "STYLE-transfer")} == {
        "style-transfer"
    }


def test_layer_sizes_round_up_as_the_unet_does() -> None:
    unet = tiny_unet("sd")
    latent = torch.zeros(1, 4, 9, 13)
    lengths = {}
    layers = cross_attentions(unet)
    hooks = [
        unet.get_submodule(layer.name).register_forward_pre_hook(
            lambda module, args, name=layer.name: lengths.__setitem__(name, args[0].shape[1])
        )
        for layer in layers
    ]
    unet(latent, 5, torch.zeros(1, 3, 32))
    for hook in hooks:
        hook.remove()
    assert lengths == {layer.name: math.prod(layer.size(9, 13)) for layer in layers}
    assert len(set(lengths.values())) == 2


# ---- the factor, and profiles as text


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("w", [0.3, 1.7])
def test_the_compositions_own_weight_follows_the_published_tables(
    family: str, w: float, request: pytest.FixtureRequest
) -> None:
    """Written down again from the published tables, with wc (and the boosts) as a factor of w."""
    layers = request.getfixturevalue(family)
    xl = family == "sdxl"
    composition = {3: w} if xl else {4: 0.25 * w, 5: w}
    style = {6: 1.0} if xl else dict.fromkeys((0, 1, 2, 3, *range(9, 16)), 1.0)
    everywhere = dict.fromkeys(range(11 if xl else 16), 1.0)
    expected = {
        "style-and-composition": style | composition,
        "strong-style-and-composition": everywhere | dict.fromkeys(composition, w),
        "style-transfer-precise": style | composition,
        "composition-precise": dict.fromkeys(everywhere, 0.1 * w)
        | ({6: w, 3: 1.0} if xl else dict.fromkeys(style, w) | {4: 0.25, 5: 1.0}),
    }
    for name, table in expected.items():
        weights = layer_weights(f"{name}:{w}", layers).weights
        assert weights == pytest.approx([table.get(layer.block_index, 0.0) for layer in layers]), name


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Style And Composition : 0.5", "style-and-composition:0.5"),
        ("style-transfer-precise:1", "style-transfer-precise:1"),
        ("1, 0.5,0", (1.0, 0.5, 0.0)),
        ("up_blocks.1:1, default:0", {"up_blocks.1": 1.0, "default": 0.0}),
        ("mid_block:1", {"mid_block": 1.0}),
        ("*.attentions.0:-0.5,default:1", {"*.attentions.0": -0.5, "default": 1.0}),
        ('{"up": {"block_0": [0, 1, 0]}, "default": 0}', {"up": {"block_0": [0, 1, 0]}, "default": 0}),
    ],
)
def test_a_profile_is_read_from_text_and_reads_again_as_itself(text: str, meant: object) -> None:
    assert read_profile(text) == meant
    assert read_profile(read_profile(text)) == meant
