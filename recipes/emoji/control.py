"""Stage 6: the canny ControlNet of the frozen base.

It starts as START's, whose condition embedding already sees edges, or as a copy of the base's encoder. Edges
are OpenCV's, with random thresholds, sparse to dense; half of the captions do not name the concept, so that
it is the edges that tell what to draw. Icons without a word are targets too: structure needs no words.

    python recipes/emoji/control.py --minutes 20
"""

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
from diffusers import ControlNetModel, DDIMScheduler
from draw import caption
from latents import latents_of
from pool import Pool
from text import frozen_base
from torch import Tensor
from torch.nn import functional as F

OUT = MODEL / "controlnet-canny"


def condition_of(pictures: np.ndarray, low: list[float], high: list[float]) -> Tensor:
    """Edges of uint8 (N, 128, 128, 3) as a ControlNet's condition (N, 3, 128, 128), 0 or 1."""
    maps = [cv2.Canny(np.ascontiguousarray(p), a, b) for p, a, b in zip(pictures, low, high, strict=True)]
    return torch.from_numpy(np.stack(maps)).to(DEVICE)[:, None].float().div(255).expand(-1, 3, -1, -1)


def main() -> None:
    parser = stage_parser(__doc__, minutes=20, lr=8e-4, batch=16)
    args = parsed(parser)
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
        latents, pool = latents_of(1), Pool(1)
        abar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)
        for step in loop:
            rng = np.random.default_rng([10, step])
            picked = rng.integers(len(latents), size=args.batch).tolist()
            low = rng.uniform(30, 180, args.batch)
            low[: args.batch // 2] = 100
            high = low * rng.uniform(1.5, 3, args.batch)
            high[: args.batch // 2] = 200
            condition = condition_of(pool.pictures(picked), low.tolist(), high.tolist())
            says = [
                (bool(rng.uniform() < 0.5), *(bool(rng.uniform() < 0.6) for _ in range(3))) for _ in picked
            ]
            x = torch.from_numpy(latents[picked]).float().to(DEVICE)
            t = timesteps(len(x))
            noisy, target = noised(x, t, abar)
            with half():
                hidden = texts(
                    [caption(pool.facts[i], rng, say) for i, say in zip(picked, says, strict=True)]
                )
                down, mid = net(noisy, t, hidden, condition, return_dict=False)
                out = unet(
                    noisy, t, hidden, down_block_additional_residuals=down, mid_block_additional_residual=mid
                ).sample
            loss = F.mse_loss(out.float(), target)
            loop.learn(loss)
            progress_mean(loop.log, "loss", loss.item())
    assert loop.ema
    loop.ema.copy_to(net)
    save_half(net, OUT)


if __name__ == "__main__":
    main()
