"""Transformer bases: recognised, loaded and turned to other tasks as UNets are; their quirks are rows."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import tinydit
from imprompt.catalog import bases
from imprompt.errors import ModelError, UsageError
from imprompt.generation.families import KINDS, find_base
from imprompt.generation.guided import check_guidance, guidance_arguments
from imprompt.generation.loading import choose_dtype
from imprompt.generation.pipelines import for_task, load, scheduler_for
from imprompt.schema.request import Request
from layouts import sparse
from tiny import tiny_sd

FLUX = "FluxTransformer2DModel"
SD3 = "SD3Transformer2DModel"
UNET = "model.diffusion_model.input_blocks.{}.attn2.to_k.weight"
PIPES = {"flux": tinydit.flux, "chroma": tinydit.chroma, "sd3": tinydit.sd3}


@pytest.mark.parametrize(
    ("kind", "pipeline"),
    [
        ("sd", diffusers.StableDiffusionImg2ImgPipeline), ("sd3", diffusers.StableDiffusion3Img2ImgPipeline),
        ("flux", diffusers.FluxImg2ImgPipeline), ("flux-fill", diffusers.FluxFillPipeline),
        ("chroma", diffusers.ChromaInpaintPipeline),
    ],
)  # fmt: skip
@pytest.mark.parametrize("strength", [0.04, 0.6, 0.75, 1.0])
def test_as_many_steps_are_drawn_as_diffusers_draws(kind: str, pipeline: Any, strength: float) -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    timesteps, count = pipeline.get_timesteps(SimpleNamespace(scheduler=scheduler), 10, strength, "cpu")
    assert KINDS[kind].drawn_steps(10, strength) == count == len(timesteps)


@pytest.mark.parametrize("kind", PIPES)
def test_a_folder_is_loaded_for_every_task_around_the_same_weights(kind: str, tmp_path: Path) -> None:
    made, texts = PIPES[kind](), tiny_sd()
    absent = [name for name, part in made.components.items() if part is None]
    for name in absent:  # of another kind than published, but loaded in the same way
        made.register_modules(**{name: texts.tokenizer if "tokenizer" in name else texts.text_encoder})
    made.save_pretrained(tmp_path / "base")
    base = find_base(str(tmp_path / "base"))
    assert base.kind is KINDS[kind]
    pipe = load(base, "generate", torch.float32)
    for task, name in KINDS[kind].pipelines.items():
        other = for_task(pipe, base, task)
        assert type(other).__name__ == name
        assert other.transformer is pipe.transformer
    parts = {path.parent.name for path in base.weight_files}
    assert parts == {"transformer", "vae", *(name for name in absent if "text_encoder" in name)}
    with pytest.raises(UsageError, match="is for models that predict noise"):
        scheduler_for(pipe, "ddim")


@pytest.mark.parametrize(
    ("pipeline", "reads_guidance", "steps", "guidance"),
    [
        ("FluxPipeline", True, 28, 3.5), ("FluxPipeline", False, 4, 0.0),
        ("FluxFillPipeline", True, 50, 30.0), ("FluxKontextPipeline", True, 28, 2.5),
    ],
)  # fmt: skip
def test_a_folder_of_flux_has_the_defaults_of_the_published_base_of_its_kind(
    pipeline: str, reads_guidance: bool, steps: int, guidance: float, tmp_path: Path
) -> None:
    config = {"_class_name": FLUX, "joint_attention_dim": 4096, "guidance_embeds": reads_guidance}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    defaults = find_base(str(tmp_path)).defaults
    assert (defaults.steps, defaults.guidance) == (steps, guidance)


@pytest.mark.parametrize(("reads_guidance", "steps"), [(True, 28), (False, 4)])
def test_so_has_a_single_file(reads_guidance: bool, steps: int, tmp_path: Path) -> None:
    keys = ["double_blocks.0.img_attn.qkv.weight", *(["guidance_in.in_layer.weight"] * reads_guidance)]
    sparse(tmp_path / "base.safetensors", dict.fromkeys(keys, ("BF16", (4, 4))))
    assert find_base(str(tmp_path / "base.safetensors")).defaults.steps == steps


def test_a_transformer_is_drawn_in_the_format_it_is_published_in() -> None:
    device = torch.device("mps")
    assert choose_dtype("auto", device, find_base("flux")) == torch.bfloat16
    assert choose_dtype("auto", device, find_base("sdxl")) == torch.float16
    assert choose_dtype("float16", device, find_base("flux")) == torch.float16
    assert choose_dtype("auto", torch.device("cpu"), find_base("flux")) == torch.float32


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"_class_name": "FluxTransformer2DModel", "joint_attention_dim": 4096}, "flux"),
        ({"_class_name": "ChromaTransformer2DModel", "joint_attention_dim": 4096}, "chroma"),
        (
            {"_class_name": "SD3Transformer2DModel", "num_attention_heads": 38, "attention_head_dim": 64},
            "sd35",
        ),
        ({"_class_name": "SD3Transformer2DModel", "num_attention_heads": 24, "attention_head_dim": 64}, None),
        ({"_class_name": "FluxTransformer2DModel", "joint_attention_dim": 32}, None),
    ],
)
def test_a_folders_family_is_told_by_its_transformer(
    config: dict[str, object], family: str | None, tmp_path: Path
) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text("{}")
    assert find_base(str(tmp_path)).family == family


@pytest.mark.parametrize(
    ("key", "shape", "family"),
    [
        (UNET.format("1.1.transformer_blocks.0"), (320, 768), "sd15"),
        (
            UNET.format("1.1.transformer_blocks.0"),
            (320, 1024),
            "sd21",
        ),
        (
            UNET.format("4.1.transformer_blocks.1"),
            (640, 2048),
            "sdxl",
        ),
        ("double_blocks.0.img_attn.qkv.weight", (9216, 3072), "flux"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", (9216, 3072), "flux"),
        ("joint_blocks.0.x_block.attn.qkv.weight", (7296, 2432), "sd35"),
        ("distilled_guidance_layer.in_proj.weight", (5120, 64), "chroma"),
    ],
)
def test_a_single_file_is_recognised_by_a_key(
    key: str, shape: tuple[int, int], family: str, tmp_path: Path
) -> None:
    sparse(tmp_path / "a.safetensors", {key: ("F16", shape)})
    base = find_base(str(tmp_path / "a.safetensors"))
    assert (base.family, base.kind is KINDS[_kind(family)]) == (family, True)


def _kind(family: str) -> str:
    return next(name for name, kind in KINDS.items() if family in kind.families)


def test_a_file_of_another_kind_is_no_base(tmp_path: Path) -> None:
    sparse(tmp_path / "a.safetensors", {"image_proj.proj.weight": ("F16", (2, 2))})
    with pytest.raises(ModelError, match="An adapter goes to --adapter"):
        load(find_base(str(tmp_path / "a.safetensors")), "generate", torch.float32)


def test_every_base_of_the_catalogue_has_a_kind_and_defaults() -> None:
    for name, row in bases().items():
        base = find_base(name)
        assert base.kind in KINDS.values()
        assert base.defaults.size == row.size
    assert find_base("flux-schnell").defaults.steps == 4
    assert find_base("flux-kontext").defaults.guidance == 2.5
    with pytest.raises(UsageError, match="can inpaint, not generate"):
        load(find_base("flux-fill"), "generate", torch.float32)


def test_a_distilled_base_reads_a_negative_with_true_guidance_alone() -> None:
    flux, sdxl = find_base("flux"), find_base("sdxl")
    plain = Request(prompt="a", guidance=3.5)
    assert guidance_arguments(plain, flux, [""]) == {"guidance_scale": 3.5}
    with pytest.raises(UsageError, match="guidance-distilled and reads it with true_guidance above 1 alone"):
        check_guidance(plain.replace(negative="blurry"), flux)
    guided = plain.replace(negative="blurry", true_guidance=4.0)
    check_guidance(guided, flux)
    assert guidance_arguments(guided, flux, ["blurry"]) == {
        "guidance_scale": 3.5, "true_cfg_scale": 4.0, "negative_prompt": "blurry"
    }  # fmt: skip
    assert guidance_arguments(plain, sdxl, ["a", "b"])["negative_prompt"] == ["a", "b"]
    assert "negative_prompt" not in guidance_arguments(plain.replace(guidance=1.0), sdxl, ["a"])


def test_guidance_that_a_pipeline_does_not_have_is_refused() -> None:
    guided = Request(prompt="a", true_guidance=4.0)
    for name in ("sdxl", "chroma", "sd35"):
        with pytest.raises(UsageError, match=rf"true_guidance: base '{name}' is not guidance-distilled"):
            check_guidance(guided, find_base(name))
    fill = guided.replace(task="inpaint", image="a.png", mask="b.png")
    with pytest.raises(UsageError, match=r"true_guidance: diffusers' FluxFillPipeline"):
        check_guidance(fill, find_base("flux-fill"))
    with pytest.raises(UsageError, match=r"negative: diffusers' FluxFillPipeline"):
        check_guidance(fill.replace(negative="blurry", true_guidance=None), find_base("flux-fill"))


def test_a_negative_needs_one_guidance_above_one() -> None:
    assert Request(prompt="a", negative="b", guidance=0.0, true_guidance=3.0).negative == "b"
    with pytest.raises(UsageError, match="negative: has no effect with true_guidance 1"):
        Request(prompt="a", negative="b", guidance=3.5, true_guidance=1.0)
    with pytest.raises(UsageError, match="negative: has no effect with guidance 1"):
        Request(prompt="a", negative="b", guidance=1.0)
