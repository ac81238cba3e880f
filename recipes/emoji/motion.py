"""Stage 7: the motion adapter, AnimateDiff's temporal layers between the layers of the frozen UNet.

Clips are made from the icons, so that their motions are known exactly: a thing of any look, palette and
background bounces, spins, slides to the left or right, grows or shakes, one loop of 16 frames whose first is
at rest, and the caption says which. Only the temporal layers learn. Most of the noise's variance is shared by
the frames of a clip (Ge et al. 2023, "Preserve Your Own Correlation", §3.1), in training and, as
``imprompt.json`` beside the weights says, when drawing. Most steps show 8 of the 16 frames.

    python recipes/emoji/motion.py --minutes 30
"""

import json
import math

import numpy as np
import torch
from base import SCHEDULE
from common import (
    CHECKPOINTS,
    DEVICE,
    MODEL,
    START,
    STATE,
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
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from draw import Icons, apply_look, caption, choose, style_of, warp
from latents import mark_of
from text import MOTIONS, frozen_base
from torch import Tensor
from torch.nn import functional as F

FRAMES = 16
SHARED = 0.8
"""Part of the initial noise's variance that all frames have in common."""


def pose(motion: str, phase: float, much: float) -> tuple[float, float, float, float]:
    """Shift right and down (parts of the side), size factor and angle at ``phase`` 0…1 of a loop."""
    wave = math.sin(2 * math.pi * phase)
    if motion == "bouncing":
        return 0.0, -0.2 * much * abs(wave), 1.0, 0.0
    if motion == "spinning":
        return 0.0, 0.0, 1.0, 360.0 * phase
    if motion in ("sliding left", "sliding right"):
        # Out at one side and in again at the other, at even speed.
        way = (phase + 0.5) % 1 - 0.5
        return (1.3 if motion == "sliding right" else -1.3) * way, 0.0, 1.0, 0.0
    if motion == "growing":
        return 0.0, 0.0, 1.0 + 0.5 * much * (0.5 - 0.5 * math.cos(2 * math.pi * phase)), 0.0
    return 0.09 * much * math.sin(6 * math.pi * phase), 0.0, 1.0, 5 * much * math.sin(6 * math.pi * phase)


def clip(icons: Icons, seed: int, index: int) -> tuple[np.ndarray, dict, str]:
    """Clip ``index`` of ``seed``: uint8 (16, 128, 128, 3), what it shows, and its motion word."""
    style = style_of(seed, 10**6 + index)
    split = {1: "train", 2: "validation", 3: "test"}[seed]
    rng = np.random.default_rng([seed, index, 11])
    motion = MOTIONS[index % len(MOTIONS)]
    icon = choose(icons, rng, split, style.look, 0.1)
    rgba, row = np.asarray(icons.rgba[icon]), icons.rows[icon]
    much, size, x, y = (
        rng.uniform(0.8, 1.2),
        rng.uniform(70, 92),
        63.5 + rng.uniform(-5, 5),
        63.5 + rng.uniform(-4, 8),
    )
    if motion == "growing":
        size *= 0.75
    if motion == "bouncing":
        y += 8
    mirror, draws = bool(rng.uniform() < 0.5), int(rng.integers(1 << 30))
    frames = []
    for number in range(FRAMES):
        dx, dy, grown, angle = pose(motion, number / FRAMES, much)
        colour, alpha = warp(rgba, size * grown, math.radians(angle), x + 128 * dx, y + 128 * dy, mirror)
        frames.append(apply_look(style, colour, alpha, style.ramp, np.random.default_rng(draws)))
    fact = {"concept": row["concept"], "look": style.look, "ground": style.ground, "colours": style.colours,
            "ground_words": style.ground_words, "count": 1}  # fmt: skip
    return np.clip(np.stack(frames) + 0.5, 0, 255).astype(np.uint8), fact, motion


def words(fact: dict, motion: str, rng: np.random.Generator) -> str:
    if rng.uniform() < 0.1:
        return ""
    said = caption(fact, rng, (True, *(bool(rng.uniform() < 0.6) for _ in range(3))))
    if rng.uniform() < 0.1:
        return said
    head, *rest = said.split(", ")
    if rng.uniform() < 0.5:
        return ", ".join([f"{head} {motion}", *rest]) if head else motion
    return f"{said}, {motion}" if said else motion


def clips_of(count: int) -> tuple[Tensor, list[tuple[dict, str]]]:
    """Latents (N, 16, 4, 16, 16) of the first ``count`` training clips, kept in the state folder."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval().to(DEVICE)
    path = STATE / f"clips-{count}-{mark_of(vae)}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        return kept["latents"], kept["about"]
    icons, latents, about = Icons(), [], []
    with torch.no_grad():
        for i in range(count):
            frames, fact, motion = clip(icons, 1, i)
            with half():
                z = vae.encode(to_float(torch.from_numpy(frames))).latent_dist.mode()
            latents.append((z * vae.config.scaling_factor).half().cpu())
            about.append((fact, motion))
            if i % 100 == 0:
                print(f"clip {i}/{count}", flush=True)
    torch.save({"latents": torch.stack(latents), "about": about}, path)
    return torch.stack(latents), about


def joined(base: UNet2DConditionModel, adapter: MotionAdapter) -> UNetMotionModel:
    """diffusers' UNet for video, whose temporal layers are the adapter's own modules, not copies."""
    unet = UNetMotionModel.from_unet2d(base, adapter).requires_grad_(False)
    for mine, theirs in (
        *zip(adapter.down_blocks, unet.down_blocks, strict=True),
        *zip(adapter.up_blocks, unet.up_blocks, strict=True),
        (adapter.mid_block, unet.mid_block),
    ):
        for ours in mine.motion_modules:
            ours.requires_grad_(len(ours.transformer_blocks) > 0)
        theirs.motion_modules = mine.motion_modules
    return unet


class Positions:
    """The position encodings of some of a clip's frames, as if the others stood between them."""

    def __init__(self, unet: UNetMotionModel) -> None:
        self.places = [m for m in unet.modules() if isinstance(m, SinusoidalPositionalEmbedding)]
        self.whole = [place.pe for place in self.places]

    def show(self, frames: Tensor) -> None:
        for place, whole in zip(self.places, self.whole, strict=True):
            place.pe = whole[:, frames]

    def restore(self) -> None:
        for place, whole in zip(self.places, self.whole, strict=True):
            place.pe = whole


def main() -> None:
    parser = stage_parser(__doc__, minutes=30, lr=1e-3)
    parser.add_argument("--count", type=int, default=900, help="clips to learn from")
    parser.add_argument("--clips", type=int, default=3, help="clips a step, of 8 frames each")
    args = parsed(parser)
    adapter = MotionAdapter.from_pretrained(START / "motion").float().to(DEVICE)
    base, texts = frozen_base()
    unet = joined(base, adapter)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    mark = fingerprint(stage="motion", motions=MOTIONS)
    loop = Loop(
        CHECKPOINTS / "motion.pt", args.minutes, adapter, optimizer, Ema(adapter, 0.997), mark, warmup=40
    )
    if not args.export:
        latents, about = clips_of(args.count)
        positions = Positions(unet)
        abar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)
        for step in loop:
            rng = np.random.default_rng([12, step])
            whole = step % 8 == 0  # now and then, clips as they are when drawing
            count = max(1, args.clips // 2) if whole else args.clips
            shown = np.arange(FRAMES) if whole else np.sort(rng.choice(FRAMES, FRAMES // 2, replace=False))
            picked = rng.integers(len(latents), size=count).tolist()
            x = latents[picked][:, shown].float().transpose(1, 2).to(DEVICE)  # N 4 F 16 16
            part = torch.tensor([SHARED if rng.uniform() < 0.75 else rng.choice((0.0, 0.5)) for _ in picked])
            part = part.float().view(-1, 1, 1, 1, 1).to(DEVICE)
            noise = part.sqrt() * torch.randn_like(x[:, :, :1]) + (1 - part).sqrt() * torch.randn_like(x)
            u = (torch.arange(count) + torch.rand(count)) / count
            t = (1000 * u**0.6).long().clamp_max(999).to(DEVICE)
            a = abar[t].view(-1, 1, 1, 1, 1)
            noisy, target = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
            positions.show(torch.from_numpy(shown))
            with half():
                hidden = texts([words(*about[i], rng) for i in picked])
                out = unet(noisy, t, hidden.repeat_interleave(len(shown), 0)).sample
            loss = F.mse_loss(out.float(), target)
            loop.learn(loss)
            positions.restore()
            progress_mean(loop.log, "loss", loss.item())
    assert loop.ema
    loop.ema.copy_to(adapter)
    save_half(adapter, MODEL / "motion")
    (MODEL / "motion" / "imprompt.json").write_text(
        json.dumps({"shared_noise": SHARED, "noise_path": "loop", "frames": FRAMES, "fps": 8}) + "\n"
    )


if __name__ == "__main__":
    main()
