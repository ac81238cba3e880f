"""Requests → pictures: what the command line, Python and the server call.

An :class:`Engine` draws in four stages: it reads a request's inputs, loads its models, encodes its prompts,
and lets the ordinary diffusers pipeline draw. It keeps the last models and features, so that the next request
starts at once. Picture ``i`` of a request is the first picture of seed ``seed + i``, whatever the count.
"""

import platform
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.adapter.recorder import Attribution
from imprompt.adapter.regions import TextRegions
from imprompt.encoders import face as faces
from imprompt.encoders.features import shown_name
from imprompt.errors import ModelError, UsageError
from imprompt.generation import video
from imprompt.generation.control import Control, Map, control_call, find_controls, named_controls
from imprompt.generation.families import (
    Base,
    find_adapter,
    find_base,
    guidance_arguments,
    scheduler_for,
)
from imprompt.generation.identity import face_controls
from imprompt.generation.idle import idle_notes
from imprompt.generation.inputs import Inputs, read_inputs
from imprompt.generation.loading import LOADING, Loaded, Models
from imprompt.generation.steps import OnStep, Step, reported
from imprompt.generation.text import chunk_count, cut_words, in_chunks, text_arguments
from imprompt.io import fingerprint, seed_for
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request

_BATCH_PIXELS = 32 * 128 * 128
"""Pixels drawn at once on the CPU; a GPU draws sixteen times as many."""
_BATCHED = ("generate", "edit", "inpaint")


@dataclass(frozen=True)
class Result:
    """Pictures, the complete request that draws them again, and with what and how fast they were drawn."""

    images: list[Image.Image]
    request: Request
    """With everything filled in: seed, defaults, hashes of pictures and fingerprints of models."""
    provenance: dict[str, str]
    """Versions, device, number format, fingerprints of base and adapter."""
    timings: dict[str, float]
    """Seconds: load, encode, draw. Requests drawn as one batch share them."""
    notes: tuple[str, ...] = ()
    """What the user should know, such as that a picture was cropped."""
    attributions: tuple[Attribution, ...] = ()
    """Where each image prompt acted, one a picture, when it was asked for."""
    maps: tuple[Map, ...] = ()
    """What each of the request's controls followed, of the drawn size; one a frame where it moved."""


@dataclass(frozen=True)
class _Job:
    """A complete request, and what was read and found for it."""

    base: Base
    controls: tuple[Control, ...]
    motion: video.Motion | None
    inputs: Inputs

    @property
    def request(self) -> Request:
        return self.inputs.request

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters of its prompts, in order of first use."""
        return list(dict.fromkeys(str(prompt.adapter) for prompt in self.inputs.prompts))

    def prompts_for(self, adapter: str) -> list[ImagePrompt]:
        """The prompts that an adapter reads."""
        mine = (prompt for prompt in self.inputs.prompts if prompt.adapter == adapter)
        return [prompt.replace(adapter=None) for prompt in mine]


class Engine:
    """Draws requests one after the other; keeps one base and the last adapters loaded.

    Several threads may share an engine: they wait for each other. :meth:`release` gives the memory back.
    """

    def __init__(self, *, quiet: bool = True, exact: bool = True, at_once: int | None = None) -> None:
        if at_once is not None and at_once < 1:
            raise UsageError(f"at_once is {at_once}; at least one picture is drawn at once.")
        self.quiet = quiet
        """Whether no progress bar is shown."""
        self.exact = exact
        """Whether :meth:`run` draws the pictures of one request one by one, each bit for bit as alone. Else
        they are drawn as batches, which is faster and within 1e-4 (of the range of a pixel) of that."""
        self.at_once = at_once
        """The most pictures of a batch; ``None``: as many as their size lets expect memory for."""
        self._models = Models()
        self._lock = threading.Lock()
        self._thread: int | None = None

    def run(
        self,
        request: Request,
        *,
        pictures: Mapping[str, Image.Image] | None = None,
        explain: bool = False,
        on_step: OnStep | None = None,
    ) -> Result:
        """Draw a request. Names in it are looked up in ``pictures`` first, then as files.

        With ``explain`` it is measured where each image prompt acts (:attr:`Result.attributions`), which
        draws the same and takes longer. ``on_step`` is called after each denoising step; what it raises ends
        the run. Raises :class:`InputError` for pictures that cannot be used, :class:`UsageError` and
        :class:`ModelError` for what does not fit together, and :class:`ModelError` when a picture comes out
        as NaN or empty, or memory does not suffice. Nothing stays attached to the base then.
        """
        if explain:
            _check_explainable(request)
        with self._exclusive(request.base):
            job = self._read(request, pictures or {})
            return self._draw_jobs([job], explain, on_step, together=1 if self.exact or explain else None)[0]

    def run_batch(
        self,
        requests: Sequence[Request],
        *,
        pictures: Mapping[str, Image.Image] | None = None,
        on_step: OnStep | None = None,
    ) -> list[Result]:
        """Draw several requests. Those that agree in all but prompts, image prompts and seed are drawn as one
        batch, each picture within 1e-4 (of the range of a pixel) of what :meth:`run` draws.

        In ``on_step`` pictures are counted over all requests; :attr:`Step.picture` is the batch's first.
        Raises as :meth:`run`, and then returns none of the results.
        """
        results: list[Result] = []
        total, before = sum(request.count for request in requests), 0
        with self._exclusive(requests[0].base if requests else ""):
            jobs = [self._read(request, pictures or {}) for request in requests]
            for group in _batches(jobs):
                told = None if on_step is None else _counted_on(on_step, before, total)
                results += self._draw_jobs(group, False, told, together=None)
                before += sum(job.request.count for job in group)
        return results

    @property
    def loaded(self) -> tuple[str, ...]:
        """Where the base comes from that is kept loaded, and the names of the adapters."""
        return self._models.names

    def release(self) -> None:
        """Forget the models and all features."""
        self._models.release()

    # ---- the four stages

    @contextmanager
    def _exclusive(self, base: str) -> Iterator[None]:
        """One run at a time; memory that does not suffice is given back and said."""
        if self._thread == threading.get_ident():
            raise UsageError("this engine is drawing: on_step cannot draw with it; use another engine.")
        with self._lock:
            self._thread = threading.get_ident()
            try:
                yield
            except (MemoryError, RuntimeError) as error:
                if not _is_of_memory(error):
                    raise
                self.release()
                raise ModelError(
                    f"memory does not suffice to draw with base '{base}': try a smaller --size, and on a GPU "
                    "--dtype float16 or --offload model."
                ) from error
            finally:
                self._thread = None

    def _read(self, request: Request, pictures: Mapping[str, Image.Image]) -> _Job:
        """Fill in what the request leaves open, find its models by name, and read its pictures."""
        base = find_base(request.base)
        request = complete(request, base)
        controls = find_controls(request, base)
        motion = video.find_motion(request.motion, base) if request.task == "animate" else None
        return _Job(
            base, controls, motion, read_inputs(request, pictures, base.defaults.size, base.kind.multiple)
        )

    def _draw_jobs(
        self, jobs: Sequence[_Job], explain: bool, on_step: OnStep | None, together: int | None
    ) -> list[Result]:
        """Load, encode and draw jobs that may be one batch, ``together`` pictures at a time."""
        clock = [time.perf_counter()]
        first = jobs[0]
        names = list(dict.fromkeys(name for job in jobs for name in job.adapters))
        loaded = self._models.load(first.request, first.base, first.controls, first.motion, names)
        prints = [_fingerprints(job, loaded.adapters) for job in jobs]
        if first.motion is not None:
            context = video.window_length(loaded.pipe, first.request)
            jobs = [_changed(job, context=context) for job in jobs]
        jobs = [_changed(job, fingerprints=found) for job, found in zip(jobs, prints, strict=True)]
        clock.append(time.perf_counter())
        with _attached(loaded, jobs) as prompted:
            shots = [(job, index) for job in jobs for index in range(job.request.count)]
            size = together or min(_together(jobs, loaded), self.at_once or len(shots))
            prompted([job for job, _ in next(_slices(shots, size, loaded.pipe))[1]])
            clock.append(time.perf_counter())
            notes = [_notes(job, loaded) for job in jobs]
            images: list[list[Image.Image]] = []
            attributions: list[Attribution] = []
            for start, some in _slices(shots, size, loaded.pipe):
                prompted([job for job, _ in some])
                with ExitStack() as watch:
                    watch.enter_context(_fresh_scheduler(loaded.pipe, first.request.scheduler))
                    watch.enter_context(reported(loaded.pipe, on_step, start, len(shots)))
                    watch.enter_context(face_controls(loaded.pipe, first.controls, loaded.adapters))
                    recorder = (
                        watch.enter_context(next(iter(loaded.adapters.values())).recording())
                        if explain
                        else None
                    )
                    label = "drawing" if len(shots) == 1 else f"drawing {start + 1} of {len(shots)}"
                    loaded.pipe.set_progress_bar_config(
                        disable=self.quiet, desc=label, leave=False, unit="step"
                    )
                    images += _draw(loaded.pipe, some)
                attributions += [] if recorder is None else [recorder.result()]
            provenance = [_provenance(job, loaded) for job in jobs]
        clock.append(time.perf_counter())
        spans = [round(after - before, 3) for before, after in pairwise(clock)]
        timings = dict(zip(("load", "encode", "draw"), spans, strict=True))
        drawn = iter(images)
        return [
            Result(
                [image for _ in range(job.request.count) for image in next(drawn)],
                job.request,
                made_with,
                timings,
                tuple(said),
                tuple(attributions),
                job.inputs.maps,
            )
            for job, made_with, said in zip(jobs, provenance, notes, strict=True)
        ]


def generate(request: Request, *, pictures: Mapping[str, Image.Image] | None = None) -> Result:
    """Draw one request with an :class:`Engine` of its own. For several, keep one engine: it keeps the
    models."""
    return Engine().run(request, pictures=pictures)


def complete(request: Request, base: Base) -> Request:
    """The request with everything that it leaves open filled in from the base. Raises
    :class:`UsageError`."""
    defaults = base.defaults
    changes: dict[str, object] = {
        "steps": defaults.steps if request.steps is None else request.steps,
        "guidance": defaults.guidance if request.guidance is None else request.guidance,
        "scheduler": defaults.scheduler if request.scheduler is None else request.scheduler,
        "seed": secrets.randbelow(2**32) if request.seed is None else request.seed,
    }
    if request.task == "animate":
        changes |= video.clip_defaults(request, video.find_motion(request.motion, base))
    elif request.task != "generate" and request.strength is None:
        changes["strength"] = 0.6 if request.task == "edit" else 1.0
    if request.controls:
        changes["controls"] = named_controls(request.controls, base)
    filled = request.replace(**changes, **_completed_prompts(request, base))
    if filled.strength is not None and int((filled.steps or 0) * filled.strength) < 1:
        raise UsageError(
            f"strength: {filled.strength:g} of {filled.steps} steps is less than one; nothing would be drawn."
        )
    return filled


def _completed_prompts(request: Request, base: Base) -> dict[str, object]:
    """The adapters' names, and the strength of image prompts that leave it open."""
    if not request.images:
        return {}
    changes: dict[str, object] = {
        "images": tuple(
            prompt if prompt.adapter is None else prompt.replace(adapter=find_adapter(prompt.adapter, base))
            for prompt in request.images
        )
    }
    if not all(prompt.adapter for prompt in request.images):
        changes["adapter"] = find_adapter(request.adapter, base)
    if request.scale is None and any(prompt.scale is None for prompt in request.images):
        changes["scale"] = 0.6 if request.prompt else 1.0
    return changes


def _check_explainable(request: Request) -> None:
    if not request.images:
        raise UsageError("explain: there is no image prompt to explain; give one in `images`.")
    if request.task == "animate":
        raise UsageError("explain: it is for stills; draw one with generate.")


def _changed(job: _Job, **fields: object) -> _Job:
    return replace(job, inputs=replace(job.inputs, request=job.request.replace(**fields)))


# ---- batches


def _batches(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Neighbours that can be drawn as one batch."""
    group: list[_Job] = []
    for job in jobs:
        if group and _agreement(job) != _agreement(group[0]):
            yield group
            group = []
        group.append(job)
    if group:
        yield group


def _agreement(job: _Job) -> object:
    """Equal for jobs that can be drawn as one batch; jobs that cannot are equal to none."""
    request = job.request
    if request.task not in _BATCHED or request.controls:
        return object()
    own = dict.fromkeys(("images", "regions", "hashes", "fingerprints", "scale", "adapter", "negative"))
    start = [request.hashes.get(str(name)) for name in (request.image, request.mask)]
    shared = request.model_dump(exclude={*own, "prompt", "seed", "count"})
    return shared, start, bool(request.images), job.adapters


def _together(jobs: Sequence[_Job], loaded: Loaded) -> int:
    """How many pictures are drawn at once."""
    request = jobs[0].request
    assert request.size is not None
    if request.task not in _BATCHED or request.controls:
        return 1
    if any(adapter.lora is not None for adapter in loaded.adapters.values()):
        return 1  # a face's LoRA acts on whole rows of the batch
    pixels = _BATCH_PIXELS * (1 if loaded.device.type == "cpu" else 16)
    return max(1, pixels // (request.size[0] * request.size[1]))


def _slices(
    shots: Sequence[tuple[_Job, int]], size: int, pipe: Any
) -> Iterator[tuple[int, list[tuple[_Job, int]]]]:
    """(number of the first, pictures) of each call of the pipeline: neighbours with texts of one length."""
    start, before, some = 0, -1, list[tuple[_Job, int]]()
    for number, (job, index) in enumerate(shots):
        chunks = chunk_count(pipe, job.request.prompt, job.request.negative)
        if some and (len(some) == size or chunks != before):
            yield start, some
            start, some = number, []
        some.append((job, index))
        before = chunks
    yield start, some


def _counted_on(on_step: OnStep, before: int, total: int) -> OnStep:
    """``on_step`` for a part of several drawings, of which ``before`` pictures are drawn already."""

    def told(step: Step) -> None:
        on_step(replace(step, picture=before + step.picture, pictures=total))

    return told


# ---- encoding


@contextmanager
def _attached(loaded: Loaded, jobs: Sequence[_Job]) -> Iterator[Callable[[Sequence[_Job]], None]]:
    """While open, the adapters and text regions are on the pipeline. Yields what prompts a batch, one job a
    picture; a batch like the one before costs nothing."""
    texts, before = TextRegions(), list[_Job]()

    def prompted(batch: Sequence[_Job]) -> None:
        nonlocal before
        if list(map(id, batch)) == list(map(id, before)):
            return
        alone = all(job is batch[0] for job in batch)
        samples = list(batch[:1] if alone else batch)
        for name, adapter in loaded.adapters.items():
            adapter.set_batch([job.prompts_for(name) or None for job in samples])
        if any(job.inputs.regions for job in samples):
            texts.attach(loaded.pipe).set_batch([job.inputs.regions for job in samples])
        elif before:
            texts.detach()
        before = list(batch)

    try:
        for name, adapter in loaded.adapters.items():
            adapter.attach(loaded.pipe)
            adapter.set_guidance(jobs[0].request.image_guidance)
            if any(_shows_pictures(job, name) for job in jobs):
                with LOADING:  # an encoder may be loaded
                    _ = adapter.image_encoder
        yield prompted
    finally:
        for adapter in loaded.adapters.values():
            adapter.clear_prompt()
            adapter.set_guidance(None)
            adapter.detach()
        texts.detach()
        loaded.pipe.maybe_free_model_hooks()  # a run that was ended leaves offloaded parts on the device


def _shows_pictures(job: _Job, adapter: str) -> bool:
    """Whether an adapter has pictures to encode, not only saved features."""
    shown = (part for each in job.prompts_for(adapter) for part in (*each.pictures, each.negative))
    return any(isinstance(part, Image.Image) for part in shown)


def _notes(job: _Job, loaded: Loaded) -> list[str]:
    notes = list(job.inputs.notes)
    for name, adapter in loaded.adapters.items():
        if _shows_pictures(job, name) and (reader := adapter.face_embedder) is not None:
            note = faces.licence_note(reader.space)
            notes += [note] if note else []
    return notes + _cut_notes(job, loaded.pipe) + idle_notes(job.request, job.inputs.prompts, loaded)


def _cut_notes(job: _Job, pipe: Any) -> list[str]:
    """A note for each text of which the encoder does not read the end."""
    request = job.request
    texts = [] if in_chunks(pipe) else [("prompt", request.prompt), ("negative", request.negative)]
    texts += [(f"images.{n}.text", str(each.text or "")) for n, each in enumerate(request.images)]
    texts += [(f"regions.{n}.text", str(each.text)) for n, each in enumerate(request.regions)]
    lost = ((name, cut_words(pipe, text)) for name, text in texts if text)
    return [f"{name}: the text encoder does not read its end: '{words}'" for name, words in lost if words]


# ---- drawing


@contextmanager
def _fresh_scheduler(pipe: Any, name: str | None) -> Iterator[None]:
    """While open, the pipeline has a scheduler without a past."""
    own, pipe.scheduler = pipe.scheduler, scheduler_for(pipe, name)
    try:
        yield
    finally:
        pipe.scheduler = own


def _draw(pipe: Any, shots: Sequence[tuple[_Job, int]]) -> list[list[Image.Image]]:
    """The pictures of one call of the pipeline, or a clip's frames, finished."""
    job, _ = shots[0]
    request = job.request
    generators = [torch.Generator().manual_seed(_seed(job, index)) for job, index in shots]
    if request.task == "animate":
        call = (
            _call(pipe, shots) | control_call(job.controls, job.inputs.maps, request)
            if job.controls
            else _call(pipe, shots)
        )
        frames = video.draw(pipe, call, request, job.inputs.frames, generators[0])
        return [[_checked(frame) for frame in frames]]
    call = _call(pipe, shots)
    if job.controls:
        call |= control_call(job.controls, job.inputs.maps, request)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("ignore", message=".*invalid value encountered in cast.*")
        generator = generators[0] if len(shots) == 1 else generators
        pixels = pipe(**call, generator=generator, output_type="np").images
    return [[_finished(job, _checked(one))] for (job, _), one in zip(shots, pixels, strict=True)]


def _seed(job: _Job, index: int) -> int:
    assert job.request.seed is not None
    return seed_for(job.request.seed, index)


def _call(pipe: Any, shots: Sequence[tuple[_Job, int]]) -> dict[str, Any]:
    """The arguments of the diffusers pipeline, but for the generator and controls."""
    job, _ = shots[0]
    request, inputs = job.request, job.inputs
    assert request.guidance is not None
    assert request.size is not None

    def each(values: list[Any]) -> Any:
        return values if len(shots) > 1 else values[0]

    call: dict[str, Any] = {
        "prompt": each([job.request.prompt for job, _ in shots]),
        "num_inference_steps": request.steps,
        **guidance_arguments(job.base, request.guidance, [job.request.negative for job, _ in shots]),
    }
    guided = "negative_prompt" in call
    prompts, negatives = ([getattr(job.request, name) for job, _ in shots] for name in ("prompt", "negative"))
    if (text := text_arguments(pipe, prompts, negatives if guided else None)) is not None:
        call = {
            name: value for name, value in call.items() if name not in ("prompt", "negative_prompt")
        } | text
    kind = job.base.kind
    if request.task != "edit" or kind.denoiser == "transformer":  # SD's read it from the picture
        call |= {"width": request.size[0], "height": request.size[1]}
    if inputs.start is not None:
        call["image"] = each([inputs.start] * len(shots))
        if kind.strength:
            call["strength"] = request.strength
    if inputs.region is not None:
        call["mask_image"] = each([inputs.region] * len(shots))
    return call


def _finished(job: _Job, image: Image.Image) -> Image.Image:
    """Outside an inpainted region the very pixels of the start."""
    start, region = job.inputs.start, job.inputs.region
    return image if start is None or region is None else Image.composite(image, start, region)


def _checked(pixels: np.ndarray) -> Image.Image:
    """Pixels (height, width, 3) in [0, 1] as a picture. Raises :class:`ModelError` for NaN and black."""
    if not np.isfinite(pixels).all():
        raise ModelError(
            "the picture came out as NaN, which is no picture. With float16 this is an overflow: try --dtype "
            "float32 or bfloat16. Else the weights of base or adapter are damaged."
        )
    if float(pixels.max()) == 0.0:
        raise ModelError(
            "the picture came out black everywhere, which models draw when numbers overflow. Try --dtype "
            "float32, or a smaller scale or guidance."
        )
    return Image.fromarray((pixels * 255).round().astype("uint8"))


# ---- what it was drawn with


def _fingerprints(job: _Job, adapters: Mapping[str, IPAdapter]) -> dict[str, str]:
    """A fingerprint of every model's weights. Raises :class:`ModelError` when one is not what the request was
    made with."""
    request = job.request
    found = {f"base {job.base.name}": job.base.fingerprint}
    found |= {f"control {net.name}": net.fingerprint for net in job.controls}
    if job.motion is not None:
        found[f"motion {job.motion.name}"] = job.motion.fingerprint
    for name in job.adapters:
        source = adapters[name].checkpoint.source
        if source is not None:
            found[f"adapter {name}"] = fingerprint(source)
    extras = [("lora", ref.path) for ref in request.loras]
    extras += [("embedding", ref.path) for ref in request.embeddings]
    for kind, path in extras:
        if (place := Path(path).expanduser()).exists():
            found[f"{kind} {path}"] = fingerprint(place)
    for name, known in request.fingerprints.items():
        if name in found and found[name] != known:
            raise ModelError(
                f"{name}: its weights are not those that the request was made with (fingerprint "
                f"{found[name]}, not {known}); use those, or drop the recorded fingerprints (--force)."
            )
    return found


def _provenance(job: _Job, loaded: Loaded) -> dict[str, str]:
    device = loaded.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    made_with = {part: version(part) for part in ("imprompt", "torch", "diffusers", "transformers")}
    made_with |= {
        "device": f"{device} ({machine})",
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "base": f"{job.base.name} {job.base.fingerprint}",
    }
    adapters = [loaded.adapters[name] for name in job.adapters]
    if adapters:
        made_with["adapter"] = ", ".join(adapter.checkpoint.name for adapter in adapters)
        # Asking for the encoder loads it, which saved features are there to avoid.
        used = [loaded.adapters[name] for name in job.adapters if _shows_pictures(job, name)]
        names = dict.fromkeys(shown_name(getattr(each.image_encoder, "name", "none")) for each in used)
        made_with["encoder"] = ", ".join(names) or "none"
    if job.motion is not None:
        made_with["motion"] = f"{job.motion.name} {job.motion.fingerprint}"
    if job.controls:
        made_with["controls"] = ", ".join(f"{net.name} {net.fingerprint}" for net in job.controls)
    return made_with


def _is_of_memory(error: Exception) -> bool:
    """Whether torch or the system ran out of memory; on the CPU and on mps torch only says so in words."""
    message = str(error).lower()
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(
        words in message for words in ("out of memory", "can't allocate memory")
    )
