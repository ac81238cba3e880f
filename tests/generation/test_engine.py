"""Requests drawn on tiny real models: the three tasks, repetition, steering, and every refusal."""

import gc
import json
import platform
import shutil
import weakref
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from compiled import run_unchecked
from imprompt import output
from imprompt.errors import InputError, ModelError, UsageError
from imprompt.generation.engine import Engine, generate
from imprompt.generation.inputs import fitted
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request


def pixels(image):
    return np.asarray(image).astype(int)


def test_an_image_prompt_changes_the_picture_and_zero_scale_does_not(engine, common, pictures):
    plain = {key: value for key, value in common.items() if key != "adapter"}
    alone = engine.run(Request(prompt="a cat", **plain)).images[0]
    shown = engine.run(Request(prompt="a cat", images=[pictures / "ref.png"], scale=1, **common)).images[0]
    silent = engine.run(Request(prompt="a cat", images=[pictures / "ref.png"], scale=0, **common)).images[0]
    again = engine.run(Request(prompt="a cat", **plain)).images[0]
    assert np.abs(pixels(shown) - pixels(alone)).max() > 2
    assert np.array_equal(pixels(silent), pixels(alone))
    assert np.array_equal(pixels(again), pixels(alone))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux what the processor can do")
def test_a_number_format_that_the_processor_imitates_is_noted(engine, common):
    known = set(Path("/proc/cpuinfo").read_text().split())
    imitated = platform.machine() == "x86_64" and not known & {"avx512_bf16", "amx_bf16"}
    result = engine.run(Request(prompt="a cat", dtype="bfloat16", device="cpu", base=common["base"], steps=1))
    assert any("no bfloat16 arithmetic" in note for note in result.notes) == imitated


def test_a_picture_needs_no_text(engine, common, pictures):
    result = engine.run(Request(images=[pictures / "ref.png"], **common))
    assert result.request.scale == 1.0
    assert result.images[0].size == (32, 32)


def test_a_complete_request_repeats_the_picture_bit_for_bit(common, pictures, tmp_path):
    asked = Request(prompt="a cat", images=[pictures / "ref.png"], count=3, exact=True, **common)
    first = generate(asked)
    paths = output.save(first, tmp_path / "cat.png")
    for path, image in zip(paths, first.images, strict=True):
        again = generate(output.read_request(path))
        assert np.array_equal(pixels(again.images[0]), pixels(image))


def test_picture_number_i_is_the_first_of_seed_plus_i(engine, common, pictures):
    asked = Request(prompt="a cat", images=[pictures / "ref.png"], count=3, exact=True, **common)
    several = engine.run(asked)
    third = engine.run(
        Request(prompt="a cat", images=[pictures / "ref.png"], **{**common, "seed": common["seed"] + 2})
    )
    assert np.array_equal(pixels(several.images[2]), pixels(third.images[0]))


def test_a_request_without_a_seed_gets_one_that_is_recorded(engine, common, pictures):
    without = {**common, "seed": None}
    seeds = {
        engine.run(Request(prompt="a", images=[pictures / "ref.png"], **without)).request.seed for _ in "ab"
    }
    assert len(seeds) == 2


def test_editing_keeps_more_of_the_picture_with_less_strength(engine, common, pictures):
    def edited(strength):
        request = Request(
            task="edit", image=pictures / "other.png", images=[pictures / "ref.png"], strength=strength,
            **{**common, "steps": 10},
        )  # fmt: skip
        return pixels(engine.run(request).images[0])

    start = Image.open(pictures / "other.png").resize((32, 32), Image.Resampling.LANCZOS)
    vae = diffusers.AutoencoderKL.from_pretrained(
        common["base"], subfolder="vae"
    )  # random: "kept" is what it makes of the start
    with torch.no_grad():
        x = torch.from_numpy(np.asarray(start) / 127.5 - 1).permute(2, 0, 1)[None].float()
        kept = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)[0].permute(1, 2, 0)
    distances = [np.abs(edited(s) / 127.5 - 1 - kept.numpy()).mean() for s in (0.1, 0.5, 1.0)]
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("which", ["base", "inpainting_base"])
def test_inpainting_keeps_what_the_mask_does_not_mark(engine, common, pictures, which, request):
    folder = request.getfixturevalue(which)
    asked = Request(
        task="inpaint", image=pictures / "ref.png", mask=pictures / "mask.png",
        images=[pictures / "other.png"],
        **{**common, "base": str(folder), "adapter": str(folder / "adapters"), "size": (40, 40)},
    )  # fmt: skip
    drawn, start = pixels(engine.run(asked).images[0]), pixels(Image.open(pictures / "ref.png"))
    assert np.array_equal(drawn[:, :20], start[:, :20])
    assert not np.array_equal(drawn[:, 20:], start[:, 20:])


def test_a_wide_picture_is_edited_in_its_proportions(engine, common, pictures):
    result = engine.run(Request(task="edit", image=pictures / "wide.png", prompt="x", **no_adapter(common)))
    assert result.images[0].size == (48, 24)
    assert any("64×32" in note and "48×24" in note for note in result.notes)


def test_pictures_can_be_handed_over_instead_of_read(engine, common, pictures):
    image = Image.open(pictures / "ref.png")
    by_name = engine.run(Request(prompt="a", images=["mine"], **common), pictures={"mine": image})
    by_file = engine.run(Request(prompt="a", images=[pictures / "ref.png"], **common))
    assert np.array_equal(pixels(by_name.images[0]), pixels(by_file.images[0]))
    assert by_name.request.hashes == {}


def test_differently_steered_pictures_are_prompts_of_their_own(engine, common, pictures):
    names = [str(pictures / "ref.png"), str(pictures / "other.png")]
    together = engine.run(Request(prompt="a", images=[names], scale=0.8, **common))
    apart = engine.run(
        Request(
            prompt="a",
            images=[ImagePrompt(names[0], scale=0.8), ImagePrompt(names[1], scale=0.4)],
            **common,
        )
    )
    assert len(together.request.images) == 1
    assert len(apart.request.images) == 2
    assert not np.array_equal(pixels(together.images[0]), pixels(apart.images[0]))


def test_a_window_that_never_opens_is_no_prompt(engine, common, pictures):
    ref = ImagePrompt(str(pictures / "ref.png"), start=0.5, end=0.5)
    closed = engine.run(Request(prompt="a", images=[ref], **common)).images[0]
    alone = engine.run(Request(prompt="a", **no_adapter(common))).images[0]
    assert np.array_equal(pixels(closed), pixels(alone))


@pytest.mark.parametrize(
    "scheduler", ["ddim", "euler", "euler-a", "dpm++2m", "dpm++2m-karras", "unipc", "pndm", "ddpm"]
)
def test_every_scheduler_draws(engine, common, pictures, scheduler):
    asked = Request(prompt="a", images=[pictures / "ref.png"], scheduler=scheduler, **common)
    first, second = (engine.run(asked).images[0] for _ in "ab")
    assert np.array_equal(pixels(first), pixels(second))


def test_a_base_says_what_it_likes(base, common, tmp_path, pictures):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    likes = {
        "steps": 2,
        "guidance": 2.5,
        "size": 40,
        "scheduler": "ddim",
        "adapter": str(folder / "adapters"),
    }
    (folder / "defaults.json").write_text(json.dumps(likes))
    result = generate(Request(prompt="a", images=[pictures / "ref.png"], base=str(folder)))
    filled = result.request
    assert (filled.steps, filled.guidance, filled.size, filled.scheduler) == (2, 2.5, (40, 40), "ddim")
    assert filled.adapter == likes["adapter"]


def test_nan_is_never_a_picture(base, common, tmp_path, pictures):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.weight"] = torch.full_like(tensors["conv_out.weight"], float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN"):
        generate(Request(prompt="a", base=str(folder), steps=2, seed=1))


def test_after_a_refusal_the_engine_draws_as_before(engine, common, pictures, tmp_path):
    asked = Request(prompt="a", images=[pictures / "ref.png"], **common)
    before = engine.run(asked).images[0]
    (tmp_path / "broken.png").write_bytes((pictures / "ref.png").read_bytes()[:200])
    with pytest.raises(InputError, match=r"broken\.png"):
        engine.run(asked.replace(images=[tmp_path / "broken.png"]))
    assert np.array_equal(pixels(engine.run(asked).images[0]), pixels(before))


def test_a_picture_that_changed_since_is_refused(engine, common, pictures, tmp_path):
    shutil.copy(pictures / "ref.png", tmp_path / "mine.png")
    drawn = engine.run(Request(prompt="a", images=[tmp_path / "mine.png"], **common)).request
    shutil.copy(pictures / "other.png", tmp_path / "mine.png")
    with pytest.raises(InputError, match=r"mine\.png.*sha256"):
        engine.run(drawn)


REFUSED = [
    (InputError, "no file.*gone.png", {"images": ["gone.png"]}),
    (InputError, "'.*' is a folder; a picture is expected", {"images": ["."]}),
    (UsageError, "emoij.*did you mean emoji", {"base": "emoij"}),
    (UsageError, "sd15-plu.*sd15-plus", {"adapter": "sd15-plu", "images": ["ref.png"]}),
    (ModelError, "no adapter at", {"adapter": "none.safetensors", "images": ["ref.png"]}),
    (ModelError, "no base at", {"base": "no/such/folder"}),
    (UsageError, "inpainting model.*9 channels.*inpaint", {"base": "<inpainting>", "adapter": None}),
    (UsageError, "offload.*CPU", {"offload": "model", "adapter": None, "device": "cpu"}),
    (UsageError, "offload.*CPU", {"offload": "adapter", "images": ["ref.png"], "device": "cpu"}),
    (InputError, "40×40.*64×32.*proportions", {"task": "inpaint", "image": "wide.png", "mask": "mask.png"}),
    (UsageError, "strength.*less than one", {"task": "edit", "image": "ref.png", "strength": 0.1}),
]


@pytest.mark.parametrize(("kind", "message", "fields"), REFUSED)
def test_what_cannot_be_drawn_is_said_in_one_line(
    engine, common, pictures, inpainting_base, kind, message, fields
):
    def place(value):
        if value == "<inpainting>":
            return str(inpainting_base)
        if isinstance(value, str) and (pictures / value).is_file():
            return str(pictures / value)
        return [place(each) for each in value] if isinstance(value, list) else value

    stated = {"prompt": "a", **common, **{name: place(value) for name, value in fields.items()}}
    if "images" not in stated:
        stated["adapter"] = None
    with pytest.raises(kind, match=message) as said:
        engine.run(Request(**stated))
    assert "\n" not in str(said.value)


def test_a_black_mask_is_refused(engine, common, pictures, tmp_path):
    Image.new("L", (40, 40)).save(tmp_path / "black.png")
    black = tmp_path / "black.png"
    asked = Request(task="inpaint", prompt="a", image=pictures / "ref.png", mask=black, **no_adapter(common))
    with pytest.raises(InputError, match=r"black\.png.*black everywhere"):
        engine.run(asked)


def test_an_adapter_without_an_encoder_says_where_one_is(engine, common, pictures, tmp_path):
    from imprompt.adapter.ipadapter import IPAdapter
    from tiny import random_adapter_state, tiny_unet

    for width, said in (
        (1024, r"hf download h94/IP-Adapter --include 'models/image_encoder/\*'"),
        (40, "file.$"),
    ):
        state = random_adapter_state(tiny_unet(), feature_width=width)
        path = IPAdapter.from_state_dict(state).save_pretrained(tmp_path, f"{width}.safetensors")
        asked = Request(images=[pictures / "ref.png"], **{**common, "adapter": str(path)})
        with pytest.raises(ModelError, match=f"has no image encoder.*{said}"):
            engine.run(asked)


def test_an_adapter_of_another_base_changes_nothing(engine, common, pictures, tmp_path):
    import tiny
    from imprompt.adapter.ipadapter import IPAdapter

    other = IPAdapter.from_state_dict(tiny.random_adapter_state(tiny.tiny_unet("sdxl")))
    other.save_pretrained(tmp_path, "other.safetensors")
    asked = Request(prompt="a", images=[pictures / "ref.png"], **common)
    before = engine.run(asked).images[0]
    with pytest.raises(ModelError, match=r"other.*UNet"):
        engine.run(asked.replace(adapter=str(tmp_path / "other.safetensors")))
    assert np.array_equal(pixels(engine.run(asked).images[0]), pixels(before))


def test_a_pickled_base_is_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="opens no pickles"):
        generate(Request(prompt="a", base=str(tmp_path / "model.ckpt")))


def test_offline_a_repository_that_is_not_cached_is_said(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"no-one/nothing.*HF_HUB_OFFLINE"):
        generate(Request(prompt="a", base="no-one/nothing"))


def test_an_inpainting_base_is_refused_before_its_weights_are_read(inpainting_base, tmp_path):
    folder = tmp_path / "base9"
    shutil.copytree(inpainting_base, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"9 channels.*use it with inpaint"):
        generate(Request(prompt="a", base=str(folder), steps=2))
    asked = Request(prompt="a", base=str(folder), steps=2, task="inpaint", image="i", mask="m")
    white = Image.new("RGB", (32, 32), "white")
    with pytest.raises(ModelError, match=r"base9.*cannot be loaded"):
        generate(asked, pictures={"i": white, "m": white})


def test_too_little_memory_is_said_and_given_back(base):
    engine = Engine()

    def exhausted(*_: object) -> None:  # real exhaustion takes the machine
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    asked = Request(prompt="a", base=str(base), steps=2, seed=1)
    with pytest.raises(ModelError, match=r"memory does not suffice.*--size"):
        engine.run(asked, on_step=exhausted)
    assert engine.loaded == ()
    assert engine.run(asked).images[0].size == (32, 32)


def test_where_memory_does_not_suffice_for_a_batch_smaller_ones_are_drawn(engine, common, pictures):
    asked = Request(prompt="a cat", images=[pictures / "ref.png"], count=5, **common)
    drawn = []

    def exhausted(step) -> None:
        if step.together > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        drawn.append((step.picture, step.together))

    images = engine.run(asked, on_step=exhausted).images
    assert list(dict.fromkeys(drawn)) == [(0, 2), (2, 2), (4, 1)]
    for image, alone in zip(images, engine.run(asked.replace(exact=True)).images, strict=True):
        assert np.abs(pixels(image) - pixels(alone)).max() <= 1


def test_release_forgets_everything(base, pictures):
    engine, before = Engine(), alive(diffusers.StableDiffusionPipeline)
    engine.run(
        Request(images=[pictures / "ref.png"], base=str(base), adapter=str(base / "adapters"), steps=2)
    )
    assert engine.loaded == (str(base), str(base / "adapters"))
    kept = weakref.ref(next(iter(alive(diffusers.StableDiffusionPipeline) - before)))
    engine.release()
    assert engine.loaded == ()
    assert kept() is None


HOLDING = """
import os, shutil, sys
from pathlib import Path
from imprompt.generation.engine import Engine
from imprompt.schema.request import Request

base, picture, other = sys.argv[1:]
shutil.copytree(base, other)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def litter():
    # 300 MB that are freed but for every hundredth piece, so that the heap keeps them
    pieces = [bytearray(b"1") * 60_000 for _ in range(5000)]
    return pieces[::100]


engine, kept = Engine(), []
request = Request(images=[picture], base=base, adapter=f"{base}/adapters", steps=1, size=32)
engine.run(request)
for give_back in (lambda: engine.run(request.replace(adapter=f"{other}/adapters")), engine.release):
    kept.append(litter())
    held = resident()
    give_back()
    assert held - resident() > 150, held - resident()
"""


@pytest.mark.xdist_group("compiled")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc keeps")
def test_another_adapter_and_a_release_give_memory_back(base, pictures, tmp_path):
    run_unchecked(HOLDING, base, pictures / "ref.png", tmp_path / "other", folder=Path(__file__).parent)


def alive(kind):
    """The living objects of that class."""
    gc.collect()
    return {each for each in gc.get_objects() if type(each) is kind}


def no_adapter(common):
    return {key: value for key, value in common.items() if key != "adapter"}


@pytest.mark.parametrize(("given", "drawn"), [((720, 1080), (832, 1216)), ((1080, 720), (1216, 832))])
def test_a_picture_is_cropped_to_a_size_that_its_side_is_no_fraction_of(given, drawn):
    across = Image.linear_gradient("L").rotate(90).resize(given)  # the crop is centred: its middle stays grey
    found = fitted(across, drawn)
    assert found.size == drawn
    assert abs(int(np.asarray(found).mean()) - 127) <= 1
