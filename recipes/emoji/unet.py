"""Stage 4: the text-to-image UNet, Stable Diffusion's layout on 16×16×4 latents.

Autoencoder and text encoder are frozen; latents and the hidden states of every caption are computed once.
v-prediction with even weights: a caption says nearly all of a small picture, so it is at high noise that
concepts are learned, which min-SNR weights would all but silence (measured: colours came, shapes did not).
Timesteps are stratified over each batch and lean to high noise; captions are dropped for classifier-free
guidance; an average of the weights is what is kept.

A quarter of each batch is of the everyday concepts outside the vocabulary. The words for them are not
learned in the time a CPU has, but how such things are drawn is, and adapters need a base that can draw what
they show.

    python recipes/emoji/unet.py
    python recipes/emoji/unet.py --further --minutes 60   # later, from the weights that are there
"""

import argparse
import json
import random

import torch
from common import MODEL, RUNS, Ema, Loop, Row, adamw, load_pictures, load_rows, progress_mean, save_half
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

LENGTH = 16
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128, 256),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=256, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


class Captions:
    """The frozen text encoder's hidden states (16×256) of every caption, computed once; ``ends`` says where
    each caption's words end."""

    def __init__(self, rows: list[Row]) -> None:
        tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder").float().eval()
        texts = sorted({text for row in rows for kind in row["captions"].values() for text in kind} | {""})
        self.index = {text: i for i, text in enumerate(texts)}
        hidden, self.ends = [], {}
        with torch.no_grad():
            for i in range(0, len(texts), 64):
                ids = tokenizer(
                    texts[i : i + 64],
                    padding="max_length",
                    truncation=True,
                    max_length=LENGTH,
                    return_tensors="pt",
                ).input_ids
                hidden.append(encoder(ids).last_hidden_state)
                first = (ids == tokenizer.eos_token_id).int().argmax(1).tolist()
                self.ends.update(zip(texts[i : i + 64], first, strict=True))
        self.hidden = torch.cat(hidden)

    def __getitem__(self, texts: list[str]) -> Tensor:
        return self.hidden[[self.index[text] for text in texts]]


def latents_of(pictures: Tensor) -> Tensor:
    """Scaled latents (N, 4, 16, 16); the mean of the posterior, whose spread is negligible."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval()
    with torch.no_grad():
        chunks = [vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode() for chunk in pictures.split(32)]
    return torch.cat(chunks) * vae.config.scaling_factor


def caption_of(row: Row) -> str:
    kind = random.choices(["full", "concept", "style", ""], [0.72, 0.14, 0.04, 0.10])[0]
    return random.choice(row["captions"][kind]) if kind else ""


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--minutes", type=float, help="end the schedule by the clock instead of --steps")
    parser.add_argument("--further", action="store_true", help="start from the bundled UNet's weights")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--vocabulary", default="small")
    parser.add_argument(
        "--beside", default="core", help="where the other quarter of each batch is taken from"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--export-only", action="store_true", help="write the newest checkpoint's average and stop"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet").float() if args.further else build()
    half = torch.cpu._is_avx512_bf16_supported()
    print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters", flush=True)
    optimizer = adamw(unet.parameters(), args.lr)
    loop = Loop(
        RUNS / "unet.pt", args.steps, unet, optimizer, Ema(unet, 0.999), warmup=150, minutes=args.minutes
    )
    if not args.export_only:
        known = load_rows(args.vocabulary)
        words = {row["groups"]["concept"] for row in known}
        rows = known + [row for row in load_rows(args.beside) if row["groups"]["concept"] not in words]
        near, far = range(len(known)), range(len(known), len(rows))
        few = args.batch // 4 if far else 0
        latents = latents_of(load_pictures(rows))
        captions = Captions(rows)
        abar = DDIMScheduler(**SCHEDULE).alphas_cumprod
        order: list[int] = []
        beside: list[int] = []
        unet.train()
        for step in loop:
            random.seed(step)
            while len(order) < args.batch - few:
                order += random.sample(near, len(near))
            while len(beside) < few:
                beside += random.sample(far, len(far))
            picked = order[: args.batch - few] + beside[:few]
            random.shuffle(picked)  # timesteps are stratified over the batch
            order, beside = order[args.batch - few :], beside[few:]
            x = latents[picked]
            noise = torch.randn_like(x)
            u = (torch.arange(args.batch) + torch.rand(args.batch)) / args.batch
            t = (1000 * u**0.75).long().clamp_max(999)
            a = abar[t].view(-1, 1, 1, 1)
            noisy = a.sqrt() * x + (1 - a).sqrt() * noise
            target = a.sqrt() * noise - (1 - a).sqrt() * x
            hidden = captions[[caption_of(rows[i]) for i in picked]]
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = unet(noisy, t, hidden).sample
            loss = F.mse_loss(out.float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            progress_mean(loop.log, "loss", loss.item())
    assert loop.ema
    loop.ema.copy_to(unet)
    save_half(unet, MODEL / "unet")
    write_pipeline()
    words = sorted({row["groups"]["concept"] for row in load_rows("small")})  # trained ones only
    styles = sorted({row["groups"]["style"] for row in load_rows("small", None)})
    (MODEL / "vocabulary.json").write_text(json.dumps({"concepts": words, "styles": styles}, indent=1) + "\n")


if __name__ == "__main__":
    main()
