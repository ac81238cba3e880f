"""Which rows of a call are uncond is told from the call itself; storage formats; nothing half attached."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.clip import ImageEncoder
from imprompt.errors import UsageError
from tiny import picture, random_adapter_state, tiny_encoder, tiny_sd, tiny_unet

CALL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}


def on(pipe: Any) -> IPAdapter:
    state = random_adapter_state(pipe.unet)
    return IPAdapter.from_state_dict(state, image_encoder=ImageEncoder(*tiny_encoder())).attach(pipe)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw(pipe: Any, guidance_scale: float = 4.0, **fields: Any) -> Tensor:
    call = CALL | {"generator": seeded(), "guidance_scale": guidance_scale} | fields
    images: Tensor = pipe("a cat", **call).images
    return images


def sibling(pipe: Any, kind: type[Any]) -> Any:
    other = kind.from_pipe(pipe) if hasattr(kind, "from_pipe") else kind(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


def test_a_sibling_around_the_same_unet_has_its_own_guidance() -> None:
    pipe = tiny_sd()
    adapter = on(pipe)
    adapter.set_prompt(picture(1))
    wanted = {scale: draw(pipe, scale) for scale in (4.0, 1.0)}
    other = sibling(pipe, diffusers.StableDiffusionPipeline)
    draw(pipe, 1.0)  # leaves the flag of the attached pipeline off
    assert torch.equal(draw(other, 4.0), wanted[4.0])
    draw(pipe, 4.0)
    assert torch.equal(draw(other, 1.0), wanted[1.0])
    image_to_image = sibling(pipe, diffusers.StableDiffusionImg2ImgPipeline)
    draw(pipe, 1.0)
    after = image_to_image("a cat", image=picture(2), strength=0.5, **_img2img())
    adapter.attach(image_to_image)
    assert torch.equal(
        image_to_image("a cat", image=picture(2), strength=0.5, **_img2img()).images, after.images
    )


def _img2img() -> dict[str, Any]:
    return {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 4.0, "generator": seeded()}


def _rows(pipe: Any, call: Callable[[], object]) -> list[tuple[bool, ...]]:
    """For each call of the UNet: which rows see the picture's own tokens (the others: its negative's)."""
    adapter = IPAdapter.from_state_dict(random_adapter_state(pipe.unet)).attach(pipe)
    tokens = torch.ones(4, 32)
    adapter.set_prompt(_tokens(tokens, torch.zeros(4, 32)))
    first = next(p for p in pipe.unet.attn_processors.values() if hasattr(p, "image_kvs"))
    seen = []

    def look(*_: object) -> None:
        (kv,) = first.image_kvs
        seen.append(tuple(bool(row.any()) for row in kv.key))

    handle = pipe.unet.mid_block.register_forward_pre_hook(look)
    try:
        call()
    finally:
        handle.remove()
        adapter.detach()
    return seen


def _tokens(tokens: Tensor, negative: Tensor) -> Any:
    from imprompt.schema.prompt import ImagePrompt

    return ImagePrompt(tokens=tokens, negative=negative)


def test_panorama_keeps_its_guidance_in_a_variable() -> None:
    pipe = sibling_of_tiny(diffusers.StableDiffusionPanoramaPipeline)
    size = {"height": 32, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
    rows = _rows(pipe, lambda: pipe("a cat", guidance_scale=4.0, **size))
    assert set(rows) == {(False, True)}
    wide = size | {"width": 576}  # two views of 64 latents
    two = _rows(pipe, lambda: pipe("a cat", guidance_scale=4.0, view_batch_size=2, **wide))
    assert (False, True, False, True) in two
    assert set(_rows(pipe, lambda: pipe("a cat", guidance_scale=1.0, **size))) == {(True,)}


def test_self_attention_guidance_calls_with_one_branch_alone() -> None:
    pipe = sibling_of_tiny(diffusers.StableDiffusionSAGPipeline)
    size = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}
    rows = _rows(pipe, lambda: pipe("a cat", guidance_scale=4.0, sag_scale=0.7, **size))
    assert rows == [(False, True), (False,)]
    two = _rows(pipe, lambda: pipe(["a cat", "a dog"], guidance_scale=4.0, sag_scale=0.7, **size))
    assert two == [(False, False, True, True), (False, False)]
    assert set(_rows(pipe, lambda: pipe("a cat", guidance_scale=1.0, sag_scale=0.7, **size))) == {(True,)}


def test_guidance_for_the_image_and_self_attention_guidance_exclude_each_other() -> None:
    pipe = sibling_of_tiny(diffusers.StableDiffusionSAGPipeline)
    adapter = on(pipe)
    adapter.set_prompt(picture(1))
    adapter.set_guidance(3.0)
    size = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}
    with pytest.raises(UsageError, match="sag_scale=0"):
        pipe("a cat", guidance_scale=4.0, sag_scale=0.7, **size)
    assert pipe("a cat", guidance_scale=4.0, sag_scale=0.0, **size).images.isfinite().all()
    adapter.set_guidance(None)
    assert pipe("a cat", guidance_scale=4.0, sag_scale=0.7, **size).images.isfinite().all()


def sibling_of_tiny(kind: type[Any]) -> Any:
    parts = dict(tiny_sd().components)
    parts.pop("image_encoder", None)
    pipe = kind(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_loop_of_the_users_own_is_told_to_state_its_layout() -> None:
    pipe = tiny_sd()
    adapter = on(pipe)
    adapter.set_prompt(picture(1))
    draw(pipe)
    states = torch.randn(2, 5, 32)
    with pytest.raises(UsageError, match=r"called from outside.*adapter\.batch"):
        pipe.unet(torch.randn(2, 4, 16, 16), 500, states)
    adapter.batch(guidance=True)
    assert pipe.unet(torch.randn(2, 4, 16, 16), 500, states).sample.isfinite().all()


def test_a_unet_in_float8_storage_takes_an_adapter() -> None:
    plain = tiny_unet("sd").to(torch.bfloat16)
    cast = tiny_unet("sd").to(torch.bfloat16)
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    outs = []
    for unet in (plain, cast):
        adapter = IPAdapter.from_state_dict(random_adapter_state(unet)).attach(unet)
        assert adapter.dtype is torch.float32
        adapter.set_prompt(torch.randn(24, generator=seeded()))
        sample = torch.randn(1, 4, 8, 8, generator=seeded()).to(torch.bfloat16)
        text = torch.randn(1, 5, 32, generator=seeded()).to(torch.bfloat16)
        with torch.no_grad():
            outs.append(unet(sample, 500, text).sample.float())
        adapter.detach()
        assert not any(hasattr(p, "image_kvs") for p in unet.attn_processors.values())
    assert torch.nn.functional.cosine_similarity(outs[0].flatten(), outs[1].flatten(), dim=0) > 0.98
