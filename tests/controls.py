"""Tiny real ControlNets, a ControlNet-Union, T2I-Adapters and SparseCtrls for the tiny pipelines, on disk.

A fresh ControlNet's outputs are zero; here every weight is random, so that following it shows.
"""

from pathlib import Path

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, SparseControlNetModel, T2IAdapter

from copies import copies
from tiny import tiny_unet


@copies
def tiny_controlnet(family: str = "sd", seed: int = 11) -> ControlNetModel:
    """The ControlNet of :func:`tiny.tiny_sd`'s UNet (``"sd"``) or :func:`tiny.tiny_sdxl`'s (``"sdxl"``)."""
    net = ControlNetModel.from_unet(tiny_unet(family), conditioning_embedding_out_channels=(8, 8, 16))
    return randomised(net, seed)


@copies
def tiny_union(seed: int = 13) -> ControlNetUnionModel:
    """A ControlNet-Union for :func:`tiny.tiny_sdxl`'s UNet, of six kinds."""
    shared = (
        "block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim",
        "attention_head_dim", "transformer_layers_per_block", "use_linear_projection", "addition_embed_type",
        "addition_time_embed_dim", "projection_class_embeddings_input_dim", "down_block_types",
    )  # fmt: skip
    unet = tiny_unet("sdxl")
    net = ControlNetUnionModel(
        **{name: unet.config[name] for name in shared},
        conditioning_embedding_out_channels=(8, 8, 16),
        num_control_type=6,
        num_trans_channel=16,
        num_trans_head=2,
        num_trans_layer=1,
        num_proj_channel=16,
    )
    return randomised(net, seed)


@copies
def tiny_t2i(seed: int = 17) -> T2IAdapter:
    """A T2I-Adapter for :func:`tiny.tiny_sd`'s UNet."""
    net = T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter")
    return randomised(net, seed)


@copies
def tiny_sparse(*, rgb: bool = True, frames: int = 8, seed: int = 19) -> SparseControlNetModel:
    """A SparseCtrl for :func:`tiny.tiny_sd`'s UNet: of pictures (``rgb``, in latents) or of scribbles."""
    unet = tiny_unet("sd").config
    shared = ("block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim")
    net = SparseControlNetModel(
        **{name: unet[name] for name in shared},
        attention_head_dim=unet["attention_head_dim"],
        down_block_types=[
            "CrossAttnDownBlockMotion" if "CrossAttn" in kind else "DownBlockMotion"
            for kind in unet["down_block_types"]
        ],
        conditioning_channels=4 if rgb else 3,
        conditioning_embedding_out_channels=(8, 8, 16),
        use_simplified_condition_embedding=rgb,
        motion_max_seq_length=frames,
        motion_num_attention_heads=2,
    )
    return randomised(net, seed)


def saved(net: torch.nn.Module, folder: Path) -> str:
    """``net`` in diffusers' layout in ``folder``; returns its path as a request says it."""
    net.save_pretrained(folder)
    return str(folder)


def randomised(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """``net`` with random weights where they are zero."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return net.eval().requires_grad_(False)
