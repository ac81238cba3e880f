"""Measure a step of a FLUX transformer with an image prompt over a plain step, at FLUX's true block shapes.

One double and one single block with random weights and no text encoders; CPU time, one thread. Prints JSON:
the median ratio of each adapter's steps to the plain steps of the same round, for the first step of a
drawing, in which an adapter makes its keys and values, and for those after it. "again" is the control: the
plain steps once more. Where it is more than 1 % from 1, the machine is too busy for the ratios to say much.

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

HIDDEN, JOINT, POOLED, STEPS = 3072, 4096, 768, 3
FEATURES = 8  # width of a picture's features: they are projected before the first step


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


def norm(name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(JOINT), f"{name}.bias": torch.zeros(JOINT)}


def xlabs(tokens: int = 16) -> dict[str, Tensor]:
    """XLabs' file for one double block."""
    rows = tokens * JOINT
    state = {
        "ip_adapter_proj_model.proj.weight": weight(rows, FEATURES),
        "ip_adapter_proj_model.proj.bias": weight(rows),
    }
    for part in "kv":
        name = f"double_blocks.0.processor.ip_adapter_double_stream_{part}_proj"
        state |= {f"{name}.weight": weight(HIDDEN, JOINT), f"{name}.bias": weight(HIDDEN)}
    return state | norm("ip_adapter_proj_model.norm")


def instantx(tokens: int = 128) -> dict[str, Tensor]:
    """InstantX's file for both blocks."""
    rows, inner = tokens * JOINT, 2 * FEATURES
    state = {
        "image_proj.proj.0.weight": weight(inner, FEATURES),
        "image_proj.proj.0.bias": weight(inner),
        "image_proj.proj.2.weight": weight(rows, inner),
        "image_proj.proj.2.bias": weight(rows),
    }
    for site in range(2):
        state |= {f"ip_adapter.{site}.to_{part}_ip.weight": weight(HIDDEN, JOINT) for part in "kv"}
    return state | norm("image_proj.norm")


def seconds(pipe: FluxPipeline, size: int, steps: int = STEPS) -> list[float]:
    """CPU time of each step of one drawing; the first one's is from the call on."""
    text = {"prompt_embeds": torch.ones(1, 256, JOINT), "pooled_prompt_embeds": torch.ones(1, POOLED)}
    times = [time.process_time()]

    def done(*_: object) -> dict[str, Tensor]:
        times.append(time.process_time())
        return {}

    pipe(
        **text, height=size, width=size, num_inference_steps=steps, output_type="latent",
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
        for name, state in {"xlabs": xlabs(), "instantx": instantx()}.items():
            save_file(state, Path(folder) / f"{name}.safetensors")
            adapters[name] = IPAdapter.from_pretrained(Path(folder) / f"{name}.safetensors")
    seconds(pipe, args.size, steps=1)  # warm up
    times: dict[str, list[list[float]]] = {name: [] for name in ("plain", *adapters, "again")}
    for _ in range(args.rounds):
        for name, drawings in times.items():
            adapter = adapters.get(name)
            if adapter is not None:
                adapter.attach(pipe)
                adapter.set_prompt(ImagePrompt(features=torch.randn(1, FEATURES)), scale=0.7)
            drawings.append(seconds(pipe, args.size))
            if adapter is not None:
                adapter.detach()
    plain = times.pop("plain")
    found = {
        when: {name: ratio(drawings, plain, steps) for name, drawings in times.items()}
        for when, steps in (("first step", slice(0, 1)), ("later steps", slice(1, None)))
    }
    step = median(one for steps in plain for one in steps[1:])
    print(json.dumps(found | {"seconds of a plain step": round(step, 2)}, indent=2))


def ratio(own: list[list[float]], plain: list[list[float]], steps: slice) -> float:
    """The median ratio of some steps of all rounds, each to the plain step of its round."""
    pairs = [
        pair for one, two in zip(own, plain, strict=True) for pair in zip(one[steps], two[steps], strict=True)
    ]
    return round(median(a / b for a, b in pairs), 4)


if __name__ == "__main__":
    main()
