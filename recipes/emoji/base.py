"""What every stage on the UNet shares: the noise schedule, noisy latents, and the pipeline's files.

v-prediction with even weights: a caption says nearly all of a small picture, so it is at high noise that
concepts are learned, which min-SNR weights would all but silence. Timesteps are stratified over each batch
and lean to high noise.
"""

import json

import torch
from common import DEVICE, MODEL
from diffusers import DDIMScheduler
from draw import COLOURS, LOOKS
from labels import WORDS
from text import MOTIONS
from torch import Tensor

SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def timesteps(n: int) -> Tensor:
    """Of a batch, in no order (N,)."""
    u = (torch.randperm(n, device=DEVICE) + torch.rand(n, device=DEVICE)) / n
    return (1000 * u**0.75).long().clamp_max(999)


def noised(x: Tensor, t: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
    """A noisy latent and the velocity the UNet has to say."""
    a, noise = abar[t].view(-1, 1, 1, 1), torch.randn_like(x)
    return a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x


def write_pipeline() -> None:
    """The files that make the folder a diffusers pipeline, its image encoder where adapters look."""
    DDIMScheduler(**SCHEDULE).save_pretrained(MODEL / "scheduler")
    parts = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "requires_safety_checker": False, "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (MODEL / "model_index.json").write_text(json.dumps(parts, indent=2) + "\n")
    words = {"concepts": WORDS, "styles": list(LOOKS), "colours": list(COLOURS), "motions": list(MOTIONS)}
    (MODEL / "vocabulary.json").write_text(json.dumps(words, indent=1) + "\n")
