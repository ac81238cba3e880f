"""Stage 6: the motion adapter, AnimateDiff's temporal layers between the layers of the frozen UNet.

A clip is one loop of 16 frames, its first frame at rest, so that what a frame shows follows from its number.
Real clips are the animated Fluent emoji of the vocabulary (pinned npm packages, MIT, 3 s loops); since those
come in one style and for some concepts only, every still is also moved by hand, each kind of thing in the
way of its kind (``WAYS``). Held-out concepts and pairs are moved by neither; their real clips are written
for the evaluation alone.

Only the temporal layers learn, and their last projection starts at 0: before the first step every frame is
the still model's. Most of the noise's variance is shared by the frames of a clip (Ge et al. 2023, "Preserve
Your Own Correlation", §3.1), in training and, as ``imprompt.json`` beside the weights says, when drawing:
some clips share less or none, so that plain diffusers pipelines work too. When drawing, the rest goes on a
loop through the frames: after 1,076 steps what moves is still led by the noise, and noise of each frame's own
flickered (adjacent frames differed by 0.078; on the loop by 0.030; in real clips by 0.026). Training on with
95 % shared made it no better. Most steps show 8 of a clip's 16 frames, with the position encodings of those
16: half the cost a clip.

    python recipes/emoji/motion.py --minutes 55

Measured on one core: 23 pictures/s, that is 1.4 s a step of 4 clips of 8 frames; 25 minutes of a whole core
are about 1,100 steps. Clips and latents take 2 minutes more, once. A run that was interrupted goes on when
it is started again.
"""

import argparse
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import DATA, HERE, MODEL, RUNS, Ema, Loop, Row, load_rows, progress_mean, save_half
from data import SIZE, bare, fetch, hashed, members, on_white
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from unet import SCHEDULE, Captions, caption_of

FRAMES = 16
SHARED = 0.8
"""Part of the initial noise's variance that all frames have in common."""
MARGIN = 0.9
"""Stills are drawn this much smaller before they move, so that they stay inside the picture."""

Pose = dict[str, float]
"""Shifts ``dx``, ``dy`` as parts of the picture's side, factors ``sx`` and ``sy``, ``angle`` in degrees."""


def hop(p: float) -> Pose:
    up = abs(math.sin(2 * math.pi * p))
    return {"dy": -0.10 * up, "sy": 0.90 + 0.12 * up}


def swing(p: float) -> Pose:
    return {"angle": 16 * math.sin(2 * math.pi * p), "dy": -0.02 * abs(math.sin(2 * math.pi * p))}


def drift(p: float) -> Pose:
    return {"dx": 0.09 * math.sin(2 * math.pi * p), "dy": -0.03 * abs(math.sin(4 * math.pi * p))}


def pulse(p: float) -> Pose:
    small = 1 - 0.12 * (1 - math.cos(2 * math.pi * p))
    return {"sx": small, "sy": small}


def turn(p: float) -> Pose:
    return {"sx": 1 - 0.3 * (1 - math.cos(2 * math.pi * p)), "dy": -0.05 * math.sin(math.pi * p)}


WAYS: dict[str, tuple[Callable[[float], Pose], ...]] = {
    "Animals & Nature": (hop, swing),
    "Food & Drink": (swing, turn),
    "Travel & Places": (drift, pulse),
    "Smileys & Emotion": (swing, hop),
    "Activities": (hop, turn),
    "Objects": (turn, swing),
}
"""Category → ways of moving: functions of the loop's phase, 0 to 1."""


def way_of(row: Row) -> Callable[[float], Pose]:
    """One concept moves in one way, whatever its style: it can be learned from the features at hand."""
    ways = WAYS.get(row["category"], (pulse,))
    return ways[hashed(row["groups"]["concept"]) % len(ways)]


def moved(still: Image.Image, way: Callable[[float], Pose], amplitude: float) -> list[Image.Image]:
    """The still's loop: each frame scaled and turned about the foot of the picture's middle, then shifted."""
    frames, side = [], still.width
    for number in range(FRAMES):
        pose = way(number / FRAMES)
        stretch = {k: 1 + amplitude * (pose.get(k, 1.0) - 1) for k in ("sx", "sy")}
        angle = math.radians(amplitude * pose.get("angle", 0.0))
        foot = np.array([side / 2, side * 0.93])
        shift = amplitude * side * np.array([pose.get("dx", 0.0), pose.get("dy", 0.0)])
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        back = np.linalg.inv(turn @ np.diag([stretch["sx"], stretch["sy"]]) * MARGIN)
        offset = foot - back @ (foot + shift)
        matrix = (*back[0], offset[0], *back[1], offset[1])
        frames.append(
            still.transform(
                still.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor="white"
            )
        )
    return frames


def loop_of(content: bytes) -> list[Image.Image]:
    """An animated WebP as 16 even frames of its loop; fewer than 16 real ones make none."""
    with Image.open(io.BytesIO(content)) as film:
        count = getattr(film, "n_frames", 1)
        frames = []
        for number in range(FRAMES if count >= FRAMES else 0):
            film.seek(number * count // FRAMES)
            frames.append(on_white(film).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    return frames


def write_clips(packages: Path) -> list[Row]:
    """The vocabulary's real clips: ``data/animated/<code point>.webp``, rows in ``data/animated.jsonl``."""
    index = DATA / "animated.jsonl"
    if not index.exists():
        named = (row for row in load_rows("small", None) if row["groups"]["style"] == "fluent-3d")
        known = {Path(row["file_name"]).stem: row for row in named}
        sources = json.loads((HERE / "sources-animated.json").read_text())
        rows = []
        (DATA / "animated").mkdir(exist_ok=True)
        for name, source in tqdm(sources.items(), "packages"):
            for file, content in members(fetch(name, source, packages), r"assets/.*\.webp$").items():
                code = bare(Path(file).stem)
                if code in known and (frames := loop_of(content)):
                    path = f"animated/{code}.webp"
                    more = {"save_all": True, "append_images": frames[1:], "duration": 125, "loop": 0}
                    frames[0].save(DATA / path, lossless=True, **more)
                    rows.append({**known[code], "file_name": path})
        rows.sort(key=lambda row: row["file_name"])
        index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [json.loads(line) for line in index.read_text().splitlines()]


def frames_of(path: Path) -> list[Image.Image]:
    with Image.open(path) as film:
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(film.convert("RGB"))
    return frames


def clips(real: list[Row], stills: list[Row], variants: int) -> tuple[list[Row], Tensor]:
    """Rows, and their scaled latents (N, 16, 4, 16, 16) in fp16, computed once and kept in ``runs/``."""
    rows = real + [row for row in stills for _ in range(variants)]
    path = RUNS / f"motion-latents-{len(real)}-{len(rows)}.pt"
    if path.exists():
        return rows, torch.load(path, weights_only=True)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval()
    half = torch.cpu._is_avx512_bf16_supported()
    latents = torch.empty(len(rows), FRAMES, 4, 16, 16, dtype=torch.float16)
    for i, row in enumerate(tqdm(rows, "clips", mininterval=10)):
        file = DATA / row["file_name"]
        if i < len(real):
            frames = frames_of(file)
        else:
            amplitude = random.Random(i).uniform(0.7, 1.2)
            frames = moved(Image.open(file).convert("RGB"), way_of(row), amplitude)
        pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            latents[i] = vae.encode(pixels.float() / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
    RUNS.mkdir(parents=True, exist_ok=True)
    torch.save(latents, path)
    return rows, latents


def build() -> MotionAdapter:
    """Temporal layers where latents are 16×16 and 8×8, and in the middle; elsewhere 4×4 has none."""
    adapter = MotionAdapter(
        block_out_channels=(64, 128, 256), motion_layers_per_block=1,
        motion_transformer_layers_per_block=(1, 1, 0), motion_num_attention_heads=4,
        motion_norm_num_groups=32, motion_max_seq_length=FRAMES, use_motion_mid_block=True,
    )  # fmt: skip
    for module in adapter.modules():
        if hasattr(module, "transformer_blocks"):
            torch.nn.init.zeros_(module.proj_out.weight)
            torch.nn.init.zeros_(module.proj_out.bias)
            module.requires_grad_(len(module.transformer_blocks) > 0)
    return adapter


def joined(base: UNet2DConditionModel, adapter: MotionAdapter) -> UNetMotionModel:
    """diffusers' UNet for video, whose temporal layers are the adapter's own modules, not copies."""
    unet = UNetMotionModel.from_unet2d(base, adapter).requires_grad_(False)
    for mine, theirs in (
        *zip(adapter.down_blocks, unet.down_blocks, strict=True),
        *zip(adapter.up_blocks, unet.up_blocks, strict=True),
        (adapter.mid_block, unet.mid_block),
    ):
        for ours in mine.motion_modules:
            for block in ours.transformer_blocks:
                block.requires_grad_(True)
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


def export(adapter: MotionAdapter) -> None:
    save_half(adapter, MODEL / "motion")
    (MODEL / "motion" / "imprompt.json").write_text(
        json.dumps({"shared_noise": SHARED, "noise_path": "loop", "frames": FRAMES, "fps": 8}) + "\n"
    )


def write_real(clips: list[Row]) -> None:
    """The held-out real clips, for the evaluation: ``eval/clips/<concept>.webp``."""
    folder = MODEL / "eval" / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    for row in clips:
        frames = frames_of(DATA / row["file_name"])
        more = {"save_all": True, "append_images": frames[1:], "duration": 125, "loop": 0}
        frames[0].save(folder / f"{row['groups']['concept']}.webp", quality=90, method=6, **more)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="end the schedule by the clock instead of --steps")
    parser.add_argument("--clips", type=int, default=4, help="clips a step, of 8 frames each")
    parser.add_argument("--real", type=float, default=0.4, help="share of real clips in training")
    parser.add_argument("--variants", type=int, default=1, help="amplitudes of each moved still")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--packages", type=Path, default=RUNS / "packages")
    parser.add_argument("--data-only", action="store_true", help="write clips and latents, and stop")
    parser.add_argument("--export-only", action="store_true", help="write the newest checkpoint and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    adapter = build()
    base = UNet2DConditionModel.from_pretrained(MODEL / "unet").float().eval()
    unet = joined(base, adapter)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in adapter.parameters()) / 1e6:.1f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    if not args.export_only:
        animated = write_clips(args.packages)
        real = [row for row in animated if row["split"] == "train"]
        write_real([row for row in animated if row["split"] != "train"])
        rows, latents = clips(real, load_rows("small"), args.variants)
    if args.data_only:
        return
    path, ema = RUNS / "motion.pt", Ema(adapter, 0.995)
    loop = Loop(path, args.steps, adapter, optimizer, ema, warmup=50, minutes=args.minutes)
    if not args.export_only:
        captions = Captions(rows)
        positions = Positions(unet)
        abar = DDIMScheduler(**SCHEDULE).alphas_cumprod
        half = torch.cpu._is_avx512_bf16_supported()
        for step in loop:
            random.seed(step)
            whole = loop.part() > 0.7 and step % 2 == 0  # at the end, clips as they are when drawing
            count = max(1, args.clips // 2) if whole else args.clips
            frames = range(FRAMES) if whole else sorted(random.sample(range(FRAMES), FRAMES // 2))
            shown = torch.tensor(frames)
            picked = [
                random.choice(
                    range(len(real)) if random.random() < args.real else range(len(real), len(rows))
                )
                for _ in range(count)
            ]
            x = latents[picked][:, shown].float().transpose(1, 2)  # N 4 F 16 16
            part = torch.tensor(
                [SHARED if random.random() < 0.75 else random.choice((0.0, 0.5)) for _ in picked]
            )
            part = part.view(-1, 1, 1, 1, 1)
            noise = part.sqrt() * torch.randn_like(x[:, :, :1]) + (1 - part).sqrt() * torch.randn_like(x)
            u = (torch.arange(count) + torch.rand(count)) / count
            t = (1000 * u**0.6).long().clamp_max(999)
            a = abar[t].view(-1, 1, 1, 1, 1)
            noisy = a.sqrt() * x + (1 - a).sqrt() * noise
            target = a.sqrt() * noise - (1 - a).sqrt() * x
            hidden = captions[[caption_of(rows[i]) for i in picked]]
            positions.show(shown)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = unet(noisy, t, hidden.repeat_interleave(len(shown), 0)).sample
            loss = F.mse_loss(out.float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            positions.restore()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            progress_mean(loop.log, "loss", loss.item())
    assert loop.ema
    loop.ema.copy_to(adapter)
    export(adapter)


if __name__ == "__main__":
    main()
