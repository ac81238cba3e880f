"""PSNR, top-k and bootstrap against values computed by hand."""

import math

import pytest
import torch

from imprompt.evaluation.metrics import bootstrap, cosine, psnr, topk_hits


def test_psnr_of_a_known_error():
    black, grey = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1)
    assert psnr(black, grey).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)


def test_psnr_of_equal_pictures_is_infinite():
    assert psnr(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2)).item() == math.inf


def test_psnr_refuses_to_broadcast():
    with pytest.raises(ValueError, match="one shape"):
        psnr(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))


def test_cosine_ignores_length():
    assert cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0, 0.0]])).item() == pytest.approx(1)
    assert cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item() == pytest.approx(0)


def test_topk_counts_the_true_class_among_the_best():
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.1, 0.5, 0.4]])
    truth = torch.tensor([2, 0])
    assert topk_hits(scores, truth, 1).tolist() == [False, False]
    assert topk_hits(scores, truth, 2).tolist() == [True, False]
    assert topk_hits(scores, truth, 3).tolist() == [True, True]


def test_a_constant_scorer_gets_no_hit_by_ties():
    assert not topk_hits(torch.zeros(4, 10), torch.arange(4), 5).any()


def test_scores_that_are_nan_are_misses():
    assert not topk_hits(torch.full((1, 3), math.nan), torch.tensor([0]), 3).any()


def test_bootstrap_interval_covers_the_mean_and_narrows_with_more_values():
    source = torch.Generator().manual_seed(1)
    few, many = bootstrap(torch.rand(20, generator=source)), bootstrap(torch.rand(2000, generator=source))
    assert few.low < few.mean < few.high
    assert many.high - many.low < 0.3 * (few.high - few.low)
    # The normal approximation of a uniform's mean: 1.96·sqrt(1/12/n) either side.
    assert many.high - many.low == pytest.approx(2 * 1.96 * math.sqrt(1 / 12 / 2000), rel=0.15)


def test_bootstrap_repeats_itself():
    values = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    assert bootstrap(values) == bootstrap(values)


@pytest.mark.parametrize("values", [torch.empty(0), torch.tensor([0.5, math.nan]), torch.tensor([math.inf])])
def test_bootstrap_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match=r"no values|not finite"):
        bootstrap(values)
