"""Guidance of its own for the image: equal to ordinary guidance at equal scales, its formula elsewhere."""

from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from torch import Tensor

from controls import tiny_controlnet, tiny_t2i
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.clip import ImageEncoder
from imprompt.errors import UsageError
from imprompt.schema.prompt import ImagePrompt
from tiny import TEXT_WIDTH, picture, random_adapter_state, tiny_encoder, tiny_sd, tiny_sdxl, tiny_unet

MASK = Image.new("L", (32, 32), 255)


def on(pipe: Any) -> IPAdapter:
    encoder = ImageEncoder(*tiny_encoder(), name="tiny")
    return IPAdapter.from_state_dict(random_adapter_state(pipe.unet), image_encoder=encoder).attach(pipe)


PIPELINES = {
    "generate": (tiny_sd, {}),
    "edit": (lambda: StableDiffusionImg2ImgPipeline.from_pipe(tiny_sd()), {"image": picture(5)}),
    "inpaint": (
        lambda: StableDiffusionInpaintPipeline.from_pipe(tiny_sd()),
        {"image": picture(5), "mask_image": MASK, "width": 32, "height": 32},
    ),
    "inpaint with nine channels": (
        lambda: StableDiffusionInpaintPipeline.from_pipe(tiny_sd(9)),
        {"image": picture(5), "mask_image": MASK, "width": 32, "height": 32},
    ),
    "controlnet": (
        lambda: StableDiffusionControlNetPipeline.from_pipe(tiny_sd(), controlnet=tiny_controlnet()),
        {"image": picture(5), "controlnet_conditioning_scale": 0.8},
    ),
    "t2i-adapter": (
        lambda: StableDiffusionAdapterPipeline.from_pipe(tiny_sd(), adapter=tiny_t2i()),
        {"image": picture(5), "adapter_conditioning_scale": 0.8},
    ),
    "sdxl": (tiny_sdxl, {}),
    "sdxl edit": (
        lambda: StableDiffusionXLImg2ImgPipeline.from_pipe(tiny_sdxl()),
        {"image": picture(5), "strength": 0.8},
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_equal_scales_are_ordinary_guidance(name: str) -> None:
    make, inputs = PIPELINES[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    adapter = on(pipe)
    adapter.set_prompt(picture(1), scale=0.8)

    def draw() -> Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        call = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", **inputs}
        return pipe(["a cat"], num_images_per_prompt=2, generator=generator, **call).images

    ordinary = draw()
    adapter.set_guidance(4.0)
    torch.testing.assert_close(draw(), ordinary, rtol=1e-4, atol=1e-4)
    adapter.set_guidance(9.0)
    assert not torch.allclose(draw(), ordinary, atol=1e-2)
    adapter.set_guidance(None)
    assert torch.equal(draw(), ordinary)


def test_the_texts_scale_is_the_one_that_the_pipeline_computes_with() -> None:
    """A callback may change it in mid-run; the argument of the call stays what it was."""
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    adapter = on(pipe)
    adapter.set_prompt(picture(1), scale=0.8)

    def draw(image: bool) -> Tensor:
        def lower(pipe: Any, step: int, t: int, values: dict[str, Any]) -> dict[str, Any]:
            pipe._guidance_scale = 2.0
            adapter.set_guidance(2.0 if image else None)
            return values

        adapter.set_guidance(7.5 if image else None)
        call = {"num_inference_steps": 4, "guidance_scale": 7.5, "output_type": "latent"}
        return pipe(
            "a cat", generator=torch.Generator().manual_seed(0), callback_on_step_end=lower, **call
        ).images

    torch.testing.assert_close(draw(True), draw(False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guided", [True, False])
def test_the_result_is_the_published_sum_of_three_evaluations(guided: bool) -> None:
    unet = tiny_unet("sd")
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    random = torch.Generator().manual_seed(4)
    sample = torch.randn(2, 4, 8, 8, generator=random)
    text, empty = torch.randn(2, 2, 5, TEXT_WIDTH, generator=random)
    prompt = ImagePrompt(features=torch.randn(24, generator=random))
    adapter.set_batch([prompt, ImagePrompt(features=torch.randn(24, generator=random), profile="ease-out")])

    @torch.no_grad()
    def call(parts: tuple[str, ...], *texts: Tensor) -> Tensor:
        adapter.batch(guidance=parts)  # type: ignore[arg-type]
        return unet(sample.repeat(len(parts), 1, 1, 1), 500, torch.cat(texts), return_dict=False)[0]

    nothing, alone, both = call(("uncond",), empty), call(("uncond",), text), call(("cond",), text)
    s_text, s_image = (6.0, 2.5) if guided else (1.0, 2.5)
    expected = nothing + s_text * (alone - nothing) + s_image * (both - alone)
    adapter.set_guidance(s_image, text=s_text)
    if guided:
        e_nothing, e_text = call(("uncond", "cond"), empty, text).chunk(2)
        result = e_nothing + s_text * (e_text - e_nothing)
    else:
        result = call(("cond",), text)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_that_is_cleared_and_an_adapter_that_left_widen_nothing() -> None:
    pipe = tiny_sd()
    rows: list[int] = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    adapter = on(pipe)
    adapter.set_guidance(3.0)

    def draw(**fields: object) -> int:
        pipe("a", num_inference_steps=1, guidance_scale=4.0, output_type="latent", **fields)
        return rows[-1]

    assert draw() == 2
    adapter.set_prompt(picture(1))
    assert draw() == 3
    assert draw(num_images_per_prompt=2) == 6
    adapter.detach()
    assert draw() == 2
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


def test_a_region_is_said_where_text_is_guided_towards() -> None:
    pipe = tiny_sd()
    adapter = on(pipe)
    half = torch.ones(4, 4)
    half[:, :2] = 0

    def draw() -> Tensor:
        call = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
        return pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images

    adapter.set_prompt(picture(1), mask=half, text="a dog")
    ordinary = draw()
    adapter.set_guidance(4.0)
    torch.testing.assert_close(draw(), ordinary, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_no_number_is_no_guidance(value: float) -> None:
    with pytest.raises(UsageError, match="guidance: image is"):
        on(tiny_sd()).set_guidance(value)


def test_what_cannot_be_widened_is_said() -> None:
    unet = tiny_unet("sd")
    adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    adapter.set_prompt(torch.zeros(24))
    sample, text = torch.zeros(3, 4, 8, 8), torch.zeros(3, 5, TEXT_WIDTH)
    adapter.batch(guidance=["uncond", "cond", "cond"])
    adapter.set_guidance(3.0)
    with pytest.raises(UsageError, match="uncond, cond, cond"):
        unet(sample, 500, text)
    adapter.batch(guidance=True)
    with pytest.raises(UsageError, match="pass text="):
        unet(sample[:2], 500, text[:2])
    second = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
    second.set_guidance(5.0)
    with pytest.raises(UsageError, match="share their guidance"):
        unet(sample[:2], 500, text[:2])
