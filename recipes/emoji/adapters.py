"""Stage 5: the adapters, ``plus`` (resampler, 16 tokens, the default) and ``base`` (linear, 4 tokens).

Only the adapter learns, unless ``--with-base`` lets UNet and text encoder learn on beside it: where hours
are few, one pass that serves both is worth more than two; a third of its draws then go without the adapter,
as ``base.py`` trains. In half of the draws reference and target share look, palette and background and show
different things, the text saying what (sometimes more); in most others the picture speaks alone, and the
target is the reference itself or the same icon placed anew; in the rest the text alone speaks. The
projection starts as one that says of a picture what its full caption says, which needs no UNet and takes
minutes; keys and values of ``base`` start as those of ``plus``.

    python recipes/emoji/adapters.py plus --minutes 40 --with-base
    python recipes/emoji/adapters.py base --minutes 20
"""

import hashlib
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from base import SCHEDULE, learned, noised, say_plain, timesteps
from base import say as say_some
from common import (
    CHECKPOINTS,
    DEVICE,
    HALF,
    MODEL,
    STATE,
    Crew,
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
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from draw import GROUP, caption
from encoder import normalise
from numpy.random import Generator
from pool import Pool
from safetensors import safe_open
from safetensors.torch import save_file
from text import Texts, frozen_base
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from imprompt import IPAdapter

NAMES = {"base": "ip-adapter_emoji.safetensors", "plus": "ip-adapter-plus_emoji.safetensors"}
KINDS = {"base": "linear", "plus": "resampler"}


def features(kind: str, encoder: CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
    out = encoder(pixels, output_hidden_states=kind == "plus")
    return out.hidden_states[-2] if kind == "plus" else out.image_embeds


class Seen:
    """The encoder's features of the pool's pictures; each picture is encoded once and kept on disk."""

    def __init__(self, kind: str, encoder: CLIPVisionModelWithProjection, pool: Pool) -> None:
        self.kind, self.encoder, self.pool = kind, encoder, pool
        weights = hashlib.sha256()
        for value in encoder.state_dict().values():
            weights.update(value.cpu().numpy().tobytes())
        path = STATE / "features" / f"{kind}-{weights.hexdigest()[:12]}-{len(pool)}.bin"
        path.parent.mkdir(exist_ok=True)
        shape = (65, encoder.config.hidden_size) if kind == "plus" else (encoder.config.projection_dim,)
        if not path.exists():  # processes that begin at once open the same file
            with suppress(FileExistsError), path.open("xb") as file:
                file.truncate(2 * len(pool) * math.prod(shape))
        self.kept = np.memmap(path, np.float16, "r+", shape=(len(pool), *shape))

    def __call__(self, picked: list[int]) -> Tensor:
        new = sorted({i for i in picked if not self.kept[i].any()})
        if new:
            with torch.no_grad(), half():
                found = features(self.kind, self.encoder, normalise(self.pool.pictures(new)))
            self.kept[new] = found.half().cpu().numpy()
        return torch.from_numpy(self.kept[picked]).float().to(DEVICE)


PLAIN_SHARE = 0.3
"""Part of the draws without an adapter that are of plain pictures (see ``base.py``). With 0.6 of 0.35 a
look was named in a seventh of all draws, and 219,000 samples did not teach its word."""
HARD_GROUNDS, HARD_LOOKS = ("striped", "dotted", "checked"), ("stained glass",)
HARD_SHARE = 0.2
"""How often a group of a hard look or background is drawn beside the others: these teach last and least."""


def hard_groups(facts: list[dict], size: int) -> np.ndarray:
    """Of each group, whether its look or background is hard (bool)."""
    first = facts[: size // GROUP * GROUP : GROUP]
    return np.array([f["ground"] in HARD_GROUNDS or f["look"] in HARD_LOOKS for f in first])


def pair(
    facts: list[dict], size: int, groups: np.ndarray, rng: Generator, bare: float
) -> tuple[int, int, str, bool, bool]:
    """(reference, target, text, whether the picture is shown, whether the adapter is there at all).

    Plain pictures begin at ``size``; they are targets alone.
    """
    if rng.uniform() < bare:
        if rng.uniform() < PLAIN_SHARE:
            target = int(rng.integers(size, len(facts)))
            return 0, target, caption(facts[target], rng, say_plain(rng)), False, False
        while True:
            target = int(rng.choice(groups)) * GROUP + int(rng.integers(GROUP))
            if facts[target]["concept"] or rng.uniform() > 0.85:
                break
        return target, target, caption(facts[target], rng, say_some(rng)), False, False
    group = int(rng.choice(groups)) * GROUP
    share, shown = rng.uniform(), True
    if share < 0.5:  # another thing in the same manner
        while True:
            one, two = (int(k) for k in rng.choice(GROUP, 2, replace=False))
            if {one, two} != {0, 2} and facts[group + two]["concept"]:
                break
            group = int(rng.choice(groups)) * GROUP
        more = rng.uniform() < 0.2
        say = (True, *(bool(more and rng.uniform() < 0.5) for _ in range(3)))
    else:
        one = int(rng.integers(GROUP))
        two = (2 if one == 0 else 0) if one in (0, 2) and rng.uniform() < 0.4 else one
        if share < 0.92:
            say = (False,) * 4 if rng.uniform() < 0.75 else tuple(bool(rng.uniform() < 0.4) for _ in range(4))
        else:
            shown = False
            say = (
                (False,) * 4
                if rng.uniform() < 0.4
                else (True, *(bool(rng.uniform() < 0.6) for _ in range(3)))
            )
    return group + one, group + two, caption(facts[group + two], rng, say), shown, True


def learn_captions(adapter: IPAdapter, kind: str, steps: int, texts: Texts, unet: UNet2DConditionModel,
                   encoder: CLIPVisionModelWithProjection, pool: Pool) -> None:  # fmt: skip
    """Let the projection say what the full caption's first states say, as keys and values see them."""
    weights = [w for n, w in unet.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n]
    metric = sum(w.detach().T @ w.detach() / len(w) for w in weights)
    values, vectors = torch.linalg.eigh(metric / metric.diagonal().mean())
    seen = vectors * values.clamp_min(0).sqrt()
    optimizer = torch.optim.AdamW(adapter.projection.parameters(), lr=1e-3, betas=(0.9, 0.98))
    for step in range(steps):
        rng = np.random.default_rng([8, step])
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 40, max(0.05, 2 * (1 - step / steps)))
        picked = rng.integers(len(pool), size=32).tolist()
        with torch.no_grad(), half():
            shown = features(kind, encoder, normalise(pool.pictures(picked)))
            hidden = texts([caption(pool.facts[i], np.random.default_rng(0), (True,) * 4) for i in picked])
        count = 16 if kind == "plus" else 4
        with half():
            tokens = adapter.projection(shown.float())
        want = hidden[:, :16].float() if kind == "plus" else hidden[:, [0, 2, 5, 12]].float()
        loss = F.mse_loss(tokens.float()[:, :count] @ seen, want @ seen)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.projection.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            spread = ((want - want.mean(0)) @ seen).square().mean()
            print(f"captions {step}/{steps}: left {float(loss.detach() / spread):.3f}", flush=True)


def export(adapter: IPAdapter, kind: str) -> Path:
    made = adapter.save_pretrained(CHECKPOINTS, f"{kind}.safetensors")
    path = MODEL / "adapters" / NAMES[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    with safe_open(made, "pt") as file:
        weights = {name: file.get_tensor(name).half().contiguous() for name in file.keys()}  # noqa: SIM118, not a dict
        save_file(weights, path, metadata=file.metadata())
    return path


def main() -> None:
    parser = stage_parser(__doc__, minutes=40, lr=8e-4, batch=24)
    parser.add_argument("kind", choices=sorted(NAMES))
    parser.add_argument("--caption-steps", type=int, default=400)
    parser.add_argument("--captions-only", action="store_true", help="stop when the projection says captions")
    parser.add_argument("--with-base", action="store_true", help="UNet and text encoder learn on too")
    parser.add_argument("--base-lr", type=float, default=2.5e-4)
    parser.add_argument("--text-lr", type=float, default=2e-4, help="of the text encoder's layers")
    parser.add_argument("--word-lr", type=float, default=4e-4, help="of its embeddings")
    parser.add_argument("--bare", type=float, default=0.5, help="part of the draws without an adapter")
    parser.add_argument("--go-on", action="store_true", help="start from the model folder's adapter")
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    args = parsed(parser)
    crew = Crew(args.processes)  # of more than one: run with --captions-only first
    torch.manual_seed(0)
    unet, texts = frozen_base()
    encoder = CLIPVisionModelWithProjection.from_pretrained(MODEL / "image_encoder").float().eval().to(DEVICE)
    text = texts.encoder
    width = encoder.config.hidden_size if args.kind == "plus" else encoder.config.projection_dim
    adapter = IPAdapter.new(
        unet, kind=KINDS[args.kind], feature_width=width, tokens=16 if args.kind == "plus" else 4
    )
    plus = MODEL / "adapters" / NAMES["plus"]
    if args.kind == "base" and plus.exists():  # its keys and values have learned far longer
        known = IPAdapter.from_pretrained(plus).module.state_dict()
        known = {name: value for name, value in known.items() if name.startswith("ip_adapter.")}
        adapter.module.load_state_dict(known, strict=False)
    adapter.module.to(DEVICE)
    pool = Pool(1)
    path = CHECKPOINTS / f"adapter-{args.kind}.pt"
    said = CHECKPOINTS / f"captions-{args.kind}.pt"
    own = MODEL / "adapters" / NAMES[args.kind]
    if not path.exists() and not args.export and own.exists() and args.go_on:
        adapter.module.load_state_dict(IPAdapter.from_pretrained(own).module.state_dict())
    elif not path.exists() and not args.export:
        if not said.exists():
            learn_captions(adapter, args.kind, args.caption_steps, texts, unet, encoder, pool)
            CHECKPOINTS.mkdir(parents=True, exist_ok=True)
            torch.save(adapter.projection.state_dict(), said)
        adapter.projection.load_state_dict(torch.load(said, weights_only=True))
    if args.captions_only:
        return
    learners = nn.ModuleDict({"adapter": adapter.module})
    optimizer = adamw(adapter.module.parameters(), args.lr)
    if args.with_base:
        learners.update(
            {"unet": unet.requires_grad_(True).train(), "text": text.requires_grad_(True).train()}
        )
        words = [p for name, p in text.named_parameters() if "embedding" in name]
        layers = [p for name, p in text.named_parameters() if "embedding" not in name]
        rates = ((unet.parameters(), args.base_lr), (layers, args.text_lr), (words, args.word_lr))
        for parameters, rate in rates:
            for group in adamw(parameters, rate).param_groups:
                optimizer.add_param_group(group)
        if DEVICE == "cpu" and HALF:
            unet.set_attn_processor(AttnProcessor())
    mark = fingerprint(
        stage=args.kind,
        width=width,
        layers=len(adapter.state_dict()["ip_adapter"]),
        base=args.with_base,
        groups=len(optimizer.param_groups),
    )
    loop = Loop(
        path,
        args.minutes,
        learners,
        optimizer,
        None if crew.rank else Ema(learners, 0.999 if args.with_base else 0.998),
        mark,
        100,
        crew=crew,
    )
    if not args.export:
        latents, facts, size = learned()
        abar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)
        with torch.no_grad():
            nothing = features(args.kind, encoder, torch.zeros(1, 3, 128, 128, device=DEVICE))
            if args.kind == "base":
                nothing = torch.zeros_like(nothing)
        seen = Seen(args.kind, encoder, pool)
        hard = hard_groups(facts, size)
        adapter.attach(unet)
        for step in loop:
            rng = np.random.default_rng([9, step, crew.rank])
            groups = np.flatnonzero(~hard | (rng.uniform(size=len(hard)) < HARD_SHARE))
            drawn = [
                pair(facts, size, groups, rng, args.bare if args.with_base else 0.0)
                for _ in range(args.batch)
            ]
            shown = seen([one for one, *_ in drawn])
            visible = torch.tensor([see for *_, see, _ in drawn], device=DEVICE)
            there = torch.tensor([float(there) for *_, there in drawn], device=DEVICE)
            shown = torch.where(visible.view(-1, *[1] * (shown.ndim - 1)), shown, nothing)
            x = torch.from_numpy(latents[[two for _, two, *_ in drawn]]).float().to(DEVICE)
            t = timesteps(len(x))
            noisy, target = noised(x, t, abar)
            with half(), adapter.training_tokens(adapter.projection(shown), there):
                hidden = texts([words for _, _, words, *_ in drawn])
                out = unet(noisy, t, hidden).sample
                loss = F.mse_loss(out.float(), target)
                loop.learn(loss)
            progress_mean(loop.log, "loss", loss.item())
        adapter.detach()
    if crew.rank:
        return
    assert loop.ema
    loop.ema.copy_to(learners)
    if args.with_base:
        save_half(unet, MODEL / "unet")
        save_half(text, MODEL / "text_encoder")
    print(f"wrote {export(adapter, args.kind)}")


if __name__ == "__main__":
    main()
