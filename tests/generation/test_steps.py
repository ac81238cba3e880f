"""Progress: each step is told, previews look like what is drawn, and an exception ends a drawing cleanly."""

import numpy as np
import pytest
from PIL import Image

from imprompt.generation.engine import Engine
from imprompt.schema.request import Request


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
