"""Image prompts with controls draw what diffusers draws with its own IP-Adapter path, on the same weights.

Ours goes through ``controlled`` and ``control_call``; theirs is diffusers' pipeline called by hand. Beside it
stands the proof that an image prompt reaches no attention of a ControlNet.
"""

import inspect
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from controls import saved, tiny_controlnet, tiny_t2i, tiny_union
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.generation.control import control_call, controlled, find_controls, load_net
from imprompt.generation.families import Base
from imprompt.generation.favor import favored
from imprompt.schema.request import ControlRef, Request
from tiny import PICTURE, picture, random_adapter_state, tiny_encoder, tiny_sd, tiny_sdxl

TOLERANCE = 1e-4
STRENGTH = 0.7
NAMES = {"generate": "", "edit": "Img2Img", "inpaint": "Inpaint"}
TASKS = [(family, task) for family in ("sd", "sdxl") for task in NAMES] + [
    ("sd", "inpaint-9"),
    ("sdxl", "inpaint-9"),
]


def arguments(task: str) -> dict[str, object]:
    call: dict[str, object] = {
        "prompt": "a cat", "negative_prompt": "bad", "num_inference_steps": 2, "guidance_scale": 5.0,
        "generator": torch.Generator().manual_seed(5), "output_type": "np",
    }  # fmt: skip
    if task != "edit":
        call |= {"width": PICTURE, "height": PICTURE}
    if task != "generate":
        call |= {"image": picture(50), "strength": STRENGTH, "num_inference_steps": 3}  # it takes two
    if task == "inpaint":
        mask = Image.new("L", (PICTURE, PICTURE))
        mask.paste(255, (0, 0, PICTURE // 2, PICTURE))
        call["mask_image"] = mask
    return call


def base_pipe(family: str, channels: int = 4) -> diffusers.DiffusionPipeline:
    pipe = {"sd": tiny_sd, "sdxl": tiny_sdxl}[family](channels)
    model, processor = tiny_encoder()
    pipe.register_modules(image_encoder=model, feature_extractor=processor)
    return pipe


def request_of(task: str, refs: list[ControlRef]) -> Request:
    if task == "generate":
        return Request(prompt="a cat", controls=refs)
    extra = {"mask": "mask"} if task == "inpaint" else {}
    return Request(task=task, prompt="a cat", image="image", strength=STRENGTH, controls=refs, **extra)


def compare(
    family: str,
    task: str,
    refs: list[ControlRef],
    maps: list[Image.Image],
    theirs: Callable,
    channels: int = 4,
) -> None:
    """Ours with and without the image prompt against diffusers' pipeline ``theirs(parts)`` → (pipe, call)."""
    pipe, request = base_pipe(family, channels), request_of(task, refs)
    found = find_controls(request, Base("tiny", "tiny"))
    nets = {control.source: load_net(control, torch.float32) for control in found}
    ours = controlled(pipe, request.task, found, nets)
    call = control_call(found, maps, request)
    state = random_adapter_state(pipe.unet)
    adapter = IPAdapter.from_state_dict(state).attach(ours)
    adapter.set_prompt(picture(1), scale=0.6)
    drawn = ours(**arguments(task) | call).images
    adapter.detach()
    without = ours(**arguments(task) | call).images
    uncontrolled = arguments(task) | call
    for name in ("controlnet_conditioning_scale", "adapter_conditioning_scale"):
        if name in uncontrolled:
            uncontrolled[name] = [0.0] * len(refs) if isinstance(uncontrolled[name], list) else 0.0
    assert np.abs(without - ours(**uncontrolled).images).max() > 10 * TOLERANCE, (
        "the control has no effect, and parity would say nothing"
    )
    other, how = theirs(pipe.components, nets)
    other.set_progress_bar_config(disable=True)
    none = [None]
    if hasattr(other, "load_ip_adapter"):
        other.load_ip_adapter([state], subfolder=none, weight_name=none, image_encoder_folder=None)
        other.set_ip_adapter_scale(0.6)
        expected = other(**arguments(task) | how, ip_adapter_image=picture(1)).images
        assert np.abs(drawn - expected).max() <= TOLERANCE
    else:
        assert np.abs(without - other(**arguments(task) | how).images).max() <= TOLERANCE
    assert np.isfinite(drawn).all()
    assert np.abs(drawn - without).max() > 10 * TOLERANCE, "nor has the picture"


def made(name: str, parts: dict, **extra: object) -> diffusers.DiffusionPipeline:
    kind = getattr(diffusers, name)
    taken = inspect.signature(kind.__init__).parameters
    switches = {} if "XL" in name else {"safety_checker": None, "requires_safety_checker": False}
    return kind(**{key: part for key, part in parts.items() if key in taken} | switches | extra)


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_one_controlnet_draws_what_diffusers_draws(family: str, task: str, tmp_path: Path) -> None:
    model = saved(tiny_controlnet(family), tmp_path / "net")
    channels, task = (9, "inpaint") if task == "inpaint-9" else (4, task)
    xl = "XL" if family == "sdxl" else ""

    def theirs(parts: dict, nets: dict) -> tuple:
        name = f"StableDiffusion{xl}ControlNet{NAMES[task]}Pipeline"
        how = {
            "controlnet_conditioning_scale": 0.8,
            "control_guidance_start": 0.0,
            "control_guidance_end": 1.0,
        }
        return made(name, parts, controlnet=nets[model]), how | {
            "image" if task == "generate" else "control_image": picture(7)
        }

    ref = ControlRef(kind="none", path="map", model=model, scale=0.8)
    compare(family, task, [ref], [picture(7)], theirs, channels)


@pytest.mark.parametrize(("family", "task"), TASKS[:6])
def test_favor_of_the_control_is_diffusers_guess_mode_with_other_factors(
    family: str, task: str, tmp_path: Path
) -> None:
    """Guess mode multiplies by 0.1 to 1, evenly on a logarithmic scale; its net here has what undoes that."""
    pipe, net = base_pipe(family), tiny_controlnet(family)
    ref = ControlRef(kind="none", path="map", model=saved(net, tmp_path), scale=0.8, favor="control")
    request = request_of(task, [ref])
    found = find_controls(request, Base("tiny", "tiny"))
    ours = controlled(pipe, request.task, found, {ref.model: net})
    call = arguments(task) | control_call(found, [picture(7)], request)
    call["num_images_per_prompt"] = 2
    balanced = ours(**call).images
    with favored(ours, found, rows=2):
        drawn = ours(**call | {"generator": torch.Generator().manual_seed(5)}).images
    last_convolutions = [*net.controlnet_down_blocks, net.controlnet_mid_block]
    theirs = np.logspace(-1, 0, len(last_convolutions))
    with torch.no_grad():
        for place, convolution in enumerate(reversed(last_convolutions)):
            for parameter in convolution.parameters():
                parameter.mul_(0.825**place / theirs[::-1][place])
    call |= {"generator": torch.Generator().manual_seed(5), "guess_mode": True}
    assert np.abs(drawn - ours(**call).images).max() <= TOLERANCE
    assert np.abs(drawn - balanced).max() > 10 * TOLERANCE


@pytest.mark.parametrize(("family", "task"), TASKS[:6])
def test_two_controlnets_with_windows_draw_what_diffusers_draws(
    family: str, task: str, tmp_path: Path
) -> None:
    models = [saved(tiny_controlnet(family, seed), tmp_path / str(seed)) for seed in (11, 12)]
    xl = "XL" if family == "sdxl" else ""
    begins = 0.0 if task == "generate" else 1 - STRENGTH

    def theirs(parts: dict, nets: dict) -> tuple:
        name = f"StableDiffusion{xl}ControlNet{NAMES[task]}Pipeline"
        how = {
            "image" if task == "generate" else "control_image": [picture(7), picture(8)],
            "controlnet_conditioning_scale": [0.8, 0.5],
            "control_guidance_start": [0.0, 0.5],
            "control_guidance_end": [0.7, 1.0],
        }
        return made(name, parts, controlnet=[nets[model] for model in models]), how

    refs = [  # a request counts from pure noise, diffusers from where drawing begins
        ControlRef(kind="none", path="a", model=models[0], scale=0.8, end=begins + 0.7 * (1 - begins)),
        ControlRef(kind="none", path="b", model=models[1], scale=0.5, start=begins + 0.5 * (1 - begins)),
    ]
    compare(family, task, refs, [picture(7), picture(8)], theirs)


@pytest.mark.parametrize("task", list(NAMES))
def test_a_union_of_kinds_draws_what_diffusers_draws(task: str, tmp_path: Path) -> None:
    model = saved(tiny_union(), tmp_path / "net")

    def theirs(parts: dict, nets: dict) -> tuple:
        how = {
            "control_image": [picture(7), picture(8)], "control_mode": [1, 3],
            "controlnet_conditioning_scale": [0.8, 0.5],
        }  # fmt: skip
        name = f"StableDiffusionXLControlNetUnion{NAMES[task]}Pipeline"
        return made(name, parts, controlnet=nets[model]), how

    refs = [
        ControlRef(kind="depth", path="a", model=model, scale=0.8),
        ControlRef(kind="none", path="b", model=f"{model}:canny", scale=0.5),
    ]
    compare("sdxl", task, refs, [picture(7), picture(8)], theirs)


def test_a_t2i_adapter_draws_what_diffusers_draws(tmp_path: Path) -> None:
    model = saved(tiny_t2i(), tmp_path / "net")

    def theirs(parts: dict, nets: dict) -> tuple:
        how = {"image": picture(7), "adapter_conditioning_scale": 0.8}
        return made("StableDiffusionAdapterPipeline", parts, adapter=nets[model]), how

    ref = ControlRef(kind="canny", path="map", model=model, scale=0.8)
    compare("sd", "generate", [ref], [picture(7)], theirs)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_an_image_prompt_reaches_no_attention_of_the_controlnet(family: str, tmp_path: Path) -> None:
    model = saved(tiny_controlnet(family), tmp_path / "net")
    request = request_of("generate", [ControlRef(kind="none", path="map", model=model)])
    pipe = base_pipe(family)
    found = find_controls(request, Base("tiny", "tiny"))
    net = load_net(found[0], torch.float32)
    ours = controlled(pipe, "generate", found, {model: net})
    text = pipe.encode_prompt(
        "a cat", device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=True,
        negative_prompt="bad",
    )  # fmt: skip
    tokens = torch.cat([text[1], text[0]])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    net.register_forward_hook(
        lambda _, __, given, out: seen.append((given["encoder_hidden_states"], out[0][-1])), with_kwargs=True
    )
    processors = {name: id(one) for name, one in net.attn_processors.items()}

    def first_step(scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        seen.clear()
        adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).attach(ours)
        if scale is not None:
            adapter.set_prompt(picture(1), scale=scale)
        assert {name: id(one) for name, one in net.attn_processors.items()} == processors
        image = ours(**arguments("generate") | control_call(found, [picture(7)], request)).images
        adapter.detach()
        pictures.append(image)
        return seen[0]

    pictures: list[np.ndarray] = []
    without, shown = first_step(None), first_step(3.0)
    assert torch.equal(shown[0], tokens)  # as many tokens as the text has, and these
    assert torch.equal(shown[1], without[1])  # what it hands to the UNet does not know the picture
    assert np.abs(pictures[0] - pictures[1]).max() > 10 * TOLERANCE
