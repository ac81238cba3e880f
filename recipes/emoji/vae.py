"""Stage 2: the autoencoder, ``AutoencoderKL`` with f = 8 and four latent channels, no attention.

It is fully convolutional, so it learns from 64×64 crops and is used at 128×128. The loss is L2 plus L1 in
pixel space with a very small KL weight: emoji are flat colours and sharp edges, and a latent that is nearly
deterministic keeps them. The scaling factor is measured at the end (1 / standard deviation of the latents).

    python recipes/emoji/vae.py
    python recipes/emoji/vae.py --decoder-only --minutes 15 --lr 1e-3   # later, while the UNet trains

The second stage trains the bundled decoder on, half of the time from latents with a little noise: a UNet's
latents are never quite those of a picture, and a decoder that has only seen exact ones paints the difference
as blotches.
"""

import argparse
import random

import torch
from common import MODEL, RUNS, Ema, Loop, load_pictures, load_rows, progress_mean, save_half
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

NOISE = 0.2
"""Largest noise on the latents of the second stage, as a share of their spread."""


def build() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, sample_size=128, latent_channels=4, layers_per_block=1,
        block_out_channels=(16, 24, 48, 128), norm_num_groups=8, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def crops(pictures: Tensor, n: int, size: int = 64) -> Tensor:
    out = []
    for _ in range(n):
        i = random.randrange(len(pictures))
        y, x = random.randrange(129 - size), random.randrange(129 - size)
        crop = pictures[i, :, y : y + size, x : x + size]
        out.append(crop.flip(2) if random.random() < 0.5 else crop)
    return torch.stack(out).float() / 127.5 - 1


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    errors = []
    for chunk in pictures.split(16):
        x = chunk.float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append(((x - y) / 2).square().mean(dim=(1, 2, 3)))
    return float((-10 * torch.cat(errors).clamp_min(1e-10).log10()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocabulary", default="all")
    parser.add_argument("--minutes", type=float, help="end the schedule by the clock instead of --steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decoder-only", action="store_true", help="train on with the encoder frozen")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pictures = load_pictures(load_rows(args.vocabulary))
    held_out = load_pictures([r for r in load_rows("core", None) if r["split"] != "train"])[::3]
    vae = build()
    if args.decoder_only:
        # Latents that the UNet has learned stay valid: only what becomes of them improves.
        vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().train()
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in vae.parameters() if p.requires_grad], lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4
    )
    loop = Loop(
        RUNS / ("vae-decoder.pt" if args.decoder_only else "vae.pt"),
        args.steps,
        vae,
        optimizer,
        Ema(vae, 0.998),
        minutes=args.minutes,
    )
    spread = NOISE / vae.config.scaling_factor if args.decoder_only else 0.0
    for step in loop:
        random.seed(step)
        x = crops(pictures, args.batch)
        latents = vae.encode(x).latent_dist
        z = latents.sample()
        z[::2] += spread * torch.rand(len(z[::2]), 1, 1, 1) * torch.randn_like(z[::2])
        y = vae.decode(z).sample
        loss = F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 1e-6 * latents.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress_mean(loop.log, "loss", loss.item())
        if step % 500 == 499:
            print(f"held-out PSNR {psnr(vae, held_out[:48]):.2f} dB", flush=True)
    assert loop.ema
    loop.ema.copy_to(vae)
    vae.eval()
    with torch.no_grad():
        sample = pictures[:: max(1, len(pictures) // 512)].float() / 127.5 - 1
        latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in sample.split(32)])
    if not args.decoder_only:
        vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    print(f"held-out PSNR {psnr(vae, held_out):.2f} dB on {len(held_out)} pictures")
    print(f"standard deviation of the latents {latents.std():.3f}")
    save_half(vae, MODEL / "vae")


if __name__ == "__main__":
    main()
