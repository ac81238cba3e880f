"""A sheet of samples drawn during training, to see what the adapter has learned.

A row for each held-out picture: the picture, then drawings from its caption without the adapter, from the
picture alone, from both, and from the picture with the caption of another. Noise is the same in every sheet.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.face import Faces as EncodedFaces
from imprompt.encoders.images import load_image
from imprompt.evaluation.charts import grid
from imprompt.schema.prompt import ImagePrompt
from imprompt.training.cache import EncodedSet
from imprompt.training.data import Plan, crop_box, generator_for
from imprompt.training.pictures import neighbours

ROWS, STEPS = 6, 20
PIXELS = 512 * 512
"""Drawn at once, at most, beside what training keeps in memory: small pictures share a batch."""
COLUMNS = ("picture", "caption alone", "picture alone", "both", "picture, other caption")


class Preview:
    """Draws sheets with the base's own pipeline, from encoded pictures and captions."""

    def __init__(self, pipe: Any, adapter: IPAdapter, data: EncodedSet, plan: Plan, guidance: float) -> None:
        self.pipe, self.adapter, self.data, self.guidance = pipe, adapter, data, guidance
        self.shown = plan.validation[:ROWS]
        self.sizes = [plan.sizes[row] for row in self.shown]
        own = [plan.validation_caption(row) for row in self.shown]
        other = [plan.other_caption(row) for row in self.shown]
        self.asked = [(own, False), ([""] * len(own), True), (own, True), (other, True)]
        pictures = [load_image(plan.rows[row].read()) for row in self.shown]
        self.references = [
            picture.resize(size, box=crop_box(*picture.size, *size))
            for picture, size in zip(pictures, self.sizes, strict=True)
        ]
        self._without: list[Image.Image] | None = None

    @torch.no_grad()
    def draw(self) -> tuple[bytes, list[list[Image.Image]]]:
        """The sheet as PNG, and its pictures by column."""
        if self._without is None:  # the same throughout the run
            self._without = self._draw(*self.asked[0])
        columns = [self.references, self._without, *(self._draw(*asked) for asked in self.asked[1:])]
        cells = [picture for row in zip(*columns, strict=True) for picture in row]
        stream = io.BytesIO()
        grid(cells, COLUMNS, [""] * len(self.shown)).save(stream, "PNG")
        return stream.getvalue(), columns

    def _draw(self, captions: Sequence[str], with_picture: bool) -> list[Image.Image]:
        unet = self.pipe.unet
        weight = next(unet.parameters())
        before = self.pipe.vae.device
        self.pipe.vae.to(weight.device)
        try:
            self.adapter.attach(self.pipe)
            images = []
            for places in neighbours(self.sizes, ROWS, PIXELS):
                if with_picture:
                    self.adapter.set_batch([self._prompt(self.shown[place]) for place in places])
                images += self._some([captions[place] for place in places], places, weight)
            return images
        finally:
            self.adapter.clear_prompt()
            self.adapter.attach(unet)
            self.pipe.vae.to(before)

    def _some(self, captions: Sequence[str], places: Sequence[int], weight: Tensor) -> list[Image.Image]:
        def embedded(name: str, texts: Sequence[str]) -> Tensor:
            return self.data.text(name, texts).to(weight.device, weight.dtype)

        empty = [""] * len(captions)
        options: dict[str, Any] = {"prompt_embeds": embedded("states", captions)}
        options["negative_prompt_embeds"] = embedded("states", empty)
        if unet_takes_pooled(self.pipe.unet):
            options["pooled_prompt_embeds"] = embedded("pooled", captions)
            options["negative_pooled_prompt_embeds"] = embedded("pooled", empty)
        reduced = weight.dtype != torch.float32
        width, height = self.sizes[places[0]]
        with torch.autocast(weight.device.type, weight.dtype, enabled=reduced):
            found: list[Image.Image] = self.pipe(
                width=width,
                height=height,
                num_inference_steps=STEPS,
                guidance_scale=self.guidance,
                generator=[generator_for(0, "samples", place) for place in places],
                **options,
            ).images
        return found

    def _prompt(self, row: int) -> ImagePrompt:
        features = {name: self.data.features.rows(name, [row], [0]) for name in self.data.negative}
        if "face" in features:
            return ImagePrompt(
                features=EncodedFaces(
                    features["face"], "unknown", features.get("hidden"), self.data.negative.get("hidden")
                )
            )
        name, shown = next(iter(features.items()))
        negative = self.data.negative[name] if name == "hidden" else None
        return ImagePrompt(features=shown, negative=negative)


def unet_takes_pooled(unet: Any) -> bool:
    """Whether the UNet reads pooled text and sizes beside the text states, as SDXL's does."""
    return bool(unet.config.addition_embed_type == "text_time")
