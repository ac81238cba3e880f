"""Requests drawn as one batch: each picture is as alone; what cannot be one batch is drawn apart."""

import numpy as np
import pytest
from PIL import Image

from imprompt.errors import UsageError
from imprompt.generation.engine import Engine
from imprompt.generation.steps import Step
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.request import Request


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def calls(engine: Engine, requests: list[Request]) -> tuple[list[list[Image.Image]], int]:
    """What a batch draws, and in how many calls of the pipeline."""
    first_steps = []

    def count(step: object) -> None:
        if step.index == 1:
            first_steps.append(step)

    results = engine.run_batch(requests, on_step=count)
    return [result.images for result in results], len(first_steps)


def equal_to_solo(engine: Engine, requests: list[Request], drawn: list[list[Image.Image]]) -> bool:
    # Within 1e-4 of the range: a value at the edge between two bytes may fall to the other side.
    return all(
        np.abs(pixels(one) - pixels(alone)).max() <= 1
        for images, request in zip(drawn, requests, strict=True)
        for one, alone in zip(images, engine.run(request.replace(exact=True)).images, strict=True)
    )


@pytest.fixture
def foreign(common, pictures) -> list[Request]:
    """Requests that agree in nothing but base, adapter, steps and size."""
    ref, other, mask = (str(pictures / f"{name}.png") for name in ("ref", "other", "mask"))
    drawn = Request(prompt="a cat", images=[ref], **common)
    return [
        drawn,
        drawn.replace(prompt="a dog", seed=7, images=[ImagePrompt([ref, other], weights=[1, 2])], scale=0.5),
        drawn.replace(
            prompt="", negative="blue", seed=8, images=[ImagePrompt(other, mask=mask, start=0.3), ref]
        ),
        drawn.replace(
            seed=9, images=[ImagePrompt(ref, profile="style", scaling="k+v", negative=other)],
            regions=[TextRegion("a hat", mask)], count=2,
        ),
    ]  # fmt: skip


def test_foreign_requests_are_one_batch_and_each_as_alone(engine, foreign):
    drawn, count = calls(engine, foreign)
    assert count == 1
    assert [len(images) for images in drawn] == [1, 1, 1, 2]
    assert equal_to_solo(engine, foreign, drawn)


@pytest.mark.parametrize("task", ["edit", "inpaint"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler-a"])
def test_pictures_to_start_from_are_shared_by_a_batch(engine, foreign, pictures, task, scheduler):
    start = {"task": task, "image": pictures / "wide.png", "strength": 0.7, "scheduler": scheduler}
    if task == "inpaint":
        start |= {"image": pictures / "ref.png", "mask": pictures / "mask.png"}
    requests = [request.replace(**start) for request in foreign]
    drawn, count = calls(engine, requests)
    assert count == 1
    assert equal_to_solo(engine, requests, drawn)


def test_what_differs_in_more_is_drawn_apart(engine, foreign):
    first, second, third, _ = foreign
    requests = [first, second.replace(steps=2), third.replace(steps=2), first.replace(size=(40, 32))]
    drawn, count = calls(engine, requests)
    assert count == 3
    assert equal_to_solo(engine, requests, drawn)


def test_records_of_a_batch_are_those_of_each_request(engine, foreign):
    results = engine.run_batch(foreign)
    for result, request in zip(results, foreign, strict=True):
        assert result.request == engine.run(request).request
        assert np.abs(pixels(engine.run(result.request).images[0]) - pixels(result.images[0])).max() <= 1


def test_many_pictures_are_drawn_in_several_batches(engine, foreign):
    drawn, count = calls(Engine(at_once=2), foreign)
    assert count == 3
    assert equal_to_solo(engine, foreign, drawn)
    with pytest.raises(UsageError, match="at_once is 0"):
        Engine(at_once=0)


def test_the_pictures_of_one_request_are_a_batch_where_exactness_is_not_asked_for(engine, foreign):
    asked, seen = foreign[1].replace(count=3), []

    def told(step: Step) -> None:
        seen.append((step.picture, step.together))

    images = engine.run(asked, on_step=told).images
    exact = engine.run(asked.replace(exact=True), on_step=told).images
    assert seen == [(0, 3)] * 3 + [(0, 1)] * 3 + [(1, 1)] * 3 + [(2, 1)] * 3
    for index, (image, alone) in enumerate(zip(images, exact, strict=True)):
        assert np.abs(pixels(image) - pixels(alone)).max() <= 1
        assert np.array_equal(pixels(engine.run(asked.single(index)).images[0]), pixels(alone))


def test_requests_that_are_exact_are_drawn_alone_among_others(engine, foreign):
    requests = [request.replace(exact=index > 1) for index, request in enumerate(foreign)]
    for result, request in list(zip(engine.run_batch(requests), requests, strict=True))[2:]:
        for image, alone in zip(result.images, engine.run(request).images, strict=True):
            assert np.array_equal(pixels(image), pixels(alone))


def test_requests_that_alternate_are_sorted_into_batches_and_back(engine, foreign):
    first, second, *_ = foreign
    requests = [first, first.replace(steps=2), second, second.replace(steps=2)]
    drawn = [result.images for result in engine.run_batch(requests)]
    assert equal_to_solo(engine, requests, drawn)
    timings = [result.timings for result in engine.run_batch(requests)]
    assert timings[0] == timings[2] != timings[1] == timings[3], "requests drawn as one batch share them"


def test_no_request_is_no_result(engine):
    assert engine.run_batch([]) == []
