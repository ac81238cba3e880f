"""A sheet of samples drawn while training: what the adapter does by now, for people to look at.

One row a held-out (validation) picture: the picture, drawn from it alone, drawn from it with its own caption,
drawn from it with the caption of something else. Noise is the same in every sheet. Figures are the
validation's and the report's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.images import load_image
from imprompt.io import write_atomic
from imprompt.training.cache import EncodedSet
from imprompt.training.data import Plan, crop_to_shape, generator_for

ROWS, STEPS = 6, 20


class Sampler:
    """Draws sheets with the UNet in training; ``extra`` gives what else the UNet takes for some captions."""

    def __init__(
        self, unet: Any, vae: Any, adapter: IPAdapter, scheduler: Any, data: EncodedSet, plan: Plan,
        extra: Callable[[Sequence[str]], dict[str, Any]], *, side: int, guidance: float,
    ) -> None:  # fmt: skip
        from diffusers import DDIMScheduler

        self.unet, self.vae, self.adapter, self.data, self.extra = unet, vae, adapter, data, extra
        self.scheduler = DDIMScheduler.from_config(scheduler.config)
        self.side, self.guidance = side, guidance
        self.shown = plan.validation[:ROWS]
        self.captions = [[""] * len(self.shown)]
        self.captions += [
            [caption(row) for row in self.shown] for caption in (plan.validation_caption, plan.other_caption)
        ]
        pictures = [load_image(plan.rows[row].file) for row in self.shown]
        self.references = [crop_to_shape(picture, side, side).resize((side, side)) for picture in pictures]

    @torch.no_grad()
    def write(self, folder: Path, step: int) -> Path:
        """Draw a sheet into ``folder/samples``; returns its path."""
        columns = [self.references, *(self._draw(captions) for captions in self.captions)]
        gap = max(2, self.side // 32)
        cell = self.side + gap
        sheet = Image.new("RGB", (len(columns) * cell + gap, len(self.shown) * cell + gap), "white")
        for x, column in enumerate(columns):
            for y, picture in enumerate(column):
                sheet.paste(picture, (gap + x * cell, gap + y * cell))
        path = folder / "samples" / f"{step:08d}.png"
        return write_atomic(path, lambda stream: sheet.save(stream, "PNG"), overwrite=True)

    def _draw(self, captions: Sequence[str]) -> list[Image.Image]:
        parameter = next(self.unet.parameters())
        device, dtype = parameter.device, parameter.dtype
        features = self.data.features.rows(self.data.feature, self.shown, [0] * len(self.shown))
        both = torch.cat([self.data.negative.expand_as(features), features]).to(device)
        asked = [""] * len(captions) + list(captions)
        states = self.data.text("states", asked).to(device, dtype)
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (len(captions), self.unet.config.in_channels, self.side // factor, self.side // factor)
        latents = torch.randn(shape, generator=generator_for(0, "samples")).to(device)
        self.scheduler.set_timesteps(STEPS, device=device)
        latents = latents * self.scheduler.init_noise_sigma
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tokens = self.adapter.projection(both)
            for t in self.scheduler.timesteps:
                given = self.scheduler.scale_model_input(torch.cat([latents, latents]), t)
                with self.adapter.training_tokens(tokens):
                    out = self.unet(given, t, states, return_dict=False, **self.extra(asked))[0].float()
                without, with_image = out.chunk(2)
                guided = without + self.guidance * (with_image - without)
                latents = self.scheduler.step(guided, t, latents).prev_sample
        return self._decode(latents)

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        vae, config = self.vae, self.vae.config
        place = next(vae.parameters())
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        pixels = (vae.decode(latents.to(place.device, place.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
        arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array) for array in arrays]
