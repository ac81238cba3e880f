"""LoRAs and textual inversion on a request draw what diffusers draws with them; what does not fit is said."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, StableDiffusionPipeline
from safetensors.torch import save_file

import tiny
from imprompt.app.cli import main
from imprompt.errors import ImpromptError, ModelError, UsageError
from imprompt.generation.engine import Engine
from imprompt.schema.request import EmbeddingRef, LoraRef, Request


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extras")
    pipe = tiny.tiny_sd()
    pipe.save_pretrained(folder / "base")
    for seed, name in enumerate(("a", "b")):
        save_file(lora(pipe, seed), folder / f"{name}.safetensors")
    random = torch.Generator().manual_seed(3)
    save_file({"emb_params": torch.randn(2, 32, generator=random)}, folder / "zorp.safetensors")
    save_file({"emb_params": torch.randn(2, 48)}, folder / "wide.safetensors")
    save_file({"other.weight": torch.ones(2, 2)}, folder / "nothing.safetensors")
    return folder


def lora(pipe: StableDiffusionPipeline, seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name in pipe.unet.attn_processors:
        layer = name.removesuffix(".processor") + ".to_v"
        linear = pipe.unet.get_submodule(layer)
        found[f"unet.{layer}.lora_A.weight"] = torch.randn(2, linear.in_features, generator=random)
        found[f"unet.{layer}.lora_B.weight"] = torch.randn(linear.out_features, 2, generator=random) / 4
    return found


def request(place: Path, **fields: object) -> Request:
    return Request(base=str(place / "base"), prompt="a", steps=2, seed=1, size=(32, 32), **fields)


def theirs(pipe: StableDiffusionPipeline, prompt: str = "a") -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        prompt,
        num_inference_steps=2,
        width=32,
        height=32,
        generator=torch.Generator().manual_seed(1),
    )
    return np.asarray(drawn.images[0])


def test_loras_draw_what_diffusers_draws_with_them_and_leave_with_the_request(place: Path) -> None:
    engine = Engine()
    plain = engine.run(request(place)).images[0]
    refs = (LoraRef(path=str(place / "a.safetensors"), weight=0.5), str(place / "b.safetensors"))
    drawn = np.asarray(engine.run(request(place, loras=refs)).images[0])
    pipe = StableDiffusionPipeline.from_pretrained(place / "base", safety_checker=None)
    for name in ("a", "b"):
        pipe.load_lora_weights(str(place), weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, 1.0])
    assert np.abs(drawn.astype(int) - theirs(pipe)).max() <= 1
    assert not np.array_equal(drawn, np.asarray(plain))
    assert engine.run(request(place)).images[0].tobytes() == plain.tobytes()


def test_a_word_of_textual_inversion_is_known_to_prompts(place: Path) -> None:
    engine = Engine()
    words = (EmbeddingRef(path=str(place / "zorp.safetensors"), token="zorp"),)
    drawn = engine.run(request(place, embeddings=words).replace(prompt="a zorp")).images[0]
    without = engine.run(request(place).replace(prompt="a zorp")).images[0]
    assert drawn.tobytes() != without.tobytes()
    pipe = StableDiffusionPipeline.from_pretrained(place / "base", safety_checker=None)
    pipe.load_textual_inversion(str(place), weight_name="zorp.safetensors", token="zorp")
    assert np.abs(np.asarray(drawn).astype(int) - theirs(pipe, "a zorp")).max() <= 1


@pytest.mark.parametrize("still_first", [False, True])
def test_clips_have_the_loras_and_words_too(place: Path, tmp_path: Path, still_first: bool) -> None:
    """As diffusers' pipeline of clips has them, whether or not a still with them was drawn before."""
    tiny.tiny_motion().save_pretrained(tmp_path)
    word, path = "zorp", str(place / "a.safetensors")
    fields = {"loras": [LoraRef(path=path, weight=0.5)], "embeddings": [str(place / "zorp.safetensors")]}
    still = request(place, **fields).replace(prompt=f"a {word}")
    clip = still.replace(task="animate", motion=str(tmp_path), frames=2)
    engine = Engine()
    before = engine.run(still) if still_first else None
    drawn = engine.run(clip)
    pipe = AnimateDiffPipeline.from_pretrained(place / "base", motion_adapter=tiny.tiny_motion())
    pipe.load_lora_weights(str(place), weight_name="a.safetensors", adapter_name="a")
    pipe.set_adapters(["a"], [0.5])
    pipe.load_textual_inversion(str(place), weight_name="zorp.safetensors", token=word)
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(
        f"a {word}", num_inference_steps=2, width=32, height=32, num_frames=2,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    for ours, frame in zip(drawn.images, wanted.frames[0], strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(frame)).max() <= 1
    after = engine.run(still)
    if before is not None:
        assert after.images[0].tobytes() == before.images[0].tobytes()


def test_a_lora_of_the_motion_adapter_acts_in_one_window(place: Path, tmp_path: Path) -> None:
    motion = tiny.tiny_motion()
    motion.save_pretrained(tmp_path)
    found = {}
    for name, layer in motion.named_modules():
        if name.endswith("to_v"):
            found[f"unet.{name}.lora_A.weight"] = torch.ones(2, layer.in_features)
            found[f"unet.{name}.lora_B.weight"] = torch.ones(layer.out_features, 2)
    save_file(found, tmp_path / "zoom.safetensors")
    clip = request(place).replace(task="animate", motion=str(tmp_path), frames=2)
    zoomed = clip.replace(loras=[str(tmp_path / "zoom.safetensors")])
    engine = Engine()
    assert engine.run(zoomed).images[0].tobytes() != engine.run(clip).images[0].tobytes()
    with pytest.raises(UsageError, match=r"loras: with one that changes the motion adapter .* at most 8"):
        engine.run(zoomed.replace(frames=11))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"loras": ("nothing.safetensors",)}, ModelError, "LoRA .*nothing"),
        ({"loras": ("wide",)}, ModelError, "there is no LoRA"),
        ({"loras": ("a.safetensors:0.8",)}, UsageError, r"write a\.safetensors,weight=0\.8"),
        ({"loras": ("owner/name",)}, ModelError, r"the hub cannot be asked .* owner/name/file"),
        ({"loras": ("base/model_index.json",)}, ModelError, "opens no pickles"),
        ({"embeddings": ("wide.safetensors",)}, ModelError, "width 48, this base's text encoder 32"),
        ({"embeddings": ("none.safetensors",)}, ModelError, "there is no embedding"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    place: Path,
    fields: dict[str, tuple[str]],
    error: type[ImpromptError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(error, match=message) as found:
        Engine().run(request(place, **fields))
    assert "\n" not in str(found.value)


def test_a_lora_of_other_widths_is_refused_in_one_line(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    other = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    save_file(other, tmp_path / "other.safetensors")
    words = ["generate", "a", "--base", str(place / "base"), "--steps", "1", "--size", "32", "-q"]
    capfd.readouterr()
    assert main([*words, "--lora", str(tmp_path / "other.safetensors"), "-o", str(tmp_path / "a.png")]) == 3
    error = capfd.readouterr().err
    assert "size mismatch for down_blocks.0.attentions.0" in error
    assert error.count("\n") == 1


def test_flags_are_read_and_come_back_and_wrong_ones_are_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = request(place, loras=(LoraRef.parse("a,b.safetensors,weight=0.5"),))
    assert asked.loras[0] == LoraRef(path="a,b.safetensors", weight=0.5)
    assert Request.from_json(asked.to_json()) == asked
    words = ["generate", "a", "--base", str(place / "base"), "--steps", "1", "--size", "32", "-q"]
    target = str(tmp_path / "a.png")
    assert main([*words, "--lora", f"{place / 'a.safetensors'},weight=0.3", "-o", target]) == 0
    capsys.readouterr()
    for flag, text, said in (
        ("--lora", "a.safetensors,scale=1", "known are weight"),
        ("--lora", "a.safetensors,weight=x", "weight"),
        ("--embedding", "a.safetensors,weight=1", "known are token"),
    ):
        assert main([*words, flag, text]) == 2
        assert said in capsys.readouterr().err
