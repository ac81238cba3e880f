"""What a control adds to the UNet under each ``favor``, through the engine: by task, half and control."""

import json
from collections.abc import Callable
from functools import wraps
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from controls import saved, tiny_controlnet, tiny_sparse, tiny_t2i, tiny_union
from imprompt import output
from imprompt.errors import UsageError
from imprompt.generation.engine import complete
from imprompt.generation.families import find_base
from imprompt.schema.request import ControlRef, Request

FRAMES = 4
Added = Callable[[Request], list[Tensor]]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made = {
        "net": tiny_controlnet(), "net2": tiny_controlnet(seed=12), "netxl": tiny_controlnet("sdxl"),
        "union": tiny_union(), "sparse": tiny_sparse(), "t2i": tiny_t2i(), "motion": tiny.tiny_motion(),
        "xl": tiny.tiny_sdxl(),
    }  # fmt: skip
    return {name: saved(model, folder / name) for name, model in made.items()}


class Seen(Exception):
    """Ends a drawing at its first step."""


@pytest.fixture
def added(engine, monkeypatch) -> Added:
    """What the UNet is given at the first step of a request, from the finest block to the middle one."""
    seen: list[list[Tensor]] = []

    def recording(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def recorded(*args: Any, **call: Any) -> Any:
            down, middle = (
                call.get(f"{at}_additional_residual{s}") for at, s in (("down_block", "s"), ("mid_block", ""))
            )
            seen.append([] if down is None else [each.clone() for each in (*down, middle)])
            raise Seen

        return recorded

    def first_step(request: Request) -> list[Tensor]:
        seen.clear()
        with monkeypatch.context() as patch:
            for kind in (diffusers.UNet2DConditionModel, diffusers.UNetMotionModel):
                patch.setattr(kind, "forward", recording(kind.forward))
            with pytest.raises(Seen):
                engine.run(request)
        return seen[0]

    return first_step


@pytest.fixture
def asked(common, pictures, models) -> Callable[..., Request]:
    """A request of one of :data:`CASES`; in it ``<name>`` is a model or picture."""

    def of_case(case: str, favor: str | None = "balanced", **more: object) -> Request:
        def named(value: object) -> object:
            if not (isinstance(value, str) and value.startswith("<")):
                return value
            name, _, kind = value[1:-1].partition(":")
            return models[name] + f":{kind}" * bool(kind) if name in models else pictures / f"{name}.png"

        fields = {name: named(value) for name, value in CASES[case].items()}
        net = {"kind": "none", "path": pictures / "ref.png", "model": named("<net>")}
        net |= {name.removeprefix("control."): fields.pop(name) for name in (*fields,) if "." in name}
        own = {key: value for key, value in common.items() if key != "adapter"}
        controls = [ControlRef(**net, favor=favor)]
        return Request(**{**own, "guidance": 4, "prompt": "a cat", "controls": controls, **fields, **more})

    return of_case


CASES: dict[str, dict[str, object]] = {
    "generate": {},
    "edit": {"task": "edit", "image": "<other>"},
    "inpaint": {"task": "inpaint", "image": "<other>", "mask": "<mask>"},
    "clip": {"task": "animate", "frames": FRAMES, "motion": "<motion>"},
    "long clip": {"task": "animate", "frames": 11, "motion": "<motion>"},
    "frame of a clip": {
        "task": "animate", "frames": FRAMES, "motion": "<motion>", "control.model": "<sparse>",
        "control.kind": "frame", "control.at": 0,
    },
    # those of another base together: the engine keeps one
    "xl": {"base": "<xl>", "size": 32, "control.model": "<netxl>"},
    "union": {"base": "<xl>", "size": 32, "control.model": "<union:canny>"},
    "xl clip": {
        "task": "animate", "frames": FRAMES, "motion": "<motion>", "base": "<xl>", "size": 32,
        "control.model": "<netxl>",
    },
}  # fmt: skip


def expected(balanced: list[Tensor], favor: str, *, guided: bool = True) -> list[Tensor]:
    """A1111's rule: the middle block's as they are, each finer one 0.825 of the next; "control" without those
    of the unconditional half, which comes first."""
    found, factor = [], 1.0
    for residual in reversed(balanced):
        mine = residual * (factor if favor != "balanced" else 1.0)
        if favor == "control" and guided:
            mine[: len(mine) // 2] = 0
        found.append(mine)
        factor *= 0.825
    return found[::-1]


def check(given: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(given) == len(wanted) > 3
    for mine, theirs in zip(given, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", list(CASES))
def test_residuals_fade_to_the_finest_block_and_control_keeps_them_from_the_uncond_half(added, asked, case):
    balanced = added(asked(case))
    assert all(each.abs().max() > 1e-3 for each in balanced)
    for favor in ("prompt", "control"):
        check(added(asked(case, favor)), expected(balanced, favor))


def test_a_video_that_is_redrawn_favours_too(added, asked, pictures, tmp_path):
    tiny.picture(1, (40, 40)).save(
        tmp_path / "film.gif", save_all=True, append_images=[tiny.picture(2, (40, 40))]
    )
    film = {"video": tmp_path / "film.gif", "frames": 2, "strength": 0.7}
    check(added(asked("clip", "control", **film)), expected(added(asked("clip", **film)), "control"))


def test_without_guidance_there_is_no_uncond_half_and_control_weakens_as_prompt_does(added, asked):
    balanced = added(asked("generate", guidance=1))
    for favor in ("prompt", "control"):
        check(added(asked("generate", favor, guidance=1)), expected(balanced, favor, guided=False))


def test_each_of_several_controls_has_its_own_also_where_one_model_follows_two(
    added, asked, pictures, models
):
    ref = asked("generate").controls[0]
    refs = [
        ref.replace(favor="control"),
        ref.replace(model=models["net2"], favor="prompt", scale=0.7),
        ref.replace(path=str(pictures / "other.png")),  # the first's model
    ]
    alone = [
        expected(added(asked("generate", controls=[each.replace(favor="balanced")])), each.favor)
        for each in refs
    ]
    summed = [sum(parts[1:], parts[0]) for parts in zip(*alone, strict=True)]
    check(added(asked("generate", controls=refs)), summed)


@pytest.mark.parametrize("favor", ["prompt", "control"])
@pytest.mark.parametrize("guidance", [{}, {"image_guidance": 6.0}])
def test_a_picture_of_a_batch_with_an_image_prompt_is_as_alone(
    engine, asked, common, pictures, favor, guidance
):
    shown = {"images": [pictures / "other.png"], "adapter": common["adapter"], **guidance}
    request = asked("generate", favor, count=3, **shown)
    together = engine.run(request).images
    for index, image in enumerate(together):
        alone = engine.run(request.single(index)).images[0]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(alone)).max() <= 1
    balanced = np.asarray(engine.run(asked("generate", **shown)).images[0])
    assert not np.array_equal(np.asarray(together[0]), balanced)


@pytest.mark.parametrize("speed", ["balanced", "fast"])
@pytest.mark.parametrize("favor", ["prompt", "control"])
def test_at_a_speed_one_control_is_followed_alike_alone_and_beside_a_silent_one(
    engine, asked, models, speed, favor
):
    """Beside another, a ControlNet is called with the conditional rows alone at most steps."""
    request = asked("generate", favor, speed=speed, steps=7)
    silent = request.controls[0].replace(model=models["net2"], scale=0)
    drawn = [np.asarray(engine.run(each).images[0]).astype(int) for each in (
        request, request.replace(controls=[*request.controls, silent]), request.replace(speed="exact")
    )]  # fmt: skip
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert np.abs(drawn[0] - drawn[2]).max() > 0


def test_a_model_without_a_favor_of_its_own_is_balanced_and_draws_after_another_as_before(
    engine, added, asked
):
    plain = asked("generate", None)
    drawn = engine.run(plain)
    assert drawn.request.controls[0].favor == "balanced"
    before, residuals = np.asarray(drawn.images[0]), added(plain)
    assert not np.array_equal(np.asarray(engine.run(asked("generate", "control")).images[0]), before)
    for again in (plain, asked("generate", "balanced")):
        assert np.array_equal(np.asarray(engine.run(again).images[0]), before)
        assert all(map(torch.equal, added(again), residuals))


@pytest.mark.parametrize(
    ("fields", "favor"),
    [
        ({}, "control"),
        ({"guidance": 5.0}, "control"),
        ({"guidance": 1.0}, "balanced"),
        ({"prompt": "", "images": ["b.png"]}, "balanced"),
        ({"task": "animate"}, "balanced"),
        ({"task": "edit", "image": "b.png"}, "control"),
        ({"model": "emoji-canny"}, "control"),
        ({"favor": "balanced"}, "balanced"),
        ({"favor": "prompt", "guidance": 1.0}, "prompt"),
        ({"base": "sd15"}, "balanced"),
    ],
)
def test_a_complete_request_says_what_its_controls_favour_by_the_catalogue(fields, favor):
    own = {name: fields[name] for name in ("favor", "model") if name in fields}
    of_request = {name: value for name, value in fields.items() if name not in own}
    ref = ControlRef(kind="canny", path="a.png", **own)
    request = Request(**{"prompt": "a", "base": "emoji", "controls": [ref], **of_request})
    assert complete(request, find_base(request.base)).controls[0].favor == favor


def test_a_picture_drawn_before_controls_favoured_anything_is_repeated_balanced():
    old = Request(prompt="a", controls=[{"kind": "canny", "path": "a.png"}], fingerprints={"emoji": "0" * 12})
    fields = json.loads(old.to_json())
    del fields["controls"][0]["favor"]
    assert Request.from_mapping(fields).controls[0].favor == "balanced"
    assert Request.from_mapping({**fields, "fingerprints": {}}).controls[0].favor is None


def test_a_saved_picture_repeats_what_it_favours(engine, asked, tmp_path):
    drawn = engine.run(asked("generate", "prompt"))
    (path,) = output.save(drawn, tmp_path / "a.png")
    again = output.read_request(path)
    assert again.controls[0].favor == "prompt"
    assert np.array_equal(np.asarray(engine.run(again).images[0]), np.asarray(drawn.images[0]))


def test_a_model_that_follows_all_its_pictures_at_once_takes_one_favor(engine, asked, pictures):
    (ref,) = asked("union", "prompt").controls
    other = ref.replace(path=str(pictures / "other.png"), favor="control")
    with pytest.raises(UsageError, match="favor must be the same for all, not prompt and control"):
        engine.run(asked("union", controls=[ref, other]))
    (key,) = asked("frame of a clip").controls
    with pytest.raises(UsageError, match=r"a SparseCtrl.*favor must be the same for all"):
        engine.run(asked("frame of a clip", controls=[key, key.replace(at=1, favor="prompt")]))


def test_what_is_no_controlnet_of_a_unet_is_refused_and_balanced_is_not(engine, asked, models):
    (ref,) = asked("generate", "prompt").controls
    t2i = ref.replace(model=models["t2i"])
    with pytest.raises(UsageError, match=r"favor=prompt is for ControlNets of UNets, and .* a T2I-Adapter"):
        engine.run(asked("generate", controls=[t2i]))
    assert engine.run(asked("generate", controls=[t2i.replace(favor="balanced")])).images


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canny:a.png,favor=controlnet", "favor: input should be 'balanced', 'prompt' or 'control', got"),
        ("canny:a.png,favor=", "'favor' is empty"),
    ],
)
def test_another_favor_is_said_in_one_line(text, message):
    with pytest.raises(UsageError, match=message):
        ControlRef.parse(text)
    assert ControlRef.parse("canny:a.png,favor=control,scale=0.5").favor == "control"


@pytest.mark.parametrize(("case", "rows"), [("generate", 1), ("clip", FRAMES), ("xl", 1), ("union", 1)])
def test_control_does_not_compute_the_rows_to_which_it_adds_nothing(engine, asked, monkeypatch, case, rows):
    seen = set()

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def counted(net: Any, sample: Tensor, *args: Any, **call: Any) -> Any:
            seen.add(len(sample))
            return forward(net, sample, *args, **call)

        return counted

    for kind in (diffusers.ControlNetModel, diffusers.ControlNetUnionModel):
        monkeypatch.setattr(kind, "forward", counting(kind.forward))
    for favor, computed in (("balanced", 2 * rows), ("control", rows)):
        seen.clear()
        engine.run(asked(case, favor))
        assert seen == {computed}
