"""Stage 7: the canny ControlNet of the frozen base, by the product's own edges.

Every training picture of every style is used, whether or not its concept is a word the base knows: structure
generalises where words do not. Edges are found with random thresholds, sparse to dense, and half of the
captions say at most the style, so that it is the edges that tell what to draw. The copy of the base's encoder
keeps its down blocks; its middle block is a single residual one, which halves the file and the time.
Latents and edges are computed once and kept in ``runs/control-cache.pt``.

    python recipes/emoji/control.py [--minutes 25]

A run that was interrupted goes on when it is started again. Every 100 steps, and at the end, it says what
part of the held-out pictures' loss the edges take away.
"""

import argparse
import hashlib
import random

import numpy as np
import torch
from common import MODEL, RUNS, Ema, Loop, Row, adamw, load_pictures, load_rows, progress_mean, save_half
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from unet import SCHEDULE, Captions, latents_of

from imprompt.generation.annotate import edges

OUT = MODEL / "controlnet-canny"
VIEWS = 2
"""Edge maps of each picture, each with thresholds of its own."""
PROBES = 32
"""Held-out pictures on which the edges' gain is measured."""


def build(unet: UNet2DConditionModel) -> ControlNetModel:
    """The base's encoder with zeroed outputs; a middle block of one residual block of the base's."""
    with torch.no_grad():
        full = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32, 64))
        light = ControlNetModel.from_config({**full.config, "mid_block_type": "UNetMidBlock2D"})
        light.load_state_dict({k: v for k, v in full.state_dict().items() if k in light.state_dict()})
    return light.float()


@torch.no_grad()
def wake(net: ControlNetModel, condition: Tensor) -> None:
    """Scale the condition's own convolutions so that edges come through them from the first step on.

    As they start, seven of them in a row with SiLUs let a thin white line fade to nothing, and the last is
    zero besides; then the outputs, zero too, have nothing to learn from. Here each gives unit variance on
    true edges, and the last half the deviation of the noisy latents' own features, to which it is added; the
    ControlNet as a whole still adds nothing.
    """
    embedding = net.controlnet_cond_embedding
    torch.nn.init.kaiming_normal_(embedding.conv_out.weight)
    x = condition
    for conv in (embedding.conv_in, *embedding.blocks, embedding.conv_out):
        conv.bias.zero_()
        conv.weight.div_(conv(x).std())
        x = F.silu(conv(x))
    embedding.conv_out.weight.mul_(0.5 * net.conv_in(torch.randn(len(x), 4, 16, 16)).std())


def edges_of(pictures: Tensor, seed: int = 0) -> Tensor:
    """Edge maps (N, VIEWS, 128, 128) as uint8, 0 or 1; the first view by the product's own thresholds."""
    chance = random.Random(seed)
    maps = torch.empty(len(pictures), VIEWS, 128, 128, dtype=torch.uint8)
    for i, picture in enumerate(tqdm(pictures, "edges", leave=False, disable=None)):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        for view in range(VIEWS):
            low = chance.uniform(30, 180)
            found = edges(image, low, low * chance.uniform(1.5, 3)) if view else edges(image)
            maps[i, view] = torch.from_numpy(np.asarray(found)[..., 0] // 255)
    return maps


def prepared(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Latents and edge maps of ``rows``, from the cache if it is of these rows and this encoder."""
    digest = hashlib.sha256("\n".join(row["file_name"] for row in rows).encode())
    for name, weight in load_file(MODEL / "vae" / "diffusion_pytorch_model.safetensors").items():
        if not name.startswith(("decoder", "post_quant_conv")):  # which may learn on; latents stay
            digest.update(weight.numpy().tobytes())
    path = RUNS / "control-cache.pt"
    if path.exists():
        cached = torch.load(path, weights_only=True)
        if cached["key"] == digest.hexdigest():
            return cached["latents"], cached["edges"]
    pictures = load_pictures(rows)
    latents, maps = latents_of(pictures), edges_of(pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({"key": digest.hexdigest(), "latents": latents, "edges": maps}, part)
    part.replace(path)
    return latents, maps


def caption_of(row: Row) -> str:
    kind = random.choices(["full", "concept", "style", ""], [0.4, 0.1, 0.3, 0.2])[0]
    return random.choice(row["captions"][kind]) if kind else ""


def condition_of(maps: Tensor) -> Tensor:
    """Edge maps (B, 128, 128) as a ControlNet's condition (B, 3, 128, 128) in [0, 1]."""
    return maps.float().unsqueeze(1).expand(-1, 3, -1, -1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--minutes", type=float, help="end the schedule by the clock instead of --steps")
    parser.add_argument("--further", action="store_true", help="start from the bundled ControlNet's weights")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--vocabulary", default="all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--export-only", action="store_true", help="write the newest checkpoint's average and stop"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet").float().eval().requires_grad_(False)
    net = ControlNetModel.from_pretrained(OUT).float() if args.further else build(unet)
    half = torch.cpu._is_avx512_bf16_supported()
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters", flush=True)
    optimizer = adamw(net.parameters(), args.lr)
    loop = Loop(
        RUNS / "control.pt", args.steps, net, optimizer, Ema(net, 0.995), warmup=100, minutes=args.minutes
    )
    if not args.export_only:
        rows = load_rows(args.vocabulary)
        unseen = [row for row in load_rows("small", None) if row["split"] != "train"]
        probes = random.Random(0).sample(unseen, PROBES)
        latents, maps = prepared(rows + probes)
        captions = Captions(rows + probes)
        if loop.step == 0 and not args.further:
            wake(net, condition_of(maps[:64, 0]))
        abar = DDIMScheduler(**SCHEDULE).alphas_cumprod

        def loss_of(x: Tensor, t: Tensor, hidden: Tensor, condition: Tensor | None) -> Tensor:
            noise = torch.randn_like(x)
            a = abar[t].view(-1, 1, 1, 1)
            noisy = a.sqrt() * x + (1 - a).sqrt() * noise
            target = a.sqrt() * noise - (1 - a).sqrt() * x
            down, mid = None, None
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                if condition is not None:
                    down, mid = net(noisy, t, hidden, condition, return_dict=False)
                out = unet(
                    noisy, t, hidden, down_block_additional_residuals=down, mid_block_additional_residual=mid
                ).sample
            return F.mse_loss(out.float(), target)

        @torch.no_grad()
        def gain() -> float:
            """The part of the held-out loss that the edges take away, concept known, style unsaid."""
            hidden = captions[[row["captions"]["concept"][0] for row in probes]]
            t = torch.linspace(100, 999, PROBES).long()
            losses = []
            for condition in (condition_of(maps[-PROBES:, 0]), None):
                torch.manual_seed(0)
                losses.append(loss_of(latents[-PROBES:], t, hidden, condition).item())
            return 1 - losses[0] / losses[1]

        order: list[int] = []
        net.train()
        for step in loop:
            random.seed(step)
            while len(order) < args.batch:
                order += random.sample(range(len(rows)), len(rows))
            picked, order = order[: args.batch], order[args.batch :]
            u = (torch.arange(args.batch) + torch.rand(args.batch)) / args.batch
            t = (1000 * u**0.75).long().clamp_max(999)
            views = torch.randint(VIEWS, (args.batch,))
            hidden = captions[[caption_of(rows[i]) for i in picked]]
            loss = loss_of(latents[picked], t, hidden, condition_of(maps[picked, views]))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            progress_mean(loop.log, "loss", loss.item())
            if step % 100 == 99:
                loop.log["gain"] = gain()
    assert loop.ema
    loop.ema.copy_to(net)
    if not args.export_only:
        print(f"the edges take away {gain():.0%} of the held-out loss", flush=True)
    save_half(net, OUT)


if __name__ == "__main__":
    main()
