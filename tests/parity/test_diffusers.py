"""Our pictures equal diffusers' own IP-Adapter path on the same weights, through whole pipelines.

Both sides get the same random adapter, pipeline, pictures and seed; final pixels in fp32 are compared.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.checkpoints.convert import convert
from imprompt.schema.prompt import ImagePrompt
from layouts import face
from tiny import PICTURE, StateDict, picture, random_adapter_state, tiny_encoder, tiny_sd, tiny_sdxl

TOLERANCE = 1e-4
PIPELINES = {
    ("sd", "generate"): StableDiffusionPipeline,
    ("sd", "edit"): StableDiffusionImg2ImgPipeline,
    ("sd", "inpaint"): StableDiffusionInpaintPipeline,
    ("sd", "inpaint-9"): StableDiffusionInpaintPipeline,
    ("sdxl", "generate"): StableDiffusionXLPipeline,
    ("sdxl", "edit"): StableDiffusionXLImg2ImgPipeline,
    ("sdxl", "inpaint"): StableDiffusionXLInpaintPipeline,
    ("sdxl", "inpaint-9"): StableDiffusionXLInpaintPipeline,
}
KINDS = ("linear", "plus")


def pipeline(family: str = "sd", task: str = "generate") -> DiffusionPipeline:
    base = {"sd": tiny_sd, "sdxl": tiny_sdxl}[family](9 if task == "inpaint-9" else 4)
    model, processor = tiny_encoder()
    parts = base.components | {"image_encoder": model, "feature_extractor": processor}
    extra = {"requires_safety_checker": False} if family == "sd" else {}
    pipe = PIPELINES[family, task](**parts, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: DiffusionPipeline,
    *,
    count: int = 1,
    each: int = 1,
    guidance: float = 5.0,
    images: int = 1,
    **extra: object,
) -> np.ndarray:
    shown = [picture(50 + i) for i in range(images)]
    steps = 3  # of which an edit takes two
    if "Img2Img" in type(pipe).__name__:
        extra |= {"image": shown, "strength": 0.7}
    elif "Inpaint" in type(pipe).__name__:
        mask = Image.new("L", (PICTURE, PICTURE))
        mask.paste(255, (0, 0, PICTURE // 2, PICTURE))
        extra |= {"image": shown, "mask_image": [mask] * images, "strength": 0.9}
        extra |= {"width": PICTURE, "height": PICTURE}
    else:
        extra |= {"width": PICTURE, "height": PICTURE}
        # The second-order solver has a history from its third step on.
        steps = 3 if isinstance(pipe.scheduler, DPMSolverMultistepScheduler) else 2
    return pipe(
        ["a cat", "two dogs", "the sea"][:count],
        negative_prompt=["bad"] * count,
        num_inference_steps=steps,
        num_images_per_prompt=each,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
        **extra,
    ).images


def theirs(
    pipe: DiffusionPipeline,
    states: Sequence[StateDict],
    scale: object,
    shown: dict[str, object],
    **how: object,
) -> np.ndarray:
    none = [None] * len(states)
    pipe.load_ip_adapter(list(states), subfolder=none, weight_name=none, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)
    return draw(pipe, **shown, **how)


def close(ours: np.ndarray, other: np.ndarray) -> bool:
    assert np.isfinite(ours).all()
    return ours.shape == other.shape and float(np.abs(ours - other).max()) <= TOLERANCE


@pytest.mark.parametrize(("kind", "guidance"), [("linear", 5.0), ("plus", 5.0), ("plus", 1.0)])
@pytest.mark.parametrize(("family", "task"), list(PIPELINES))
def test_every_task_draws_what_diffusers_draws(family: str, task: str, kind: str, guidance: float) -> None:
    pipe = pipeline(family, task)
    state = random_adapter_state(pipe.unet, kind)
    without = draw(pipe, guidance=guidance)
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(picture(1), scale=0.6)
    ours = draw(pipe, guidance=guidance)
    adapter.set_prompt(picture(1), scale=0.0)
    assert np.array_equal(draw(pipe, guidance=guidance), without)
    adapter.detach()
    assert np.array_equal(draw(pipe, guidance=guidance), without)
    other = theirs(pipe, [state], 0.6, {"ip_adapter_image": picture(1)}, guidance=guidance)
    assert close(ours, other)
    assert not close(ours, without), "the picture would have no effect, and parity would say nothing"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "each"), [(1, 3), (2, 1), (3, 1), (2, 2)])
def test_batches_draw_what_diffusers_draws(family: str, kind: str, count: int, each: int) -> None:
    pipe = pipeline(family)
    state = random_adapter_state(pipe.unet, kind)
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(picture(1), scale=0.8)
    ours = draw(pipe, count=count, each=each)
    adapter.detach()
    assert close(ours, theirs(pipe, [state], 0.8, {"ip_adapter_image": picture(1)}, count=count, each=each))


@pytest.mark.parametrize(("count", "each"), [(3, 1), (2, 2)])
@pytest.mark.parametrize(
    ("family", "task", "kind"),
    [
        ("sd", "edit", "plus"),
        ("sd", "inpaint", "linear"),
        ("sd", "inpaint-9", "plus"),
        ("sdxl", "edit", "linear"),
        ("sdxl", "inpaint", "plus"),
        ("sdxl", "inpaint-9", "linear"),
    ],
)
def test_batches_of_pictures_to_edit_draw_what_diffusers_draws(
    family: str, task: str, kind: str, count: int, each: int
) -> None:
    pipe = pipeline(family, task)
    state = random_adapter_state(pipe.unet, kind)
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt([picture(1), picture(2)], scale=0.8)
    ours = draw(pipe, count=count, each=each, images=count)
    adapter.detach()
    shown = {"ip_adapter_image": [[picture(1), picture(2)]]}
    assert close(ours, theirs(pipe, [state], 0.8, shown, count=count, each=each, images=count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_several_pictures_of_one_prompt_share_a_softmax_as_in_diffusers(
    family: str, kind: str, guidance: float
) -> None:
    pipe, pictures = pipeline(family), [picture(seed) for seed in (1, 2, 3)]
    state = random_adapter_state(pipe.unet, kind)
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(pictures, scale=0.7)
    ours = draw(pipe, guidance=guidance, count=2)
    adapter.detach()
    shown = {"ip_adapter_image": [pictures]}
    assert close(ours, theirs(pipe, [state], 0.7, shown, guidance=guidance, count=2))


@pytest.mark.parametrize("kind", KINDS)
def test_several_prompts_are_summed_as_diffusers_sums_fully_masked_pictures(kind: str) -> None:
    pipe, scales = pipeline(), (0.7, 0.3)
    state = random_adapter_state(pipe.unet, kind)
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt([ImagePrompt(image=picture(i), scale=scale) for i, scale in enumerate(scales)])
    ours = draw(pipe)
    adapter.detach()
    masks = [torch.ones(1, 2, PICTURE, PICTURE)]
    shown = {
        "ip_adapter_image": [[picture(0), picture(1)]],
        "cross_attention_kwargs": {"ip_adapter_masks": masks},
    }
    assert close(ours, theirs(pipe, [state], [list(scales)], shown))


def test_two_adapters_at_once_add_up_as_in_diffusers() -> None:
    pipe = pipeline("sdxl")
    states = [random_adapter_state(pipe.unet, kind, seed=seed) for seed, kind in enumerate(KINDS)]
    adapters = [IPAdapter.from_state_dict(state).attach(pipe) for state in states]
    for i, adapter in enumerate(adapters):
        adapter.set_prompt(picture(i), scale=0.4 + 0.3 * i)
    ours = draw(pipe)
    for adapter in adapters:
        adapter.detach()
    assert close(ours, theirs(pipe, states, [0.4, 0.7], {"ip_adapter_image": [picture(0), picture(1)]}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_features_stand_for_pictures_as_diffusers_embeds_do(kind: str, guidance: float) -> None:
    pipe = pipeline()
    random = torch.Generator().manual_seed(1)
    shape = (2, 24) if kind == "linear" else (2, 17, 32)
    features, negative = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    state = random_adapter_state(pipe.unet, kind)
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(features, negative=negative)
    ours = draw(pipe, guidance=guidance)
    adapter.detach()
    embeds = torch.stack([negative, features]) if guidance > 1 else features[None]
    assert close(ours, theirs(pipe, [state], 1.0, {"ip_adapter_image_embeds": [embeds]}, guidance=guidance))


def test_a_block_dictionary_means_what_it_means_in_diffusers() -> None:
    pipe = pipeline("sdxl")
    state = random_adapter_state(pipe.unet)
    blocks = {"down": {"block_1": [0.8]}, "up": {"block_0": [0.0, 1.2]}}
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(picture(1), profile=blocks | {"default": 0.0})
    ours = draw(pipe)
    adapter.detach()
    assert close(ours, theirs(pipe, [state], blocks, {"ip_adapter_image": picture(1)}))


def test_guidance_switched_off_in_a_callback_is_followed() -> None:
    pipe = pipeline()
    state = random_adapter_state(pipe.unet)

    def switch(pipe: DiffusionPipeline, step: int, timestep: int, now: dict[str, torch.Tensor]) -> dict:
        if step == 0:
            pipe._guidance_scale = 0.0
            now["prompt_embeds"] = now["prompt_embeds"].chunk(2)[-1]
        return now

    how = {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(picture(1))
    switched = draw(pipe, **how)
    assert not close(switched, draw(pipe))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_a_token_for_every_patch_draws_what_diffusers_draws(guidance: float) -> None:
    pipe = pipeline()
    state = random_adapter_state(pipe.unet, "full")
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(picture(1), scale=0.6)
    ours = draw(pipe, guidance=guidance)
    adapter.detach()
    assert close(ours, theirs(pipe, [state], 0.6, {"ip_adapter_image": picture(1)}, guidance=guidance))


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler])
@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_every_scheduler_draws_what_diffusers_draws(scheduler: type, target: str) -> None:
    pipe = pipeline()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, prediction_type=target)
    state = random_adapter_state(pipe.unet)
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(picture(1), scale=0.6)
    ours = draw(pipe)
    adapter.detach()
    assert close(ours, theirs(pipe, [state], 0.6, {"ip_adapter_image": picture(1)}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["saved here", "pickled", "training checkpoint"])
def test_one_file_draws_the_same_in_both(start: str, kind: str, tmp_path: Path) -> None:
    pipe = pipeline()
    state, path = random_adapter_state(pipe.unet, kind), tmp_path / "ip-adapter.safetensors"
    if start == "saved here":
        IPAdapter.from_state_dict(state).save_pretrained(tmp_path, path.name)
    else:
        saved: dict[str, object] = dict(state)
        if start == "training checkpoint":
            saved = {f"unet.{key}": value for key, value in pipe.unet.state_dict().items()}
            saved |= {f"image_proj_model.{key}": value for key, value in state["image_proj"].items()}
            saved |= {f"adapter_modules.{key}": value for key, value in state["ip_adapter"].items()}
        torch.save(saved, tmp_path / "ip-adapter.bin")
        convert(tmp_path / "ip-adapter.bin", path)
    adapter = IPAdapter.from_pretrained(tmp_path).attach(pipe)
    adapter.set_prompt(picture(1), scale=0.6)
    ours = draw(pipe)
    adapter.detach()
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.6)
    assert close(ours, draw(pipe, ip_adapter_image=picture(1)))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_face_embeddings_draw_what_diffusers_draws(guidance: float) -> None:
    pipe = pipeline()
    state = random_adapter_state(pipe.unet)
    random = torch.Generator().manual_seed(2)
    shapes = face(pipe.unet.config.cross_attention_dim)
    state["image_proj"] = {key: torch.randn(shape, generator=random) / 8 for key, shape in shapes.items()}
    person = torch.nn.functional.normalize(torch.randn(1, 512, generator=random))
    adapter = IPAdapter.from_state_dict(state).attach(pipe)
    adapter.set_prompt(person, scale=0.8)
    ours = draw(pipe, guidance=guidance)
    adapter.detach()
    embeds = torch.stack([torch.zeros_like(person), person]) if guidance > 1 else person[None]
    shown = {"ip_adapter_image_embeds": [embeds]}
    assert close(ours, theirs(pipe, [state], 0.8, shown, guidance=guidance))
