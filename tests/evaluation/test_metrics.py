"""Cosine and bootstrap against values computed by hand."""

import math

import pytest
import torch

from imprompt.evaluation.metrics import bootstrap, cosine


def test_cosine_ignores_length():
    assert cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0, 0.0]])).item() == pytest.approx(1)
    assert cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item() == pytest.approx(0)


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
