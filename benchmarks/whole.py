"""Measure whole generations of the bundled model with a picture over diffusers' with its own adapter.

A generation is all after loading: the picture and the text are encoded, drawn and decoded, the same number of
pictures by both. CPU time, on a GPU the time until it is idle again; interleaved; each round has another
picture, so that nothing is remembered. Prints JSON: ratios to diffusers (medians; "again" is the control,
diffusers once more), the mean difference of the pixels, of 255, and their signal-to-noise ratio in decibels.

    python benchmarks/whole.py [--count 1] [--steps 20] [--rounds 5] [--device cuda] [--dtype bfloat16]
        [--against float32, diffusers' format]
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import imprompt
from imprompt import Engine, Request

EMOJI = Path(imprompt.__file__).parent / "assets" / "emoji"
PLUS = "ip-adapter-plus_emoji.safetensors"
Draw = Callable[[Image.Image], list[Image.Image]]


def theirs(request: Request, size: int) -> Draw:
    """diffusers' pipeline with the bundled plus adapter, loaded by its own loader."""
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI, torch_dtype=getattr(torch, request.dtype))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(EMOJI, subfolder="adapters", weight_name=PLUS, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.6)
    pipe.to(request.device)

    def draw(shown: Image.Image) -> list[Image.Image]:
        seeds = [torch.Generator().manual_seed(1 + i) for i in range(request.count)]
        drawn = pipe(
            request.prompt, ip_adapter_image=shown, num_images_per_prompt=request.count, generator=seeds,
            num_inference_steps=request.steps, guidance_scale=request.guidance, height=size, width=size,
        )  # fmt: skip
        return list(drawn.images)

    return draw


def ours(request: Request) -> Draw:
    engine = Engine()
    return lambda shown: engine.run(request, pictures={"shown": shown}).images


def seconds(work: Callable[[], object], device: str) -> float:
    """CPU time, or until a GPU is idle again."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def compared(
    count: int,
    steps: int,
    rounds: int,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    against: str | None = None,
) -> dict[str, float]:
    """Ratios to diffusers (in the format ``against``, by default the same) of ``count`` pictures each, the
    differences of the pixels, and seconds."""
    plain = Request(
        prompt="a cat", base="emoji", seed=1, steps=steps, guidance=5.0, device=device, dtype=dtype
    )
    first = Engine().run(plain).images[0]
    request = plain.replace(images=["shown"], adapter="emoji-plus", scale=0.6, count=count)
    draw = theirs(request.replace(dtype=against or dtype), first.width)
    kinds = {"diffusers": draw, "imprompt": ours(request), "again": draw}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    drawn = {}
    for round_ in range(rounds + 1):
        shown = Image.fromarray(np.roll(np.asarray(first), 8 * round_, axis=1))
        for name, work in kinds.items():
            pictures: list[Image.Image] = []
            took = seconds(lambda work=work, shown=shown, to=pictures: to.extend(work(shown)), device)
            drawn[name] = np.stack([np.asarray(picture).astype(float) for picture in pictures])
            if round_:  # the first loads
                times[name].append(took)
    ratios = {
        name: round(median(own / base for own, base in zip(taken, times["diffusers"], strict=True)), 3)
        for name, taken in times.items()
    }
    lost = drawn["imprompt"] - drawn["diffusers"]
    noise = float(np.square(lost).mean())
    return ratios | {
        "difference": round(float(np.abs(lost).mean()), 3),
        "psnr": round(10 * math.log10(255**2 / max(noise, 1e-9)), 1),
        "seconds": round(median(times["diffusers"]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--against", help="diffusers' format; the same if not given")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    print(json.dumps(vars(args) | compared(**vars(args)), indent=2))


if __name__ == "__main__":
    main()
