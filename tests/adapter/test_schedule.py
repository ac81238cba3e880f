"""Curves against straight interpolation, gates against windows and curves at every timestep."""

import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imprompt.adapter.schedule import Clock, Gate, When, evaluate
from imprompt.errors import UsageError
from imprompt.schema.options import CURVES, read_curve, read_selection

points = st.lists(
    st.tuples(st.integers(0, 20).map(lambda i: i / 20), st.floats(-2, 2, width=32)),
    min_size=1,
    max_size=6,
    unique_by=lambda point: point[0],
).map(lambda found: tuple(sorted(found)))


CPU, SINGLE = torch.device("cpu"), torch.float32


@settings(max_examples=60, deadline=None)
@given(st.lists(points, min_size=1, max_size=3), st.floats(0, 1, width=32))
def test_a_curve_is_straight_between_its_points(
    curves: list[tuple[tuple[float, float], ...]], at: float
) -> None:
    gate = Gate([When(curve=c) for c in curves], CPU, SINGLE)
    gate.update(Clock(1000), torch.tensor(1000 * (1 - at)))
    expected = [np.interp(at, *zip(*c, strict=True)) for c in curves]
    np.testing.assert_allclose(gate.factor.numpy(), expected, atol=2e-4)


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
    gate = Gate([When(0.2, 0.6, CURVES["fade-in"]), When(), When(0.5, 1.0)], CPU, SINGLE)
    factor = gate.factor
    for t, expected in ((900.0, (0, 1, 0)), (800.0, (0.2, 1, 0)), (500.0, (0.5, 1, 1)), (400.0, (0, 1, 1))):
        gate.update(Clock(1000), torch.tensor(t))
        assert gate.factor is factor
        torch.testing.assert_close(factor, torch.tensor(expected).float())


def test_rows_of_one_timestep_each_are_told_apart() -> None:
    gate = Gate([When(end=0.5)] * 4, CPU, SINGLE)
    gate.update(Clock(1000), torch.tensor([800.0, 200.0]))
    assert gate.factor.tolist() == [1, 1, 0, 0]


def test_rows_of_several_prompts_have_the_batch_rows_timesteps() -> None:
    gate = Gate([When(end=0.5)] * 2 + [When(start=0.5)] * 2, CPU, SINGLE, prompts=2)
    gate.update(Clock(1000), torch.tensor([800.0, 200.0]))
    assert gate.factor.tolist() == [1, 0, 0, 1]


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TRAINING_STEPS = {
    "DDIM": diffusers.DDIMScheduler(**BETAS),
    "DDPM": diffusers.DDPMScheduler(**BETAS),
    "PNDM": diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True),
    "Euler": diffusers.EulerDiscreteScheduler(**BETAS),
    "Euler, Karras": diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
    "Euler a": diffusers.EulerAncestralDiscreteScheduler(**BETAS),
    "LMS": diffusers.LMSDiscreteScheduler(**BETAS),
    "Heun": diffusers.HeunDiscreteScheduler(**BETAS),
    "DPM++": diffusers.DPMSolverMultistepScheduler(**BETAS),
    "DPM++ single": diffusers.DPMSolverSinglestepScheduler(**BETAS),
    "DEIS": diffusers.DEISMultistepScheduler(**BETAS),
    "UniPC": diffusers.UniPCMultistepScheduler(**BETAS),
    "KDPM2": diffusers.KDPM2DiscreteScheduler(**BETAS),
    "LCM": diffusers.LCMScheduler(**BETAS),
    "TCD": diffusers.TCDScheduler(**BETAS),
}
OWN_UNITS = {
    "EDM Euler (Playground v2.5)": diffusers.EDMEulerScheduler(),
    "EDM DPM++ (Playground v2.5)": diffusers.EDMDPMSolverMultistepScheduler(),
    "Euler, continuous": diffusers.EulerDiscreteScheduler(
        **BETAS, timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True
    ),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow, shifted (SD3.5)": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, Heun": diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "DPM++, flow": diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    "UniPC, flow": diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
}
SCHEDULERS = TRAINING_STEPS | OWN_UNITS
WINDOWS = ((0.0, 0.5), (0.2, 1.0), (0.0, 0.8), (0.3, 0.7))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_is_that_share_of_the_steps_with_every_scheduler(
    name: str, window: tuple[float, float]
) -> None:
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(40)
    gate = Gate([When(*window)], CPU, SINGLE)
    clock, open_ = Clock.of(scheduler, CPU), []
    for timestep in dict.fromkeys(scheduler.timesteps.tolist()):
        gate.update(clock, torch.tensor(float(timestep)))
        open_.append(bool(gate.factor.item()))
    share = sum(open_) / len(open_)
    if name in OWN_UNITS:
        assert share == pytest.approx(window[1] - window[0])
    elif "Karras" not in name:  # whose steps are not evenly spaced in training steps
        assert share == pytest.approx(window[1] - window[0], abs=0.06)
    assert open_[0] is (window[0] == 0)
    assert open_[-1] is (window[1] == 1)


def test_a_rounded_timestep_is_the_nearest_of_the_run() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    clock = Clock.of(scheduler, CPU)
    rounded = (scheduler.timesteps / 1000).to(torch.bfloat16).float() * 1000  # as FLUX is called
    assert clock.position(rounded).tolist() == list(range(28))


def test_the_clock_of_no_scheduler_is_a_thousand_training_steps() -> None:
    assert Clock.of(None, CPU).position(torch.tensor(250.0)).item() == 750


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
        ("0:1,x:2", "'x:2' is not a point"),
        ([], "at least|expected"),
        ([(0.0, math.nan)], "not a finite number"),
        ([(1.5, 1.0)], "outside 0 to 1"),
        ([(0.5, 1.0), (0.2, 1.0)], "ascending"),
        ([0.5], "not a point"),
    ],
)
def test_a_bad_curve_is_one_line(curve: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_curve(curve)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("selection", "said"),
    [("0-x", "not a token or range"), ("4", "no token 4"), ("1,1", "twice"), ([], "no token")],
)
def test_a_bad_selection_is_one_line(selection: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_selection(selection, 4)  # type: ignore[arg-type]


def test_tokens_are_selected_by_number_and_range() -> None:
    assert read_selection("0-2,8", 16) == (0, 1, 2, 8)
    assert read_selection([3, 1], 4) == (3, 1)
