"""Requests with controls: what they change, what is kept of them, and every refusal before drawing."""

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import ControlNetModel
from PIL import Image

import tiny
from controls import saved, tiny_controlnet, tiny_t2i, tiny_union
from imprompt import output
from imprompt.catalog import controls, families
from imprompt.errors import InputError, ModelError, UsageError
from imprompt.generation.annotate import _ANNOTATORS
from imprompt.generation.control import find_controls
from imprompt.generation.engine import Engine, complete
from imprompt.generation.families import find_base
from imprompt.schema.request import CONTROLS as KINDS
from imprompt.schema.request import ControlRef, Request


@pytest.fixture(scope="session")
def nets(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models by name: ``net`` and ``net2`` for the tiny base, ``xl``, ``union``, ``t2i``."""
    folder = tmp_path_factory.mktemp("nets")
    models = {
        "net": tiny_controlnet(), "net2": tiny_controlnet(seed=12), "xl": tiny_controlnet("sdxl"),
        "union": tiny_union(), "t2i": tiny_t2i(),
    }  # fmt: skip
    return {name: saved(model, folder / name) for name, model in models.items()}


@pytest.fixture
def plain(common) -> dict[str, object]:
    return {key: value for key, value in common.items() if key != "adapter"} | {"prompt": "a cat"}


def pixels(image):
    return np.asarray(image).astype(int)


def control(pictures: Path, model: str, **fields: object) -> ControlRef:
    return ControlRef(**{"kind": "canny", "path": pictures / "ref.png", "model": model} | fields)


@pytest.mark.parametrize("task", ["generate", "edit", "inpaint"])
def test_a_control_changes_the_picture_and_scale_zero_does_not(engine, plain, pictures, nets, task):
    start = {} if task == "generate" else {"image": pictures / "other.png"}
    start |= {"mask": pictures / "mask.png"} if task == "inpaint" else {}
    asked = Request(task=task, **plain, **start)
    alone = engine.run(asked).images[0]
    followed = engine.run(asked.replace(controls=[control(pictures, nets["net"])]))
    silent = engine.run(asked.replace(controls=[control(pictures, nets["net"], scale=0)])).images[0]
    assert np.abs(pixels(followed.images[0]) - pixels(alone)).max() > 2
    assert np.array_equal(pixels(silent), pixels(alone))
    assert np.array_equal(pixels(engine.run(asked).images[0]), pixels(alone))
    assert followed.maps[0].size == followed.images[0].size
    assert set(np.unique(followed.maps[0])) == {0, 255}
    assert followed.provenance["controls"].startswith(nets["net"])


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(each) is kind for each in gc.get_objects())


def test_several_controls_are_followed_together_in_their_order(engine, plain, pictures, nets):
    one, other = control(pictures, nets["net"]), control(pictures, nets["net2"], scale=0.5)
    both = pixels(engine.run(Request(controls=[one, other], **plain)).images[0])
    of_both = alive(ControlNetModel)
    for alone in (one, other):
        assert not np.array_equal(both, pixels(engine.run(Request(controls=[alone], **plain)).images[0]))
    assert alive(ControlNetModel) == of_both - 1  # of the last request; the other is given back
    again = engine.run(Request(controls=[one, other], **plain)).images[0]
    assert np.array_equal(pixels(again), both)


def test_a_control_and_an_image_prompt_both_act(engine, common, pictures, nets):
    asked = Request(
        prompt="a", images=[pictures / "other.png"], controls=[control(pictures, nets["net"])], **common
    )
    both = pixels(engine.run(asked).images[0])
    assert not np.array_equal(both, pixels(engine.run(asked.replace(controls=())).images[0]))
    assert not np.array_equal(both, pixels(engine.run(asked.replace(scale=0)).images[0]))


def test_guidance_of_its_own_for_the_picture_goes_with_a_control(engine, common, pictures, nets):
    asked = Request(
        prompt="a",
        images=[pictures / "other.png"],
        controls=[control(pictures, nets["net"])],
        guidance=4.0,
        **common,
    )
    ordinary = pixels(engine.run(asked).images[0])
    same, stronger = (pixels(engine.run(asked.replace(image_guidance=s)).images[0]) for s in (4.0, 9.0))
    assert np.abs(same - ordinary).max() <= 1
    assert not np.array_equal(stronger, ordinary)


def test_a_window_counts_from_pure_noise_whatever_the_strength(engine, plain, pictures, nets):
    asked = Request(task="edit", image=pictures / "other.png", strength=0.5, **{**plain, "steps": 10})

    def drawn(**window: float) -> np.ndarray:
        return pixels(
            engine.run(asked.replace(controls=[control(pictures, nets["net"], **window)])).images[0]
        )

    assert np.array_equal(drawn(), drawn(start=0.5))  # drawing begins at the middle of the schedule
    assert not np.array_equal(drawn(), drawn(end=0.75))
    with pytest.raises(UsageError, match=r"end 0\.4 lies before drawing begins.*0\.5"):
        drawn(end=0.4)


def test_a_saved_picture_repeats_its_controls_and_notices_another_file(
    engine, common, pictures, nets, tmp_path
):
    shutil.copy(pictures / "ref.png", tmp_path / "mine.png")
    ref = control(tmp_path, nets["net"], path=tmp_path / "mine.png", scale=0.7, end=0.8)
    first = engine.run(Request(prompt="a", images=[pictures / "other.png"], controls=[ref], **common))
    (path,) = output.save(first, tmp_path / "out.png")
    request = output.read_request(path)
    assert request.controls == (ref.replace(favor="balanced"),)
    assert str(tmp_path / "mine.png") in request.hashes
    assert Request.from_json(request.to_json()) == request
    assert np.array_equal(pixels(engine.run(request).images[0]), pixels(first.images[0]))
    shutil.copy(pictures / "other.png", tmp_path / "mine.png")
    with pytest.raises(InputError, match=r"mine\.png.*sha256"):
        engine.run(request)


def test_a_saved_map_given_back_as_finished_draws_the_same(engine, plain, pictures, nets, tmp_path):
    first = engine.run(Request(controls=[control(pictures, nets["net"])], **plain))
    _, place = output.save(first, tmp_path / "out.png", maps=True)
    assert place.name == "out-control-1-canny.png"
    again = engine.run(Request(controls=[ControlRef(kind="none", path=place, model=nets["net"])], **plain))
    assert np.array_equal(pixels(again.images[0]), pixels(first.images[0]))


def test_a_control_picture_of_other_proportions_is_cropped_and_that_is_said(engine, plain, pictures, nets):
    wide = control(pictures, nets["net"], path=pictures / "wide.png")
    result = engine.run(Request(controls=[wide], **plain))
    assert result.maps[0].size == (32, 32)
    assert any("64×32" in note and "cropped" in note and "32×32" in note for note in result.notes)


def test_a_control_of_another_base_is_refused_with_both_names_before_weights_are_read(
    plain, pictures, nets, tmp_path
):
    folder = tmp_path / "xl-net"
    shutil.copytree(nets["xl"], folder)
    next(folder.glob("*.safetensors")).unlink()
    engine = Engine()
    with pytest.raises(ModelError, match=rf"{folder}.*width 64.*base '{plain['base']}'.*width 32") as said:
        engine.run(Request(controls=[control(pictures, str(folder))], **plain))
    assert "\n" not in str(said.value)
    assert not engine.loaded


REFUSED = [
    (
        ModelError,
        "control 'sdxl-canny' is for sdxl bases.*'emoji'",
        {"base": "emoji"},
        {"model": "sdxl-canny"},
    ),
    (
        UsageError,
        "'emoji' has no default model for depth.*known for it: canny",
        {"base": "emoji"},
        {"kind": "depth"},
    ),
    (UsageError, "has no default model for canny", {}, {}),
    (ModelError, "Kolors model; diffusers has no pipeline", {"base": "kolors"}, {"model": "sdxl-canny"}),
    (UsageError, "finished map needs the model", {}, {"kind": "none"}),
    (UsageError, "'sd15-cany'.*sd15-canny", {}, {"model": "sd15-cany"}),
    (UsageError, "takes depth, not canny", {"base": "sd15"}, {"model": "sd15-depth"}),
    (UsageError, "must be told what the map is", {}, {"kind": "none", "model": "<union>"}),
    (UsageError, "takes pose.*not tile", {}, {"kind": "tile", "model": "<union>"}),
    (UsageError, "says depth of a map", {}, {"model": "<union>:depth"}),
    (UsageError, "T2I-Adapter.*generate only", {"task": "edit", "image": "x"}, {"model": "<t2i>"}),
    (UsageError, "T2I-Adapter.*start and end", {}, {"model": "<t2i>", "start": 0.2}),
    (ModelError, "is a UNet2DConditionModel", {}, {"model": "<base>/unet"}),
    (ModelError, "is a file", {}, {"model": "<picture>"}),
]


@pytest.mark.parametrize(("kind", "message", "fields", "ref"), REFUSED)
def test_what_cannot_be_followed_is_said_in_one_line(plain, pictures, nets, base, kind, message, fields, ref):
    places = {**{f"<{name}>": place for name, place in nets.items()}, "<base>": str(base)}
    model = ref.get("model")
    for name, place in {**places, "<picture>": str(pictures / "ref.png")}.items():
        model = model.replace(name, place) if model else None
    asked = {**plain, **fields}
    asked |= {"image": pictures / "ref.png"} if "image" in fields else {}
    engine = Engine()
    with pytest.raises(kind, match=message) as said:
        engine.run(Request(controls=[control(pictures, **{**ref, "model": model})], **asked))
    assert "\n" not in str(said.value)
    assert not engine.loaded


def test_controls_of_different_kinds_of_model_are_refused_together(plain, pictures, nets):
    refs = [control(pictures, nets["net"]), control(pictures, nets["t2i"])]
    with pytest.raises(UsageError, match=r"is a ControlNet.*a T2I-Adapter.*must all be"):
        Engine().run(Request(controls=refs, **plain))


def test_a_t2i_adapter_is_followed_and_needs_no_controlnet(engine, common, pictures, nets):
    asked = Request(
        prompt="a", images=[pictures / "other.png"], controls=[control(pictures, nets["t2i"])], **common
    )
    both = pixels(engine.run(asked).images[0])
    assert not np.array_equal(both, pixels(engine.run(asked.replace(controls=())).images[0]))
    assert not np.array_equal(both, pixels(engine.run(asked.replace(scale=0)).images[0]))


def test_after_a_damaged_control_the_engine_draws_as_before(engine, plain, pictures, nets, tmp_path):
    asked = Request(controls=[control(pictures, nets["net"])], **plain)
    before = pixels(engine.run(asked).images[0])
    folder = tmp_path / "damaged"
    shutil.copytree(nets["net"], folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"damaged' cannot be loaded"):
        engine.run(asked.replace(controls=[control(pictures, str(folder))]))
    assert np.array_equal(pixels(engine.run(asked).images[0]), before)


def test_offline_a_control_that_is_not_cached_is_said_with_size_and_licence(plain, pictures, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = Request(controls=[ControlRef(kind="depth", path=pictures / "ref.png")], base="sd15", prompt="a")
    with pytest.raises(ModelError, match=r"sd15-depth.*control_v11f1p_sd15_depth: 723 MB.*OpenRAIL"):
        Engine().run(asked)


def test_defaults_are_listed_models_of_the_family_that_take_the_kind():
    assert _ANNOTATORS.keys() == KINDS.keys()
    assert families()["sd15"].keyframes["frame"] == "sd15-sparse-rgb"
    for family in families().values():
        for kind, name in (*family.controls.items(), *family.keyframes.items()):
            assert controls()[name].family == family.name
            assert kind in controls()[name].modes
            assert kind in KINDS


def test_a_complete_request_names_its_controls_models(plain, pictures):
    asked = Request(controls=[ControlRef(kind="canny", path=pictures / "ref.png")], prompt="a", base="sdxl")
    assert complete(asked, find_base("sdxl")).controls[0].model == "sdxl-canny"
    assert complete(asked.replace(base="sd15"), find_base("sd15")).controls[0].model == "sd15-canny"


def test_the_bundled_control_is_the_emoji_bases_own(pictures):
    base = find_base("emoji")
    if not (Path(base.source) / "controlnet-canny").is_dir():
        pytest.skip("a checkout without the bundled ControlNet")
    asked = complete(
        Request(prompt="a", controls=[ControlRef(kind="canny", path=pictures / "ref.png")]), base
    )
    (found,) = find_controls(asked, base)
    assert found.net == "controlnet"
    assert json.loads((Path(found.source) / "config.json").read_text())["cross_attention_dim"] == 256


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("canny:edge.png", {"kind": "canny", "path": "edge.png"}),
        ("depth:a,b.png,scale=0.8,end=0.7", {"kind": "depth", "path": "a,b.png", "scale": 0.8, "end": 0.7}),
        ("frame:a.png,at=15,scale=0.5", {"kind": "frame", "path": "a.png", "at": 15, "scale": 0.5}),
        ("NONE:C:\\maps\\x.png,model=sdxl-union:depth", {
            "kind": "none", "path": "C:\\maps\\x.png", "model": "sdxl-union:depth",
        }),
    ],
)  # fmt: skip
def test_a_control_is_read_from_one_flag(text, expected):
    assert ControlRef.parse(text) == ControlRef(**expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("edge.png", "KIND:PATH is expected, such as canny:edge.png"),
        ("cany:edge.png", "'cany' is unknown; did you mean 'canny'"),
        ("canny:", "KIND:PATH is expected"),
        ("canny:a.png,weight=2", "unknown option 'weight'; known are scale, start, end, favor, model, at"),
        ("canny:a.png,scale=1,scale=2", "'scale' is given twice"),
        ("canny:a.png,scale=-1", "scale"),
        ("frame:a.png", "needs its place in the clip, such as at=0"),
        ("frame:a.png,at=x", "at: "),
        ("canny:a.png,start=0.5,end=0.5", "does not lie after start"),
    ],
)
def test_a_flag_that_cannot_be_read_is_said(text, message):
    with pytest.raises(UsageError, match=message) as said:
        ControlRef.parse(text)
    assert str(said.value).startswith(f"--control '{text}'")
    assert "\n" not in str(said.value)


def test_maps_can_be_handed_over_like_other_pictures(engine, plain, nets):
    ref = ControlRef(kind="none", path="drawn", model=nets["net"])
    shown = Image.fromarray(np.asarray(tiny.picture(3)))
    result = engine.run(Request(controls=[ref], **plain), pictures={"drawn": shown})
    assert np.array_equal(pixels(result.maps[0]), pixels(shown))
    assert result.request.hashes == {}
