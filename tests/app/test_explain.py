"""Heat maps are bright where a prompt acted, and every prompt gets its two pictures."""

import numpy as np
import torch
from PIL import Image

from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.recorder import Attribution
from imprompt.app.explain import colours, explain, overlay
from tiny import tiny_unet


def test_heat_is_where_it_was_measured() -> None:
    heat = np.zeros((4, 4))
    heat[0, 0] = 1
    seen = np.asarray(overlay(Image.new("RGB", (64, 64), "grey"), heat), np.float64).sum(-1)
    assert seen[:12, :12].mean() > seen[40:, 40:].mean() + 50


def test_colours_run_from_dark_to_bright() -> None:
    brightness = colours(np.linspace(0, 1, 50)).sum(-1)
    assert (np.diff(brightness) > 0).all()


def test_each_prompt_gets_a_map_and_a_chart() -> None:
    layers = tuple(sorted(cross_attentions(tiny_unet("sdxl")), key=lambda layer: layer.block_index))
    found = Attribution(layers, (0.1, 0.5), torch.rand(2, 2, len(layers)), torch.rand(2, 8, 8))
    pages = explain(found, Image.new("RGB", (64, 48)))
    assert list(pages) == [f"{kind}-{g}" for g in (1, 2) for kind in ("where", "when")]
    assert pages["where-1"].size == (64, 48)
    assert pages["when-1"].width > 200
