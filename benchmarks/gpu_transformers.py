"""A step of FLUX and SD3.5-Large of their true size at 1024 pixels with an image prompt over the plain step;
the sections "flux" and "sd35" of gpu.py.

FLUX with XLabs' adapter (16 tokens) and InstantX's (128), SD3.5 with InstantX's, guided. diffusers has XLabs'
and SD3.5's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from gpu_timing import Run, Work, difference, launches
from layers import sharing
from torch import Tensor

from imprompt import ImagePrompt, IPAdapter

STRENGTH = 0.7
State = dict[str, dict[str, Tensor]]


def flux(run: Run) -> None:
    """FLUX: one picture, no guidance by a second branch."""
    small = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    small |= {"joint_attention_dim": 64, "axes_dims_rope": (4, 4, 8)}
    side, words = (8, 7) if run.quick else (64, 512)
    plain = run.model(lambda: FluxTransformer2DModel(guidance_embeds=True, **small if run.quick else {}))
    config = plain.config
    rows, columns = torch.meshgrid(*[torch.arange(side, device=run.device)] * 2, indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    call = {
        "hidden_states": run.randn(1, side**2, config.in_channels),
        "encoder_hidden_states": run.randn(1, words, config.joint_attention_dim),
        "pooled_projections": run.randn(1, config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, device=run.device, dtype=run.dtype),
        "guidance": torch.full((1,), 3.5, device=run.device),
        "img_ids": ids.to(run.dtype),
        "txt_ids": torch.zeros(words, 3, device=run.device, dtype=run.dtype),
    }
    features = run.randn(1, 768)
    state = xlabs(run, config, 4 if run.quick else 16)
    other = sharing(plain)
    other._load_ip_adapter_weights([state])
    for processor in other.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [STRENGTH]
    measured(
        run, plain, call, guided=False,
        adapters={"XLabs": (state, features), "InstantX": (instantx_flux(run, config), run.randn(1, 1152))},
        theirs={"XLabs": (other, {"ip_adapter_image_embeds": [features[None]]})},
    )  # fmt: skip


def sd35(run: Run) -> None:
    """SD3.5-Large: a guided batch of one picture."""
    heads, width, blocks, side, words = (4, 8, 2, 16, 7) if run.quick else (38, 64, 38, 128, 333)
    inner = heads * width
    plain = run.model(
        lambda: SD3Transformer2DModel(
            sample_size=side, num_layers=blocks, num_attention_heads=heads, attention_head_dim=width,
            caption_projection_dim=inner, joint_attention_dim=64 if run.quick else 4096,
            pooled_projection_dim=2048, pos_embed_max_size=192, qk_norm="rms_norm",
        )
    )  # fmt: skip
    call = {
        "hidden_states": run.randn(2, 16, side, side),
        "encoder_hidden_states": run.randn(2, words, plain.config.joint_attention_dim),
        "pooled_projections": run.randn(2, 2048),
        "timestep": torch.full((2,), 500.0, device=run.device),
    }
    state = instantx_sd3(run, inner, width, blocks)
    features = run.randn(1, 729, 1152)
    embeds = torch.cat([torch.zeros_like(features), features])
    other = sharing(plain)
    other._load_ip_adapter_weights(state)
    for processor in other.attn_processors.values():
        processor.scale = STRENGTH
    measured(
        run, plain, call, guided=True, adapters={"InstantX": (state, features)},
        theirs={"InstantX": (other, {"ip_adapter_image_embeds": embeds})},
    )  # fmt: skip


def measured(
    run: Run,
    plain: Any,
    call: Mapping[str, Tensor],
    *,
    guided: bool,
    adapters: Mapping[str, tuple[State, Tensor]],
    theirs: Mapping[str, tuple[Any, dict[str, Any]]],
) -> None:
    """Compare, then time all adapters on copies of ``plain`` that share its weights."""
    kinds: dict[str, Work] = {}
    with torch.inference_mode():
        for name in ("plain", "plain again"):
            kinds[name] = lambda: plain(**call).sample
        bare = plain(**call).sample
        differences = {}
        for name, (state, features) in adapters.items():
            model = sharing(plain)
            adapter = IPAdapter.from_state_dict(state).attach(model)
            adapter.batch(guidance=guided)
            adapter.set_prompt(ImagePrompt(features=features, scale=STRENGTH))
            kinds[f"imprompt {name}"] = lambda model=model, _=adapter: model(**call).sample
            got = kinds[f"imprompt {name}"]()
            differences[name] = {"plain": difference(got, bare)}
            if name in theirs:
                other, extra = theirs[name]
                kinds[f"diffusers {name}"] = lambda other=other, extra=extra: (
                    other(**call, joint_attention_kwargs=dict(extra)).sample  # it writes into them
                )
                differences[name]["diffusers"] = difference(got, kinds[f"diffusers {name}"]())
        run.add("differences", differences)
        run.add("eager", run.ratios(kinds))
        if run.device != "cpu":
            run.attempt("launches", lambda: {name: launches(work) for name, work in kinds.items()})
            run.add("GiB", round(torch.cuda.max_memory_allocated() / 2**30, 1))


def xlabs(run: Run, config: Any, tokens: int) -> State:
    """XLabs' adapter, as diffusers arranges it."""
    joint, inner = config.joint_attention_dim, config.num_attention_heads * config.attention_head_dim
    proj = {"proj.weight": run.weight(tokens * joint, 768), "proj.bias": run.randn(tokens * joint) / 10}
    layers = {}
    for block in range(config.num_layers):
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{block}.{part}.weight"] = run.weight(inner, joint)
            layers[f"{block}.{part}.bias"] = run.randn(inner) / 10
    return {"image_proj": proj | normed(run, "norm", joint), "ip_adapter": layers}


def instantx_flux(run: Run, config: Any, tokens: int = 128) -> State:
    joint, inner = config.joint_attention_dim, config.num_attention_heads * config.attention_head_dim
    proj = {
        "proj.0.weight": run.weight(2304, 1152),
        "proj.0.bias": run.randn(2304) / 10,
        "proj.2.weight": run.weight(tokens * joint, 2304),
        "proj.2.bias": run.randn(tokens * joint) / 10,
    }
    layers = {
        f"{site}.{part}.weight": run.weight(inner, joint)
        for site in range(config.num_layers + config.num_single_layers)
        for part in ("to_k_ip", "to_v_ip")
    }
    return {"image_proj": proj | normed(run, "norm", joint), "ip_adapter": layers}


def instantx_sd3(run: Run, inner: int, head: int, blocks: int) -> State:
    """InstantX's: a resampler that hears the time, 1280 wide with 64 queries; layers of ``inner``."""
    width = 128 if run.quick else 1280
    proj = {
        "latents": run.randn(1, 64, width),
        **linear(run, "proj_in", 1152, width),
        **linear(run, "proj_out", width, inner),
        **normed(run, "norm_out", inner),
        **linear(run, "time_embedding.linear_1", 320, width),
        **linear(run, "time_embedding.linear_2", width, width),
    }
    for i in range(4):
        for name in ("0.norm1", "0.norm2", "1.0"):
            proj |= normed(run, f"layers.{i}.{name}", width)
        proj |= {
            f"layers.{i}.0.to_q.weight": run.weight(width, width),
            f"layers.{i}.0.to_kv.weight": run.weight(2 * width, width),
            f"layers.{i}.0.to_out.weight": run.weight(width, width),
            f"layers.{i}.1.1.weight": run.weight(4 * width, width),
            f"layers.{i}.1.3.weight": run.weight(width, 4 * width),
            **linear(run, f"layers.{i}.2.1", width, 4 * width),
        }
    layers: dict[str, Tensor] = {}
    for n in range(blocks):
        layers |= linear(run, f"{n}.norm_ip.linear", width, 2 * inner)
        layers |= {f"{n}.{part}.weight": run.weight(inner, inner) for part in ("to_k_ip", "to_v_ip")}
        layers |= {
            f"{n}.{norm}.weight": torch.ones(head, device=run.device, dtype=run.dtype)
            for norm in ("norm_q", "norm_k", "norm_ip_k")
        }
    return {"image_proj": proj, "ip_adapter": layers}


def linear(run: Run, name: str, into: int, out: int) -> dict[str, Tensor]:
    return {f"{name}.weight": run.weight(out, into), f"{name}.bias": run.randn(out) / 10}


def normed(run: Run, name: str, width: int) -> dict[str, Tensor]:
    ones = torch.ones(width, device=run.device, dtype=run.dtype)
    return {f"{name}.weight": ones, f"{name}.bias": torch.zeros_like(ones)}
