"""Stage 4: the text-to-image UNet, Stable Diffusion's layout on 16×16×4 latents, with its text encoder.

The autoencoder is frozen; the pool's latents come from ``latents.py``. v-prediction with even weights: a
caption says nearly all of a small picture, so it is at high noise that concepts are learned, which min-SNR
weights would all but silence. Timesteps are stratified over each batch and lean to high noise; captions name
a random part of what the picture shows, a tenth nothing (classifier-free guidance); an average of the
weights is kept.

START's UNet draws clear shapes, and 150 steps on the new pictures alone undo them at any learning rate that
learns: three eighths of each batch are therefore plain pictures such as START draws.

    python recipes/emoji/base.py --minutes 60
    python recipes/emoji/base.py --minutes 300   # later: goes on from the plateau of the first run
"""

import json

import numpy as np
import torch
from common import (
    CHECKPOINTS,
    DEVICE,
    HALF,
    MODEL,
    START,
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
from draw import COLOURS, LOOKS, PLAIN_SEED, caption
from encoder import WORDS
from latents import latents_of
from numpy.random import Generator
from pool import Pool
from text import MOTIONS, Texts, make_encoder, make_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def say(rng: Generator) -> tuple[bool, bool, bool, bool]:
    if rng.uniform() < 0.1:
        return (False,) * 4
    return tuple(bool(rng.uniform() < p) for p in (0.9, 0.8, 0.75, 0.75))  # type: ignore[return-value]


def say_plain(rng: Generator) -> tuple[bool, bool, bool, bool]:
    """Of a plain picture, mostly what it shows alone."""
    return say(rng) if rng.uniform() < 0.3 else (True, False, False, False)


def learned() -> tuple[np.ndarray, list[dict], int]:
    """Latents and facts of the pool and, behind them, of the plain pictures; and where these begin."""
    own, plain = latents_of(1), latents_of(PLAIN_SEED)
    facts = Pool(1).facts[: len(own)] + Pool(PLAIN_SEED).facts[: len(plain)]
    return np.concatenate([own, plain]), facts, len(own)


def timesteps(n: int) -> Tensor:
    u = (torch.arange(n) + torch.rand(n)) / n
    return (1000 * u**0.75).long().clamp_max(999).to(DEVICE)


def noised(x: Tensor, t: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
    """A noisy latent and the velocity the UNet has to say."""
    a, noise = abar[t].view(-1, 1, 1, 1), torch.randn_like(x)
    return a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x


def write_pipeline() -> None:
    """The files that make the folder a diffusers pipeline, its image encoder where adapters look."""
    DDIMScheduler(**SCHEDULE).save_pretrained(MODEL / "scheduler")
    (MODEL / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
                "feature_extractor": ["transformers", "CLIPImageProcessor"],
                "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
                "requires_safety_checker": False, "safety_checker": [None, None],
                "scheduler": ["diffusers", "DDIMScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            },
            indent=2,
        )
        + "\n"
    )  # fmt: skip
    (MODEL / "vocabulary.json").write_text(
        json.dumps(
            {"concepts": WORDS, "styles": list(LOOKS), "colours": list(COLOURS), "motions": list(MOTIONS)},
            indent=1,
        )
        + "\n"
    )  # fmt: skip


def main() -> None:
    parser = stage_parser(__doc__, minutes=60, lr=2.5e-4, batch=32)
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    args = parsed(parser)
    crew = Crew(args.processes)
    tokenizer = (
        CLIPTokenizer.from_pretrained(MODEL / "tokenizer") if args.export or crew.rank else make_tokenizer()
    )
    unet = UNet2DConditionModel.from_pretrained(START / "unet").float()
    if DEVICE == "cpu" and HALF:
        unet.set_attn_processor(AttnProcessor())  # a fifth faster to train there than fused attention
    both = nn.ModuleDict({"unet": unet, "text": make_encoder(tokenizer)}).train().to(DEVICE)
    texts = Texts(tokenizer, both["text"])
    optimizer = adamw(unet.parameters(), args.lr)
    for group in adamw(both["text"].parameters(), args.lr / 3).param_groups:
        optimizer.add_param_group(group)
    mark = fingerprint(stage="base", words=WORDS, looks=LOOKS, tokens=len(tokenizer))
    loop = Loop(
        CHECKPOINTS / "base.pt",
        args.minutes,
        both,
        optimizer,
        None if crew.rank else Ema(both, 0.999),
        mark,
        100,
        crew=crew,
    )
    if not args.export:
        latents, facts, own = learned()
        known = np.flatnonzero([fact["concept"] is not None for fact in facts])
        near, plain = known[known < own], known[known >= own]
        abar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)
        for step in loop:
            rng = np.random.default_rng([6, step, crew.rank])
            third = args.batch * 3 // 8
            picked = np.concatenate(
                [
                    rng.choice(plain, third),
                    rng.choice(near, third),
                    rng.integers(own, size=args.batch - 2 * third),
                ]
            )
            rng.shuffle(picked)  # timesteps are stratified over the batch
            x = torch.from_numpy(latents[picked]).float().to(DEVICE)
            t = timesteps(len(x))
            noisy, target = noised(x, t, abar)
            with half():
                hidden = texts(
                    [caption(facts[i], rng, say(rng) if i < own else say_plain(rng)) for i in picked]
                )
                out = unet(noisy, t, hidden).sample
            loss = F.mse_loss(out.float(), target)
            loop.learn(loss)
            progress_mean(loop.log, "loss", loss.item())
    if crew.rank:
        return
    assert loop.ema
    loop.ema.copy_to(both)
    save_half(unet, MODEL / "unet")
    save_half(both["text"], MODEL / "text_encoder")
    write_pipeline()


if __name__ == "__main__":
    main()
