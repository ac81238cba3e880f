"""What a training sample costs: the reference recipe's step against imprompt's, interleaved in one process.

The reference step (tencent-ailab/IP-Adapter's tutorial scripts) encodes picture, caption and reference in
every step, runs the UNet in float32 under autocast, reads the loss, and clips nothing; on a GPU its encoders
are in the format of the autocast. imprompt's step reads what it encoded once. Both train one linear adapter
on the same base with the same batch, in bfloat16 where the device has it; pictures are decoded beforehand.
The figure is time a sample, reference over imprompt: CPU time, or on a GPU the device's (imprompt's samples
are then made beforehand, as its thread does).

    python benchmarks/training.py [--rounds N] [--batch B] [--base emoji|sd15] [--size 512] [--device cuda]
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from gpu_timing import milliseconds
from PIL import Image
from torch.nn import functional
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.catalog import ASSETS
from imprompt.data.read import read_dataset
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.images import load_image
from imprompt.generation.families import find_base
from imprompt.generation.pipelines import load
from imprompt.training import TrainConfig
from imprompt.training.folder import RunFolder
from imprompt.training.launch import make_accelerator
from imprompt.training.trainer import Trainer


def sd15_base(folder: Path, device: str) -> Path:
    """Write a base of Stable Diffusion 1.5's shape with random weights, its image encoder a ViT-H/14. (The
    values cost nothing.)"""
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **ends
    )
    vision = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
        projection_dim=1024, image_size=224, patch_size=14,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        models: dict[str, Any] = {
            "unet": UNet2DConditionModel(cross_attention_dim=768, sample_size=64),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            "text_encoder": CLIPTextModel(text),
            "image_encoder": CLIPVisionModelWithProjection(vision),
        }  # fmt: skip
    tokenizer = StableDiffusionPipeline.from_pretrained(
        ASSETS, unet=None, vae=None, text_encoder=None, scheduler=None, safety_checker=None
    ).tokenizer
    tokenizer.model_max_length = 77
    StableDiffusionPipeline(
        **{name: model.to(torch.bfloat16) for name, model in models.items()}, tokenizer=tokenizer,
        feature_extractor=CLIPImageProcessorPil(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


class Reference:
    """The reference recipe's step, on pictures that are prepared already."""

    def __init__(
        self, base: str, encoder: Path, batch: int, side: int | None, dtype: torch.dtype, device: str
    ) -> None:
        self.device, self.dtype = device, dtype
        self.format = torch.float32 if device == "cpu" else dtype
        self.pipe = load(find_base(base), "generate", torch.float32).to(device)
        self.encoder = ImageEncoder.from_pretrained(encoder, torch_dtype=self.format, device=device)
        self.adapter = IPAdapter.new(self.pipe.unet.requires_grad_(False), image_encoder=self.encoder)
        self.adapter.to(device).attach(self.pipe.unet)
        for part in (self.pipe.vae, self.pipe.text_encoder):
            part.to(self.format)
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-4, weight_decay=1e-2)
        rows = read_dataset(ASSETS / "eval").rows[:batch]
        images = [load_image(row.read()) for row in rows]
        self.captions = [row.caption for row in rows]
        self.shown = self.encoder.prepare(images)
        targets = [_array(image if side is None else image.resize((side, side))) for image in images]
        self.pixels = torch.from_numpy(np.stack(targets)).permute(0, 3, 1, 2) / 127.5 - 1

    def step(self) -> None:
        pipe, device, count = self.pipe, self.device, len(self.captions)
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                pixels, shown = (each.to(device, self.format) for each in (self.pixels, self.shown))
                latents = pipe.vae.encode(pixels).latent_dist.sample().float()
                states = pipe.encode_prompt(self.captions, device, 1, False)[0]
                features = self.encoder.model(shown).image_embeds
            clean = latents * pipe.vae.config.scaling_factor
            noise, steps = torch.randn_like(clean), torch.randint(0, 1000, (count,), device=device)
            noisy = pipe.scheduler.add_noise(clean, noise, steps)
            with self.adapter.training_tokens(self.adapter.projection(features)):
                predicted = pipe.unet(noisy, steps, states, return_dict=False)[0]
            loss = functional.mse_loss(predicted.float(), noise)
            loss.item()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _array(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGB"), dtype=np.float32)


def trainer(folder: Path, base: str, batch: int, side: int | None, device: str) -> Trainer:
    """imprompt's, before its first step."""
    rows = read_dataset(ASSETS / "eval").rows[:batch]
    pictures = folder / "pictures"
    pictures.mkdir()
    for row in rows:
        (pictures / row.file.name).write_bytes(row.read())
        (pictures / f"{row.file.stem}.txt").write_text(row.caption)
    config = TrainConfig(
        data=str(pictures), output=folder / "run", base=base, batch=batch, kind="linear", init=None,
        steps=10**6, resolution=side, device=device, sample_every=0, trackers=(), quiet=True,
    )  # fmt: skip
    held = RunFolder(config.output, resume=False)
    held.open()
    return Trainer(config, make_accelerator(config), held)


def our_step(ours: Trainer, number: int, device: str) -> Callable[[], None]:
    """One step; on the CPU with making its sample, which costs the same time in a thread."""
    if device == "cpu":
        return lambda: ours.advance([ours.samples.make(number)])
    sample = ours.samples.make(number)
    return lambda: ours.advance([sample])


def compared(
    folder: Path, base: str, batch: int, side: int | None, device: str, rounds: int
) -> dict[str, Any]:
    """Samples a second of both, and their ratio; ``folder`` is an empty one."""
    encoder = ASSETS / "image_encoder"
    if base == "sd15":
        base = str(sd15_base(folder / "base", device))
        encoder = Path(base) / "image_encoder"
    ours = trainer(folder, base, batch, side, device)
    theirs = Reference(base, encoder, batch, side, ours.dtype, device)
    spent: dict[str, list[float]] = {"reference": [], "imprompt": [], "again": []}
    for number in range(rounds + 1):
        for name, times in spent.items():
            step = theirs.step if name != "imprompt" else our_step(ours, number, device)
            took = milliseconds(step, device) / 1000
            if number:  # the first round warms up
                times.append(took)
    ratios = [a / b for a, b in zip(spent["reference"], spent["imprompt"], strict=True)]
    control = [a / b for a, b in zip(spent["reference"], spent["again"], strict=True)]
    return {
        "dtype": str(ours.dtype), "batch": batch,
        "samples_per_second": {
            name: round(batch / statistics.median(spent[name]), 2) for name in ("reference", "imprompt")
        },
        "reference_over_imprompt": round(statistics.median(ratios), 3),
        "least_and_most": [round(min(ratios), 3), round(max(ratios), 3)],
        "reference_over_itself": round(statistics.median(control), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--base", choices=["emoji", "sd15"], default="emoji")
    parser.add_argument("--size", type=int, help="side of the targets in pixels")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = compared(Path(place), args.base, args.batch, args.size, args.device, args.rounds)
    print(json.dumps(vars(args) | found, indent=2))


if __name__ == "__main__":
    main()
