"""Requests on tiny FLUX, Chroma and SD3.5 folders: the Engine draws what diffusers' pipelines draw."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image

import tinydit
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import ModelError, UsageError
from imprompt.generation.engine import Engine
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request
from quantized import gguf_file

PIPELINES = {
    "flux": diffusers.FluxPipeline,
    "chroma": diffusers.ChromaPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
}


PHOTO_PIPELINES = {
    (name, task): getattr(diffusers, kind.__name__.replace("Pipeline", f"{part}Pipeline"))
    for name, kind in PIPELINES.items()
    for task, part in (("edit", "Img2Img"), ("inpaint", "Inpaint"))
}
LANCZOS = Image.Resampling.LANCZOS


@pytest.fixture(scope="module", params=PIPELINES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinydit.save_base(request.param, tmp_path_factory.mktemp("bases") / request.param)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinydit.save_base("flux", tmp_path_factory.mktemp("bases") / "flux")


def asked(base: Path, **fields: object) -> Request:
    common = {"base": str(base), "size": (48, 32), "steps": 3}
    if fields.get("images"):
        common["adapter"] = str(base / "adapters")
    return Request.from_mapping({**common, "prompt": "a cat", "seed": 5, "guidance": 3.0, **fields})


def drawn(engine: Engine, request: Request) -> np.ndarray:
    return np.asarray(engine.run(request).images[0], np.int16)


def test_a_request_draws_what_the_pipeline_draws(engine: Engine, base: Path, pictures: Path) -> None:
    pipe = PIPELINES[base.name].from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    shown = Image.open(pictures / "ref.png").convert("RGB")
    adapter = IPAdapter.from_pretrained(base / "adapters").attach(pipe)
    call = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 3.0}
    for scale in (0.0, 0.8):
        adapter.set_prompt(shown, scale=scale)
        wanted = pipe("a cat", generator=torch.Generator().manual_seed(5), **call).images[0]
        got = drawn(engine, asked(base, images=[ImagePrompt(str(pictures / "ref.png"), scale=scale)]))
        assert np.abs(got - np.asarray(wanted, np.int16)).max() <= 1


def test_a_picture_a_scale_and_a_mask_act(engine: Engine, base: Path, pictures: Path) -> None:
    shown, mask = str(pictures / "ref.png"), str(pictures / "mask.png")
    plain = drawn(engine, asked(base))
    whole = drawn(engine, asked(base, images=[ImagePrompt(shown, scale=3)]))
    masked = drawn(engine, asked(base, images=[ImagePrompt(shown, scale=3, mask=mask)]))
    assert np.abs(whole - plain).max() > 3
    assert np.abs(masked - plain).max() > 3
    assert np.abs(masked - whole).max() > 3


def test_each_step_has_a_preview(engine: Engine, base: Path) -> None:
    previews: list[Image.Image] = []
    drawn = engine.run(asked(base), on_step=lambda step: previews.append(step.preview())).images[0]
    assert [preview.size for preview in previews] == [drawn.size] * 3
    assert len({preview.tobytes() for preview in previews}) == 3


@pytest.mark.parametrize("task", ["edit", "inpaint"])
def test_a_photo_is_drawn_anew(engine: Engine, base: Path, pictures: Path, task: str) -> None:
    place = {"image": str(pictures / "other.png"), "size": (32, 32), "strength": 0.7}
    place["images"] = [ImagePrompt(str(pictures / "ref.png"), scale=3)]
    if task == "inpaint":
        place["mask"] = str(pictures / "mask.png")
    request = asked(base, task=task, **place)
    got = drawn(engine, request)
    assert np.array_equal(got, drawn(engine, request))
    pipe = PHOTO_PIPELINES[base.name, task].from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    if task == "inpaint" and base.name == "chroma":  # which diffusers' pipeline asks for
        pipe.transformer.register_to_config(guidance_embeds=False)
    shown, start, mask = (Image.open(pictures / f"{name}.png") for name in ("ref", "other", "mask"))
    IPAdapter.from_pretrained(base / "adapters").attach(pipe).set_prompt(shown, scale=3)
    start, mask = start.convert("RGB").resize((32, 32), LANCZOS), mask.convert("L").resize((32, 32), LANCZOS)
    call = {"image": start, "strength": 0.7, "height": 32, "width": 32}
    call |= {"mask_image": mask} if task == "inpaint" else {}
    generator = torch.Generator().manual_seed(5)
    wanted = pipe("a cat", num_inference_steps=3, guidance_scale=3.0, generator=generator, **call).images[0]
    wanted = Image.composite(wanted, start, mask) if task == "inpaint" else wanted
    assert np.abs(got - np.asarray(wanted, np.int16)).max() <= 1
    assert np.abs(got - drawn(engine, asked(base, task=task, **place | {"images": []}))).max() > 3


def test_true_guidance_draws_what_diffusers_draws(engine: Engine, flux: Path, pictures: Path) -> None:
    """A negative text and picture are read, each request's own in a batch; with the same two calls a step."""
    pipe = diffusers.FluxPipeline.from_pretrained(flux)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(flux / "adapters"), weight_name="ip_adapter.safetensors")
    pipe.set_ip_adapter_scale(0.8)
    shown, other = (Image.open(pictures / f"{name}.png").convert("RGB") for name in ("ref", "other"))
    wanted = pipe(
        "a cat", negative_prompt="a dog", true_cfg_scale=2.5, guidance_scale=3.0, num_inference_steps=3,
        height=32, width=48, generator=torch.Generator().manual_seed(5), ip_adapter_image=shown,
        negative_ip_adapter_image=other,
    ).images[0]  # fmt: skip
    prompt = ImagePrompt(str(pictures / "ref.png"), scale=0.8, negative=str(pictures / "other.png"))
    request = asked(flux, images=[prompt], negative="a dog", true_guidance=2.5)
    got = drawn(engine, request)
    assert np.abs(got - np.asarray(wanted, np.int16)).max() <= 1
    plain = request.replace(images=[ImagePrompt(str(pictures / "ref.png"), scale=0.8)])
    others = [plain, plain.replace(negative="a bird"), plain.replace(negative="", true_guidance=None)]
    drawings = [drawn(engine, each) for each in others]
    for drawing in drawings:
        assert np.abs(drawing - got).max() > 3
    assert np.abs(drawings[0] - drawings[1]).max() > 1
    together = engine.run_batch([request, others[1]])
    for result, alone in zip(together, (got, drawings[1]), strict=True):
        assert np.abs(np.asarray(result.images[0], np.int16) - alone).max() <= 1


def test_a_negative_picture_that_is_not_read_is_noted(engine: Engine, flux: Path, pictures: Path) -> None:
    shown, other = str(pictures / "ref.png"), str(pictures / "other.png")
    plain = asked(flux, images=[ImagePrompt(shown)])
    asked_for = plain.replace(images=[ImagePrompt(shown, negative=other)])
    result = engine.run(asked_for)
    assert "images.0.negative has no effect: this base reads it with true_guidance above 1" in result.notes
    assert np.array_equal(np.asarray(result.images[0], np.int16), drawn(engine, plain))
    for read in ({"true_guidance": 2.0}, {"image_guidance": 2.0}):
        assert not engine.run(asked_for.replace(**read)).notes
        assert not np.array_equal(
            drawn(engine, asked_for.replace(**read)), drawn(engine, plain.replace(**read))
        )


def test_a_crop_is_noted_where_the_encoder_crops(engine: Engine, base: Path, pictures: Path) -> None:
    """SigLIP, which SD3.5's adapter reads, squashes a picture to a square."""
    notes = engine.run(asked(base, images=[str(pictures / "wide.png")])).notes
    cropped = [note for note in notes if "50% lies outside the centre square" in note]
    assert len(cropped) == (0 if base.name == "sd3" else 1)


@pytest.mark.parametrize("how", ["gguf", "int8"])
def test_a_quantised_transformer_draws_nearly_the_same(
    base: Path, pictures: Path, how: str, tmp_path: Path
) -> None:
    if how == "gguf":
        transformer = PIPELINES[base.name].from_pretrained(base).transformer
        how = str(gguf_file(tmp_path / "transformer.gguf", transformer))
    else:
        pytest.importorskip("torchao", reason="int8 needs torchao, in the extra 'quantize'")
    engine, shown = Engine(), asked(base, images=[ImagePrompt(str(pictures / "ref.png"), scale=3)])
    whole, bare = drawn(engine, shown), drawn(engine, asked(base))
    got = drawn(engine, shown.replace(quantize=how))
    assert 0 < np.abs(got - whole).max() < np.abs(whole - bare).max()
    assert np.abs(got - drawn(engine, asked(base, quantize=how))).max() > 3


def test_a_file_that_is_no_transformer_is_said_in_one_line(
    engine: Engine, base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="reading .gguf needs the extra 'quantize'")
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(ModelError, match=r"no\.gguf' is no transformer of base") as error:
        engine.run(asked(base, quantize=str(tmp_path / "no.gguf")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offloading_changes_no_pixel(base: Path, pictures: Path, how: str) -> None:
    """On the CPU, with the hooks that ``--offload`` installs; the Engine refuses it without a GPU."""
    pipe = PIPELINES[base.name].from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    adapter = IPAdapter.from_pretrained(base / "adapters").attach(pipe)
    adapter.set_prompt(Image.open(pictures / "ref.png"), scale=0.8)
    call = {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 3.0}

    def draw() -> np.ndarray:
        image = pipe("a cat", generator=torch.Generator().manual_seed(5), **call).images[0]
        return np.asarray(image, np.int16)

    wanted = draw()
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:  # what enable_sequential_cpu_offload does; accelerate fails on a text encoder for the CPU
        cpu_offload(pipe.transformer, "cpu")
        assert next(pipe.transformer.parameters()).is_meta
    assert np.array_equal(draw(), wanted)
    adapter.set_prompt(Image.open(pictures / "other.png"), scale=0.8)
    assert not np.array_equal(draw(), wanted)


@pytest.mark.parametrize("task", ["generate", "edit", "inpaint"])
def test_kontext_draws_the_size_that_is_asked_for(
    engine: Engine, pictures: Path, task: str, tmp_path: Path
) -> None:
    base = tinydit.save_base("flux-kontext", tmp_path / "kontext")
    kind = diffusers.FluxKontextInpaintPipeline if task == "inpaint" else diffusers.FluxKontextPipeline
    pipe = kind.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(base / "adapters"), weight_name="ip_adapter.safetensors")
    pipe.set_ip_adapter_scale(0.8)
    start, mask = (Image.open(pictures / f"{name}.png").resize((32, 32)) for name in ("other", "mask"))
    places = {"generate": {}, "edit": {"image": "start"}, "inpaint": {"image": "start", "mask": "mask"}}[task]
    request = asked(base, task=task, images=[ImagePrompt("shown", scale=0.8)], **{"size": (32, 32)} | places)
    given = {"start": start, "mask": mask, "shown": Image.open(pictures / "ref.png")}
    result = engine.run(request, pictures=given)
    assert result.images[0].size == (32, 32)
    assert result.request.strength == (1.0 if task == "inpaint" else None)
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "width": 32, "height": 32, "max_area": 32 * 32}
    call |= {"image": start} if places else {}
    call |= {"mask_image": mask, "strength": 1.0} if task == "inpaint" else {}
    wanted = pipe(
        prompt="a cat", generator=torch.Generator().manual_seed(5), ip_adapter_image=given["shown"],
        _auto_resize=False, **call,
    ).images[0]  # fmt: skip
    wanted = Image.composite(wanted, start, mask) if task == "inpaint" else wanted
    far = np.abs(np.asarray(result.images[0], np.int16) - np.asarray(wanted, np.int16))
    assert far.max() <= 1
    if task == "edit":
        with pytest.raises(UsageError, match=r"strength: base .* draws anew what the text says"):
            engine.run(request.replace(strength=0.5), pictures=given)


def test_guidance_that_the_model_does_not_read_is_noted(engine: Engine, flux: Path, tmp_path: Path) -> None:
    """FLUX.1 [schnell] has no input for it."""
    note = "guidance: 3 has no effect: this model was trained to draw without"
    assert note not in engine.run(asked(flux)).notes
    schnell = tmp_path / "schnell"
    shutil.copytree(flux, schnell)
    config = schnell / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": False}))
    result = engine.run(asked(schnell))
    assert note in result.notes
    other = engine.run(asked(schnell, guidance=0.0))
    assert not other.notes
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(other.images[0]))


def test_a_text_ends_where_t5_stops_reading_not_clip(engine: Engine, base: Path) -> None:
    """512 tokens on FLUX and Chroma, 256 on SD3; the tiny T5 reads letters, the tiny CLIP 16 tokens."""
    for letters, cut in ((90, False), (360, base.name == "sd3"), (630, True)):
        notes = engine.run(asked(base, prompt="abcdefgh " * (letters // 9))).notes
        assert bool([note for note in notes if "does not read its end" in note]) is cut, letters


@pytest.mark.parametrize("prompt", ["a (cat:1.3)", "a cat BREAK a dog"])
def test_weights_and_breaks_that_t5_does_not_take_are_noted(engine: Engine, base: Path, prompt: str) -> None:
    notes = engine.run(asked(base, prompt=prompt)).notes
    assert [note for note in notes if note.startswith("prompt: (word:1.3) and BREAK are read as they are")]


def test_where_each_prompt_acted_is_told_in_the_order_of_the_request(
    engine: Engine, flux: Path, pictures: Path, tmp_path: Path
) -> None:
    """Whatever adapter reads which."""
    shutil.copytree(flux / "adapters", tmp_path / "other")
    left, right = (Image.new("L", (48, 32)) for _ in range(2))
    left.paste(255, (0, 0, 24, 32))
    right.paste(255, (24, 0, 48, 32))
    shown = [("left", None), ("right", str(tmp_path / "other")), ("left", None)]
    given = {"shown": Image.open(pictures / "ref.png"), "left": left, "right": right}
    images = [ImagePrompt("shown", mask=mask, adapter=adapter) for mask, adapter in shown]
    [found] = engine.run(asked(flux, images=images), pictures=given, explain=True).attributions
    halves = [map_.unflatten(1, (2, -1)).sum((0, 2)) for map_ in found.maps]
    assert [int(half.argmax()) for half in halves] == [0, 1, 0]


def test_no_clip_is_drawn_with_a_transformer(engine: Engine, base: Path) -> None:
    with pytest.raises(UsageError, match=r"base: clips are drawn with UNets .* has a transformer"):
        engine.run(Request.from_mapping({"task": "animate", "prompt": "a cat", "base": str(base)}))
