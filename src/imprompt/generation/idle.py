"""Image prompts and fields of clips that cannot act in a run, by its real steps and the base's real layers.

Zero strength that was asked for as such is no finding; all else that leaves a prompt without effect is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from PIL import Image

from imprompt.adapter.frames import Track
from imprompt.adapter.injection import find_denoiser
from imprompt.adapter.schedule import Clock, curve_at
from imprompt.generation.families import Kind
from imprompt.generation.job import Job
from imprompt.generation.loading import Loaded
from imprompt.generation.pipelines import scheduler_for
from imprompt.generation.video import in_windows
from imprompt.schema import options
from imprompt.schema.profiles import layer_weights
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request


def idle_notes(job: Job, loaded: Loaded) -> list[str]:
    """One note for each prompt that cannot act: where it names itself, and why; and one if none is there for
    an option that acts on adapters alone."""
    request, prompts = job.request, job.inputs.prompts
    if not prompts:
        idle = "offload 'adapter' has no effect: there is no image prompt, so no adapter and no image encoder"
        return [idle] if request.offload == "adapter" else []
    steps = cache(partial(_step_fractions, request, job.base.kind, loaded))
    found = find_denoiser(loaded.pipe)
    assert found is not None  # an adapter fits it
    backbone, denoiser = found
    sites = backbone.sites(denoiser)
    notes = []
    for number, prompt in enumerate(prompts):
        reason = _idle_in_time(prompt, steps)
        layers = loaded.adapters[str(prompt.adapter)].sites_of(sites)
        if layers and not any(layer_weights(prompt.profile, layers).weights):
            reason = "its profile is 0 in every layer"
        over_frames = Track(curve=options.read_curve(prompt.frame_curve))
        if request.frames and not any(over_frames.factors(request.frames)):
            reason = "its frame_curve is 0 in every frame"
        if reason and prompt.scale != 0:
            notes.append(f"images.{number} has no effect: {reason}")
        notes += [f"images.{number}.{said}" for said in _idle_of_one(prompt)]
    return notes


def clip_notes(job: Job, loaded: Loaded) -> list[str]:
    """A note for each field of a clip that cannot act in this run."""
    request = job.request
    if request.task != "animate":
        return []
    assert job.motion is not None
    known = job.motion.defaults
    notes = list(_noise_notes(request, _step_fractions(request, job.base.kind, loaded), known))
    if request.context is not None and not in_windows(request):
        notes.append(
            f"context {request.context} has no effect: the clip's {request.frames} frames are drawn in one "
            "window (smaller windows, or more frames, are drawn one after the other)"
        )
    return notes


def _noise_notes(request: Request, steps: Sequence[float], known: Mapping[str, Any]) -> Iterator[str]:
    """How frames share noise, where it makes no difference; ``known`` has the motion adapter's values."""

    def called(field: str) -> str:
        """The field's name and value; whose it is, if the motion adapter has the same."""
        value = getattr(request, field)
        shown = value if isinstance(value, str) else f"{value:g}"
        return f"{field} {shown} (the motion adapter's)" if known.get(field) == value else f"{field} {shown}"

    shared = request.shared_start or 0.0
    if shared and steps[0] >= shared:
        yield (
            f"{called('shared_start')} has no effect: drawing begins at {steps[0]:.2f} of the schedule (more "
            "steps begin earlier, and so does more strength with a video)"
        )
    if shared > steps[-1]:
        why = f"all {len(steps)} steps lie before {called('shared_start')}, where frames share all noise"
        usual: dict[str, object] = {"shared_noise": 0.0, "noise_path": "apart"}
    elif request.shared_noise == 1:
        why = f"with {called('shared_noise')} frames have all noise in common"
        usual = {"noise_path": "apart"}
    else:
        return
    for field, value in usual.items():
        if getattr(request, field) != known.get(field, value):
            yield f"{called(field)} has no effect: {why}"


def _idle_of_one(prompt: ImagePrompt) -> Iterator[str]:
    """Options that say how several pictures go together, on a prompt that has one."""
    if isinstance(prompt.at, tuple) and len(prompt.at) == 1:
        yield "at has no effect: a single picture is shown in every frame; several blend from place to place"
    single = len(prompt.pictures) == 1 and isinstance(prompt.pictures[0], Image.Image)
    if single and prompt.combine != "concat" and set(prompt.weights or (1.0,)) == {1.0}:
        yield f"combine has no effect: '{prompt.combine}' of a single picture is that picture"


def _step_fractions(request: Request, kind: Kind, loaded: Loaded) -> list[float]:
    """The fraction of the schedule at each step that the request really draws; 0 is pure noise."""
    assert request.steps is not None
    scheduler = scheduler_for(loaded.pipe, request.scheduler)
    # Dynamic shifting moves the noise levels, not the number of steps, by which its schedulers are read.
    shifted = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(request.steps, **shifted)
    timesteps = scheduler.timesteps.float().cpu()
    if request.strength is not None:
        drawn = kind.drawn_steps(request.steps, request.strength)
        timesteps = timesteps[(request.steps - drawn) * scheduler.order :]
    return Clock.of(scheduler, timesteps.device).fraction(timesteps).tolist()


def _idle_in_time(prompt: ImagePrompt, fractions: Callable[[], Sequence[float]]) -> str:
    """Why none of the steps sees the prompt; empty if one does."""
    if prompt.start <= 0 and prompt.end >= 1 and prompt.curve == "constant":
        return ""
    steps = fractions()
    first = prompt.start if prompt.start > 0 else float("-inf")
    last = prompt.end if prompt.end < 1 else float("inf")
    inside = [step for step in steps if first <= step < last and prompt.start < prompt.end]
    window = f"from start {prompt.start:g} to end {prompt.end:g}"
    if not inside:
        return (
            f"none of the {len(steps)} steps, which run from {steps[0]:.2f} to {steps[-1]:.2f} of the "
            f"schedule, lies {window}"
        )
    if not curve_at(options.read_curve(prompt.curve), torch.tensor(inside)).any():
        return f"its curve is 0 at each of the {len(inside)} steps {window}"
    return ""
