"""Guidance of a request: what the base's pipeline can follow, its arguments, and what has no effect.

A guidance-distilled base (FLUX) takes ``guidance`` as an input of the model. Classifier-free guidance, which
reads the negative text and pictures, is then ``true_guidance``, diffusers' ``true_cfg_scale``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import UsageError
from imprompt.generation.control import Control, controlled_class
from imprompt.generation.families import Base
from imprompt.generation.job import Job
from imprompt.generation.pipelines import pipeline_class, takes
from imprompt.schema.request import Request


def is_guided(request: Request, base: Base) -> bool:
    """Whether the negative is read: classifier-free guidance is above 1."""
    scale = request.true_guidance if base.kind.distilled else request.guidance
    return (scale or 0.0) > 1


def check_guidance(request: Request, base: Base, controls: Sequence[Control] = ()) -> None:
    """Raise :class:`UsageError` for guidance or a negative text that the base's pipeline does not follow."""
    if not base.kind.distilled:
        if request.true_guidance is not None:
            raise UsageError(
                f"true_guidance: base '{base.name}' is not guidance-distilled; its scale is `guidance`."
            )
        return
    guided = is_guided(request, base)
    if not (guided or request.negative):
        return
    field = "true_guidance" if guided else "negative"
    plain = pipeline_class(base, request.task)
    pipeline = controlled_class(controls[0], request.task, plain) if controls else plain
    if not takes(pipeline, "true_cfg_scale"):
        raise UsageError(
            f"{field}: diffusers' {pipeline} has the distilled guidance alone and reads no negative; "
            "leave it out."
        )
    if not guided:
        raise UsageError(
            f"negative: base '{base.name}' is guidance-distilled and reads it with true_guidance above 1 "
            "alone, at twice the work; set that, or leave the negative out."
        )


def guidance_arguments(request: Request, base: Base, negatives: Sequence[str]) -> dict[str, Any]:
    """The pipeline's arguments for guidance, with one negative text for each picture."""
    call: dict[str, Any] = {"guidance_scale": request.guidance}
    if is_guided(request, base):
        call["negative_prompt"] = list(negatives) if len(negatives) > 1 else negatives[0]
        if base.kind.distilled:
            call["true_cfg_scale"] = request.true_guidance
    return call


def negative_notes(job: Job, adapters: Mapping[str, IPAdapter]) -> list[str]:
    """A note for each image prompt whose negative is not read."""
    notes = []
    off = not is_guided(job.request, job.base) and job.request.image_guidance is None
    for number, prompt in enumerate(job.inputs.prompts):
        field = "noise" if prompt.noise is not None else "negative"
        if getattr(prompt, field) is None:
            continue
        if not adapters[str(prompt.adapter)].shows_uncond:
            notes.append(f"images.{number}.{field} has no effect: its adapter shows the negative no picture")
        elif off:
            notes.append(
                f"images.{number}.{field} has no effect: this base reads it with true_guidance above 1"
            )
    return notes


def guidance_notes(job: Job, pipe: Any) -> list[str]:
    """A note where the guidance that was asked for is no input of a distilled transformer (FLUX.1
    [schnell])."""
    asked, usual = job.request.guidance, job.base.defaults.guidance
    if not job.base.kind.distilled or asked in (0, usual) or pipe.transformer.config.guidance_embeds:
        return []
    return [f"guidance: {asked:g} has no effect: this model was trained to draw without"]
