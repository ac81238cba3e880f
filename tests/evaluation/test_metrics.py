"""Cosine and bootstrap against values computed by hand."""

import math

import pytest
import torch

from imprompt.evaluation.metrics import bootstrap, cosine, found_share, paired


def test_cosine_ignores_length():
    assert cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0, 0.0]])).item() == pytest.approx(1)
    assert cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item() == pytest.approx(0)


def test_a_drawing_is_found_where_its_own_label_is_nearest():
    right, up, left = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    between = torch.tensor([0.8, 0.6])
    anchors = torch.stack([torch.stack([right, right]), torch.stack([up, up]), torch.stack([left, right])])
    drawn = torch.stack([torch.stack([right, between]), torch.stack([between, up]), torch.stack([left, up])])
    assert found_share(drawn, anchors, ["a", "b", "c"]).tolist() == [1, 0.5, 0]  # c's anchors cancel out
    assert found_share(drawn, anchors, ["a", "b", "b"])[2] == 1  # with b's they mean up
    with pytest.raises(ValueError, match="two labels"):
        found_share(drawn, anchors, ["a", "a", "a"])


def test_bootstrap_interval_covers_the_mean_and_narrows_with_more_values():
    source = torch.Generator().manual_seed(1)
    twenty = torch.rand(20, generator=source)
    few, many = bootstrap(twenty), bootstrap(torch.rand(2000, generator=source))
    assert few == bootstrap(twenty)
    assert few.low < few.mean < few.high
    assert many.high - many.low < 0.3 * (few.high - few.low)
    # The normal approximation of a uniform's mean: 1.96·sqrt(1/12/n) either side.
    assert many.high - many.low == pytest.approx(2 * 1.96 * math.sqrt(1 / 12 / 2000), rel=0.15)


@pytest.mark.parametrize("values", [torch.empty(0), torch.tensor([0.5, math.nan]), torch.tensor([math.inf])])
def test_bootstrap_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match=r"no values|not finite"):
        bootstrap(values)


@pytest.mark.parametrize("count", [6, 8, 12, 24])
def test_a_difference_that_is_chance_excludes_zero_in_5_of_100_cases_at_most(count):
    draws = torch.randn(600, count, generator=torch.Generator().manual_seed(count))
    found = [paired(each, torch.zeros(count)) for each in draws]
    wrong = sum(not one.low <= 0 <= one.high for one in found) / len(found)
    assert 0.01 < wrong <= 0.06
    assert all(one.low <= one.mean <= one.high for one in found)


def test_a_paired_interval_of_six_reaches_from_the_least_to_the_most():
    """Of the 64 patterns of signs, one has all of them above zero and one all below."""
    values = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.9], dtype=torch.float64)
    found = paired(values, torch.zeros(6))
    assert (found.low, found.high) == pytest.approx((0.1, 0.9))
    assert found.mean == pytest.approx(0.4)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_pairs_have_a_mean_and_no_interval(count):
    found = paired(torch.ones(count), torch.zeros(count))
    assert (found.mean, found.low, found.high, found.n) == (1, None, None, count)
