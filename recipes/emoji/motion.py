"""Stage 7: the motion adapter, AnimateDiff's temporal layers between the layers of the frozen UNet.

Clips are made from the icons, so that their motions are known exactly: a thing of any look, palette and
background bounces, spins, slides to the left or right, grows or shakes, one loop of 16 frames whose first is
at rest, and the caption says which. The temporal layers learn and, slowly, the embeddings of the motion words
that ``words.py`` has made readable. Most of the noise's variance is shared by the frames of a clip (Ge et al.
2023, "Preserve Your Own Correlation", §3.1), at the first time steps all of it, in training and, as
``imprompt.json`` beside the weights says, when drawing. On a CPU most steps show 8 of the 16 frames.

    python recipes/emoji/motion.py --draw --processes 16 --count 9600
    python recipes/emoji/motion.py --count 9600 --clips 32 --word-lr 0    # on a GPU
"""

import json
import math
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from base import SCHEDULE
from common import (
    CHECKPOINTS,
    DEVICE,
    MODEL,
    START,
    STATE,
    Crew,
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
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from draw import Icons, apply_look, caption, choose, style_of, warp
from pool import icons
from text import MOTIONS, Texts, frozen_base
from torch import Tensor, nn

FRAMES = 16
SHARED_DRAWN = 0.97
"""Part of the noise's variance that all frames have in common in drawings, after the start: with all of it,
frames would differ by a first guess that is never refined."""
SHARED = (SHARED_DRAWN, SHARED_DRAWN, 0.9, 0.5, 0.0)
"""The same in training, one of these for a clip, at time steps before ``BLIND``."""
BLIND = 870
"""The time step from which all noise is common and a clip is shown as that noise alone, as a drawing begins:
the still model would see a thing elsewhere in each frame's own noise, and move it so. The schedule leaves 0.5
to 1.6 % of the variance to the picture there, from which every motion can be read: a model that saw that
would not need the words."""
BLIND_CLIPS = 0.6
"""Part of the clips shown so: there alone the words say what moves."""


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
    return with_motion(said, motion, rng)


def with_motion(said: str, motion: str, rng: np.random.Generator) -> str:
    """A caption that names the motion too: behind the thing, behind the first clause or at the end."""
    head, *rest = said.split(", ")
    thing, on, ground = head.partition(" on ")
    where = rng.integers(3)
    if where == 0 and head:
        return ", ".join([f"{thing} {motion}{on}{ground}", *rest])
    if where == 1 and head:
        return ", ".join([f"{head} {motion}", *rest])
    return f"{said}, {motion}" if said else motion


FEW = 100
"""Clips of a file."""


def clips_path(number: int) -> Path:
    return STATE / "clips" / f"{number:03}.npy"


def make(number: int) -> None:
    """Draw a file of training clips unless it is there: frames (100, 16, 128, 128, 3), and what they show."""
    path = clips_path(number)
    if path.exists():
        return
    drawn = [clip(icons(), 1, i) for i in range(number * FEW, (number + 1) * FEW)]
    path.with_suffix(".json").write_text(json.dumps([[fact, motion] for _, fact, motion in drawn]))
    np.save(part := path.with_suffix(".part.npy"), np.stack([frames for frames, *_ in drawn]))
    part.replace(path)


@torch.no_grad()
def clips_of(vae: AutoencoderKL, count: int, rank: int) -> tuple[Tensor, list[tuple[dict, str]]]:
    """Latents (N, 16, 4, 16, 16) of at most ``count`` training clips, kept on disk, and what they show."""
    numbers = [n for n in range(count // FEW) if clips_path(n).exists()]
    first = float(next(vae.encoder.parameters()).double().abs().sum())
    kept = {n: clips_path(n).with_suffix(f".{fingerprint(encoder=first)}.npy") for n in numbers}
    for number in numbers if rank % 2 == 0 else numbers[::-1]:  # two processes meet in the middle
        if kept[number].exists():
            continue
        latents = [
            vae.encode(to_float(torch.from_numpy(frames.copy()))).latent_dist.mode()
            for frames in np.load(clips_path(number), mmap_mode="r")
        ]
        scaled = torch.stack(latents) * vae.config.scaling_factor
        np.save(part := kept[number].with_suffix(f".{rank}.npy"), scaled.half().cpu().numpy())
        part.replace(kept[number])
    about = [one for n in numbers for one in json.loads(clips_path(n).with_suffix(".json").read_text())]
    return torch.from_numpy(np.concatenate([np.load(kept[n]) for n in numbers])).to(DEVICE), about


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


def deeper(folder: Path) -> MotionAdapter:
    """The adapter of ``folder`` with a temporal layer at every level; a new one adds nothing at first."""
    old = MotionAdapter.from_pretrained(folder).float()
    levels = (1,) * len(old.config.block_out_channels)
    new = MotionAdapter.from_config({**old.config, "motion_transformer_layers_per_block": levels})
    missing = new.load_state_dict(old.state_dict(), strict=False).missing_keys
    for name, module in new.named_modules():
        if isinstance(module, AnimateDiffTransformer3D) and any(
            key.startswith(f"{name}.") for key in missing
        ):
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    return new


class ShortAttention:
    """Attention as plain products, for CPUs: PyTorch's fused kernel spends half of a step on sequences of 8
    to 16 frames at thousands of places. Several places share a product, and a mask keeps them apart.

    For layers without group norm, residual or attention mask of their own, as in this UNet."""

    PLACES = 4

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows, length, width = hidden_states.shape
        together = self.PLACES if encoder_hidden_states is None and length <= FRAMES < rows else 1

        def split(y: Tensor) -> Tensor:
            return y.reshape(rows // together, -1, attn.heads, width // attn.heads).transpose(1, 2)

        near = split(attn.to_q(hidden_states) * attn.scale) @ split(attn.to_k(seen)).transpose(-1, -2)
        if together > 1:
            place = torch.arange(together * length, device=near.device) // length
            near = near.masked_fill(place[:, None] != place, -math.inf)
        drawn = near.softmax(-1) @ split(attn.to_v(seen))
        return attn.to_out[0](drawn.transpose(1, 2).reshape(rows, length, width))


def motion_words(texts: Texts) -> nn.Embedding:
    """The text encoder's embeddings, of which the motion words alone learn: no picture has taught them."""
    encoder = texts.encoder
    embeddings = encoder.get_input_embeddings().requires_grad_(True)
    rows = torch.zeros(embeddings.num_embeddings, 1, device=DEVICE)
    rows[texts.tokenizer(" ".join(MOTIONS), add_special_tokens=False).input_ids] = 1
    embeddings.weight.register_hook(lambda gradient: gradient * rows)
    return embeddings


def times(count: int) -> Tensor:
    """Time steps, the noisier ones somewhat more often."""
    u = (torch.arange(count) + torch.rand(count)) / count
    return (1000 * u**0.6).long().clamp_max(999).to(DEVICE)


def times_of_clips(count: int) -> Tensor:
    """Time steps, ``BLIND_CLIPS`` of them from ``BLIND`` on."""
    u = (torch.arange(count) + torch.rand(count)) / count
    seen = BLIND * (u / (1 - BLIND_CLIPS)) ** 0.6
    blind = BLIND + (1000 - BLIND) * (u - 1 + BLIND_CLIPS) / BLIND_CLIPS
    return torch.where(u < 1 - BLIND_CLIPS, seen, blind).long().to(DEVICE)


def turned(latents: Tensor, motion: str) -> tuple[Tensor, str]:
    """The clip (16, C, H, W) backwards, from the same first frame, and the word for what it shows then. What
    spins (always clockwise) or shakes (always to the right at first) stays as it is."""
    if motion in ("spinning", "shaking"):
        return latents, motion
    swapped = {"sliding left": "sliding right", "sliding right": "sliding left"}
    return latents[-torch.arange(FRAMES)], swapped.get(motion, motion)


def errors(drawn: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors (N) of what the frames (N, C, F, H, W) have in common, and of what moves. They add up to
    the mean squared error; the first is large, and hides in their sum whether motions are learned."""
    wrong = drawn - target
    common = wrong.mean(2, keepdim=True)
    return common.square().mean((1, 2, 3, 4)), (wrong - common).square().mean((1, 2, 3, 4))


def main() -> None:
    parser = stage_parser(__doc__, minutes=30, lr=1e-3)
    parser.add_argument("--count", type=int, default=1200, help="clips to learn from")
    parser.add_argument("--clips", type=int, default=6, help="clips a step, of 8 frames each")
    parser.add_argument("--word-lr", type=float, default=3e-4, help="of the motion words' embeddings")
    parser.add_argument("--processes", type=int, default=1, help="that train together, or draw")
    parser.add_argument("--draw", action="store_true", help="draw the clips and stop")
    args = parsed(parser)
    if args.draw:
        (STATE / "clips").mkdir(parents=True, exist_ok=True)
        with get_context("spawn").Pool(args.processes) as workers:
            workers.map(make, range(args.count // FEW), chunksize=1)
        return
    crew = Crew(args.processes)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval().to(DEVICE)
    base, texts = frozen_base()
    words_ = motion_words(texts)
    adapter = deeper(START / "motion").to(DEVICE)
    unet = joined(base, adapter).to(DEVICE)
    if DEVICE == "cpu":
        unet.set_attn_processor(ShortAttention())
    learners = nn.ModuleDict({"motion": adapter, "words": words_})
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in adapter.parameters() if p.requires_grad], "weight_decay": 0.01},
         {"params": list(words_.parameters()), "lr": args.word_lr, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98),
    )  # fmt: skip
    mark = fingerprint(stage="motion", motions=MOTIONS, words=True, deeper=True)
    loop = Loop(
        CHECKPOINTS / "motion.pt", args.minutes, learners, optimizer,
        None if crew.rank else Ema(learners, 0.995), mark, warmup=40, crew=crew,
    )  # fmt: skip
    if not args.export:
        latents, about = clips_of(vae, args.count, crew.rank)
        positions = Positions(unet)
        abar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)
        for step in loop:
            rng = np.random.default_rng([12, step, crew.rank])
            whole = DEVICE != "cpu" or step % 8 == 0  # now and then, clips as they are when drawing
            count = max(1, args.clips // 2) if whole and DEVICE == "cpu" else args.clips
            shown = np.arange(FRAMES) if whole else np.sort(rng.choice(FRAMES, FRAMES // 2, replace=False))
            picked = rng.integers(len(latents), size=count).tolist()
            pairs = [(latents[i], about[i][1]) for i in picked]
            pairs = [turned(*pair) if rng.uniform() < 0.5 else pair for pair in pairs]
            x = torch.stack([clip for clip, _ in pairs])[:, shown].float().transpose(1, 2)  # N 4 F 16 16
            t = times_of_clips(count)
            blind = (t >= BLIND).view(-1, 1, 1, 1, 1)
            part = torch.tensor(rng.choice(SHARED, count), dtype=torch.float32, device=DEVICE)
            part = torch.where(blind, 1.0, part.view(-1, 1, 1, 1, 1))
            noise = part.sqrt() * torch.randn_like(x[:, :, :1]) + (1 - part).sqrt() * torch.randn_like(x)
            a = abar[t].view(-1, 1, 1, 1, 1)
            seen = torch.where(blind, 0.0, a)
            noisy, target = seen.sqrt() * x + (1 - seen).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
            positions.show(torch.from_numpy(shown))
            with half():
                said = [words(about[i][0], motion, rng) for i, (_, motion) in zip(picked, pairs, strict=True)]
                hidden = texts(said)
                out = unet(noisy, t, hidden.repeat_interleave(len(shown), 0)).sample
            still, moved = errors(out.float(), target)
            loop.learn((still + moved).mean())
            positions.restore()
            progress_mean(loop.log, "still", still.mean())
            progress_mean(loop.log, "moved", moved.mean())
    if crew.rank:
        return
    assert loop.ema
    loop.ema.copy_to(learners)
    save_half(adapter, MODEL / "motion")
    save_half(texts.encoder, MODEL / "text_encoder")
    shared = {"shared_noise": SHARED_DRAWN, "shared_start": round(1 - BLIND / 1000, 3)}
    drawn_with = {**shared, "noise_path": "apart", "frames": FRAMES, "fps": 8}
    (MODEL / "motion" / "imprompt.json").write_text(json.dumps(drawn_with) + "\n")


if __name__ == "__main__":
    main()
