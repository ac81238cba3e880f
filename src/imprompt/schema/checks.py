"""What the fields of a request must agree on: what is missing for its task, or given without effect.

Each check yields findings in one line that begins with the field's name. All that can be told without
opening a file is told here; the rest by :mod:`imprompt.generation.inputs`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imprompt.schema.request import Request

_ANIMATE = ("frames", "fps", "motion", "video", "context", "shared_noise", "noise_path")


def contradictions(request: "Request") -> Iterator[str]:
    """All findings, the most telling first."""
    for check in (_task, _time, _frames, _prompts, _adapters, _guidance):
        yield from check(request)


def _task(request: "Request") -> Iterator[str]:
    needed = {"edit": ("image",), "inpaint": ("image", "mask")}.get(request.task, ())
    for name in ("image", "mask"):
        given = getattr(request, name) is not None
        if name in needed and not given:
            yield f"{name}: the task {request.task!r} needs one."
        if name not in needed and given:
            tasks = "edit and inpaint" if name == "image" else "inpaint"
            yield f"{name}: has no effect in the task {request.task!r}; it belongs to {tasks}."
    if request.task == "generate" and request.strength is not None:
        yield "strength: has no effect in the task 'generate'; an image prompt's is `scale`."
    from_nothing = request.task == "generate" or (request.task == "animate" and request.video is None)
    if from_nothing and not (request.prompt or request.images or request.regions or request.controls):
        yield "prompt: give a text, an image prompt, or both."


def _time(request: "Request") -> Iterator[str]:
    """What only a clip has."""
    if request.task == "animate":
        if request.quantize != "none":
            yield "quantize: clips are drawn by a UNet of their own, which is not quantised."
        if request.strength is not None and request.video is None:
            yield "strength: has no effect without a video to start from; an image prompt's is `scale`."
        return
    elsewhere = f"no effect in the task {request.task!r}"
    for name in _ANIMATE:
        if getattr(request, name) is not None:
            yield f"{name}: has {elsewhere}; it belongs to animate."
    if any(prompt.at is not None or prompt.frame_curve != "constant" for prompt in request.images):
        yield f"images: at and frame_curve have {elsewhere}; they belong to animate."
    if any(control.at is not None for control in request.controls):
        yield f"controls: at has {elsewhere}; it belongs to animate."


def _frames(request: "Request") -> Iterator[str]:
    for prompt in request.images:
        last = prompt.at[-1] if isinstance(prompt.at, tuple) else 0
        if request.frames is not None and last >= request.frames:
            yield f"images: at={last} lies behind the last of {request.frames} frames, counted from 0."


def _prompts(request: "Request") -> Iterator[str]:
    for number, prompt in enumerate(request.images):
        for name in prompt.in_memory:
            yield (
                f"images.{number}.{name}: a request holds names only; name the picture and hand it over in "
                "`pictures`, or use IPAdapter.set_prompt."
            )
    for number, region in enumerate(request.regions):
        if not isinstance(region.text, str) or not isinstance(region.mask, str):
            yield f"regions.{number}: a request holds texts and names only; use TextRegions for tensors."
    if not request.images:
        for name in ("scale", "adapter", "face_model", "image_guidance"):
            if getattr(request, name) is not None:
                yield f"{name}: has no effect without an image prompt; give one in `images`."


def _adapters(request: "Request") -> Iterator[str]:
    """What every image prompt overrules."""
    if not request.images:
        return
    if request.adapter is not None and all(prompt.adapter for prompt in request.images):
        yield "adapter: has no effect, for each image names its own."
    if request.scale is not None and all(prompt.scale is not None for prompt in request.images):
        yield "scale: has no effect, for each image has its own."


def _guidance(request: "Request") -> Iterator[str]:
    if request.guidance is None or request.guidance > 1:
        return
    weak = f"with guidance {request.guidance:g}; it needs more than 1."
    if request.negative:
        yield f"negative: has no effect {weak}"
    if request.image_guidance is None:
        for number, prompt in enumerate(request.images):
            for name in ("negative", "noise"):
                if getattr(prompt, name) is not None:
                    yield f"images.{number}.{name}: has no effect {weak}"
