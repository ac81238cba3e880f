"""What a training sample costs: the reference recipe's step against imprompt's, interleaved in one process.

The reference step (tencent-ailab/IP-Adapter's tutorial scripts) encodes picture, caption and reference in
every step, runs the UNet and the adapter in the base's number format, and clips nothing. imprompt's step
reads what it encoded once. Both train one linear adapter on the bundled base with the same batch, in bfloat16
autocast where the CPU has it. The figure is CPU time a sample, reference over imprompt.

    python benchmarks/training.py [--rounds N] [--batch B]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.catalog import ASSETS
from imprompt.data.rows import read_dataset
from imprompt.encoders.clip import ImageEncoder
from imprompt.encoders.images import load_image
from imprompt.generation.families import find_base
from imprompt.generation.pipelines import load
from imprompt.training import TrainConfig
from imprompt.training.folder import RunFolder
from imprompt.training.launch import make_accelerator
from imprompt.training.trainer import Trainer


class Reference:
    """The reference recipe's step, on pictures that are decoded already."""

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        self.pipe = load(find_base("emoji"), "generate", torch.float32)
        self.encoder = ImageEncoder.from_pretrained(ASSETS / "image_encoder", torch_dtype=torch.float32)
        self.adapter = IPAdapter.new(self.pipe.unet.requires_grad_(False), image_encoder=self.encoder)
        self.adapter.attach(self.pipe.unet)
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-4, weight_decay=1e-2)
        rows = read_dataset(ASSETS / "eval").rows[:batch]
        self.images = [load_image(row.read()) for row in rows]
        self.captions, self.dtype = [row.caption for row in rows], dtype

    def step(self) -> None:
        pipe, count = self.pipe, len(self.images)
        pixels = torch.stack([torch.from_numpy(_array(image)) for image in self.images]).permute(0, 3, 1, 2)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                latents = pipe.vae.encode(pixels / 127.5 - 1).latent_dist.sample().float()
                states = pipe.encode_prompt(self.captions, "cpu", 1, False)[0]
                features = self.encoder.encode(self.images).pooled
            clean = latents * pipe.vae.config.scaling_factor
            noise, steps = torch.randn_like(clean), torch.randint(0, 1000, (count,))
            noisy = pipe.scheduler.add_noise(clean, noise, steps)
            with self.adapter.training_tokens(self.adapter.projection(features)):
                predicted = pipe.unet(noisy, steps, states, return_dict=False)[0]
            functional.mse_loss(predicted.float(), noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _array(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGB"), dtype=np.float32)


def trainer(folder: Path, batch: int) -> Trainer:
    """imprompt's, before its first step."""
    rows = read_dataset(ASSETS / "eval").rows[:batch]
    pictures = folder / "pictures"
    pictures.mkdir()
    for row in rows:
        (pictures / row.file.name).write_bytes(row.read())
        (pictures / f"{row.file.stem}.txt").write_text(row.caption)
    config = TrainConfig(
        data=str(pictures), output=folder / "run", batch=batch, kind="linear", init=None, steps=10**6,
        device="cpu", trackers=(), quiet=True,
    )  # fmt: skip
    held = RunFolder(config.output, resume=False)
    held.open()
    return Trainer(config, make_accelerator(config), held)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        ours = trainer(Path(place), args.batch)
        theirs = Reference(args.batch, ours.dtype)
        passes = iter(range(10**6))
        spent: dict[str, list[float]] = {"reference": [], "imprompt": []}
        for number in range(args.rounds + 1):
            for name in spent:
                before = time.process_time()
                if name == "reference":
                    theirs.step()
                else:
                    ours.advance([ours.samples.make(next(passes))])
                if number:  # the first round warms up
                    spent[name].append(time.process_time() - before)
    ratios = [a / b for a, b in zip(*spent.values(), strict=True)]
    each = {name: args.batch / statistics.median(times) for name, times in spent.items()}
    print(f"{ours.dtype}, batch {args.batch}, {args.rounds} rounds")
    print(", ".join(f"{name} {pace:.2f} samples per CPU second" for name, pace in each.items()))
    print(f"reference / imprompt: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
