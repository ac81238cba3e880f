"""Measure a step of a FLUX transformer with an image prompt over a plain step, at FLUX's true block shapes.

One double and one single block with random weights, no text encoders; CPU time from one step to the next,
interleaved. The first step is apart, as it makes the adapter's keys and values. Prints JSON: ratios (medians
over the later steps of all rounds; "again" is the control, the plain steps once more), and of the first.

    python benchmarks/flux_blocks.py [--rounds 5] [--size 512]
"""

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from imprompt import ImagePrompt, IPAdapter

HIDDEN, JOINT, POOLED, SIGLIP, STEPS = 3072, 4096, 768, 1152, 3


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    vae = AutoencoderKL(
        latent_channels=16, block_out_channels=(32,) * 4, shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer, **texts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape) / shape[-1] ** 0.5


def xlabs(tokens: int = 16) -> tuple[dict[str, Tensor], Tensor]:
    """XLabs' file for one double block, and a picture's features."""
    state = {
        "ip_adapter_proj_model.proj.weight": weight(tokens * JOINT, POOLED),
        "ip_adapter_proj_model.proj.bias": weight(tokens * JOINT),
        "ip_adapter_proj_model.norm.weight": torch.ones(JOINT),
        "ip_adapter_proj_model.norm.bias": torch.zeros(JOINT),
    }
    for part in "kv":
        name = f"double_blocks.0.processor.ip_adapter_double_stream_{part}_proj"
        state |= {f"{name}.weight": weight(HIDDEN, JOINT), f"{name}.bias": weight(HIDDEN)}
    return state, torch.randn(1, POOLED)


def instantx(tokens: int = 128) -> tuple[dict[str, Tensor], Tensor]:
    """InstantX's file for both blocks, and a picture's features."""
    state = {
        "image_proj.proj.0.weight": weight(2 * SIGLIP, SIGLIP),
        "image_proj.proj.0.bias": weight(2 * SIGLIP),
        "image_proj.proj.2.weight": weight(tokens * JOINT, 2 * SIGLIP),
        "image_proj.proj.2.bias": weight(tokens * JOINT),
        "image_proj.norm.weight": torch.ones(JOINT),
        "image_proj.norm.bias": torch.zeros(JOINT),
    }
    for site in range(2):
        state |= {f"ip_adapter.{site}.to_{part}_ip.weight": weight(HIDDEN, JOINT) for part in "kv"}
    return state, torch.randn(1, SIGLIP)


def seconds(pipe: FluxPipeline, size: int) -> list[float]:
    """CPU time of each step of one call."""
    text = {"prompt_embeds": torch.ones(1, 256, JOINT), "pooled_prompt_embeds": torch.ones(1, POOLED)}
    times = [time.process_time()]

    def done(*_: object) -> dict[str, Tensor]:
        times.append(time.process_time())
        return {}

    pipe(
        **text, height=size, width=size, num_inference_steps=STEPS, output_type="latent",
        callback_on_step_end=done,
    )  # fmt: skip
    return [after - before for before, after in pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=512, help="side in pixels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe, adapters = flux(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (state, features) in {"xlabs": xlabs(), "instantx": instantx()}.items():
            save_file(state, Path(folder) / f"{name}.safetensors")
            adapters[name] = IPAdapter.from_pretrained(Path(folder) / f"{name}.safetensors"), features
    times: dict[str, list[list[float]]] = {name: [] for name in ("plain", "again", *adapters)}
    seconds(pipe, args.size)
    for _ in range(args.rounds):
        times["plain"].append(seconds(pipe, args.size))
        for name, (adapter, features) in adapters.items():
            adapter.attach(pipe)
            adapter.set_prompt(ImagePrompt(features=features), scale=0.7)
            times[name].append(seconds(pipe, args.size))
            adapter.detach()
        times["again"].append(seconds(pipe, args.size))
    first, later = (
        {name: ratio(steps, times["plain"], which) for name, steps in times.items()}
        for which in (slice(0, 1), slice(1, None))
    )
    step = median(one for steps in times["plain"] for one in steps[1:])
    print(json.dumps(later | {"first step": first, "seconds": round(step, 2)}, indent=2))


def ratio(own: list[list[float]], plain: list[list[float]], which: slice) -> float:
    """The median ratio of some steps of all rounds, each to the plain step beside it."""
    rounds = zip(own, plain, strict=True)
    return round(median(a / b for one, two in rounds for a, b in zip(one[which], two[which], strict=True)), 4)


if __name__ == "__main__":
    main()
