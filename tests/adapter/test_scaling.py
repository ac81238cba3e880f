"""Scaling modes against their published formulas, through a whole attention."""

import pytest
import torch
import torch.nn.functional as F

from imprompt.adapter.scaling import split_strength, with_strength
from imprompt.schema.options import SCALINGS, canonical

S, H, T, D = 3, 2, 5, 8
C = H * D


def expected(mode: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: float) -> torch.Tensor:
    if mode == "v-only":
        return F.scaled_dot_product_attention(q, k, v) * w
    if mode == "k+v":
        return F.scaled_dot_product_attention(q, k * w, v * w)
    w = w * C / 1280
    if mode == "k+v-penalty":
        return F.scaled_dot_product_attention(q, k * w, v * w)
    mean = v.mean(dim=2, keepdim=True)
    return F.scaled_dot_product_attention(q, k * w, (v - mean) + mean * w)


@pytest.mark.parametrize("mode", SCALINGS)
def test_each_mode_is_its_formula_for_every_sample(mode: str) -> None:
    q, k, v = torch.randn(S, H, 7, D), torch.randn(S, H, T, D), torch.randn(S, H, T, D)
    strengths = [0.7, -0.4, 1.3]
    key, value = with_strength(k, v, [mode] * S, strengths, C, None)
    outside = [split_strength(mode, w, C)[2] for w in strengths]
    got = F.scaled_dot_product_attention(q, key, value) * torch.tensor(outside)[:, None, None, None]
    for i, w in enumerate(strengths):
        torch.testing.assert_close(
            got[i : i + 1], expected(mode, q[i : i + 1], k[i : i + 1], v[i : i + 1], w)
        )


@pytest.mark.parametrize("mode", SCALINGS)
def test_strength_zero_gives_exactly_nothing(mode: str) -> None:
    assert split_strength(mode, 0.0, C)[2] == 0.0


def test_the_mean_is_taken_over_tokens_that_are_there() -> None:
    k, v = torch.randn(1, H, T, D), torch.randn(1, H, T, D)
    k[:, :, 3:], v[:, :, 3:] = 0, 0
    present = (torch.arange(T) < 3)[None, None, :, None]
    mode = ["k+mean-v-penalty"]
    alone = with_strength(k[:, :, :3], v[:, :, :3], mode, [0.8], C, None)
    beside = with_strength(k, v, mode, [0.8], C, present)
    torch.testing.assert_close(beside[1][:, :, :3], alone[1])


def test_the_users_own_spelling_is_understood() -> None:
    said = ("V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty")
    assert tuple(canonical("scaling", name, SCALINGS) for name in said) == SCALINGS
