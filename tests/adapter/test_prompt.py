"""What an image prompt accepts, what it refuses, and how masks reach a layer's grid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from pydantic import ValidationError

from imprompt.adapter.masks import read_mask, read_masks, resize_mask
from imprompt.adapter.prompt import as_prompts
from imprompt.encoders.clip import Features
from imprompt.errors import InputError, UsageError
from imprompt.schema.prompt import ImagePrompt
from tiny import picture


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one"),
        ({"image": "a.png", "tokens": torch.zeros(4, 8)}, "image and tokens"),
        ({"image": []}, "empty list"),
        ({"image": "a.png", "scale": math.nan}, "scale: input should be a finite number, got nan"),
        ({"image": "a.png", "scale": math.inf}, "scale: input should be a finite number, got inf"),
        ({"image": "a.png", "start": 0.7, "end": 0.3}, "start: 0.7 lies after end 0.3"),
        ({"image": "a.png", "start": -0.1}, "start: .* got -0.1"),
        ({"image": "a.png", "end": 1.5}, "end: .* got 1.5"),
        ({"image": "a.png", "profile": "stile"}, "did you mean 'style'"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ImagePrompt(**fields)


def test_a_prompt_cannot_be_changed_behind_its_checks() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ImagePrompt(image="a.png").scale = math.nan


def test_a_list_of_pictures_is_one_prompt_and_a_list_of_prompts_is_several() -> None:
    (one,) = as_prompts(["a.png", picture()], {"scale": 0.5})
    assert len(one.pictures) == 2
    assert one.scale == 0.5
    several = as_prompts([ImagePrompt(image="a.png"), ImagePrompt(image="b.png", scale=0.3)], {"end": 0.5})
    assert [(p.pictures, p.scale, p.end) for p in several] == [
        (("a.png",), None, 0.5),
        (("b.png",), 0.3, 0.5),
    ]


def test_features_of_several_pictures_join_into_one_prompt() -> None:
    (pooled,) = as_prompts([torch.zeros(24), torch.ones(24)], {})
    assert pooled.features.shape == (2, 24)
    (hidden,) = as_prompts([torch.zeros(1, 17, 32), torch.ones(2, 17, 32)], {})
    assert hidden.features.shape == (3, 17, 32)
    encoded = Features(torch.zeros(1, 24), torch.zeros(1, 17, 32), torch.zeros(1, 17, 32))
    (carried,) = as_prompts(encoded, {})
    assert carried.features is encoded


@pytest.mark.parametrize(
    "value",
    [[], [ImagePrompt(image="a.png"), "b.png"], 7, None, [torch.zeros(3), torch.zeros(4)]],
)
def test_what_is_no_prompt_is_refused(value: object) -> None:
    # The second is this test run's type check, which comes first for what is no prompt by its type.
    with pytest.raises((UsageError, TypeCheckError)):
        as_prompts(value, {})


def test_masks_of_every_kind_mean_the_same() -> None:
    wanted = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for mask in (wanted, wanted.bool(), (wanted * 255).to(torch.uint8), wanted[None], wanted.half()):
        assert torch.equal(read_mask(mask), wanted[None, None])
    assert read_masks(None) == (None, None)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(4, 4), "0 everywhere"),
        (torch.full((4, 4), 2.0), "outside 0 to 1"),
        (torch.full((4, 4), math.nan), "NaN or infinite"),
        (torch.ones(2, 4, 4), "one picture"),
        (torch.ones(4), "one picture"),
        (torch.ones(0, 4), "one picture"),
    ],
)
def test_a_mask_that_is_none_is_refused(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_mask(mask)


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(0, 2**31))
def test_complementary_masks_stay_complementary_at_every_resolution(
    given_size: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    mask = torch.rand(1, 1, *given_size, generator=torch.Generator().manual_seed(seed))
    there, elsewhere = resize_mask(mask, size), resize_mask(1 - mask, size)
    assert there.shape[-2:] == size
    torch.testing.assert_close(there + elsewhere, torch.ones(1, 1, *size))
    assert there.min() >= mask.min() - 1e-6
    assert there.max() <= mask.max() + 1e-6


def test_nothing_leaks_outside_a_hard_mask() -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    small = resize_mask(mask, (8, 8))
    assert torch.equal(small[..., :4], torch.ones(1, 1, 8, 4))
    assert torch.equal(small[..., 4:], torch.zeros(1, 1, 8, 4))
