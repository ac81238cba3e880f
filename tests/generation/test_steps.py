"""Progress: each step is told, previews look like what is drawn, and an exception ends a drawing cleanly."""

import copy
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import tinydit
from imprompt.generation.drawing import keep_float32
from imprompt.generation.engine import Engine
from imprompt.generation.pipelines import scheduler_for
from imprompt.generation.steps import latent_colours, reported
from imprompt.schema.request import SCHEDULERS, Request


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("scheduler", [None, "euler-a", "pndm", "dpm++2m", "lcm"])
def test_each_step_is_told_once_and_the_picture_stays_the_same(engine, common, pictures, scheduler):
    request = Request(
        prompt="a", images=[pictures / "ref.png"], count=2, exact=True, **{**common, "scheduler": scheduler}
    )
    steps = []
    told = engine.run(request, on_step=steps.append)
    total = steps[0].total
    assert [(step.picture, step.index) for step in steps] == [
        (p, i + 1) for p in (0, 1) for i in range(total)
    ]
    assert {(step.total, step.pictures) for step in steps} == {(total, 2)}
    for one, other in zip(told.images, engine.run(request).images, strict=True):
        assert np.array_equal(pixels(one), pixels(other))


def test_steps_are_those_that_are_really_drawn(engine, common, pictures):
    request = Request(
        task="edit", image=pictures / "ref.png", prompt="a", strength=0.5,
        **{**common, "adapter": None, "steps": 10},
    )  # fmt: skip
    steps = []
    engine.run(request, on_step=steps.append)
    assert [(step.index, step.total) for step in steps] == [(i + 1, 5) for i in range(5)]


def test_the_last_preview_resembles_the_picture():
    steps = []
    request = Request(prompt="a red apple, neon style", steps=12, seed=3)
    drawn = Engine().run(request, on_step=steps.append).images[0]
    preview = steps[-1].preview()
    assert preview.size == drawn.size
    first, last = (np.abs(pixels(step.preview()) - pixels(drawn)).mean() for step in (steps[0], steps[-1]))
    flat = np.abs(pixels(drawn).mean((0, 1)) - pixels(drawn)).mean()
    assert last < min(first, 0.6 * flat)


def test_what_a_step_raises_ends_the_drawing_and_leaves_no_trace(engine, common, pictures):
    request = Request(prompt="a", images=[pictures / "ref.png"], **common)
    plain = Request(prompt="a", **{**common, "adapter": None})
    before, alone = engine.run(request).images[0], engine.run(plain).images[0]

    def stop(step):
        if step.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(request, on_step=stop)
    assert np.array_equal(pixels(engine.run(plain).images[0]), pixels(alone))
    assert np.array_equal(pixels(engine.run(request).images[0]), pixels(before))


def test_pictures_of_several_requests_are_counted_on(engine, common, pictures):
    one = Request(prompt="a", images=[pictures / "ref.png"], **common)
    other = one.replace(prompt="b", count=2)
    steps = []
    engine.run_batch([one, other, one.replace(steps=2)], on_step=steps.append)
    assert [(step.picture, step.pictures, step.total) for step in steps] == [(0, 4, 3)] * 3 + [(3, 4, 2)] * 2
    previews = [step.preview(2) for step in steps[:3]]
    assert not np.array_equal(pixels(previews[0]), pixels(previews[2]))


def test_a_clip_previews_a_frame():
    steps = []
    request = Request(task="animate", prompt="a red apple, neon style", frames=4, steps=2, seed=1)
    Engine().run(request, on_step=steps.append)
    assert isinstance(steps[-1].preview(), Image.Image)
    assert steps[-1].preview().size == (128, 128)


def test_tokens_of_flux_are_shown_where_their_pixels_are():
    pipe, steps = tinydit.flux(), []
    pipe.scheduler.set_timesteps(2)
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    tokens = pipe._pack_latents(latents, 1, 4, 16, 24)
    with reported(pipe, steps.append, 0, 1, (48, 32)):
        for shown in (latents, tokens):
            pipe.scheduler.step(torch.zeros_like(shown), pipe.scheduler.timesteps[len(steps)], shown)
    one, other = (step.preview() for step in steps)
    assert one.size == (48, 32)
    assert np.array_equal(pixels(one), pixels(other))


def test_colours_are_fitted_to_latents_as_pipelines_have_them():
    """SD3's and FLUX's are shifted as well as scaled."""
    vae = tinydit.sd3().vae
    colours = latent_colours(vae)
    plain = copy.deepcopy(vae)
    plain.register_to_config(shift_factor=None)
    latents = torch.randn(1, colours.shape[0] - 1, generator=torch.Generator().manual_seed(1))
    shift = vae.config.shift_factor * vae.config.scaling_factor
    ones = torch.ones(1, 1)
    shifted = torch.cat((latents - shift, ones), 1) @ colours
    assert torch.allclose(shifted, torch.cat((latents, ones), 1) @ latent_colours(plain), atol=1e-3)


@pytest.mark.parametrize("as_tuple", [True, False])
@pytest.mark.parametrize("name", [*SCHEDULERS, "flow"])
def test_half_precision_latents_end_as_the_rounded_float32_ones(name, as_tuple):
    own = diffusers.FlowMatchEulerDiscreteScheduler() if name == "flow" else diffusers.DDIMScheduler()
    pipe = SimpleNamespace(scheduler=own)

    def drawn(dtype):
        scheduler = scheduler_for(pipe, None if name == "flow" else name)
        keep_float32(scheduler)
        scheduler.set_timesteps(8)
        luck, taken = torch.Generator().manual_seed(1), {}
        if "generator" in scheduler.step.__wrapped__.__code__.co_varnames:
            taken = {"generator": torch.Generator().manual_seed(2)}
        latents = torch.randn(1, 4, 8, 8, generator=luck).bfloat16().to(dtype)
        for timestep in scheduler.timesteps:
            predicted = torch.randn(latents.shape, generator=luck).bfloat16().to(dtype)
            output = scheduler.step(predicted, timestep, latents, return_dict=not as_tuple, **taken)
            latents = output[0] if as_tuple else output.prev_sample
            assert latents.dtype == dtype
        return latents

    assert torch.equal(drawn(torch.bfloat16), drawn(torch.float32).bfloat16())


def test_latents_that_the_pipeline_changes_are_taken_as_they_are():
    scheduler = diffusers.DDIMScheduler()
    keep_float32(scheduler)
    scheduler.set_timesteps(4)
    zeros, ones = torch.zeros(1, 4, 2, 2).bfloat16(), torch.ones(1, 4, 2, 2).bfloat16()
    first, second = scheduler.timesteps[:2]
    scheduler.step(zeros, first, ones)
    masked = scheduler.step(zeros, second, zeros).prev_sample
    assert torch.equal(masked, zeros)
