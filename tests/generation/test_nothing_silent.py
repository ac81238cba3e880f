"""What would have no effect, or another than before, is said: idle prompts, other weights, crops, threads."""

import re
import shutil
import threading

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from imprompt.errors import ModelError, UsageError
from imprompt.generation.engine import Engine
from imprompt.generation.families import find_base
from imprompt.generation.idle import idle_notes
from imprompt.generation.inputs import read_inputs
from imprompt.generation.job import Job
from imprompt.generation.loading import Models
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request


def pixels(image):
    return np.asarray(image).astype(int)


def notes(engine, request):
    return [note for note in engine.run(request).notes if "has no effect" in note]


@pytest.mark.parametrize(
    ("prompt", "fields", "said"),
    [
        ({"end": 0.9}, {}, None),
        (
            {"end": 0.5},
            {"task": "edit", "strength": 0.34},
            "none of the 1 steps.* lies from start 0 to end 0.5",
        ),
        ({"end": 0.02}, {}, "none of the 3 steps"),
        ({"start": 0.5, "end": 0.5}, {}, "none of the 3 steps"),
        ({"curve": "0:0,1:0"}, {}, "its curve is 0 at each of the 3 steps"),
        ({"curve": "0.5:0,1:1", "end": 0.4}, {}, "its curve is 0 at each of the 1 steps"),
        ({"profile": "default:0"}, {}, "its profile is 0 in every layer"),
        ({"profile": (0, 0, 0, 0), "scale": 1}, {}, "its profile is 0"),
        ({"scale": 0}, {}, None),
        ({}, {}, None),
    ],
)
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_a_prompt_that_cannot_act_in_this_run_is_said(
    engine, common, pictures, prompt, fields, said, scheduler
):
    start = {"image": pictures / "ref.png"} if fields.get("task") == "edit" else {}
    request = Request(
        prompt="a", images=[ImagePrompt(pictures / "ref.png", **prompt)], scheduler=scheduler,
        **fields, **start, **common,
    )  # fmt: skip
    found = notes(engine, request)
    if said is None:
        assert found == []
        return
    (note,) = found
    assert note.startswith("images.0 has no effect: ")
    assert re.search(said, note)
    drawn = engine.run(request).images[0]
    plain = request.replace(images=(), adapter=None)
    assert np.array_equal(pixels(drawn), pixels(engine.run(plain).images[0])), "and it is true"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"offload": "adapter"}, ["offload 'adapter' has no effect: there is no image prompt"]),
        ({"offload": "model"}, []),
        ({}, []),
    ],
)
def test_an_offload_of_adapters_that_are_not_there_is_said(fields, said):
    """On any machine: the Engine itself asks for a GPU before it draws with ``offload``."""
    request = Request(prompt="a", adapter=None, **fields)
    base = find_base("emoji")
    job = Job(base, (), None, read_inputs(request, {}, base.defaults.size))
    found = idle_notes(job, Models().load(request.replace(offload="none", device="cpu"), base, (), None, ()))
    assert [note[: len(start)] for note, start in zip(found, said, strict=True)] == said


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"combine": "average"}, r"images.0.combine has no effect: 'average' of a single picture"),
        ({"combine": "add", "weights": (1,)}, r"images.0.combine has no effect: 'add'"),
        ({"combine": "add", "weights": (2,)}, None),
        ({"framing": "top"}, r"wide.png': framing=top has no effect, for it is wider than high"),
        ({"framing": "left"}, None),
    ],
)
def test_an_option_that_a_picture_gives_nothing_to_do_is_said(engine, common, pictures, prompt, said):
    def asked(**options):
        image = ImagePrompt(pictures / "wide.png", **options)
        return engine.run(Request(prompt="a", images=[image], **common))

    drawn, plain = asked(**prompt), asked()
    alike = np.array_equal(pixels(drawn.images[0]), pixels(plain.images[0]))
    found = [note for note in drawn.notes if "has no effect" in note]
    assert alike == (said is not None)
    assert [bool(re.search(said or "", note)) for note in found] == ([True] if said else [])


@pytest.mark.parametrize(
    "what",
    [
        "adapters/ip-adapter.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "image_encoder/model.safetensors",
    ],
)
def test_other_weights_than_the_recorded_are_an_error(common, base, pictures, tmp_path, what):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    fields = {**common, "base": str(folder), "adapter": str(folder / "adapters")}
    drawn = Engine().run(Request(prompt="a", images=[pictures / "ref.png"], **fields)).request
    assert {name.split()[0] for name in drawn.fingerprints} == {"base", "adapter", "image"}
    Engine().run(drawn)
    tensors = load_file(folder / what)
    name = next(name for name, weight in sorted(tensors.items()) if weight.numel() > 8)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, folder / what, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its weights are not those .*\(--force\)"):
        Engine().run(drawn)
    Engine().run(drawn.replace(fingerprints={}))


def test_a_lora_that_changed_is_an_error(common, base, pictures, tmp_path):
    drawn = Request(prompt="a", images=[pictures / "ref.png"], **common)
    known = Engine().run(drawn).request
    with pytest.raises(ModelError, match=r"base .*: its weights are not those"):
        Engine().run(known.replace(fingerprints=dict.fromkeys(known.fingerprints, "0" * 12)))
    other = known.replace(fingerprints={"base elsewhere": "0" * 12})
    assert np.array_equal(pixels(Engine().run(other).images[0]), pixels(Engine().run(drawn).images[0]))


def test_what_lies_on_the_picture_is_cropped_as_it_is(engine, common, pictures):
    photo = Image.open(pictures / "ref.png").resize((64, 32))
    mask = Image.new("L", (64, 32))
    mask.paste(255, (32, 0, 64, 32))  # the right half; of the middle square, too
    square = mask.crop((16, 0, 48, 32))
    plain = {name: value for name, value in common.items() if name != "adapter"}
    fields = {"task": "inpaint", "prompt": "a", "image": "photo", "mask": "mask", "size": (32, 32)}
    shown = Request(images=[ImagePrompt("other", mask="mask")], scale=1, **fields, **common)
    given = {"photo": photo, "mask": mask, "other": Image.open(pictures / "other.png")}
    wide = engine.run(shown, pictures=given).images[0]
    cropped = {**given, "photo": photo.crop((16, 0, 48, 32)), "mask": square}
    assert np.abs(pixels(wide) - pixels(engine.run(shown, pictures=cropped).images[0])).max() <= 2
    region = Request(regions=[{"text": "a dog", "mask": "mask"}], **fields, **plain)
    wide, narrow = (engine.run(region, pictures=some).images[0] for some in (given, cropped))
    assert np.abs(pixels(wide) - pixels(narrow)).max() <= 2


def test_models_are_released_after_the_drawing_of_another_thread(common):
    engine, early = Engine(), []
    thread = threading.Thread(target=engine.release)

    def told(step):
        if step.index == 1:
            thread.start()
            thread.join(0.3)
        early.append(not thread.is_alive())

    engine.run(Request(prompt="a", **{**common, "adapter": None}), on_step=told)
    thread.join()
    assert not any(early)
    assert engine.loaded == ()


def test_threads_that_share_an_engine_draw_what_one_draws(common, pictures):
    engine = Engine()
    requests = [
        Request(prompt="a", images=[pictures / f"{name}.png"], **{**common, "seed": seed})
        for name, seed in (("ref", 1), ("other", 2), ("wide", 3), ("ref", 4))
    ]
    expected = [pixels(engine.run(request).images[0]) for request in requests]
    drawn: dict[int, np.ndarray] = {}

    def draw(number: int) -> None:
        drawn[number] = pixels(engine.run(requests[number]).images[0])

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(drawn[number], one) for number, one in enumerate(expected))


def test_engines_in_several_threads_load_at_once(common, pictures):
    request = Request(prompt="a", images=[pictures / "ref.png"], **common)
    found: list[object] = []

    def draw() -> None:
        try:
            found.append(pixels(Engine().run(request).images[0]))
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=draw) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(one, found[0]) for one in found), found


def test_an_engine_cannot_draw_within_its_own_step(engine, common):
    request = Request(prompt="a", **{**common, "adapter": None})
    with pytest.raises(UsageError, match="use another engine"):
        engine.run(request, on_step=lambda _: engine.run(request))
    assert engine.run(request).images
