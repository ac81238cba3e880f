"""Base architectures: :class:`Backbone` is one row of the table
:data:`imprompt.adapter.backbones.table.BACKBONES`.

A row has the attention sites, how to read a call of the denoiser (latents, text, timestep, grid, CFG
branches), and the processor that adds image prompts at a site. A new architecture is a new row.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from types import FrameType
from typing import Any, Literal, TypeAlias

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from imprompt.catalog import Backbone as BackboneName
from imprompt.catalog import family_of
from imprompt.errors import UsageError

BlockKind: TypeAlias = Literal["input", "middle", "output", "double", "single", "joint"]
Branch: TypeAlias = Literal["uncond", "cond", "text"]
"""One part of a guided batch. ``text`` has the cond text and the uncond image tokens (image guidance)."""


@dataclass(frozen=True)
class Site:
    """One attention layer that reads image prompts."""

    name: str
    """Module path, e.g. ``down_blocks.1.attentions.0.transformer_blocks.0.attn2``."""
    index: int
    """The number ``N`` of ``ip_adapter.N.to_k_ip.weight`` in published files."""
    block_index: int
    """Position of its block in execution order, from 0; several sites may share a block."""
    kind: BlockKind
    level: int
    """Number of times the latent has been halved, rounding up; 0 in transformers."""
    width: int
    """Width of keys and values, ``H·D``."""
    cross_dim: int
    """Width of the image tokens it reads."""

    @property
    def block(self) -> str:
        """Module path of its block, e.g. ``down_blocks.1.attentions.0`` or ``transformer_blocks.3``."""
        return block_of(self.name)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of this site's grid, for a latent (or token) grid of ``height × width``."""
        factor = 2**self.level
        return -(-height // factor), -(-width // factor)


def block_of(site: str) -> str:
    """Module path of the block of a site, by the site's."""
    parts = site.split(".")
    if parts[0].endswith("transformer_blocks"):
        return ".".join(parts[:2])
    return ".".join(parts[: 3 if parts[0] == "mid_block" else 4])


@dataclass(frozen=True)
class Grid:
    """The layout of the denoiser's tokens on the picture."""

    height: int
    width: int
    frames: int = 1
    text_tokens: int = 0
    """Text tokens in front of the image tokens where one sequence holds both (``single`` sites)."""
    reference_tokens: int = 0
    """Tokens behind the drawn picture's that belong to a reference picture (FLUX Kontext)."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one call of the denoiser that matter to image prompts."""

    latents: Tensor
    text: Tensor | None
    timestep: Tensor
    """In the scheduler's unit, one number or one a row."""


def by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``model``, by name however they were passed."""
    kind: Any = type(model)  # mypy takes no class for hashable
    return dict(zip(_parameters(kind), args, strict=False)) | dict(kwargs)


@cache
def _parameters(model: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a class's ``forward``, in order; those of the class it is derived from where
    it passes on whatever it is called with."""
    for owner in model.__mro__:
        if (forward := vars(owner).get("forward")) is not None:
            _, *found = signature(forward).parameters.values()
            if not any(each.kind is Parameter.VAR_POSITIONAL for each in found):
                return tuple(each.name for each in found)
    return ()


_NEED_IMAGES = ("text_image", "image", "image_hint", "text_image_proj", "image_proj", "ip_image_proj")
"""Configurations of diffusers' UNets that read pictures' embeddings without an IP-Adapter (Kandinsky), or by
diffusers' own."""


def refuse_diffusers_images(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` for embeddings and masks in a pipeline's call that only diffusers' own
    IP-Adapter would read."""
    config: Mapping[str, Any] = getattr(model, "config", {})
    added, attention = ((given.get(name) or {}) for name in ("added_cond_kwargs", "cross_attention_kwargs"))
    reads = {config.get("encoder_hid_dim_type"), config.get("addition_embed_type")} & {*_NEED_IMAGES}
    if "image_embeds" in added and not reads:
        said, instead = (
            "ip_adapter_image_embeds",
            "adapter.set_prompt(ImagePrompt(features=…)) before the call",
        )
    elif "ip_adapter_masks" in attention:
        said, instead = "ip_adapter_masks", "adapter.set_prompt(ImagePrompt(picture, mask=…)) before the call"
    else:
        return
    raise UsageError(f"{said}: only diffusers' own adapter reads it; write {instead}.")


@dataclass(frozen=True)
class Call:
    """The layout of one call of the denoiser. While it stays equal, the keys and values stay valid."""

    batch: int
    grid: Grid
    device: torch.device
    dtype: torch.dtype
    branches: tuple[Branch, ...]
    steady: bool = False
    """Whether each site gets every prompt, with a mask, even where strength is 0 or there is no mask: then
    the graph of a compiled denoiser fits all prompts of one length."""

    @property
    def samples(self) -> int:
        """Number of pictures drawn at once; the CFG branches of one picture count once."""
        return self.batch // len(self.branches)

    @property
    def frames(self) -> int:
        """Frames of a video; 1 for pictures."""
        return self.grid.frames


@dataclass(frozen=True, eq=False)
class Caller:
    """The pipeline whose method is calling the denoiser right now, with that method's variables."""

    pipe: Any
    variables: Mapping[str, Any]

    def value(self, name: str) -> Any:
        """The running method's variable ``name``, else the pipeline's attribute, else ``None``.

        Older pipelines keep ``do_classifier_free_guidance`` in a variable only, and some have an attribute
        beside it that says something else (Panorama: always False).
        """
        found = self.variables.get(name)
        return getattr(self.pipe, name, None) if found is None else found


def find_caller() -> Caller | None:
    """The diffusers pipeline nearest on the call stack; ``None`` in a loop of the user's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, DiffusionPipeline):
                return Caller(owner, frame.f_locals)
        frame = frame.f_back
    return None


LastCall: TypeAlias = tuple[Any, Any] | None
"""Weak references to the latents and the text of the last cond call."""


@dataclass(frozen=True, eq=False)
class Backbone:
    """One row of the table of base architectures."""

    name: BackboneName
    component: str
    """The attribute of a pipeline that holds the denoiser: ``unet`` or ``transformer``."""
    noun: str
    """Its name in messages, e.g. ``UNet``."""
    recognises: Callable[[object], bool]
    sites: Callable[[Any], tuple[Site, ...]]
    """All sites of a denoiser, in the order of published files."""
    inputs: Callable[[Mapping[str, Any]], Inputs]
    """Reads the arguments of a call, all by name (:func:`by_name`)."""
    grid: Callable[[Any, Inputs, Mapping[str, Any]], Grid]
    branches: Callable[[Inputs, Caller, LastCall], tuple[Branch, ...]]
    processor: Callable[..., Any]
    """Called with (previous processor, injection, site)."""
    wraps: tuple[type, ...]
    """Processors that compute the base's own attention, which ``processor`` may stand in for."""
    unbatched: frozenset[str] = frozenset()
    """Arguments whose first dimension is not the batch."""
    text_projection: Callable[[Any], nn.Module | None] = lambda model: None
    """The layer that projects text states to the cross-attention width before any attention reads them."""

    def describe(self, count: int, cross_dim: int) -> str:
        """Number and width of sites in words, with the architecture's name where it is known."""
        family = family_of(self.name, count, cross_dim)
        sites = "cross-attentions" if self.name == "unet" else "attentions"
        return f"{count} {sites} of width {cross_dim}" + (f" ({family.title})" if family else "")


def batched_branches(inputs: Inputs, caller: Caller, last: LastCall) -> tuple[Branch, ...]:
    """The CFG branches of a denoiser that is called with all of them in one batch, uncond first.

    A call with fewer text rows than the pipeline's ``prompt_embeds`` is one of the branches alone
    (self-attention guidance, attend-and-excite, skip-layer guidance): which one is told by comparing text.
    Raises :class:`UsageError` where the pipeline does not say whether guidance is on, or none compares equal.
    """
    branches = _branches_of(caller)
    whole, text = caller.variables.get("prompt_embeds"), inputs.text
    if not isinstance(whole, Tensor) or text is None or len(branches) == 1 or len(text) >= len(whole):
        return branches
    parts = whole.chunk(len(branches)) if len(whole) == len(branches) * len(text) else ()
    alike = {b for b, part in zip(branches, parts, strict=False) if torch.equal(part, text)}
    if len(alike) != 1:
        raise UsageError(
            f"{type(caller.pipe).__name__} calls its denoiser with {len(text)} rows of text beside a guided "
            f"batch of {len(whole)}, and its cond and uncond rows cannot be told apart; state the layout "
            "with adapter.batch(guidance=…)."
        )
    return (alike.pop(),)


def _branches_of(caller: Caller) -> tuple[Branch, ...]:
    """The CFG branches in the batches of the pipeline that is running."""
    guided = caller.value("do_classifier_free_guidance")
    if guided is None:
        raise UsageError(
            f"{type(caller.pipe).__name__} does not say whether guidance is on; state the layout of its "
            "batch with adapter.batch(guidance=…)."
        )
    if guided and caller.value("image_guidance_scale") is not None:  # InstructPix2Pix
        return ("cond", "uncond", "uncond")
    branches: tuple[Branch, ...] = ("uncond", "cond") if guided else ("cond",)
    if caller.value("do_perturbed_attention_guidance"):
        branches += ("cond",)
    views = caller.value("vb_size") if guided else None  # Panorama's views, each with both branches
    return branches * int(views) if views else branches
