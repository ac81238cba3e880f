"""Stage 6: the canny ControlNet of the frozen base.

It starts as START's; with ``--new``, for another base, it takes of that only the condition embedding, which
already sees edges. Edges are OpenCV's, with random thresholds, sparse to dense. Half of them are those of the
picture that is to be drawn. The others are of the same icon in its own colours on white: edges then say where
things are and nothing of the look, which a text gives or, in half of the draws, another thing in the target's
manner as image prompt. Half of the captions do not name the concept, so that it is the edges that tell what
to draw. Icons without a word are targets too: structure needs no words.

    python recipes/emoji/control.py --minutes 20
"""

import json
from multiprocessing import get_context

import cv2
import numpy as np
import torch
from adapters import NAMES, TOKENS, features
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
from draw import GROUP, plainly
from encoder import normalise
from labels import ALONE, LENGTH, PARTS
from pool import CHUNK, Pool, chunk_path, icons
from supply import PARTNERS, Supply
from text import frozen_base
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection
from unet import decouple

from imprompt import IPAdapter

OUT = MODEL / "controlnet-canny"


def edges_of(number: int) -> np.ndarray:
    """Edges of a chunk's pictures and of what they show drawn plainly, one bit a pixel (2000, 2, 128, 16);
    OpenCV's, in half of them with thresholds 100 and 200, else sparse to dense."""
    rng, seen = np.random.default_rng([10, number]), icons()
    pictures = np.load(chunk_path(1, number), mmap_mode="r")
    facts = json.loads(chunk_path(1, number).with_suffix(".json").read_text())
    low = np.where(rng.uniform(size=CHUNK) < 0.5, 100, rng.uniform(30, 180, CHUNK))
    high = np.where(low == 100, 200, low * rng.uniform(1.5, 3, CHUNK))
    maps = []
    for picture, fact, a, b in zip(pictures, facts, low, high, strict=True):
        plain = plainly(seen, fact)
        both = (picture, picture if plain is None else plain)
        maps.append([cv2.Canny(np.ascontiguousarray(p), a, b) > 0 for p in both])
    return np.packbits(np.array(maps), axis=-1)


def unpacked(bits: Tensor) -> Tensor:
    """A ControlNet's condition (N, 3, 128, 128), 0 or 1, of packed edges (N, 128, 16)."""
    places = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    maps = (bits[..., None] >> places & 1).flatten(2).float()
    return maps[:, None].expand(-1, 3, -1, -1)


def main() -> None:
    parser = stage_parser(__doc__, minutes=20, lr=8e-4, batch=16)
    parser.add_argument("--most", type=int, default=20000, help="pictures to learn from")
    parser.add_argument("--processes", type=int, default=2, help="that find edges")
    parser.add_argument("--new", action="store_true", help="begin with the base's encoder")
    parser.add_argument("--share", type=float, default=1.0, help="of these weights, the rest being START's")
    args = parsed(parser)
    with get_context("spawn").Pool(args.processes) as workers:
        numbers = range(len(Pool(1, args.most).chunks))
        edges = torch.from_numpy(np.concatenate(workers.map(edges_of, numbers))).to(DEVICE)
    unet, texts = frozen_base()
    net = ControlNetModel.from_pretrained(START / "controlnet-canny").float()
    if args.new:  # the base has moved on since; what reads the edges has not
        with torch.no_grad():
            fresh = {
                name: weight for name, weight in ControlNetModel.from_unet(unet).state_dict().items()
                if name in net.state_dict() and "cond_embedding" not in name and "controlnet" not in name
            }  # fmt: skip
            net.load_state_dict(fresh, strict=False)
    net = net.train().to(DEVICE)
    adapter = IPAdapter.from_pretrained(MODEL / "adapters" / NAMES["plus"])
    adapter.module.float().eval().requires_grad_(False).to(DEVICE)
    bare = args.batch // 2
    decouple(unet, adapter, bare)
    mark = fingerprint(stage="control", config={k: str(v) for k, v in net.config.items()})
    optimizer = adamw(net.parameters(), args.lr)
    loop = Loop(
        CHECKPOINTS / "control.pt", args.minutes, net, optimizer, Ema(net, 0.997), mark, 60
    )  # fmt: skip
    if not args.export:
        vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval().to(DEVICE)
        encoder = CLIPVisionModelWithProjection.from_pretrained(MODEL / "image_encoder").float().eval()
        encoder.to(DEVICE)
        supply = Supply(vae, len(edges), lambda p: features("plus", encoder, normalise(p)))
        assert supply.features is not None
        tokenizer = texts.tokenizer
        abar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)
        noun = tokenizer("", padding="max_length", max_length=LENGTH)["input_ids"]
        empty = torch.tensor(noun, device=DEVICE)
        partners = torch.tensor([[m[i % len(m)] for i in range(6)] for m in PARTNERS], device=DEVICE)
        blank = torch.zeros(bare, TOKENS["plus"], texts.encoder.config.hidden_size, device=DEVICE)
        for _ in loop:
            picked = torch.randint(len(edges), (args.batch,), device=DEVICE)
            plain = torch.randint(2, (args.batch,), device=DEVICE)
            rows = supply.plain + picked
            # Half of the captions are empty or say little, so that it is the edges that tell what to draw.
            number = torch.randint(0, PARTS + 1, (args.batch,), device=DEVICE)
            number[bare:] = ALONE  # the picture says the rest
            quiet = torch.rand(args.batch, device=DEVICE) < 0.3
            ids = torch.where(quiet[:, None], empty, supply.tokens[rows, number].long())
            other = partners[rows[bare:] % GROUP, torch.randint(6, (args.batch - bare,), device=DEVICE)]
            shown = supply.features[rows[bare:] - rows[bare:] % GROUP + other].float()
            t = timesteps(args.batch)
            noisy, target = noised(supply.latents[rows].float(), t, abar)
            with half():
                hidden = texts.encoder(ids).last_hidden_state
                states = torch.cat([hidden.float(), torch.cat([blank, adapter.projection(shown).float()])], 1)
                condition = unpacked(edges[picked, plain])
                down, mid = net(noisy, t, hidden, condition, return_dict=False)
                out = unet(
                    noisy, t, states, down_block_additional_residuals=down, mid_block_additional_residual=mid
                ).sample
            loss = F.mse_loss(out.float(), target)
            loop.learn(loss)
            progress_mean(loop.log, "loss", loss)
            progress_mean(loop.log, "plain", F.mse_loss(out[plain == 1].float(), target[plain == 1]))
    assert loop.ema
    loop.ema.copy_to(net)
    before = ControlNetModel.from_pretrained(START / "controlnet-canny").float().to(DEVICE).state_dict()
    for name, weight in net.state_dict().items():  # of the same tensors
        weight.lerp_(before[name], 1 - args.share)
    save_half(net, OUT)


if __name__ == "__main__":
    main()
