"""Measure a clip of 16 frames and 20 steps with the bundled model: time, peak memory, and the cost of
prompting each frame with a picture of its own against one picture for all frames.

Prints JSON. ``wall`` is the time a user waits, ``cpu`` the time of all threads. The ratios are medians over
interleaved rounds of one denoising step in CPU time, so that other work on the machine matters little; the
ratio of a whole clip includes the encoding of its pictures.

    python benchmarks/clips.py [--frames 16] [--steps 20] [--rounds 6]
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.framing import encode
from imprompt.generation.engine import Engine
from imprompt.generation.families import find_base
from imprompt.generation.pipelines import load
from imprompt.generation.video import find_motion, motion_pipeline
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default in (("--frames", 16), ("--steps", 20), ("--rounds", 6)):
        parser.add_argument(flag, type=int, default=default)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (128, 128, 3), dtype=np.uint8)) for _ in range(args.frames)
    ]
    figures: dict[str, float] = {"threads": torch.get_num_threads()}
    figures |= clip(pictures[0], args.frames, args.steps)
    figures |= ratios(pictures, args.steps, args.rounds)
    print(json.dumps(figures, indent=2))


def clip(picture: Image.Image, frames: int, steps: int) -> dict[str, float]:
    """Seconds of a clip prompted by one picture, with loading, and the peak memory of the process."""
    request = Request(task="animate", prompt="a cat", images=["it"], frames=frames, steps=steps, seed=0)
    started = time.perf_counter()
    worked = seconds(lambda: Engine().run(request, pictures={"it": picture}))
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    waited = time.perf_counter() - started
    return {"clip_wall_s": round(waited, 1), "clip_cpu_s": round(worked, 1), "peak_gib": round(peak, 2)}


def ratios(pictures: list[Image.Image], steps: int, rounds: int) -> dict[str, float]:
    """CPU time of a step with guidance and one picture for all frames; ratio of a picture for each frame
    to it."""
    base, frames = find_base("emoji"), len(pictures)
    pipe = motion_pipeline(
        load(base, "generate", torch.float32), find_motion(None, base), base, torch.float32
    )
    adapter = IPAdapter.from_pretrained("emoji-plus").attach(pipe)
    adapter.batch(guidance=True)
    encoder = adapter.image_encoder
    shown = {"one": pictures[:1], "each": pictures}
    encoded = {name: encode(encoder, some) for name, some in shown.items()}
    unet = pipe.unet
    side = unet.config.sample_size
    sample = torch.randn(2, unet.config.in_channels, frames, side, side)
    text = torch.randn(2 * frames, pipe.tokenizer.model_max_length, unet.config.cross_attention_dim)

    def prompted(name: str) -> None:
        at = range(frames) if name == "each" else None
        adapter.set_prompt(ImagePrompt(features=encoded[name], at=at))

    step: dict[str, list[float]] = {name: [] for name in shown}
    encoding: dict[str, list[float]] = {name: [] for name in shown}
    with torch.inference_mode():
        for number in range(rounds + 1):  # the first warms up
            for name in shown if number % 2 else reversed(shown):
                prompted(name)
                unet(sample, 500, text)  # compiles this prompt
                took = seconds(lambda: unet(sample, 499, text))
                read = seconds(lambda some=shown[name]: encode(encoder, some))
                if number:
                    step[name].append(took)
                    encoding[name].append(read)
    adapter.detach()
    once = statistics.median(step["one"])
    ratio = statistics.median(each / one for each, one in zip(step["each"], step["one"], strict=True))
    read = {name: statistics.median(times) for name, times in encoding.items()}
    whole = (once * ratio * steps + read["each"]) / (once * steps + read["one"])
    return {
        "step_cpu_ms": round(1000 * once, 1),
        "picture_per_frame_to_one_step": round(ratio, 3),
        "picture_per_frame_to_one_clip": round(whole, 3),
        "encode_one_cpu_ms": round(1000 * read["one"], 1),
        "encode_each_cpu_ms": round(1000 * read["each"], 1),
    }


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call, all threads together."""
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
