"""A request ready to be drawn, and which of them can be drawn as one batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from PIL import Image

from imprompt.errors import UsageError
from imprompt.generation import video
from imprompt.generation.control import Control
from imprompt.generation.families import Base
from imprompt.generation.inputs import Inputs
from imprompt.generation.loading import Loaded
from imprompt.generation.text import chunk_count
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request

_BATCH_PIXELS = 32 * 128 * 128
"""Pixels drawn at once on the CPU; a GPU draws sixteen times as many."""
_PIXEL_BYTES = 1500
"""Memory that decoding a pixel takes, for each byte of the number format (Stable Diffusion's VAE)."""
_OWN = {
    "prompt", "negative", "images", "regions", "scale", "adapter", "seed", "count", "hashes", "fingerprints",
}  # fmt: skip
"""Fields in which requests of one batch may differ."""
_BATCHED_NETS = ("controlnet", "union")


@dataclass(frozen=True)
class Job:
    """A complete request, and what was read and found for it."""

    base: Base
    controls: tuple[Control, ...]
    motion: video.Motion | None
    inputs: Inputs

    @property
    def request(self) -> Request:
        """The complete request."""
        return self.inputs.request

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters of its prompts, in order of first use."""
        return list(dict.fromkeys(str(prompt.adapter) for prompt in self.inputs.prompts))

    def prompts_for(self, adapter: str) -> list[ImagePrompt]:
        """The prompts that an adapter reads."""
        mine = (prompt for prompt in self.inputs.prompts if prompt.adapter == adapter)
        return [prompt.replace(adapter=None) for prompt in mine]


Shot: TypeAlias = tuple[Job, int]
"""One picture: a job, and the picture's number in it."""


def shots_of(jobs: Sequence[Job]) -> list[Shot]:
    """The pictures of jobs, one job after the other."""
    return [(job, index) for job in jobs for index in range(job.request.count)]


def changed(job: Job, **fields: object) -> Job:
    """The job with other values of its request's fields."""
    return replace(job, inputs=replace(job.inputs, request=job.request.replace(**fields)))


def shows_pictures(job: Job, adapter: str) -> bool:
    """Whether an adapter has pictures to encode, not only saved features."""
    shown = (part for each in job.prompts_for(adapter) for part in (*each.pictures, each.negative))
    return any(isinstance(part, Image.Image) for part in shown)


# ---- batches


def batches(jobs: Sequence[Job], *, neighbours: bool) -> list[list[int]]:
    """Numbers of the jobs that can be drawn as one batch each; of ``neighbours`` alone, or of all."""
    found: list[tuple[object, list[int]]] = []
    for number, job in enumerate(jobs):
        kind = _agreement(job)
        known = found[-1:] if neighbours else found
        batch = next((numbers for other, numbers in known if other == kind), None)
        if batch is None:
            found.append((kind, [number]))
        else:
            batch.append(number)
    return [numbers for _, numbers in found]


def _agreement(job: Job) -> object:
    """Equal for jobs that can be drawn as one batch; jobs that cannot are equal to none."""
    request = job.request
    if request.exact or request.task == "animate" or request.controls:
        return object()
    start = [request.hashes.get(str(name)) for name in (request.image, request.mask)]
    shared = request.model_dump(exclude=_OWN)
    return shared, start, bool(request.images), job.adapters


def together_limit(jobs: Sequence[Job], loaded: Loaded) -> int:
    """How many pictures are drawn at once: as many as their size lets expect memory for."""
    request = jobs[0].request
    assert request.size is not None
    if request.exact or request.task == "animate":
        return 1
    if any(control.net not in _BATCHED_NETS for control in jobs[0].controls):
        return 1
    if any(adapter.lora is not None for adapter in loaded.adapters.values()):
        return 1  # a face's LoRA acts on whole rows of the batch
    pixels = _BATCH_PIXELS * (1 if loaded.device.type == "cpu" else 16)
    if loaded.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(loaded.device)
        pixels = min(pixels, free // (_PIXEL_BYTES * loaded.dtype.itemsize))
    return max(1, pixels // (request.size[0] * request.size[1]))


def slices(shots: Sequence[Shot], size: int, pipe: Any) -> list[list[Shot]]:
    """The pictures of each call of the pipeline: at most ``size`` neighbours with texts of one length."""
    found: list[list[Shot]] = []
    before = -1
    for job, index in shots:
        chunks = chunk_count(pipe, job.request.prompt, job.request.negative)
        if not found or len(found[-1]) == size or chunks != before:
            found.append([])
        found[-1].append((job, index))
        before = chunks
    return found


def check_are_requests(values: Sequence[object]) -> None:
    """Raise :class:`UsageError` for anything but requests."""
    for value in values:
        if not isinstance(value, Request):
            raise UsageError(
                f"a Request is expected, not a {type(value).__name__}: "
                "Request(prompt='a cat', images=['a.png'])."
            )
