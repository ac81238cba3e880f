"""A UNet's guided step with image prompts over the plain step, and diffusers' adapters over the same; the
sections "sd15" and "sdxl" of gpu.py.

Both programs have the same random adapters, base (4 tokens) and plus (16), one picture or eight with masks.
"eager" is a step as Python launches it; "graph" is the same kernels replayed as one CUDA graph, without the
gaps between launches.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from gpu_timing import Run, Work, difference, graphed, launches
from layers import MODELS, OneStep, sharing
from torch import Tensor

from imprompt import ImagePrompt, IPAdapter
from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.projections.build import new_linear, new_resampler

STRENGTH, MASKED = 0.6, 8
PATCHES = 257, 1280  # ViT-H/14's hidden states
QUICK: dict[str, Any] = {
    "cross_attention_dim": 64,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}


@dataclass
class Inputs:
    """What all steps read: a guided batch of one picture, and the pictures shown."""

    sample: Tensor
    text: Tensor
    timestep: Tensor
    pictures: dict[str, tuple[Tensor, Tensor]]
    """Of each kind of adapter: features to avoid, and those of the pictures."""
    masks: Tensor
    """Strips that together cover the picture, one of each picture: ``1 N H W``."""

    @classmethod
    def random(cls, run: Run, unet: UNet2DConditionModel, side: int) -> "Inputs":
        strips = torch.eye(MASKED, device=run.device, dtype=run.dtype).repeat_interleave(side // MASKED, 1)
        pooled = run.randn(MASKED, 1024)
        return cls(
            run.randn(2, unet.config.in_channels, side, side),
            run.randn(2, 77, unet.config.cross_attention_dim),
            torch.tensor(500, device=run.device),
            {
                "base": (torch.zeros_like(pooled), pooled),
                "plus": (run.randn(1, *PATCHES).expand(MASKED, -1, -1), run.randn(MASKED, *PATCHES)),
            },
            strips[None, :, None].expand(-1, -1, side, -1).contiguous(),
        )


def state_of(run: Run, unet: UNet2DConditionModel, kind: str) -> dict[str, dict[str, Tensor]]:
    """A random adapter of a kind in the published layout."""
    cross = unet.config.cross_attention_dim
    if kind == "base":
        proj = new_linear(1024, 4, cross)
    else:
        proj = new_resampler(PATCHES[1], 16, cross, min(cross, 1280), 4)
    layers = {
        f"{site.index}.{part}.weight": run.weight(site.width, cross)
        for site in cross_attentions(unet)
        for part in ("to_k_ip", "to_v_ip")
    }
    return {"image_proj": {k: v.to(run.device, run.dtype) for k, v in proj.items()}, "ip_adapter": layers}


class Ours:
    """A step of imprompt's, and its settings."""

    def __init__(self, unet: UNet2DConditionModel, state: Any, inputs: Inputs, kind: str, count: int) -> None:
        self.pipe, self.inputs = OneStep(unet, DDIMScheduler()), inputs
        self.adapter = IPAdapter.from_state_dict(state).attach(self.pipe)
        avoided, shown = inputs.pictures[kind]
        self.prompts = [
            ImagePrompt(
                features=shown[i : i + 1],
                negative=None if kind == "base" else avoided[i : i + 1],
                mask=inputs.masks[0, i].float().cpu() if count > 1 else None,
            )
            for i in range(count)
        ]
        self.show(STRENGTH)

    def show(self, strength: float) -> None:
        """Show the same pictures at a strength."""
        self.adapter.set_prompt(self.prompts, scale=strength)

    def step(self) -> Tensor:
        return self.pipe(self.inputs.sample, self.inputs.text, self.inputs.timestep).sample

    def changed_step(self) -> Tensor:
        """A step after a change of strength."""
        self.show(0.5)
        return self.step()


def theirs(unet: UNet2DConditionModel, state: Any, inputs: Inputs, kind: str, count: int) -> Work:
    """A step of diffusers' with one adapter that is shown all pictures."""
    unet._load_ip_adapter_weights([state])
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [STRENGTH if count == 1 else [STRENGTH] * count]
    avoided, shown = inputs.pictures[kind]
    embeds = [torch.stack([avoided[:count], shown[:count]])]
    extra = {} if count == 1 else {"cross_attention_kwargs": {"ip_adapter_masks": [inputs.masks]}}

    def step() -> Tensor:
        return unet(
            inputs.sample, inputs.timestep, inputs.text, added_cond_kwargs={"image_embeds": embeds}, **extra
        ).sample

    return step


def steps(run: Run, model: str, side: int) -> None:
    """All figures of a model with latents of ``side`` × ``side``."""
    config = QUICK if run.quick else MODELS[model]
    plain = run.model(lambda: UNet2DConditionModel(**config))
    # Not in inference mode, in which PyTorch does not count who writes to the features.
    inputs = Inputs.random(run, plain, MASKED if run.quick else side)
    with torch.inference_mode():
        mine: dict[str, Ours] = {}
        kinds: dict[str, Work] = {}
        for name in ("plain", "plain again"):
            pipe = OneStep(sharing(plain), DDIMScheduler())
            kinds[name] = lambda pipe=pipe: pipe(inputs.sample, inputs.text, inputs.timestep).sample
        differences = {}
        bare = kinds["plain"]()
        for kind in ("base", "plus"):
            state = state_of(run, plain, kind)
            for count in (1, MASKED):
                label = kind if count == 1 else f"{kind}, {count} masked"
                mine[label] = Ours(sharing(plain), state, inputs, kind, count)
                kinds[f"imprompt {label}"] = mine[label].step
                kinds[f"diffusers {label}"] = theirs(sharing(plain), state, inputs, kind, count)
                mine[label].step()  # the second reads what the first kept
                got, wanted = mine[label].step(), kinds[f"diffusers {label}"]()
                differences[label] = [difference(got, wanted), difference(got, bare)]
        run.add("difference to diffusers, and to plain", differences)
        run.add("eager", run.ratios(kinds))
        if run.device == "cpu":
            return
        run.attempt("launches", lambda: {name: launches(work) for name, work in kinds.items()})
        run.attempt(
            "at a change of strength", lambda: {name: launches(x.changed_step) for name, x in mine.items()}
        )
        for each in mine.values():
            each.show(STRENGTH)
        pool = torch.cuda.graph_pool_handle()
        run.attempt("graph", lambda: run.ratios({name: graphed(work, pool) for name, work in kinds.items()}))
        run.add("GiB", round(torch.cuda.max_memory_allocated() / 2**30, 1))
