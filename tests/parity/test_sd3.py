"""InstantX's SD3.5 adapter on tiny SD3 pipelines, against diffusers' own load_ip_adapter."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

import tinydit
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import UsageError
from imprompt.schema.prompt import ImagePrompt
from tiny import picture

CALL: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "height": 32, "width": 48}


def features(*seeds: int) -> Tensor:
    """SigLIP's next to last hidden states, as diffusers' pipeline encodes pictures."""
    pixels = tinydit.siglip_processor()(images=[picture(s) for s in seeds], return_tensors="pt").pixel_values
    with torch.no_grad():
        found: Tensor = tinydit.siglip()(pixels, output_hidden_states=True).hidden_states[-2]
    return found


def draw(pipe: Any, rows: int = 1, guidance: float = 5.0, **fields: Any) -> Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in range(rows)]
    texts = tinydit.text(rows, pooled=64) | tinydit.negative(rows, pooled=64)
    images: Tensor = pipe(generator=generator, guidance_scale=guidance, **CALL | texts | fields).images
    return images


def ours(pipe: Any, sites: int = 2) -> IPAdapter:
    return IPAdapter.from_state_dict(tinydit.instantx_sd3_state(sites)).attach(pipe)


def theirs(pipe: Any, folder: Path, scale: float, sites: int = 2) -> Any:
    torch.save(tinydit.instantx_sd3_state(sites), folder / "ip.bin")
    pipe.load_ip_adapter(str(folder), weight_name="ip.bin", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("dual", [False, True])
def test_one_picture_equals_diffusers(
    guidance: float, qk_norm: str | None, dual: bool, tmp_path: Path
) -> None:
    kind: dict[str, Any] = {"dual": dual, "qk_norm": qk_norm}
    pipe, sites = tinydit.sd3(**kind), 3 if dual else 2
    plain = draw(pipe, guidance=guidance)
    adapter = ours(pipe, sites)
    adapter.set_prompt(features(1), scale=0.8)
    got = draw(pipe, guidance=guidance)
    adapter.detach()
    assert torch.equal(draw(pipe, guidance=guidance), plain)
    oracle = theirs(tinydit.sd3(**kind), tmp_path, 0.8, sites)
    wanted = draw(oracle, guidance=guidance, ip_adapter_image=picture(1))
    assert (got - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_picture_goes_through_the_pipelines_own_encoder() -> None:
    pipe = tinydit.sd3()
    adapter = ours(pipe)
    adapter.set_prompt(features(1), scale=0.8)
    wanted = draw(pipe)
    adapter.set_prompt(picture(1), scale=0.8)
    torch.testing.assert_close(draw(pipe), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.3, 1.3])  # diffusers ignores negative ones here
def test_a_batch_of_one_picture_equals_diffusers(scale: float, tmp_path: Path) -> None:
    pipe, oracle = tinydit.sd3(), theirs(tinydit.sd3(), tmp_path, scale)
    ours(pipe).set_prompt(features(1), scale=scale)
    wanted = draw(oracle, 2, ip_adapter_image=picture(1))
    torch.testing.assert_close(draw(pipe, 2), wanted, atol=1e-5, rtol=1e-5)


def test_scale_zero_and_no_prompt_are_plain_to_the_bit() -> None:
    """The second attention reads image keys too: no picture must mean no second attention."""
    pipe = tinydit.sd3()
    plain = draw(pipe)
    adapter = ours(pipe)
    assert torch.equal(draw(pipe), plain)
    adapter.set_prompt(features(1), scale=0.0)
    assert torch.equal(draw(pipe), plain)


def test_a_batch_shows_each_sample_its_own_pictures() -> None:
    """diffusers takes one picture a call."""
    pipe = tinydit.sd3()
    adapter = ours(pipe)
    prompts = [ImagePrompt(features=features(1, 2), scale=0.8), ImagePrompt(features=features(3), scale=0.5)]
    adapter.set_batch(prompts)
    together = draw(pipe, 2)
    for i, prompt in enumerate(prompts):
        adapter.set_prompt(prompt)
        texts = tinydit.text(2, pooled=64) | tinydit.negative(2, pooled=64)
        alone = pipe(
            generator=torch.Generator().manual_seed(i),
            guidance_scale=5.0,
            **CALL,
            **{name: value[i : i + 1] for name, value in texts.items()},
        ).images
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_skip_layer_guidance_calls_with_cond_rows_alone() -> None:
    """diffusers mixes uncond and cond tokens there: rows of 1 against tokens of 2."""
    pipe = tinydit.sd3()
    adapter = ours(pipe)
    adapter.set_prompt(features(1), scale=0.8)
    rows: list[tuple[int, int]] = []
    processor = pipe.transformer.transformer_blocks[0].attn.processor

    def look(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
        rows.append((len(kwargs["hidden_states"]), len(processor.image_kvs[0].key)))

    pipe.transformer.transformer_blocks[0].attn.register_forward_pre_hook(look, with_kwargs=True)
    skipped = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    assert draw(pipe, **skipped).isfinite().all()
    assert (1, 1) in rows
    assert all(latents == keys for latents, keys in rows)


def test_a_prompt_may_begin_in_mid_run() -> None:
    pipe = tinydit.sd3()
    plain = draw(pipe)
    adapter = ours(pipe)
    adapter.set_prompt(features(1), scale=0.8, start=0.5)
    late = draw(pipe)
    adapter.set_prompt(features(1), scale=0.8)
    assert not torch.equal(late, plain)
    assert not torch.equal(late, draw(pipe))


def test_guidance_of_its_own_that_equals_the_texts_changes_nothing_in_a_window() -> None:
    """SD3 is told the timestep once a row, and guidance of its own adds rows."""
    pipe = tinydit.sd3()
    adapter = ours(pipe)
    adapter.set_prompt(features(1), scale=0.8, start=0.3)
    usual = draw(pipe)
    adapter.set_guidance(5.0)
    assert torch.allclose(draw(pipe), usual, atol=1e-5)
    adapter.set_guidance(2.0)
    assert not torch.allclose(draw(pipe), usual, atol=1e-3)


def test_strength_may_act_on_the_keys_too() -> None:
    """The keys are made anew at each step."""
    pipe = tinydit.sd3()
    adapter = ours(pipe)
    drawn: dict[tuple[str, float], Tensor] = {}
    for scaling in ("v-only", "k+v"):
        for scale in (1.0, 0.5):
            adapter.set_prompt(features(1), scale=scale, scaling=scaling)
            drawn[scaling, scale] = draw(pipe)
    assert torch.equal(drawn["k+v", 1.0], drawn["v-only", 1.0])
    assert (drawn["k+v", 0.5] - drawn["v-only", 0.5]).abs().max() > 1e-6


TASKS = {
    "image-to-image": (diffusers.StableDiffusion3Img2ImgPipeline, {}),
    "inpaint": (diffusers.StableDiffusion3InpaintPipeline, {"mask_image": Image.new("L", (48, 32), 255)}),
}


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_share_the_formula(task: str, tmp_path: Path) -> None:
    kind, fields = TASKS[task]
    fields = {"image": picture(3), "strength": 0.7, **fields}
    pipe, oracle = (tinydit.sd3(kind, channels=16) for _ in "ab")  # diffusers inpaints with 16 alone
    theirs(oracle, tmp_path, 0.8)
    plain = draw(pipe, **fields)
    ours(pipe).set_prompt(features(1), scale=0.8)
    got = draw(pipe, **fields)
    assert (got - plain).abs().max() > 1e-3
    wanted = draw(oracle, **fields, ip_adapter_image=picture(1))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_no_picture_is_zero_features_not_those_of_a_black_one() -> None:
    pipe = tinydit.sd3()
    adapter = ours(pipe)
    drawn = []
    for negative in (None, torch.zeros_like(features(1)), Image.new("RGB", (32, 32))):
        adapter.set_prompt(ImagePrompt(features=features(1), scale=0.8, negative=negative))
        drawn.append(draw(pipe))
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[2] - drawn[0]).abs().max() > 1e-4


def test_tokens_are_refused_since_each_step_makes_others() -> None:
    adapter = ours(tinydit.sd3())
    tokens = torch.randn(1, 4, adapter.projection.cross_dim)
    for negative in (None, tokens):
        with pytest.raises(UsageError, match="give features or a picture"):
            adapter.set_prompt(ImagePrompt(tokens=tokens, negative=negative))
