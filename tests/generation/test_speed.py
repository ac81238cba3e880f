"""Drawing at other speeds: what runs less often, what the picture is then, and what is refused."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)

import tiny
from controls import saved, tiny_controlnet, tiny_t2i
from imprompt import output
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.clip import ImageEncoder
from imprompt.errors import UsageError
from imprompt.generation.engine import Engine
from imprompt.generation.speed import hurried, inner_reused
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.request import ControlRef, Request


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


@contextmanager
def counted(module):
    """The number of rows at each call of a module that returns a tensor."""
    rows = []
    hook = module.register_forward_hook(lambda _, args, output: rows.append(len(output)))
    try:
        yield rows
    finally:
        hook.remove()


def sd():
    return tiny.tiny_sd()


def with_control():
    return StableDiffusionControlNetPipeline(
        **tiny.tiny_sd().components, controlnet=tiny_controlnet(), requires_safety_checker=False
    )


def moving():
    parts = tiny.tiny_sd().components
    motion = tiny.tiny_motion()
    parts["unet"] = UNetMotionModel.from_unet2d(parts["unet"], motion)
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    return AnimateDiffPipeline(**{name: parts[name] for name in names}, motion_adapter=motion)


PIPES = [sd, tiny.tiny_sdxl, tiny.tiny_kolors, with_control, moving]


def call(pipe, **options):
    if pipe.__class__ is StableDiffusionControlNetPipeline:
        options["image"] = tiny.picture(3)
    if pipe.__class__ is AnimateDiffPipeline:
        options["num_frames"] = 3
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        "", num_inference_steps=5, guidance_scale=5, width=32, height=32, output_type="latent",
        generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip
    return drawn[0]


@contextmanager
def guidance_of_before(unet, calls):
    """At some calls, counted from 0, the uncond rows' output is as far from the cond rows' as it was last."""
    done, apart = 0, None

    def change(_, args, output):
        nonlocal done, apart
        uncond, cond = output[0].chunk(2)
        if done in calls:
            uncond = cond - apart
        done, apart = done + 1, cond - uncond
        changed = torch.cat((uncond, cond))
        return (changed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=changed)

    hook = unet.register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("make", PIPES, ids=lambda make: make.__name__)
def test_late_steps_run_the_cond_rows_alone_and_are_guided_as_the_step_before(make):
    if make is tiny.tiny_kolors:
        pytest.importorskip("sentencepiece")
    pipe = make()
    encoder = ImageEncoder(*tiny.tiny_encoder(), name="tiny")
    adapter = IPAdapter.from_state_dict(tiny.random_adapter_state(pipe.unet), image_encoder=encoder)
    adapter.attach(pipe).set_prompt(tiny.picture(1))
    exact = call(pipe)
    with guidance_of_before(pipe.unet, {2, 4}):
        wanted = call(pipe)
    with hurried(pipe, "balanced"), counted(pipe.unet.conv_in) as rows:
        drawn = call(pipe)  # the empty text is both rows', which cannot be told apart by comparing
    assert [count // rows[-1] for count in rows] == [2, 2, 1, 2, 1]
    torch.testing.assert_close(drawn, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drawn, exact, atol=1e-3)
    assert torch.equal(call(pipe), exact), "nothing stays behind"


def test_inner_blocks_run_at_every_third_call_and_when_the_number_of_rows_changes():
    unet, random = tiny.tiny_unet(), torch.Generator().manual_seed(1)
    sample, text = torch.randn(4, 4, 16, 16, generator=random), torch.randn(4, 5, 32, generator=random)

    def run(rows, timestep):
        with torch.no_grad():
            return unet(sample[rows], timestep, text[rows], return_dict=False)[0]

    both, cond, more = slice(2), slice(1, 2), slice(4)
    before = {name: set(vars(module)) for name, module in unet.named_modules()}
    exact = [run(both, timestep) for timestep in (800, 700)]
    inside, outside = unet.mid_block.resnets[0], unet.conv_out
    with inner_reused(unet), counted(inside) as inner, counted(outside) as outer:
        first, second = run(both, 800), run(both, 700)
        assert torch.equal(first, exact[0])
        assert not torch.equal(second, exact[1])
        assert torch.equal(run(both, 800), first), "only the inner blocks' output is kept"
        assert torch.equal(run(both, 700), exact[1])
        torch.testing.assert_close(run(cond, 700), exact[1][cond])
        run(more, 700)
    assert (inner, outer) == ([2, 2, 4], [2, 2, 2, 2, 1, 4])
    assert before == {name: set(vars(module)) for name, module in unet.named_modules()}
    assert torch.equal(run(both, 700), exact[1])


FIELDS = [
    {},
    {"task": "edit", "image": "other", "strength": 0.9},
    {"task": "inpaint", "image": "other", "mask": "mask"},
    {"controls": "net"},
    {"controls": "t2i"},
    {"count": 2},
    {"task": "animate", "frames": 3},
]
"""What differs in how a pipeline calls its models."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {"net": tiny_controlnet(), "t2i": tiny_t2i(), "motion": tiny.tiny_motion()}
    return {name: saved(model, folder / name) for name, model in made.items()}


@pytest.fixture
def ask(common, pictures, models):
    def asked(**fields):
        for name in ("image", "mask"):
            if name in fields:
                fields[name] = pictures / f"{fields[name]}.png"
        if "controls" in fields:
            control = ControlRef(
                kind="canny", path=str(pictures / "ref.png"), model=models[fields["controls"]]
            )
            fields["controls"] = [control]
        if fields.get("task") == "animate":
            fields["motion"] = models["motion"]
        shown = [ImagePrompt(str(pictures / "ref.png"), scale=0.8)]
        return Request(**{"images": shown, **common, "steps": 5, "guidance": 5, "prompt": "a cat", **fields})

    return asked


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("speed", ["balanced", "fast"])
def test_every_task_draws_faster_and_then_again_as_before(engine, ask, fields, speed):
    request = ask(**fields)
    exact = pixels(engine.run(request).images)
    result = engine.run(request.replace(speed=speed))
    assert result.request.speed == speed
    assert not np.array_equal(pixels(result.images), exact)
    assert np.array_equal(pixels(engine.run(request).images), exact)


def test_a_nine_channel_base_inpaints_faster(engine, ask, inpainting_base, pictures):
    place = {"base": str(inpainting_base), "adapter": str(inpainting_base / "adapters")}
    request = ask(task="inpaint", image="other", mask="mask", **place)
    drawn = [pixels(engine.run(request.replace(speed=speed)).images) for speed in ("exact", "fast", "exact")]
    assert np.array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0], drawn[1])


def test_regions_act_and_each_picture_of_a_batch_is_as_alone(engine, ask, pictures):
    region = TextRegion("a hat", str(pictures / "mask.png"))
    requests = [ask(speed="fast"), ask(speed="fast", prompt="a dog", seed=9, regions=[region])]
    requests.append(requests[1].replace(images=(), adapter=None))
    for result, request in zip(engine.run_batch(requests), requests, strict=True):
        alone = engine.run(request.replace(exact=True)).images
        assert np.abs(pixels(result.images) - pixels(alone)).max() <= 1


def test_a_picture_records_its_speed_and_is_repeated_with_it(ask, tmp_path):
    result = Engine().run(ask(speed="fast"))
    (path,) = output.save(result, tmp_path / "a.png")
    again = output.read_request(path)
    assert again.speed == "fast"
    assert np.array_equal(pixels(Engine().run(again).images), pixels(result.images))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speed": "balanced", "guidance": 1}, r"speed: 'balanced' .* none at 1"),
        ({"speed": "fast", "image_guidance": 3}, "image_guidance: speed 'fast' computes guidance seldom"),
        ({"speed": "quick"}, "speed: "),
    ],
)
def test_what_cannot_go_with_a_speed_is_said_in_one_line(engine, ask, fields, message):
    with pytest.raises(UsageError, match=message):
        engine.run(ask(**fields))


def test_what_only_shows_when_drawing_is_said_before(engine, ask):
    with pytest.raises(UsageError, match="explain: at speed 'fast'"):
        engine.run(ask(speed="fast"), explain=True)
    with pytest.raises(UsageError, match="speed: 'fast' is for UNets, and base 'flux' has a transformer"):
        engine.run(Request(prompt="a cat", base="flux", speed="fast"))


def test_a_unet_that_takes_guidance_as_an_input_has_nothing_to_leave_out():
    pipe = tiny.tiny_sd()
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8)
    with pytest.raises(UsageError, match="takes guidance as an input"), hurried(pipe, "balanced"):
        pass
    with hurried(pipe, "fast"):
        pass
