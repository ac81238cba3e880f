"""Projections make the tokens that diffusers' own modules make of the same weights, filled by its loader."""

import pytest
import torch
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from torch import nn

from imprompt.catalog.variants import VARIANTS
from imprompt.checkpoints.checkpoint import read
from imprompt.errors import EncoderMismatch, ModelError, UsageError
from imprompt.projections.build import build_projection, skeleton
from imprompt.projections.modules import ImageProjection
from imprompt.projections.resamplers import FaceResamplerProjection
from layouts import Shapes, face, face_plus, full_face, layers, linear, resampler

Weights = dict[str, torch.Tensor]


def weights(shapes: Shapes, seed: int = 0) -> Weights:
    random = torch.Generator().manual_seed(seed)
    found = {}
    for key, shape in shapes.items():
        spread = shape[-1] ** -0.5 if len(shape) > 1 and key != "latents" else 1.0
        found[key] = torch.randn(shape, generator=random) * spread
    return found


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def projection(variant: str, image_proj: Weights, cross: int) -> ImageProjection:
    state = {"image_proj": image_proj, "ip_adapter": weights(layers([4], cross))}
    checkpoint = read(state, variant=variant)
    return build_projection(checkpoint.variant, checkpoint.state["image_proj"]).eval()


def theirs(image_proj: Weights) -> nn.Module:
    """diffusers' module for these weights, chosen and filled by its own loader."""
    convert = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers
    return convert(None, dict(image_proj), low_cpu_mem_usage=False).eval()


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and float((one - other).detach().abs().max()) <= 1e-5


# variant → (shapes, cross-attention width, shape of the features); sizes are the published ones, or narrow
PLAIN = {
    "SD1.5": ("linear", linear(768, 1024), 768, (3, 1024)),
    "SDXL": ("linear", linear(2048, 1280), 2048, (2, 1280)),
    "narrow": ("linear", linear(24, 10), 24, (1, 10)),
    "plus": ("resampler", resampler(96, 80, 128, 2), 96, (2, 17, 80)),
    "plus, narrow attention": ("resampler", resampler(64, 32, 128, 1, tokens=5), 64, (1, 50, 32)),
    "plus as Kolors'": ("resampler", resampler(64, 40, 192, 2), 64, (3, 7, 40)),
    "full-face": ("full-face", full_face(48, 64), 48, (2, 257, 64)),
    "FaceID": ("faceid", face(48, 4), 48, (3, 512)),
    "FaceID, 16 tokens": ("faceid", face(48, 16), 48, (1, 512)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_tokens_equal_diffusers_tokens_on_the_same_weights(name: str) -> None:
    variant, shapes, cross, shown = PLAIN[name]
    image_proj, features = weights(shapes), noise(*shown)
    ours, other = projection(variant, image_proj, cross), theirs(image_proj)
    expected = other(features).reshape(len(features), -1, cross)
    assert near(ours(features), expected)
    assert ours(features).shape[1] == (shown[1] if variant == "full-face" else ours.tokens)
    assert (ours.cross_dim, ours.feature_width) == (cross, shown[-1])


@pytest.mark.parametrize("variant", ["faceid-plus", "faceid-plusv2"])
@pytest.mark.parametrize("s_scale", [1.0, 0.4])
def test_faceid_plus_tokens_equal_diffusers_tokens(variant: str, s_scale: float) -> None:
    image_proj = weights(face_plus(128, patches=96))
    ours, other = projection(variant, image_proj, 128), theirs(image_proj)
    assert isinstance(ours, FaceResamplerProjection)
    people, crops = noise(2, 512), noise(2, 9, 96, seed=2)
    other.shortcut, other.shortcut_scale, other.clip_embeds = (
        variant == "faceid-plusv2",
        s_scale,
        crops[:, None],
    )
    ours.s_scale = s_scale
    expected = other(people).reshape(2, -1, 128)
    assert near(ours(people, crops), expected)
    assert ours.patch_width == 96


ALL = {
    "linear": linear(24, 10),
    "resampler": resampler(24, 10, 128, 2, tokens=3, depth=2),
    "full-face": full_face(24, 10),
    "faceid": face(24),
    "faceid-raw": resampler(2048, 512, 64, 1),
    "faceid-plus": face_plus(64, patches=10),
    "faceid-plusv2": face_plus(64, patches=10),
}
CROSS = {"faceid-raw": 2048, "faceid-plus": 64, "faceid-plusv2": 64}


@pytest.mark.parametrize("variant", ALL)
def test_a_projections_state_dict_is_the_published_image_proj(variant: str) -> None:
    image_proj = weights(ALL[variant])
    module = projection(variant, image_proj, CROSS.get(variant, 24))
    state = module.state_dict()
    assert state.keys() == image_proj.keys()
    assert all(torch.equal(state[key], value) for key, value in image_proj.items())
    assert all(value.data_ptr() == image_proj[key].data_ptr() for key, value in state.items())


@pytest.mark.parametrize("variant", [name for name in ALL if VARIANTS[name].negative == "zero_features"])
def test_the_negative_is_the_projection_of_zeros(variant: str) -> None:
    module = projection(variant, weights(ALL[variant]), CROSS.get(variant, 24))
    zeros = torch.zeros(1, module.feature_width)
    assert torch.equal(module.negative(), module(zeros))
    assert module.negative().shape == (1, module.tokens, module.cross_dim)
    assert module.negative().abs().max() > 0


@pytest.mark.parametrize("variant", ["resampler", "full-face"])
def test_the_negative_of_hidden_states_is_the_projection_of_an_encoded_zero(variant: str) -> None:
    module, features = projection(variant, weights(ALL[variant]), 24), noise(1, 5, 10)
    assert torch.equal(module.negative(features), module(features))
    with pytest.raises(UsageError, match="negative_hidden"):
        module.negative()


def test_the_negative_of_faceid_plus_is_nobody_in_an_encoded_zero() -> None:
    module, crop = projection("faceid-plusv2", weights(ALL["faceid-plusv2"]), 64), noise(1, 9, 10)
    assert torch.equal(module.negative(crop), module(torch.zeros(1, 512), crop))
    with pytest.raises(UsageError, match="zero face embedding"):
        module.negative()


def test_photos_of_one_person_stand_side_by_side() -> None:
    photos = noise(2, 3, 512)
    for variant in ("faceid", "faceid-raw"):
        module = projection(variant, weights(ALL[variant]), CROSS.get(variant, 24))
        together = module(photos)
        alone = torch.cat([module(photos[:, i]) for i in range(3)], dim=1)
        assert near(together, alone)
    module = projection("faceid-plus", weights(ALL["faceid-plus"]), 64)
    crops = noise(2, 3, 9, 10)
    alone = torch.cat([module(photos[:, i], crops[:, i]) for i in range(3)], dim=1)
    assert near(module(photos, crops), alone)


def test_a_picture_is_projected_in_a_batch_as_alone() -> None:
    for variant, shown in (
        ("linear", noise(4, 10)),
        ("resampler", noise(4, 7, 10)),
        ("full-face", noise(4, 7, 10)),
    ):
        module = projection(variant, weights(ALL[variant]), 24)
        assert near(module(shown), torch.cat([module(each[None]) for each in shown]))


def test_gradients_reach_every_weight() -> None:
    for variant in ("linear", "resampler", "full-face"):
        module = projection(variant, weights(ALL[variant]), 24)
        tokens = module(noise(2, 10) if variant == "linear" else noise(2, 7, 10))
        tokens.square().sum().mul(noise(1)[0]).backward()
        assert all(each.grad is not None for each in module.parameters())


MISFITS = {
    "another width": ("linear", (2, 11), "pooled features shaped N E of width 10"),
    "hidden for pooled": ("linear", (2, 7, 10), r"N E of width 10, got shape \(2, 7, 10\)"),
    "pooled for hidden": ("resampler", (2, 10), r"N P W of width 10, got shape \(2, 10\)"),
    "patches of another encoder": ("full-face", (2, 7, 12), "N P W of width 10"),
    "a face of another model": ("faceid", (2, 256), "face features"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_features_of_another_kind_are_refused(what: str) -> None:
    variant, shape, message = MISFITS[what]
    module = projection(variant, weights(ALL[variant]), 24)
    with pytest.raises(EncoderMismatch, match=message):
        module(noise(*shape))


def test_a_second_input_is_needed_or_refused() -> None:
    with pytest.raises(EncoderMismatch, match="no second input"):
        projection("linear", weights(ALL["linear"]), 24)(noise(1, 10), noise(1, 3, 10))
    module = projection("faceid-plus", weights(ALL["faceid-plus"]), 64)
    with pytest.raises(EncoderMismatch, match="needs the face crop's hidden states"):
        module(noise(1, 512))
    with pytest.raises(EncoderMismatch, match="of width 10"):
        module(noise(1, 512), noise(1, 3, 11))
    with pytest.raises(EncoderMismatch, match="need as many crops"):
        module(noise(2, 512), noise(3, 9, 10))


def test_a_skeleton_takes_no_memory_and_tells_the_keys() -> None:
    found = skeleton(VARIANTS["resampler"], resampler(2048, 1280, 1280, 20))
    assert all(parameter.is_meta for parameter in found.parameters())
    assert {key: tuple(value.shape) for key, value in found.state_dict().items()} == resampler(
        2048, 1280, 1280, 20
    )


def test_heads_that_are_not_64_wide_are_refused() -> None:
    shapes = ALL["resampler"] | {"layers.0.0.to_q.weight": (100, 128)}
    with pytest.raises(ModelError, match="100 rows, not a multiple of 64"):
        skeleton(VARIANTS["resampler"], shapes)
