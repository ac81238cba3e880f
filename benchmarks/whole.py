"""Measure whole generations of the bundled model with a picture over diffusers' with its own adapter.

A generation is all after loading: the picture and the text are encoded, drawn and decoded, the same number of
pictures by both. CPU time, interleaved; each round has another picture, so that nothing is remembered. Prints
JSON: ratios to diffusers (medians; "again" is the control, diffusers once more) and the mean difference of
the pixels, of 255.

    python benchmarks/whole.py [--count 1] [--steps 20] [--rounds 5]
"""

import argparse
import json
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
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(EMOJI, subfolder="adapters", weight_name=PLUS, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.6)

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain = Request(prompt="a cat", base="emoji", seed=1, steps=args.steps, guidance=5.0)
    first = Engine().run(plain).images[0]
    request = plain.replace(images=["shown"], adapter="emoji-plus", scale=0.6, count=args.count)
    draw = theirs(request, first.width)
    kinds = {"diffusers": draw, "imprompt": ours(request), "again": draw}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    drawn = {}
    for round_ in range(args.rounds + 1):
        shown = Image.fromarray(np.roll(np.asarray(first), 8 * round_, axis=1))
        for name, work in kinds.items():
            began = time.process_time()
            drawn[name] = np.stack([np.asarray(picture).astype(float) for picture in work(shown)])
            if round_:  # the first loads
                times[name].append(time.process_time() - began)
    ratios = {
        name: round(median(own / base for own, base in zip(taken, times["diffusers"], strict=True)), 3)
        for name, taken in times.items()
    }
    lost = float(np.abs(drawn["imprompt"] - drawn["diffusers"]).mean())
    seconds = round(median(times["diffusers"]), 2)
    print(json.dumps(vars(args) | ratios | {"difference": round(lost, 3), "seconds": seconds}, indent=2))


if __name__ == "__main__":
    main()
