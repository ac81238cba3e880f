"""Curves against straight interpolation, gates against windows and curves at every timestep."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imprompt.adapter.schedule import Gate, When, evaluate
from imprompt.errors import UsageError
from imprompt.schema.options import CURVES, read_curve, read_selection

points = st.lists(
    st.tuples(st.integers(0, 20).map(lambda i: i / 20), st.floats(-2, 2, width=32)),
    min_size=1,
    max_size=6,
    unique_by=lambda point: point[0],
).map(lambda found: tuple(sorted(found)))


@settings(max_examples=60, deadline=None)
@given(st.lists(points, min_size=1, max_size=3), st.floats(0, 1, width=32))
def test_a_curve_is_straight_between_its_points(
    curves: list[tuple[tuple[float, float], ...]], at: float
) -> None:
    gate = Gate.of([When(curve=c) for c in curves], 1000, 1, torch.device("cpu"), torch.float32)
    expected = [np.interp(at, *zip(*c, strict=True)) for c in curves]
    if gate is None:
        assert expected == [1.0] * len(curves)
        return
    gate.update(torch.tensor(1000 * (1 - at)))
    np.testing.assert_allclose(gate.factor.flatten().numpy(), expected, atol=2e-4)


def test_two_points_at_one_place_are_a_step() -> None:
    places, factors = torch.tensor([[0.0, 0.5, 0.5, 1.0]]), torch.tensor([[1.0, 1.0, 0.2, 0.2]])
    for at, factor in ((0.49, 1.0), (0.5, 0.2), (0.9, 0.2)):
        torch.testing.assert_close(evaluate(places, factors, torch.tensor([at])), torch.tensor([factor]))


def test_named_curves_start_and_end_where_they_say() -> None:
    smooth = CURVES["smooth-in"]
    for x in np.linspace(0, 1, 41):
        assert np.interp(x, *zip(*smooth, strict=True)) == pytest.approx(3 * x**2 - 2 * x**3, abs=3e-3)
    ends = {name: (curve[0][1], curve[-1][1]) for name, curve in CURVES.items()}
    assert ends["fade-in"] == ends["smooth-in"] == (0, 1)
    assert ends["fade-out"] == ends["smooth-out"] == (1, 0)
    assert ends["fade-in-out"] == (0, 0)


def test_window_and_curve_multiply_and_the_tensor_stays_the_same() -> None:
    when = [When(0.2, 0.6, CURVES["fade-in"]), When(), When(0.5, 1.0)]
    gate = Gate.of(when, 1000, 2, torch.device("cpu"), torch.float32)
    assert gate is not None
    factor = gate.factor
    for t, expected in ((900.0, (0, 1, 0)), (800.0, (0.2, 1, 0)), (500.0, (0.5, 1, 1)), (400.0, (0, 1, 1))):
        gate.update(torch.tensor(t))
        assert gate.factor is factor
        torch.testing.assert_close(factor[::2].flatten(), torch.tensor(expected).float())
        assert torch.equal(factor[::2], factor[1::2])


def test_what_acts_in_full_throughout_needs_no_gate() -> None:
    device = torch.device("cpu")
    assert Gate.of([When(), When(curve=((0.0, 1.0), (1.0, 1.0)))], 1000, 1, device, torch.float32) is None


def test_a_curve_of_zeros_never_acts() -> None:
    assert When(curve=((0.0, 0.0), (1.0, 0.0))).never
    assert When(start=0.4, end=0.4).never
    assert not When(curve=CURVES["fade-in"]).never


def test_points_are_read_from_text() -> None:
    assert read_curve("0:1,0.5:0.2, 1:0") == ((0.0, 1.0), (0.5, 0.2), (1.0, 0.0))
    assert read_curve("Fade In") == CURVES["fade-in"]


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        ("fade-inn", "did you mean 'fade-in'"),
        ("0:1,x:2", "'x:2' is no point"),
        ([], "at least|expected"),
        ([(0.0, math.nan)], "no finite number"),
        ([(1.5, 1.0)], "outside 0 to 1"),
        ([(0.5, 1.0), (0.2, 1.0)], "ascending"),
        ([0.5], "no point"),
    ],
)
def test_a_bad_curve_is_one_line(curve: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_curve(curve)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("selection", "said"),
    [("0-x", "no token or range"), ("4", "no token 4"), ("1,1", "twice"), ([], "no token")],
)
def test_a_bad_selection_is_one_line(selection: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_selection(selection, 4)  # type: ignore[arg-type]


def test_tokens_are_selected_by_number_and_range() -> None:
    assert read_selection("0-2,8", 16) == (0, 1, 2, 8)
    assert read_selection([3, 1], 4) == (3, 1)
