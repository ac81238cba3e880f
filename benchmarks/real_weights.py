"""Draw the README's FLUX example with the published weights, and check what small random models cannot show.

Needs a GPU of 40 GB or more (with ``--offload model`` about 24), about 36 GB of downloads, and the licence of
FLUX.1 [dev] accepted on the hub. It checks, and prints as JSON:

- XLabs' adapter v2 loads, and is recognised as 16 tokens for FLUX;
- the Engine's picture equals that of diffusers' own ``load_ip_adapter`` with the same seed, within 2 of 255
  on average (half precision sums in another order);
- at scale 0, and once the adapter is detached, the picture is the plain one to the bit;
- the picture is closer to the reference than the plain one, by the cosine of CLIP ViT-L/14 embeddings;
- seconds a step with the adapter are at most 1.01 of those without.

Everything is written to ``--output``; look at the pictures as well.

    python benchmarks/real_weights.py photo.png [--output real-weights] [--offload model]
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

import imprompt
from imprompt.encoders.clip import ImageEncoder

PROMPT = "an owl in a forest"
STEPS, GUIDANCE, SIZE, SEED, SCALE = 28, 3.5, 1024, 1, 0.7
ADAPTER = "XLabs-AI/flux-ip-adapter-v2"
ENCODER = "openai/clip-vit-large-patch14"


def ours(reference: Path, offload: str, output: Path) -> tuple[dict[str, Image.Image], dict[str, float]]:
    """Pictures and seconds a step, of the Engine."""
    engine = imprompt.Engine(quiet=False)
    plain = imprompt.Request(
        prompt=PROMPT, base="flux", steps=STEPS, guidance=GUIDANCE, size=(SIZE, SIZE), seed=SEED,
        dtype="bfloat16", offload=offload,
    )  # fmt: skip
    requests = {
        "warm-up": plain.replace(steps=2),
        "plain": plain,
        "shown": plain.replace(images=[reference], adapter="flux-xlabs-v2", scale=SCALE),
        "zero": plain.replace(images=[reference], adapter="flux-xlabs-v2", scale=0.0),
        "plain-again": plain,
    }
    images, seconds = {}, {}
    for name, request in requests.items():
        result = engine.run(request)
        images[name], seconds[name] = result.images[0], result.timings["draw"] / request.steps
        result.images[0].save(output / f"{name}.png")
    engine.release()
    return images, seconds


def theirs(reference: Path, offload: str) -> Image.Image:
    """The same picture by diffusers' own adapter code."""
    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
    pipe.load_ip_adapter(
        ADAPTER, weight_name="ip_adapter.safetensors", image_encoder_pretrained_model_name_or_path=ENCODER,
        image_encoder_dtype=torch.bfloat16,
    )  # fmt: skip
    pipe.set_ip_adapter_scale(SCALE)
    if offload == "none":
        pipe.to("cuda")
    else:
        pipe.enable_model_cpu_offload()
    shown = Image.open(reference).convert("RGB")
    image: Image.Image = pipe(
        PROMPT, ip_adapter_image=shown, num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=SIZE,
        width=SIZE, generator=torch.Generator().manual_seed(SEED),
    ).images[0]  # fmt: skip
    return image


def far(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of two pictures, in 255ths."""
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean())


def alike(reference: Path, images: list[Image.Image]) -> list[float]:
    """Cosine of each picture's CLIP embedding with the reference's."""
    encoder = ImageEncoder.from_pretrained(ENCODER, device="cuda")
    pooled = encoder.encode([Image.open(reference).convert("RGB"), *images]).pooled.float()
    first, *others = torch.nn.functional.normalize(pooled, dim=-1)
    return [round(float(first @ other), 4) for other in others]


def main() -> int:
    """Draw, check and print; returns 1 if a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", type=Path)
    parser.add_argument("--output", type=Path, default=Path("real-weights"))
    parser.add_argument("--offload", choices=("none", "model"), default="none")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("real_weights: there is no CUDA GPU; FLUX needs one.", file=sys.stderr)
        return 3
    given.output.mkdir(parents=True, exist_ok=True)
    checkpoint = imprompt.IPAdapter.from_pretrained("flux-xlabs-v2").checkpoint
    images, seconds = ours(given.reference, given.offload, given.output)
    images["diffusers"] = theirs(given.reference, given.offload)
    images["diffusers"].save(given.output / "diffusers.png")
    plain, shown = alike(given.reference, [images["plain"], images["shown"]])
    figures = {
        "adapter": f"{checkpoint.variant.name}, {checkpoint.tokens} tokens, {checkpoint.backbone}",
        "far_from_diffusers": far(images["shown"], images["diffusers"]),
        "far_at_scale_0": far(images["zero"], images["plain"]),
        "far_after_detaching": far(images["plain-again"], images["plain"]),
        "clip_of_plain": plain,
        "clip_of_shown": shown,
        "cost_of_a_step": round(seconds["shown"] / seconds["plain"], 4),
        "gpu": torch.cuda.get_device_name(),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }
    checks = {
        "recognised": figures["adapter"] == "xlabs, 16 tokens, flux",
        "equals_diffusers": far(images["shown"], images["diffusers"]) <= 2,
        "no_trace": far(images["zero"], images["plain"]) == far(images["plain-again"], images["plain"]) == 0,
        "acts": shown > plain,
        "cheap": seconds["shown"] <= 1.01 * seconds["plain"],
    }
    print(json.dumps({"figures": figures, "checks": checks}, indent=2))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
