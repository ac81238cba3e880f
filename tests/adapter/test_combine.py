"""Combining rules against their published formulas, written again here; shares, slerp and bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from imprompt.adapter.combine import combine, log_weight_bias, slerp
from imprompt.errors import InputError, UsageError
from imprompt.schema.options import COMBINES, read_weights

values = st.floats(-4, 4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
stacks = st.integers(2, 5).flatmap(lambda n: arrays(np.float32, (n, 6), elements=values))


def by_formula(rule: str, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    wx = w.reshape(-1, *[1] * (x.ndim - 1)) * x
    if rule == "add":
        return wx.sum(0)
    if rule == "subtract":
        return wx[0] - sum(wx[1:]) / (len(x) - 1)
    if rule == "average":
        return wx.sum(0) / w.sum()
    if rule == "norm-average":
        length = np.sqrt((wx**2).sum(0))
        return (wx / np.where(length == 0, 1, length)).mean(0)
    return {"max": wx.max(0), "min": wx.min(0)}[rule]


@pytest.mark.parametrize("rule", [rule for rule in COMBINES if rule not in ("concat", "slerp")])
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8)])
def test_each_rule_is_its_published_formula(rule: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    w = np.linspace(0.5, 1.5, shape[0])
    got = combine(torch.from_numpy(x), rule, w.tolist())
    assert got.shape == (1, *shape[1:])
    np.testing.assert_allclose(got[0].numpy(), by_formula(rule, x, w), rtol=2e-5, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(stacks, st.randoms(use_true_random=False))
def test_symmetric_rules_do_not_mind_the_order(x: np.ndarray, random: "object") -> None:
    order = list(range(len(x)))
    random.shuffle(order)  # type: ignore[attr-defined]
    weights = [0.5 + i for i in range(len(x))]
    for rule in ("add", "average", "norm-average", "max", "min"):
        one = combine(torch.from_numpy(x), rule, weights)
        other = combine(torch.from_numpy(x[order]), rule, [weights[i] for i in order])
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(stacks, st.floats(0.25, 4))
def test_rules_scale_with_their_features_and_the_direction_does_not(x: np.ndarray, factor: float) -> None:
    tensor = torch.from_numpy(x)
    for rule in ("add", "average", "subtract", "max", "min"):
        torch.testing.assert_close(
            combine(tensor * factor, rule), combine(tensor, rule) * factor, rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(
        combine(tensor * factor, "norm-average"), combine(tensor, "norm-average"), rtol=1e-4, atol=1e-5
    )


def test_concat_keeps_every_picture_as_it_is_and_leaves_out_weight_zero() -> None:
    x = torch.randn(3, 4, 5)
    assert combine(x) is x
    assert torch.equal(combine(x, "concat", [1.0, 0.0, 2.0]), x[[0, 2]])


def test_a_weight_in_concat_is_showing_the_picture_that_often() -> None:
    query, a, b = torch.randn(7, 8), torch.randn(3, 8), torch.randn(3, 8)
    thrice = torch.cat((a, a, a, b))
    expected = torch.softmax(query @ thrice.T, -1) @ thrice
    both = torch.cat((a, b))
    bias = log_weight_bias([3.0, 1.0], 3)
    assert bias is not None
    torch.testing.assert_close(torch.softmax(query @ both.T + bias, -1) @ both, expected)


def test_equal_shares_need_no_bias() -> None:
    assert log_weight_bias([1.0, 1.0], 4) is None
    assert log_weight_bias([0.3, 0.0, 0.3], 4) is None


def test_slerp_turns_evenly_and_keeps_length() -> None:
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        angle, length = t * math.pi / 2, 2 + 2 * t
        expected = length * torch.tensor([math.cos(angle), math.sin(angle)])
        torch.testing.assert_close(slerp(x, y, t), expected)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (2, 5), elements=values), st.floats(0, 1))
def test_slerp_reads_the_same_from_both_ends(x: np.ndarray, t: float) -> None:
    a, b = torch.from_numpy(x)
    try:
        one = slerp(a, b, t)
    except InputError:  # opposite
        assert torch.cosine_similarity(a, b, dim=0) < -0.99
        return
    torch.testing.assert_close(one, slerp(b, a, 1 - t), rtol=1e-3, atol=1e-4)


def test_slerp_as_a_rule_takes_its_place_from_the_weights() -> None:
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(combine(x, "slerp", [1.0, 3.0]), slerp(x[:1], x[1:], 0.75))
    torch.testing.assert_close(combine(x, "slerp", [1.0, 0.0]), x[:1])


def test_half_precision_is_combined_in_single() -> None:
    x = torch.full((4, 3), 40000.0, dtype=torch.float16)
    assert combine(x, "average").dtype == torch.float16
    assert torch.equal(combine(x, "average"), x[:1])


@pytest.mark.parametrize(
    ("rule", "count", "weights", "said"),
    [
        ("substract", 2, None, "did you mean 'subtract'"),
        ("subtract", 1, None, "two at least; got 1"),
        ("slerp", 3, None, "exactly two pictures; got 3"),
        ("add", 2, [1.0], "1 are given for 2 pictures"),
        ("add", 2, [1.0, math.nan], "number 2 is nan"),
        ("concat", 2, [1.0, -1.0], "a share, 0 or more"),
        ("average", 2, [0.0, 0.0], "add up to 0"),
        ("average", 2, [1.0, -1.0], "add up to 0"),
    ],
)
def test_bad_input_is_one_line(rule: str, count: int, weights: list[float] | None, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        combine(torch.randn(count, 4), rule, weights)
    assert "\n" not in str(error.value)


def test_features_with_nan_and_opposite_features_are_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        combine(torch.tensor([[1.0, math.nan]] * 2), "add")
    with pytest.raises(InputError, match="opposite"):
        slerp(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0]), 0.5)


def test_weights_of_any_picture_default_to_one() -> None:
    assert read_weights("concat", 3) == (1.0, 1.0, 1.0)
