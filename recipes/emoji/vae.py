"""Stage 2: the autoencoder, ``AutoencoderKL`` with f = 8 and four latent channels, no attention.

Fully convolutional: it learns from 64×64 crops and is used at 128×128. The loss is L1, L2 and the L1 of the
picture's gradients (edges must stay crisp), half of the time on a latent scaled down by two, which must
decode to the picture scaled down (EQ-VAE, arXiv 2502.09509: such latents are easier for the diffusion
model), and half of the time from latents with a little noise, since a UNet's latents are never quite those
of a picture.

    python recipes/emoji/vae.py --minutes 15            # both halves, from the weights of START
    python recipes/emoji/vae.py --decoder --minutes 60  # then the decoder alone: latents stay what they are
    python recipes/emoji/vae.py --wider --minutes 15    # START's made half as wide again, then as the first
"""

from math import ceil

import numpy as np
import torch
from common import (
    CHECKPOINTS,
    DEVICE,
    MODEL,
    START,
    Ema,
    Loop,
    fingerprint,
    half,
    parsed,
    progress_mean,
    save_half,
    stage_parser,
    to_float,
)
from diffusers import AutoencoderKL
from pool import Pool
from torch import Tensor
from torch.nn import functional as F

CROP = 64
NOISE = 0.12
"""Largest noise on the latents, as a share of their spread."""


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def distance(a: Tensor, b: Tensor) -> Tensor:
    edges = sum((p - q).abs().mean() for p, q in zip(gradients(a), gradients(b), strict=True))
    means = F.mse_loss(
        F.avg_pool2d(a, 8), F.avg_pool2d(b, 8)
    )  # what colour a place has comes before all else
    return (a - b).abs().mean() + 2 * F.mse_loss(a, b) + 0.5 * edges + 8 * means


@torch.no_grad()
def quality(vae: AutoencoderKL, pictures: Tensor) -> tuple[float, float]:
    """PSNR in dB, and the share of the gradient magnitude that is left."""
    errors, mine, theirs = [], 0.0, 0.0
    for x in pictures.split(16):
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append(((x - y) / 2).square().mean(dim=(1, 2, 3)))
        mine += sum(float(g.abs().sum()) for g in gradients(y))
        theirs += sum(float(g.abs().sum()) for g in gradients(x))
    return float((-10 * torch.cat(errors).clamp_min(1e-10).log10()).mean()), mine / theirs


@torch.no_grad()
def widened(old: AutoencoderKL, times: float = 1.5) -> AutoencoderKL:
    """The same function with ``times`` as many channels: new channels have norm groups of their own, and what
    reads them starts at zero, so that latents stay those that a UNet knows."""
    config = dict(old.config)
    config["block_out_channels"] = [ceil(c * times) for c in config["block_out_channels"]]
    config["norm_num_groups"] = ceil(config["norm_num_groups"] * times)
    new = AutoencoderKL.from_config(config)
    state = new.state_dict()
    for name, weight in old.state_dict().items():
        wide = state[name]
        part = tuple(slice(n) for n in weight.shape)
        if wide.ndim == 4 and wide.shape[1] > weight.shape[1]:
            wide[: weight.shape[0], weight.shape[1] :] = 0
        if wide.ndim == 1 and len(wide) > len(weight) and "norm" not in name:
            wide[len(weight) :] = 0
        wide[part] = weight
    new.load_state_dict(state)
    return new


def main() -> None:
    parser = stage_parser(__doc__, minutes=15, lr=1.5e-3, batch=24)
    parser.add_argument("--wider", action="store_true", help="start from START's made wider")
    parser.add_argument("--most", type=int, default=20000, help="pictures to learn from")
    parser.add_argument("--decoder", action="store_true", help="train the decoder of the present model alone")
    args = parsed(parser)
    source = MODEL / "vae" if args.decoder else START / "vae"
    vae = AutoencoderKL.from_pretrained(source).float()
    vae = widened(vae) if args.wider else vae
    vae = vae.train().to(DEVICE, memory_format=torch.channels_last)
    if args.decoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    name = "decoder" if args.decoder else "vae"
    mark = fingerprint(stage=name)
    loop = Loop(
        CHECKPOINTS / f"{name}.pt", args.minutes, vae, optimizer, Ema(vae, 0.998), mark, 60
    )  # fmt: skip
    held_out = to_float(torch.from_numpy(Pool(2).pictures(list(range(0, 960, 10)))))
    pool = Pool(1, args.most)
    pictures = torch.from_numpy(np.concatenate(pool.chunks)).to(DEVICE)
    if not args.export:
        for step in loop:
            rng = np.random.default_rng(step)
            picked = torch.from_numpy(rng.integers(len(pictures), size=args.batch)).to(DEVICE)
            y, x = rng.integers(0, 128 - CROP + 1, 2)
            real = to_float(pictures[picked, y : y + CROP, x : x + CROP])
            if rng.uniform() < 0.5:
                real = real.flip(3)
            real = real.contiguous(memory_format=torch.channels_last)
            with half():
                latents = vae.encode(real).latent_dist.mode().float()
            if step % 2:
                much = torch.rand(len(real), 1, 1, 1, device=DEVICE) * NOISE * latents.detach().std()
                latents = latents + much * torch.randn_like(latents)
            with half():
                made = vae.decode(latents).sample
            loss = distance(made.float(), real)
            if not args.decoder:
                if step % 2 == 0:
                    small = F.interpolate(latents, scale_factor=0.5, mode="bilinear", antialias=True)
                    with half():
                        made = vae.decode(small).sample
                    loss = loss + 0.25 * distance(made.float(), F.avg_pool2d(real, 2))
                loss = loss + 1e-4 * latents.square().mean()
            loop.learn(loss)
            progress_mean(loop.log, "loss", loss)
            if step % 1000 == 0:
                print(
                    "validation PSNR {:.2f} dB, gradients {:.3f}".format(*quality(vae, held_out[:48])),
                    flush=True,
                )
    assert loop.ema
    loop.ema.copy_to(vae)
    vae.eval()
    if not args.decoder:
        sample = to_float(pictures[:2000:8])
        with torch.no_grad():
            latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in sample.split(25)])
        vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    print("validation PSNR {:.2f} dB, gradients {:.3f}".format(*quality(vae, held_out)))
    save_half(vae, MODEL / "vae")


if __name__ == "__main__":
    main()
