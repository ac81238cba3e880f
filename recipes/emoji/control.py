"""Stage 6: the canny ControlNet of the frozen base.

It starts as START's, whose condition embedding already sees edges, or as a copy of the base's encoder. Edges
are OpenCV's, with random thresholds, sparse to dense; half of the captions do not name the concept, so that
it is the edges that tell what to draw. Icons without a word are targets too: structure needs no words.

    python recipes/emoji/control.py --minutes 20
"""

from multiprocessing import get_context

import cv2
import numpy as np
import torch
from base import SCHEDULE, noised, timesteps
from common import (
    CHECKPOINTS,
    DEVICE,
    MODEL,
    START,
    Ema,
    Loop,
    adamw,
    fingerprint,
    half,
    parsed,
    progress_mean,
    save_half,
    stage_parser,
)
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler
from labels import LENGTH, PARTS
from pool import CHUNK, Pool, chunk_path
from supply import Supply
from text import frozen_base
from torch import Tensor
from torch.nn import functional as F

OUT = MODEL / "controlnet-canny"


def edges_of(number: int) -> np.ndarray:
    """Edges of a chunk's pictures, one bit a pixel (2000, 128, 16); OpenCV's, in half of them with thresholds
    100 and 200, else sparse to dense."""
    rng = np.random.default_rng([10, number])
    pictures = np.load(chunk_path(1, number), mmap_mode="r")
    low = np.where(rng.uniform(size=CHUNK) < 0.5, 100, rng.uniform(30, 180, CHUNK))
    high = np.where(low == 100, 200, low * rng.uniform(1.5, 3, CHUNK))
    maps = [cv2.Canny(np.ascontiguousarray(p), a, b) > 0 for p, a, b in zip(pictures, low, high, strict=True)]
    return np.packbits(np.stack(maps), axis=-1)


def unpacked(bits: Tensor) -> Tensor:
    """A ControlNet's condition (N, 3, 128, 128), 0 or 1, of packed edges (N, 128, 16)."""
    places = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    maps = (bits[..., None] >> places & 1).flatten(2).float()
    return maps[:, None].expand(-1, 3, -1, -1)


def main() -> None:
    parser = stage_parser(__doc__, minutes=20, lr=8e-4, batch=16)
    parser.add_argument("--most", type=int, default=20000, help="pictures to learn from")
    parser.add_argument("--processes", type=int, default=2, help="that find edges")
    args = parsed(parser)
    with get_context("spawn").Pool(args.processes) as workers:
        numbers = range(len(Pool(1, args.most).chunks))
        edges = torch.from_numpy(np.concatenate(workers.map(edges_of, numbers))).to(DEVICE)
    unet, texts = frozen_base()
    net = ControlNetModel.from_pretrained(START / "controlnet-canny").float()
    with torch.no_grad():  # the base has moved on since; what reads the edges has not
        fresh = {
            name: weight for name, weight in ControlNetModel.from_unet(unet).state_dict().items()
            if name in net.state_dict() and "cond_embedding" not in name and "controlnet" not in name
        }  # fmt: skip
        net.load_state_dict(fresh, strict=False)
    net = net.train().to(DEVICE)
    mark = fingerprint(stage="control", config={k: str(v) for k, v in net.config.items()})
    optimizer = adamw(net.parameters(), args.lr)
    loop = Loop(
        CHECKPOINTS / "control.pt", args.minutes, net, optimizer, Ema(net, 0.997), mark, 60
    )  # fmt: skip
    if not args.export:
        vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval().to(DEVICE)
        supply = Supply(vae, len(edges))
        tokenizer = texts.tokenizer
        abar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)
        noun = tokenizer("", padding="max_length", max_length=LENGTH)["input_ids"]
        empty = torch.tensor(noun, device=DEVICE)
        for _ in loop:
            picked = torch.randint(len(edges), (args.batch,), device=DEVICE)
            rows = supply.plain + picked
            # Half of the captions are empty or say little, so that it is the edges that tell what to draw.
            number = torch.randint(0, PARTS + 1, (args.batch,), device=DEVICE)
            quiet = torch.rand(args.batch, device=DEVICE) < 0.3
            ids = torch.where(quiet[:, None], empty, supply.tokens[rows, number].long())
            t = timesteps(args.batch)
            noisy, target = noised(supply.latents[rows].float(), t, abar)
            with half():
                hidden = texts.encoder(ids).last_hidden_state
                down, mid = net(noisy, t, hidden, unpacked(edges[picked]), return_dict=False)
                out = unet(
                    noisy, t, hidden, down_block_additional_residuals=down, mid_block_additional_residual=mid
                ).sample
            loss = F.mse_loss(out.float(), target)
            loop.learn(loss)
            progress_mean(loop.log, "loss", loss)
    assert loop.ema
    loop.ema.copy_to(net)
    save_half(net, OUT)


if __name__ == "__main__":
    main()
