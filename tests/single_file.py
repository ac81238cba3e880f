"""A Stable Diffusion pipeline as one file under the names of the original code, as model sites offer them."""

import re

from safetensors.torch import save_file

_RESNET = (
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
)  # fmt: skip
_ENDS = (
    ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
)  # fmt: skip
_VAE = (
    ("down_blocks", "down"), ("up_blocks", "up"), ("resnets", "block"), ("mid_block", "mid"),
    ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"), ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"), ("attentions.0", "attn_1"), ("mid.block.0", "mid.block_1"),
    ("mid.block.1", "mid.block_2"), ("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_", ""),
)  # fmt: skip


def save_single_file(pipe, path):
    """Write UNet, VAE and text encoder into one file."""
    parts = (
        ("model.diffusion_model.", pipe.unet, lambda name: _unet(name, pipe.unet.config)),
        ("first_stage_model.", pipe.vae, lambda name: _vae(name, len(pipe.vae.config.up_block_types))),
        ("cond_stage_model.transformer.text_model.", pipe.text_encoder, _text),
    )
    save_file(
        {
            prefix + named(name): tensor.contiguous()
            for prefix, module, named in parts
            for name, tensor in module.state_dict().items()
        },
        path,
    )
    return path


def _replaced(name, pairs):
    for mine, theirs in pairs:
        name = name.replace(mine, theirs)
    return name


def _unet(name, config):
    """The original name of a UNet's tensor; the original counts blocks through all levels."""
    side, *found = name.split(".")
    if not side.endswith(("blocks", "block")):
        return _replaced(name, _ENDS)
    per_level = config.layers_per_block + 1
    level = 0 if side == "mid_block" else int(found.pop(0))
    kind, number, rest = found[0], int(found[1]), ".".join(found[2:])
    rest = _replaced(rest, _RESNET) if kind == "resnets" else rest
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * per_level}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{1 + level * per_level + number}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":
        attends = "CrossAttn" in config.up_block_types[level]
        return f"output_blocks.{level * per_level + per_level - 1}.{1 + attends}.{rest}"
    return f"output_blocks.{level * per_level + number}.{int(kind == 'attentions')}.{rest}"


def _vae(name, levels):
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", name)
    return _replaced(name, _VAE)


def _text(name):
    return name.removeprefix("text_model.")
