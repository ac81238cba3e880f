"""Tiny transformer bases with random weights: FLUX, Chroma and SD3 pipelines, and adapters for them."""

import string
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import controls
import tiny
from copies import copies

JOINT = 32  # width of the text, and of XLabs' and InstantX's FLUX tokens
POOLED = 24  # the tiny CLIP's projected embedding
HEIGHT, WIDTH = 32, 48  # pixels; a grid of 8 × 12 tokens on FLUX and SD3


def _seeded(model: Any, seed: int) -> Any:
    """Norm weights that are not all 1, so that a forgotten norm shows."""
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "norm" in name and name.endswith("weight") and weight.ndim == 1:
            weight.data = 1 + 0.3 * torch.randn(weight.shape, generator=random)
    return model.eval().requires_grad_(False)


@copies
def _vae(channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
        mid_block_add_attention=False,
    ).eval()


@copies
def flux_transformer(in_channels: int = 16, joint: int = JOINT) -> diffusers.FluxTransformer2DModel:
    torch.manual_seed(2)
    return _seeded(
        diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=in_channels,
            out_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=joint,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        3,
    )


@copies
def chroma_transformer() -> diffusers.ChromaTransformer2DModel:
    torch.manual_seed(2)
    return _seeded(
        diffusers.ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=JOINT,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        3,
    )


@copies
def sd3_transformer(
    dual: bool = False, qk_norm: str | None = None, channels: int = 4
) -> diffusers.SD3Transformer2DModel:
    torch.manual_seed(2)
    return _seeded(
        diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=channels,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=JOINT,
            pooled_projection_dim=64,
            out_channels=channels,
            pos_embed_max_size=32,
            dual_attention_layers=(0,) if dual else (),
            qk_norm=qk_norm,
        ),
        3,
    )


@copies
def clip() -> CLIPVisionModelWithProjection:
    torch.manual_seed(4)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=37,
            projection_dim=POOLED,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    ).eval()


@copies
def siglip(side: int = 32) -> SiglipVisionModel:
    torch.manual_seed(4)
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=side,
        patch_size=8,
    )
    return SiglipVisionModel(config).eval()


def flux_controlnet(num_mode: int | None = None, seed: int = 11) -> diffusers.FluxControlNetModel:
    """A ControlNet for :func:`flux_transformer`; with ``num_mode`` a union of so many kinds."""
    config = flux_transformer().config
    shared = (
        "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
        "pooled_projection_dim", "axes_dims_rope", "guidance_embeds",
    )  # fmt: skip
    fields = {name: config[name] for name in shared}
    torch.manual_seed(seed)
    net = diffusers.FluxControlNetModel(
        patch_size=1, num_layers=1, num_single_layers=1, num_mode=num_mode, **fields
    )
    return controls.randomised(net, seed)


def sd3_controlnet(channels: int = 16, **extra: int) -> diffusers.SD3ControlNetModel:
    """A ControlNet for :func:`sd3_transformer`."""
    config = sd3_transformer(channels=channels).config
    shared = (
        "sample_size", "patch_size", "in_channels", "out_channels", "attention_head_dim",
        "num_attention_heads", "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim",
        "pos_embed_max_size",
    )  # fmt: skip
    fields = {name: config[name] for name in shared}
    torch.manual_seed(12)
    return controls.randomised(diffusers.SD3ControlNetModel(num_layers=1, **fields, **extra), 12)


def clip_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def siglip_processor(side: int = 32) -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": side, "width": side})


def flux(
    kind: type[Any] = diffusers.FluxPipeline, in_channels: int = 16, joint: int = JOINT, **parts: Any
) -> Any:
    """A FLUX pipeline of ``kind`` without text encoders, with the tiny CLIP where it takes one."""
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return _pipe(kind, flux_transformer(in_channels, joint), texts, clip(), clip_processor(), parts)


def chroma(kind: type[Any] = diffusers.ChromaPipeline) -> Any:
    texts = dict.fromkeys(("text_encoder", "tokenizer"))
    return _pipe(kind, chroma_transformer(), texts, clip(), clip_processor(), {})


def sd3(
    kind: type[Any] = diffusers.StableDiffusion3Pipeline,
    *,
    dual: bool = False,
    qk_norm: str | None = None,
    channels: int = 4,
) -> Any:
    texts = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    parts = {"vae": _vae(channels)}
    transformer = sd3_transformer(dual, qk_norm, channels)
    return _pipe(kind, transformer, texts, siglip(), siglip_processor(), parts, shift=3.0)


def _pipe(
    kind: type[Any], transformer: Any, texts: dict[str, None], encoder: Any, processor: Any,
    parts: dict[str, Any], shift: float = 1.0,
) -> Any:  # fmt: skip
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        transformer=transformer,
        **{"vae": _vae(), **texts, **parts},
    )
    if "image_encoder" in pipe.components:
        pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(rows: int = 1, seed: int = 5, pooled: int | None = 32, width: int = JOINT) -> dict[str, Tensor]:
    """Prompt embeddings for pipelines without text encoders."""
    random = torch.Generator().manual_seed(seed)
    found = {"prompt_embeds": torch.randn(rows, 7, width, generator=random)}
    if pooled is not None:
        found["pooled_prompt_embeds"] = torch.randn(rows, pooled, generator=random)
    return found


def negative(rows: int = 1, pooled: int | None = 32) -> dict[str, Tensor]:
    return {f"negative_{name}": value for name, value in text(rows, 6, pooled).items()}


def _random(seed: int) -> Any:
    random = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) / shape[-1] ** 0.5

    return weight


def xlabs_state(tokens: int = 4, blocks: int = 2, *, seed: int = 7, joint: int = JOINT) -> dict[str, Tensor]:
    """XLabs' published keys for the tiny FLUX (and Chroma)."""
    weight = _random(seed)
    state = {
        "ip_adapter_proj_model.proj.weight": weight(tokens * joint, POOLED),
        "ip_adapter_proj_model.proj.bias": weight(tokens * joint),
        "ip_adapter_proj_model.norm.weight": 1 + weight(joint),
        "ip_adapter_proj_model.norm.bias": weight(joint),
    }
    for i in range(blocks):
        for part in "kv":
            name = f"double_blocks.{i}.processor.ip_adapter_double_stream_{part}_proj"
            state |= {f"{name}.weight": 2 * weight(32, joint), f"{name}.bias": 5 * weight(32)}
    return state


def redux_state(width: int = 24, seed: int = 13) -> dict[str, Tensor]:
    """FLUX.1 Redux's published keys for the tiny FLUX, of SigLIP's last hidden state."""
    weight = _random(seed)
    return {
        "redux_up.weight": weight(3 * JOINT, width),
        "redux_up.bias": weight(3 * JOINT),
        "redux_down.weight": 2 * weight(JOINT, 3 * JOINT),
        "redux_down.bias": weight(JOINT),
    }


def instantx_flux_state(
    sites: int = 5, tokens: int = 6, *, width: int = 24, seed: int = 9
) -> dict[str, dict[str, Tensor]]:
    """InstantX's published keys for the tiny FLUX: ``tokens`` tokens from SigLIP's pooled output."""
    weight = _random(seed)
    image_proj = {
        "proj.0.weight": weight(2 * width, width),
        "proj.0.bias": weight(2 * width),
        "proj.2.weight": weight(tokens * JOINT, 2 * width),
        "proj.2.bias": weight(tokens * JOINT),
        "norm.weight": 1 + weight(JOINT),
        "norm.bias": weight(JOINT),
    }
    ip_adapter = {f"{i}.to_{part}_ip.weight": 2 * weight(32, JOINT) for i in range(sites) for part in "kv"}
    return {"image_proj": image_proj, "ip_adapter": ip_adapter}


def instantx_sd3_state(
    sites: int = 2, tokens: int = 5, *, features: int = 24, seed: int = 9
) -> dict[str, dict[str, Tensor]]:
    """InstantX's published keys for the tiny SD3: a timed resampler, width 128 (2 heads of 64), depth 4."""
    weight = _random(seed)
    width, out = 128, 32
    proj: dict[str, Tensor] = {
        "latents": weight(1, tokens, width) * width**0.5,
        "proj_in.weight": weight(width, features),
        "proj_in.bias": weight(width),
        "proj_out.weight": weight(out, width),
        "proj_out.bias": weight(out),
        "norm_out.weight": 1 + weight(out),
        "norm_out.bias": weight(out),
        "time_embedding.linear_1.weight": weight(width, 16),
        "time_embedding.linear_1.bias": weight(width),
        "time_embedding.linear_2.weight": weight(width, width),
        "time_embedding.linear_2.bias": weight(width),
    }
    for i in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            proj |= {f"layers.{i}.{norm}.weight": 1 + weight(width), f"layers.{i}.{norm}.bias": weight(width)}
        proj |= {
            f"layers.{i}.0.to_q.weight": weight(width, width),
            f"layers.{i}.0.to_kv.weight": weight(2 * width, width),
            f"layers.{i}.0.to_out.weight": weight(width, width),
            f"layers.{i}.1.1.weight": weight(4 * width, width),
            f"layers.{i}.1.3.weight": weight(width, 4 * width),
            f"layers.{i}.2.1.weight": weight(4 * width, width),
            f"layers.{i}.2.1.bias": weight(4 * width),
        }
    layers: dict[str, Tensor] = {}
    for n in range(sites):
        layers |= {
            f"{n}.norm_ip.linear.weight": weight(2 * out, width),
            f"{n}.norm_ip.linear.bias": weight(2 * out),
            f"{n}.to_k_ip.weight": weight(out, out),
            f"{n}.to_v_ip.weight": weight(out, out),
            f"{n}.norm_q.weight": 1 + weight(8),
            f"{n}.norm_k.weight": 1 + weight(8),
            f"{n}.norm_ip_k.weight": 1 + weight(8),
        }
    return {"image_proj": proj, "ip_adapter": layers}


@cache
def _t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """T5 with a tokenizer that spells letter by letter."""
    letters = [(letter, -2.0) for letter in string.ascii_lowercase + "▁,.-"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    spelled = Tokenizer(models.Unigram(pieces, 2))
    spelled.pre_tokenizer = pre_tokenizers.Metaspace()
    spelled.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(6)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=JOINT,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config).eval(), T5TokenizerFast(
        tokenizer_object=spelled, extra_ids=0, model_max_length=512
    )


def _clip_text(kind: type[Any], width: int) -> Any:
    torch.manual_seed(8)
    sizes = {"hidden_size": width, "projection_dim": 32, "intermediate_size": 37, "num_attention_heads": 2}
    places = {"max_position_embeddings": 16, "vocab_size": len(tiny.vocabulary())}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return kind(CLIPTextConfig(num_hidden_layers=2, **sizes, **places, **ends)).eval()


def save_base(kind: str, folder: Path) -> Path:
    """A tiny FLUX, Kontext, Fill, Chroma or SD3.5 as a folder, with its image encoder and an adapter in
    ``adapters/``."""
    t5, t5_tokenizer = _t5()
    clip_tokenizer = tiny.clip_tokenizer()
    (folder / "adapters").mkdir(parents=True)
    file = folder / "adapters" / "ip_adapter.safetensors"
    if kind == "sd3":
        pipe = sd3(channels=16)
        for n in ("", "_2"):
            text_encoder = _clip_text(CLIPTextModelWithProjection, 16)
            pipe.register_modules(**{f"text_encoder{n}": text_encoder, f"tokenizer{n}": clip_tokenizer})
        pipe.register_modules(text_encoder_3=t5, tokenizer_3=t5_tokenizer)
        state = instantx_sd3_state()
        save_file({f"{part}.{name}": w for part, ws in state.items() for name, w in ws.items()}, file)
    else:
        pipe = chroma() if kind == "chroma" else flux()
        if kind == "flux-fill":  # of the picture, its masked part and the mask
            pipe = flux(diffusers.FluxFillPipeline, in_channels=48)
            clip().save_pretrained(folder / "image_encoder")
            clip_processor().save_pretrained(folder / "feature_extractor")
        elif kind == "flux-kontext":
            pipe = flux(diffusers.FluxKontextPipeline)
        if kind != "chroma":
            text_encoder = _clip_text(CLIPTextModel, 32)
            pipe.register_modules(text_encoder=text_encoder, tokenizer=clip_tokenizer)
            pipe.register_modules(text_encoder_2=t5, tokenizer_2=t5_tokenizer)
        else:
            pipe.register_modules(text_encoder=t5, tokenizer=t5_tokenizer)
        save_file(xlabs_state(), file)
    pipe.save_pretrained(folder)
    return folder
