"""Checks across the fields of a request: what its task needs, and what would have no effect.

Each check yields one-line findings that begin with the field's name. Checks that need to open a file are in
:mod:`imprompt.generation.inputs`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imprompt.schema.request import Request

TASKS_OF_FIELD: dict[str, tuple[str, ...]] = {
    "image": ("edit", "inpaint"),
    "mask": ("inpaint",),
    "strength": ("edit", "inpaint", "animate"),
} | dict.fromkeys(
    ("frames", "fps", "motion", "video", "context", "shared_noise", "shared_start", "noise_path"),
    ("animate",),
)
"""Field → the tasks in which it has an effect; fields that are not listed have one in every task."""
_NEEDED = {
    "image": "the picture to start from",
    "mask": "a mask, white where the picture is redrawn (--mask)",
}
"""Field → what a task that needs it is told."""


def contradictions(request: "Request") -> Iterator[str]:
    """All findings, the most important first."""
    for check in (_task, _source, _clip, _frames, _prompts, _alone, _adapters, _guidance, _speed, _compile):
        yield from check(request)


def _task(request: "Request") -> Iterator[str]:
    for name, what in _NEEDED.items():
        if request.task in TASKS_OF_FIELD[name] and getattr(request, name) is None:
            yield f"{name}: the task {request.task!r} needs {what}."
    for name, tasks in TASKS_OF_FIELD.items():
        if getattr(request, name) is not None and request.task not in tasks:
            hint = "; an image prompt's is `scale`" if name == "strength" else ""
            where = " and ".join(tasks)
            yield f"{name}: has no effect in the task {request.task!r}; it belongs to {where}{hint}."


def _source(request: "Request") -> Iterator[str]:
    """A task that starts from noise needs something that says what to draw."""
    starts_from_noise = request.image is None and request.video is None
    if starts_from_noise and not (request.prompt or request.images or request.regions or request.controls):
        yield "prompt: give a text, an image prompt, or both."


def _clip(request: "Request") -> Iterator[str]:
    if request.task == "animate":
        if request.quantize != "none":
            yield "quantize: has no effect on clips; the motion adapter's UNet cannot be quantised."
        if request.strength is not None and request.video is None:
            yield "strength: has no effect without a video to start from; an image prompt's is `scale`."
        return
    elsewhere = f"no effect in the task {request.task!r}"
    if any(prompt.at is not None or prompt.frame_curve != "constant" for prompt in request.images):
        yield f"images: at and frame_curve have {elsewhere}; they belong to animate."
    if any(control.at is not None for control in request.controls):
        yield f"controls: at has {elsewhere}; it belongs to animate."


def _frames(request: "Request") -> Iterator[str]:
    for prompt in request.images:
        last = prompt.at[-1] if isinstance(prompt.at, tuple) else 0
        if request.frames is not None and last >= request.frames:
            yield f"images: at={last} lies after the last of {request.frames} frames, which count from 0."


def _prompts(request: "Request") -> Iterator[str]:
    for number, prompt in enumerate(request.images):
        for name in prompt.in_memory:
            yield (
                f"images.{number}.{name}: a request holds names only; name the picture and hand it over in "
                "`pictures`, or use IPAdapter.set_prompt."
            )
        if isinstance(prompt.mask, tuple):
            yield (
                f"images.{number}.mask: a request names one; name an animated picture, a folder or a video "
                "that has one for each frame."
            )
    for number, region in enumerate(request.regions):
        if not isinstance(region.text, str) or not isinstance(region.mask, str):
            yield f"regions.{number}: a request holds texts and names only; use TextRegions for tensors."


def _alone(request: "Request") -> Iterator[str]:
    """Fields of image prompts where there are none."""
    if request.images:
        return
    faces_are_followed = any(control.kind == "face" for control in request.controls)
    for name in ("scale", "adapter", "face_model", "image_guidance"):
        acts = name == "face_model" and faces_are_followed
        if getattr(request, name) is not None and not acts:
            yield f"{name}: has no effect without an image prompt; give one in `images` (--image)."


def _adapters(request: "Request") -> Iterator[str]:
    """Fields that every image prompt overrides."""
    if not request.images:
        return
    if request.adapter is not None and all(prompt.adapter for prompt in request.images):
        yield "adapter: has no effect, for each image names its own."
    if request.scale is not None and all(prompt.scale is not None for prompt in request.images):
        yield "scale: has no effect, for each image has its own."


def _guidance(request: "Request") -> Iterator[str]:
    name = "guidance" if request.true_guidance is None else "true_guidance"
    scale = getattr(request, name)
    if scale is None or scale > 1:
        return
    weak = f"with {name} {scale:g}; it needs more than 1."
    if request.negative:
        yield f"negative: has no effect {weak}"
    if request.image_guidance is None:
        for number, prompt in enumerate(request.images):
            for field in ("negative", "noise"):
                if getattr(prompt, field) is not None:
                    yield f"images.{number}.{field}: has no effect {weak}"


def _speed(request: "Request") -> Iterator[str]:
    if request.speed == "balanced" and request.guidance is not None and request.guidance <= 1:
        none = f"of which there is none at {request.guidance:g}"
        yield f"speed: 'balanced' saves work of guidance, {none}; use 'exact' or 'fast'."
    if request.speed != "exact" and request.image_guidance is not None:
        yield f"image_guidance: speed '{request.speed}' computes guidance seldom; use one of the two."


def _compile(request: "Request") -> Iterator[str]:
    if request.compile == "full" and request.speed == "fast":
        yield "compile: 'full' makes the UNet one piece, and speed 'fast' leaves out parts; use 'regional'."
    if request.compile != "off" and request.offload in ("model", "sequential"):
        yield f"compile: what is compiled stays on the device, and offload '{request.offload}' moves it away."
