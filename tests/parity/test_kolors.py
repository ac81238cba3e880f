"""Kolors: one ChatGLM's text through the UNet's own projection, and image prompts beside it.

Everything goes from a folder on disk through imprompt's own loading, and is compared with diffusers' Kolors.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import KolorsImg2ImgPipeline, KolorsPipeline
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from facemodels import photo, recogniser, scrfd
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.app import cli
from imprompt.checkpoints.convert import convert
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.face_onnx import OnnxFaces
from imprompt.errors import AdapterMismatch, ModelError
from imprompt.generation.families import find_base
from imprompt.generation.pipelines import load
from layouts import face_plus
from parity.test_diffusers import close, draw
from tiny import (
    HIDDEN,
    PICTURE,
    TEXT_WIDTH,
    picture,
    random_adapter_state,
    tiny_encoder,
    tiny_sdxl,
    tiny_unet,
)

pytest.importorskip("sentencepiece", reason="Kolors' tokenizer needs the extra 'kolors'")

PIPELINES = {"generate": KolorsPipeline, "edit": KolorsImg2ImgPipeline}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``; beside it the adapter as published: a pickle, and its encoder in ``image_encoder``."""
    from tiny import tiny_kolors

    folder = tmp_path_factory.mktemp("kolors")
    pipe = tiny_kolors()
    pipe.save_pretrained(folder / "base")
    model, processor = tiny_encoder()
    model.save_pretrained(folder / "adapter" / "image_encoder")
    processor.save_pretrained(folder / "adapter" / "image_encoder")
    state = random_adapter_state(pipe.unet, "plus")
    torch.save(state, folder / "adapter" / "ip_adapter_plus_general.bin")
    target = str(folder / "adapter" / "ip_adapter_plus_general.safetensors")
    assert cli.main(["convert", str(folder / "adapter" / "ip_adapter_plus_general.bin"), target]) == 0
    return folder


def theirs(place: Path, task: str, **how: float) -> np.ndarray:
    """Drawn by diffusers alone."""
    encoder = place / "adapter" / "image_encoder"
    pipe = PIPELINES[task].from_pretrained(
        place / "base",
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder),
        feature_extractor=CLIPImageProcessorPil.from_pretrained(encoder),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(
        str(place / "adapter"),
        subfolder="",
        weight_name="ip_adapter_plus_general.safetensors",
        image_encoder_folder=None,
    )
    pipe.set_ip_adapter_scale(0.6)
    return draw(pipe, ip_adapter_image=picture(1), **how)


@pytest.mark.parametrize("guidance", [5.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("task", PIPELINES)
def test_kolors_draws_what_diffusers_draws(place: Path, task: str, guidance: float) -> None:
    pipe = load(find_base(str(place / "base")), task, torch.float32)
    assert type(pipe) is PIPELINES[task]
    own, without = pipe.unet.encoder_hid_proj, draw(pipe, guidance=guidance)
    adapter = IPAdapter.from_pretrained(
        str(place / "adapter" / "ip_adapter_plus_general.safetensors")
    ).attach(pipe)
    adapter.set_prompt(picture(1), scale=0.6)
    ours = draw(pipe, guidance=guidance)
    assert pipe.unet.encoder_hid_proj is own
    adapter.detach()
    assert np.array_equal(draw(pipe, guidance=guidance), without)
    assert not close(ours, without)
    assert close(ours, theirs(place, task, guidance=guidance))


def test_the_command_draws_the_same_picture(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(1).save("ref.png")
    words = ["generate", "a cat", "--image", "ref.png", "--scale", "0.6", "--base", str(place / "base")]
    words += [
        "--adapter",
        str(place / "adapter" / "ip_adapter_plus_general.safetensors"),
        "--negative",
        "bad",
    ]
    words += ["--steps", "2", "--guidance", "5", "--size", "32", "--seed", "5", "-q", "-o", "cat.png"]
    assert cli.main(words) == 0
    drawn = np.asarray(Image.open("cat.png"), float)
    assert np.abs(drawn - 255 * theirs(place, "generate")[0]).max() <= 0.51  # rounding to 8 bits


def test_without_its_tokenizer_one_line_says_what_to_install(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModelError, match=r"sentencepiece: pip install 'imprompt\[kolors\]'"):
        load(find_base(str(place / "base")), "generate", torch.float32)


def test_words_of_a_region_go_through_the_projection_as_the_prompt_does(place: Path) -> None:
    pipe = load(find_base(str(place / "base")), "generate", torch.float32)
    plain = draw(pipe)
    adapter = IPAdapter.from_state_dict(random_adapter_state(tiny_unet("kolors"))).attach(pipe)
    everywhere = Image.new("L", (8, 8), 255)
    for words, same in (("a cat", True), ("the sea", False)):
        adapter.set_prompt(torch.zeros(1, 24), scale=0.0, text=words, mask=everywhere)
        assert close(draw(pipe), plain) == same


# ---- FaceID-Plus, which diffusers does not have: the reference is written here from the published formula

TEXT, TOKENS = 4 * TEXT_WIDTH, 6  # the text's width before the UNet's projection, as its 4096 are


def face_weights() -> dict[str, dict[str, torch.Tensor]]:
    """In the published container: keys and values under ``adapter_modules``."""
    random = torch.Generator().manual_seed(8)
    shapes = face_plus(TEXT, patches=HIDDEN, tokens=TOKENS)
    image_proj = {
        key: torch.randn(shape, generator=random) / (shape[-1] ** 0.5 if len(shape) > 1 else 1.0)
        for key, shape in shapes.items()
    }
    layers = random_adapter_state(tiny_unet("kolors"))["ip_adapter"]
    return {"image_proj": image_proj, "adapter_modules": layers}


def tokens_of(w: dict[str, torch.Tensor], who: torch.Tensor, look: torch.Tensor) -> torch.Tensor:
    """Identity tokens plus what they gather in the look (ProjPlus with its shortcut)."""

    def dense(x: torch.Tensor, key: str) -> torch.Tensor:
        return F.linear(x, w[f"{key}.weight"], w.get(f"{key}.bias"))

    def norm(x: torch.Tensor, key: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{key}.weight"], w[f"{key}.bias"])

    inside = "perceiver_resampler."
    first = norm(dense(F.gelu(dense(who, "proj.0")), "proj.2").reshape(-1, TOKENS, TEXT), "norm")
    x, latents = dense(look, f"{inside}proj_in"), first
    for i in range(4):
        layer = f"{inside}layers.{i}"
        mine = norm(latents, f"{layer}.0.norm2")
        both = torch.cat([norm(x, f"{layer}.0.norm1"), mine], 1)
        q, (k, v) = dense(mine, f"{layer}.0.to_q"), dense(both, f"{layer}.0.to_kv").chunk(2, -1)
        q, k, v = (each.unflatten(-1, (-1, 64)).transpose(1, 2) for each in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / 8).softmax(-1)
        latents = latents + dense((weights @ v).transpose(1, 2).flatten(2), f"{layer}.0.to_out")
        hidden = F.gelu(dense(norm(latents, f"{layer}.1.0"), f"{layer}.1.1"))
        latents = latents + dense(hidden, f"{layer}.1.3")
    return first + norm(dense(latents, f"{inside}proj_out"), f"{inside}norm_out")


class Splitting:
    """Attention to the text, and separately to the last tokens behind it."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, scale: float) -> None:
        self.key, self.value, self.scale = key, value, scale

    def __call__(self, attn, x, encoder_hidden_states, **_) -> torch.Tensor:
        def heads(each: torch.Tensor) -> torch.Tensor:
            return each.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        text, image = encoder_hidden_states.tensor_split([-TOKENS], dim=1)
        out = F.scaled_dot_product_attention(*map(heads, (attn.to_q(x), attn.to_k(text), attn.to_v(text))))
        k, v = F.linear(image, self.key), F.linear(image, self.value)
        out = out + self.scale * F.scaled_dot_product_attention(heads(attn.to_q(x)), heads(k), heads(v))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def reference(base: Path, who: torch.Tensor, look: torch.Tensor, scale: float) -> np.ndarray:
    """Tokens appended to the text's states, all through the UNet's projection, and split in each layer."""
    pipe, state = KolorsPipeline.from_pretrained(base), face_weights()
    pipe.set_progress_bar_config(disable=True)
    processors, number = dict(pipe.unet.attn_processors), 1
    for name in processors:
        if name.endswith("attn2.processor"):
            keys = (state["adapter_modules"][f"{number}.to_{part}_ip.weight"] for part in "kv")
            processors[name], number = Splitting(*keys, scale), number + 2
    pipe.unet.set_attn_processor(processors)
    with torch.no_grad():
        text, negative, pooled, negative_pooled = pipe.encode_prompt("a cat", negative_prompt="bad")
        shown = tokens_of(state["image_proj"], who, look)
        nobody = tokens_of(state["image_proj"], torch.zeros_like(who), torch.zeros_like(look))
    return pipe(
        prompt_embeds=torch.cat([text, shown], 1),
        negative_prompt_embeds=torch.cat([negative, nobody], 1),
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
        num_inference_steps=2,
        guidance_scale=5.0,
        width=PICTURE,
        height=PICTURE,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images


def test_kolors_faceid_plus_draws_what_was_published(place: Path, tmp_path: Path) -> None:
    torch.save(face_weights(), tmp_path / "ipa-faceid-plus.bin")
    said = convert(tmp_path / "ipa-faceid-plus.bin", tmp_path / "face.safetensors")
    assert (said.variant, said.tokens, said.cross_dim) == ("faceid-plus-kolors", TOKENS, 2 * TEXT_WIDTH)
    scrfd(tmp_path / "det.onnx")
    recogniser(tmp_path / "rec.onnx")
    faces = OnnxFaces(tmp_path / "det.onnx", tmp_path / "rec.onnx", "own")
    encoder, image = ImageEncoder(*tiny_encoder()), photo((160, 320, "red"), (592, 160, "green"))
    largest = faces.find(image)[0]
    who = torch.from_numpy(faces.embed(image, largest))[None]
    left, top, right, bottom = largest.box
    half = max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    assert x + half > image.width, "the square must reach beyond the picture, where it is black"
    square = image.crop((x - half, y - half, x + half, y + half)).resize((PICTURE, PICTURE))
    expected = reference(place / "base", who, encoder.encode([square]).hidden, 0.8)

    pipe = load(find_base(str(place / "base")), "generate", torch.float32)
    without = draw(pipe)
    adapter = IPAdapter.from_pretrained(
        tmp_path / "face.safetensors", image_encoder=encoder, face_embedder=faces
    ).attach(pipe)
    adapter.set_prompt(image, scale=0.8)
    ours = draw(pipe)
    assert close(ours, expected)
    assert not close(ours, without)
    adapter.detach()
    assert np.array_equal(draw(pipe), without)
    with pytest.raises(AdapterMismatch, match="through a Kolors UNet's projection"):
        adapter.attach(tiny_sdxl())
