"""Tiny real models with random weights: whole diffusers pipelines that run in a fraction of a second.

Everything is built from configurations, seeded, and built once per process; a caller gets its own copy, so
that a test may change what it got. Not mocks: the same classes as the published models, only narrow.
"""

import io
import string
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from copies import copies

TEXT_WIDTH = 32  # of one text encoder: the cross-attention width of tiny_sd; tiny_sdxl has two side by side
POOLED = 24  # the tiny image encoder's projected embedding
HIDDEN = 32  # and its hidden states
PICTURE = 32  # pixels: image side of the tiny encoder, and of the tiny pipelines' usual output

if TYPE_CHECKING:
    from diffusers import KolorsPipeline

StateDict = dict[str, dict[str, torch.Tensor]]


def tiny_sd(unet_in_channels: int = 4, *, seed: int = 0) -> StableDiffusionPipeline:
    """A StableDiffusion pipeline of the SD1.5 kind; 9 input channels make it an inpainting model's."""
    parts = _sd_parts(unet_in_channels, seed)
    pipe = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl(unet_in_channels: int = 4, *, seed: int = 0) -> StableDiffusionXLPipeline:
    """A StableDiffusionXL pipeline: two text encoders, pooled text and time ids, several layers per block."""
    parts = _sdxl_parts(unet_in_channels, seed)
    pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_kolors(*, seed: int = 0) -> "KolorsPipeline":
    """A Kolors pipeline: one ChatGLM reads the text, and the UNet projects its states to its own width.

    As in Kolors itself the text is twice as wide as the cross-attention. Needs sentencepiece.
    """
    from diffusers import KolorsPipeline

    pipe = KolorsPipeline(**_kolors_parts(seed), force_zeros_for_empty_prompt=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_unet(family: str = "sd", in_channels: int = 4, seed: int = 0) -> UNet2DConditionModel:
    """The bare UNet of :func:`tiny_sd` (``"sd"``), :func:`tiny_sdxl` (``"sdxl"``) or Kolors' kind
    (``"kolors"``)."""
    return _unet(family, in_channels, seed)


@copies
def tiny_motion(*, frames: int = 8, seed: int = 11, width: int = 16) -> MotionAdapter:
    """A motion adapter for both tiny UNets, whose temporal layers do something; ``width`` 16 fits them."""
    torch.manual_seed(seed)
    return MotionAdapter(
        block_out_channels=(width, 2 * width),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=frames,
        use_motion_mid_block=True,
    ).eval()


def tiny_encoder(
    pooled_width: int = POOLED, hidden: int = HIDDEN, *, seed: int = 7
) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessorPil]:
    """A CLIP vision tower with projection (17 hidden states of ``hidden``) and its picture processor."""
    return _encoder(pooled_width, hidden, seed)


def random_adapter_state(
    unet: UNet2DConditionModel,
    kind: str = "linear",
    *,
    feature_width: int | None = None,
    tokens: int | None = None,
    resampler_width: int = 64,
    seed: int = 3,
) -> StateDict:
    """Random weights in the published nested layout for ``unet``; ``kind``: ``linear``, ``plus``, ``full``.

    Published key indices are counted here as diffusers' loader counts them, independently of imprompt.
    """
    random = torch.Generator().manual_seed(seed)

    def weight(*shape: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * gain / shape[-1] ** 0.5

    def norm(width: int, name: str) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": 1 + 0.1 * torch.randn(width, generator=random),
            f"{name}.bias": 0.1 * torch.randn(width, generator=random),
        }

    cross = unet.config.cross_attention_dim
    if kind == "linear":
        tokens, width = tokens or 4, feature_width or POOLED
        image_proj = {
            "proj.weight": weight(tokens * cross, width),
            "proj.bias": weight(tokens * cross),
            **norm(cross, "norm"),
        }
    elif kind == "plus":
        tokens, width, d = tokens or 16, feature_width or HIDDEN, resampler_width
        image_proj = {
            "latents": weight(1, tokens, d, gain=d**0.5),
            "proj_in.weight": weight(d, width),
            "proj_in.bias": weight(d),
            "proj_out.weight": weight(cross, d),
            "proj_out.bias": weight(cross),
            **norm(cross, "norm_out"),
        }
        for i in range(4):  # diffusers' loader knows no other depth
            image_proj |= norm(d, f"layers.{i}.0.norm1") | norm(d, f"layers.{i}.0.norm2")
            image_proj |= {
                f"layers.{i}.0.to_q.weight": weight(64, d),
                f"layers.{i}.0.to_kv.weight": weight(128, d),
                f"layers.{i}.0.to_out.weight": weight(d, 64),
                **norm(d, f"layers.{i}.1.0"),
                f"layers.{i}.1.1.weight": weight(4 * d, d),
                f"layers.{i}.1.3.weight": weight(d, 4 * d),
            }
    elif kind == "full":
        width = feature_width or HIDDEN
        image_proj = {
            "proj.0.weight": weight(width, width),
            "proj.0.bias": weight(width),
            "proj.2.weight": weight(cross, width),
            "proj.2.bias": weight(cross),
            **norm(cross, "proj.3"),
        }
    else:
        raise ValueError(f"no random adapter of kind {kind!r}")

    ip_adapter, index = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor") and "motion_modules" not in name:
            inner = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            ip_adapter[f"{index}.to_k_ip.weight"] = weight(inner, cross, gain=2.0)
            ip_adapter[f"{index}.to_v_ip.weight"] = weight(inner, cross, gain=2.0)
            index += 2
    return {"image_proj": image_proj, "ip_adapter": ip_adapter}


def picture(seed: int = 0, size: tuple[int, int] = (PICTURE, PICTURE)) -> Image.Image:
    """A smooth random RGB picture, different for every seed; ``size`` is (width, height)."""
    rough = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


@copies
def _sd_parts(in_channels: int, seed: int) -> dict[str, Any]:
    text = _text_config()
    torch.manual_seed(seed)
    return {
        "unet": _unet("sd", in_channels, seed),
        "vae": _vae(seed),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": clip_tokenizer(),
        "scheduler": _scheduler(),
        "feature_extractor": None,
        "image_encoder": None,
    }


@copies
def _sdxl_parts(in_channels: int, seed: int) -> dict[str, Any]:
    text = _text_config(projection_dim=TEXT_WIDTH)
    torch.manual_seed(seed)
    return {
        "unet": _unet("sdxl", in_channels, seed),
        "vae": _vae(seed),
        "text_encoder": CLIPTextModel(text).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(text).eval(),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": _scheduler(),
    }


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tiny")  # gone with the process


@copies
def _kolors_parts(seed: int) -> dict[str, Any]:
    import sentencepiece
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    letters = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([string.ascii_lowercase, "a cat, two dogs and the sea"]),
        model_writer=letters,
        model_type="char",
        vocab_size=64,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    vocabulary = Path(_folder().name, "tokenizer.model")  # saving the tokenizer copies this file
    vocabulary.write_bytes(letters.getvalue())
    tokenizer = ChatGLMTokenizer(str(vocabulary))
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=tokenizer.vocab_size,
        hidden_size=4 * TEXT_WIDTH,
        ffn_hidden_size=4 * TEXT_WIDTH,
        kv_channels=TEXT_WIDTH,
        num_attention_heads=4,
        seq_length=256,
        multi_query_attention=True,
        add_qkv_bias=True,
        original_rope=True,
    )
    torch.manual_seed(seed)
    text_encoder = ChatGLMModel(config).eval()
    for name, weight in text_encoder.named_parameters():  # it leaves some as they are found in memory
        torch.nn.init.ones_(weight.data) if "norm" in name else torch.nn.init.normal_(weight.data, std=0.1)
    return {
        "unet": _unet("kolors", 4, seed),
        "vae": _vae(seed),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": _scheduler(),
    }


@copies
def _unet(family: str, in_channels: int, seed: int) -> UNet2DConditionModel:
    common = {
        "sample_size": PICTURE // 4,
        "in_channels": in_channels,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    torch.manual_seed(seed)
    if family == "sd":
        unet = UNet2DConditionModel(
            **common,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,
        )
    elif family in ("sdxl", "kolors"):
        pooled, text = TEXT_WIDTH, {}
        if family == "kolors":
            pooled = 4 * TEXT_WIDTH
            text = {"encoder_hid_dim": pooled, "encoder_hid_dim_type": "text_proj"}
        unet = UNet2DConditionModel(
            **common,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2 * TEXT_WIDTH,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + pooled,
            **text,
        )
    else:
        raise ValueError(f"no tiny UNet of family {family!r}")
    return unet.eval().requires_grad_(False)


@copies
def _vae(seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=PICTURE,
        mid_block_add_attention=False,
    ).eval()


@copies
def _encoder(
    pooled_width: int, hidden: int, seed: int
) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessorPil]:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=pooled_width,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=PICTURE,
        patch_size=8,
    )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": PICTURE}, crop_size={"height": PICTURE, "width": PICTURE}
    )
    return CLIPVisionModelWithProjection(config).eval(), processor


def _text_config(**extra: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        vocab_size=len(vocabulary()),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **extra,
    )


def vocabulary() -> dict[str, int]:
    letters = [
        letter + end for end in ("", "</w>") for letter in string.ascii_lowercase + string.digits + ",.-"
    ]
    return {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}


@cache
def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=vocabulary(), merges=[], model_max_length=16)


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def first_cross_attention(
    unet: UNet2DConditionModel, sample: torch.Tensor, t: float, text: torch.Tensor
) -> torch.Tensor:
    """What the first cross-attention of a call gives, ``(B, L, C)``."""
    seen: list[torch.Tensor] = []
    layer = unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    unet(sample, t, text)
    hook.remove()
    return seen[0]
