"""ControlNets for FLUX and SD3.5, and FLUX Fill: requests draw what diffusers' own pipelines draw."""

import inspect
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models import FluxMultiControlNetModel
from PIL import Image

import tinydit
from controls import saved, tiny_controlnet
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import ModelError, UsageError
from imprompt.generation.control import find_controls, load_net
from imprompt.generation.engine import Engine
from imprompt.generation.families import find_base
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import ControlRef, Request

SIZE = (48, 32)
NAMES = {"generate": "", "edit": "Img2Img", "inpaint": "Inpaint"}


def noise(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8))


def half() -> Image.Image:
    mask = Image.new("L", SIZE)
    mask.paste(255, (0, 0, SIZE[0] // 2, SIZE[1]))
    return mask


PICTURES = {"start": noise(1), "mask": half(), "map": noise(2), "map2": noise(3), "shown": noise(4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers")


@pytest.fixture(scope="module")
def flux(folder: Path) -> Path:
    return tinydit.save_base("flux", folder / "flux")


@pytest.fixture(scope="module")
def sd3(folder: Path) -> Path:
    return tinydit.save_base("sd3", folder / "sd3")


@pytest.fixture(scope="module")
def nets(folder: Path) -> dict[str, str]:
    """Folders of tiny ControlNets by name."""
    made = {
        "flux": tinydit.flux_controlnet(), "union": tinydit.flux_controlnet(num_mode=7),
        "flux2": tinydit.flux_controlnet(seed=14), "unet": tiny_controlnet(),
        "sd3": tinydit.sd3_controlnet(), "sd3-mask": tinydit.sd3_controlnet(extra_conditioning_channels=1),
    }  # fmt: skip
    return {name: saved(net, folder / f"net-{name}") for name, net in made.items()}


def asked(base: Path, task: str, controls: list[ControlRef], **fields: Any) -> Request:
    places = {"generate": {}, "edit": {"image": "start"}, "inpaint": {"image": "start", "mask": "mask"}}[task]
    strength = {} if task == "generate" else {"strength": 0.7}
    common = {"prompt": "a cat", "seed": 5, "steps": 3, "guidance": 3.0, "size": SIZE, "base": str(base)}
    return Request.from_mapping(
        {"task": task, "controls": controls, **common, **places, **strength, **fields}
    )


def drawn(engine: Engine, request: Request) -> np.ndarray:
    return np.asarray(engine.run(request, pictures=PICTURES).images[0], np.int16)


def theirs(pipe: Any, task: str, **fields: Any) -> np.ndarray:
    """What diffusers' pipeline draws; inpainted alone where the mask is white."""
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "width": SIZE[0], "height": SIZE[1]}
    if task != "generate":
        call |= {"image": PICTURES["start"], "strength": 0.7}
    if task == "inpaint":
        call["mask_image"] = PICTURES["mask"]
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)  # by which the SD3 ControlNet's pipeline samples the map's latents
    image = pipe("a cat", generator=torch.Generator().manual_seed(5), **call, **fields).images[0]
    if task == "inpaint":
        image = Image.composite(image, PICTURES["start"], PICTURES["mask"])
    return np.asarray(image, np.int16)


def test_nothing_is_said_while_a_net_is_loaded(flux: Path, nets: dict[str, str]) -> None:
    """diffusers warns its users of its own use of a class of its own."""
    request = asked(flux, "generate", [ControlRef(kind="none", path="map", model=nets["flux"])])
    [control] = find_controls(request, find_base(str(flux)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_net(control, torch.float32)


def with_net(kind: type[Any], base: Path, net: Any) -> Any:
    parts = diffusers.DiffusionPipeline.from_pretrained(base).components
    taken = inspect.signature(kind.__init__).parameters
    return kind(**{name: part for name, part in parts.items() if name in taken}, controlnet=net)


@pytest.mark.parametrize("task", NAMES)
def test_a_flux_controlnet_is_followed_beside_an_image_prompt(
    engine: Engine, flux: Path, nets: dict[str, str], task: str
) -> None:
    net = diffusers.FluxControlNetModel.from_pretrained(nets["flux"])
    pipe = with_net(getattr(diffusers, f"FluxControlNet{NAMES[task]}Pipeline"), flux, net)
    control = ControlRef(kind="none", path="map", model=nets["flux"], scale=0.8)
    call = {"control_image": PICTURES["map"], "controlnet_conditioning_scale": 0.8}
    request = asked(flux, task, [control])
    plain = drawn(engine, request)
    assert np.abs(plain - theirs(pipe, task, **call)).max() <= 1
    assert np.abs(plain - drawn(engine, asked(flux, task, []))).max() > 3
    shown = request.replace(images=[ImagePrompt("shown", scale=0.8)], adapter=str(flux / "adapters"))
    got = drawn(engine, shown)
    if task == "generate":  # the one of the three that diffusers' own adapters go with
        pipe.load_ip_adapter(str(flux / "adapters"), weight_name="ip_adapter.safetensors")
        pipe.set_ip_adapter_scale(0.8)
        call["ip_adapter_image"] = PICTURES["shown"]
    else:
        encoder = diffusers.FluxPipeline.from_pretrained(flux)
        pipe.image_encoder, pipe.feature_extractor = encoder.image_encoder, encoder.feature_extractor
        IPAdapter.from_pretrained(flux / "adapters").attach(pipe).set_prompt(PICTURES["shown"], scale=0.8)
    assert np.abs(got - theirs(pipe, task, **call)).max() <= 1
    assert np.abs(got - plain).max() > 3


def test_a_union_follows_several_maps_and_true_guidance(
    engine: Engine, flux: Path, nets: dict[str, str]
) -> None:
    union = FluxMultiControlNetModel([diffusers.FluxControlNetModel.from_pretrained(nets["union"])])
    pipe = with_net(diffusers.FluxControlNetPipeline, flux, union)
    guided = {"negative": "a dog", "true_guidance": 2.0}
    refs = [
        ControlRef(kind="none", path=name, model=f"{nets['union']}:{kind}", scale=scale, end=end)
        for name, kind, scale, end in (("map", "canny", 0.8, 1.0), ("map2", "depth", 0.5, 0.7))
    ]
    wanted = theirs(
        pipe, "generate", control_image=[PICTURES["map"], PICTURES["map2"]], control_mode=[0, 2],
        controlnet_conditioning_scale=[0.8, 0.5], control_guidance_start=[0.0, 0.0],
        control_guidance_end=[1.0, 0.7], negative_prompt="a dog", true_cfg_scale=2.0,
    )  # fmt: skip
    got = drawn(engine, asked(flux, "generate", refs, **guided))
    assert np.abs(got - wanted).max() <= 1
    alone = drawn(engine, asked(flux, "generate", refs[:1], **guided))
    assert np.abs(got - alone).max() > 1


def test_an_sd3_controlnet_is_followed_beside_an_image_prompt(
    engine: Engine, sd3: Path, nets: dict[str, str]
) -> None:
    net = diffusers.SD3ControlNetModel.from_pretrained(nets["sd3"])
    pipe = with_net(diffusers.StableDiffusion3ControlNetPipeline, sd3, net)
    control = ControlRef(kind="none", path="map", model=nets["sd3"], scale=0.3)
    call = {"control_image": PICTURES["map"], "controlnet_conditioning_scale": 0.3, "negative_prompt": ""}
    plain = drawn(engine, asked(sd3, "generate", [control]))
    assert np.array_equal(drawn(engine, asked(sd3, "generate", [control])), plain)
    assert np.abs(plain - theirs(pipe, "generate", **call)).max() <= 1
    assert np.abs(plain - drawn(engine, asked(sd3, "generate", []))).max() > 3
    fields = {"images": [ImagePrompt("shown", scale=8.0)], "adapter": str(sd3 / "adapters")}
    IPAdapter.from_pretrained(sd3 / "adapters").attach(pipe).set_prompt(PICTURES["shown"], scale=8.0)
    got = drawn(engine, asked(sd3, "generate", [control], **fields))
    assert np.abs(got - theirs(pipe, "generate", **call)).max() <= 1
    assert np.abs(got - plain).max() > 3


def test_an_sd3_controlnet_that_reads_the_mask_inpaints_beside_an_image_prompt(
    engine: Engine, sd3: Path, nets: dict[str, str], folder: Path
) -> None:
    net = diffusers.SD3ControlNetModel.from_pretrained(nets["sd3-mask"])
    pipe = with_net(diffusers.StableDiffusion3ControlNetInpaintingPipeline, sd3, net)
    call = {"control_image": PICTURES["start"], "control_mask": PICTURES["mask"], "negative_prompt": ""}
    call |= {"controlnet_conditioning_scale": 0.3, "control_guidance_end": 0.7}

    def wanted() -> np.ndarray:
        image = Image.fromarray(theirs(pipe, "generate", **call).astype(np.uint8))
        return np.asarray(Image.composite(image, PICTURES["start"], PICTURES["mask"]), np.int16)

    control = ControlRef(kind="none", path="start", model=nets["sd3-mask"], scale=0.3, end=0.7)
    request = asked(sd3, "inpaint", [control], strength=1.0)
    plain = drawn(engine, request)
    assert np.abs(plain - wanted()).max() <= 1
    assert np.abs(plain - drawn(engine, request.replace(controls=[control.replace(scale=0.0)]))).max() > 3
    fields = {"images": [ImagePrompt("shown", scale=8.0)], "adapter": str(sd3 / "adapters")}
    IPAdapter.from_pretrained(sd3 / "adapters").attach(pipe).set_prompt(PICTURES["shown"], scale=8.0)
    got = drawn(engine, request.replace(**fields))
    assert np.abs(got - wanted()).max() <= 1
    assert np.abs(got - plain).max() > 3
    early = unstated(nets["sd3-mask"], folder / "early")  # as published; its weights tell
    assert np.array_equal(drawn(engine, request.replace(controls=[control.replace(model=early)])), plain)
    maskless = unstated(nets["sd3"], folder / "early-maskless")
    with pytest.raises(ModelError, match="early-maskless' cannot be loaded"):
        engine.run(request.replace(controls=[control.replace(model=maskless)]), pictures=PICTURES)


def unstated(net: str, copy: Path) -> str:
    """A copy of an SD3 ControlNet whose configuration says nothing of more channels."""
    shutil.copytree(net, copy)
    config = json.loads((copy / "config.json").read_text())
    del config["extra_conditioning_channels"]
    (copy / "config.json").write_text(json.dumps(config))
    return str(copy)


@pytest.mark.parametrize(("kind", "task"), [("flux", "generate"), ("flux", "inpaint"), ("sd3", "generate")])
def test_several_controlnets_are_followed(
    engine: Engine, folder: Path, nets: dict[str, str], kind: str, task: str, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(kind)
    prefix = {"flux": "Flux", "sd3": "StableDiffusion3"}[kind]
    names = {"flux": ["flux", "flux2"], "sd3": ["sd3", "sd3"]}[kind]
    model = {"flux": diffusers.FluxControlNetModel, "sd3": diffusers.SD3ControlNetModel}[kind]
    pipe = with_net(
        getattr(diffusers, f"{prefix}ControlNet{NAMES[task]}Pipeline"),
        base,
        [model.from_pretrained(nets[name]) for name in names],
    )
    call = {"control_image": [PICTURES["map"], PICTURES["map2"]], "controlnet_conditioning_scale": [0.4, 0.2]}
    call |= {"negative_prompt": ""} if kind == "sd3" else {"control_mode": [None, None]}
    refs = [
        ControlRef(kind="none", path=path, model=nets[name], scale=scale)
        for path, name, scale in zip(("map", "map2"), names, (0.4, 0.2), strict=True)
    ]
    got = drawn(engine, asked(base, task, refs))
    assert np.abs(got - theirs(pipe, task, **call)).max() <= 1
    assert np.abs(got - drawn(engine, asked(base, task, refs[:1]))).max() > 1


def test_flux_fill_inpaints_with_an_image_prompt(engine: Engine, folder: Path) -> None:
    fill = tinydit.save_base("flux-fill", folder / "flux-fill")
    pipe = diffusers.FluxFillPipeline.from_pretrained(fill)
    request = asked(fill, "inpaint", [])
    plain = drawn(engine, request)
    assert np.abs(plain - theirs(pipe, "inpaint")).max() <= 1
    adapter = IPAdapter.from_pretrained(fill / "adapters").attach(pipe)
    adapter.set_prompt(PICTURES["shown"], scale=0.8)
    got = drawn(
        engine,
        request.replace(images=[ImagePrompt("shown", scale=0.8)], adapter=str(fill / "adapters")),
    )
    assert np.abs(got - theirs(pipe, "inpaint")).max() <= 1
    assert np.abs(got - plain).max() > 3
    with pytest.raises(UsageError, match="can inpaint, not generate"):
        engine.run(asked(fill, "generate", []))


def test_what_does_not_go_together_is_said_before_anything_is_loaded(
    flux: Path, sd3: Path, nets: dict[str, str], folder: Path
) -> None:
    def refused(base: Path | str, task: str, net: str, path: str = "map", **fields: Any) -> str:
        controls = [ControlRef(kind="none", path=path, model=nets[net])] * fields.pop("times", 1)
        request = asked(Path(base), task, controls, **fields)
        with pytest.raises((ModelError, UsageError)) as error:
            find_controls(request, find_base(str(base)))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is a ControlNet, which is for UNets; base" in refused(flux, "generate", "unet")
    assert "is a FLUX ControlNet, which is for a FluxPipeline; base" in refused(sd3, "generate", "flux")
    assert "base 'chroma' is a ChromaPipeline" in refused("chroma", "generate", "flux")
    assert "base 'flux-kontext' is a FluxKontext" in refused("flux-kontext", "generate", "flux")
    assert "for generate and inpaint only, not for edit" in refused(sd3, "edit", "sd3")
    assert "must be told what the map is" in refused(flux, "generate", "union")
    other = {
        "wide": diffusers.FluxControlNetModel(num_layers=0, num_single_layers=0, in_channels=16),
        "two": tinydit.sd3_controlnet(extra_conditioning_channels=2),
    }
    nets = nets | {name: saved(net, folder / f"net-{name}") for name, net in other.items()}
    assert "of width 3072 for 16 channels; the transformer" in refused(flux, "generate", "wide")
    assert "with a channel for a mask; diffusers takes it for inpaint only" in refused(
        sd3, "generate", "sd3-mask"
    )
    assert "with no channel for a mask; diffusers takes it for generate only" in refused(
        sd3, "inpaint", "sd3"
    )
    assert "of another layout than diffusers inpaints with" in refused(sd3, "inpaint", "two", "start")
    assert "reads the picture that is inpainted; say none:start" in refused(sd3, "inpaint", "sd3-mask")
    assert "that draws the masked part from noise" in refused(sd3, "inpaint", "sd3-mask", "start")
    assert "controls: 2 are given; diffusers inpaints with one" in refused(
        sd3, "inpaint", "sd3-mask", "start", times=2, strength=1.0
    )
    for base, net, title in ((flux, "flux", "a FLUX"), (sd3, "sd3", "an SD3")):
        favoured = [ControlRef(kind="none", path="map", model=nets[net], favor="prompt")]
        with pytest.raises(UsageError, match=f"favor=prompt is for ControlNets of UNets, and .* is {title}"):
            find_controls(asked(base, "generate", favoured), find_base(str(base)))
    followed = [ControlRef(kind="none", path="map", model=nets["flux"])]
    with pytest.raises(UsageError, match=r"true_guidance: diffusers' FluxControlNetImg2ImgPipeline"):
        Engine().run(asked(flux, "edit", followed, true_guidance=2.0), pictures=PICTURES)
