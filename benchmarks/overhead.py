"""What an image prompt costs: one denoising step with it, without it, and with diffusers' IP-Adapter.

Prints JSON; the figures that count are ratios within this run. Rounds are interleaved and the fastest of
each kind is taken, so that other work on the machine disturbs all kinds alike.

    python benchmarks/overhead.py [--base emoji|FOLDER] [--rounds 30]
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import imprompt

EMOJI = Path(imprompt.__file__).parent / "assets" / "emoji"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="emoji")
    parser.add_argument("--adapter", default=None, help="default: the base's adapters/*.safetensors")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    base = EMOJI if args.base == "emoji" else Path(args.base)
    files = [Path(args.adapter)] if args.adapter else sorted((base / "adapters").glob("*.safetensors"))
    print(json.dumps({file.stem: measure(base, file, args.rounds) for file in files}, indent=2))


def measure(base: Path, file: Path, rounds: int) -> dict[str, float]:
    """Milliseconds of a step of two samples (guidance), and ratios to the step without an adapter."""
    load = {"torch_dtype": torch.float32, "safety_checker": None}
    plain, ours, theirs = (StableDiffusionPipeline.from_pretrained(base, **load) for _ in range(3))
    adapter = imprompt.IPAdapter.from_pretrained(file)
    adapter.attach(ours)
    adapter.batch(guidance=True)
    feature = adapter.projection.feature
    width = adapter.projection.feature_width
    shape = (1, width) if feature == "pooled" else (1, 65, width)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    adapter.set_prompt(
        imprompt.ImagePrompt(features=features, negative=torch.zeros_like(features), scale=0.6)
    )
    theirs.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
    theirs.set_ip_adapter_scale(0.6)
    embeds = [torch.cat([torch.zeros_like(features), features])[:, None]]

    unet = plain.unet
    channels, side = unet.config.in_channels, unet.config.sample_size
    sample = torch.randn(2, channels, side, side)
    text = torch.randn(2, plain.tokenizer.model_max_length, unet.config.cross_attention_dim)
    kinds: dict[str, Callable[[], object]] = {
        "without": lambda: plain.unet(sample, 500, text),
        "imprompt": lambda: ours.unet(sample, 500, text),
        "diffusers": lambda: theirs.unet(sample, 500, text, added_cond_kwargs={"image_embeds": embeds}),
    }
    best = dict.fromkeys(kinds, float("inf"))
    with torch.inference_mode():
        for round_ in range(rounds + 3):
            for kind, step in kinds.items():
                started = time.perf_counter()
                step()
                if round_ >= 3:
                    best[kind] = min(best[kind], time.perf_counter() - started)
    milliseconds = {f"{kind}_ms": round(1000 * seconds, 2) for kind, seconds in best.items()}
    ratios = {
        f"{kind}_to_without": round(best[kind] / best["without"], 3) for kind in ("imprompt", "diffusers")
    }
    return milliseconds | ratios


if __name__ == "__main__":
    main()
