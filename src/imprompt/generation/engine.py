"""Requests → pictures: what the command line, Python and the server call.

An :class:`Engine` draws in four stages: it reads a request's inputs, loads its models, encodes its prompts,
and lets the ordinary diffusers pipeline draw. It keeps the last models and features, so that the next request
starts at once. Picture ``i`` of a request is the first picture of seed ``seed + i``, whatever the count.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from PIL import Image

from imprompt.adapter.encoding import FeatureCache
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.adapter.recorder import Attribution, Recorder
from imprompt.adapter.regions import TextRegions
from imprompt.encoders import face_onnx
from imprompt.errors import ModelError, UsageError
from imprompt.generation import video
from imprompt.generation.compiling import compile_failure
from imprompt.generation.control import Map, find_controls, named_controls
from imprompt.generation.drawing import draw, fresh_scheduler
from imprompt.generation.families import Base, find_base, fitting_adapter
from imprompt.generation.guided import check_guidance, guidance_notes, negative_notes
from imprompt.generation.idle import clip_notes, idle_notes
from imprompt.generation.inputs import crop_notes, read_inputs
from imprompt.generation.job import (
    Job,
    Shot,
    batches,
    changed,
    check_are_requests,
    shots_of,
    shows_pictures,
    slices,
    together_limit,
)
from imprompt.generation.loading import LOADING, Loaded, Models, format_notes, reads_faces
from imprompt.generation.pipelines import pipeline_class, takes
from imprompt.generation.provenance import fingerprints, provenance
from imprompt.generation.speed import check_speed, hurried
from imprompt.generation.steps import OnStep, Step, reported
from imprompt.generation.text import text_notes
from imprompt.schema.request import Request


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


class Engine:
    """Draws requests one after the other; keeps one base and the last adapters loaded.

    Several threads may share an engine: they wait for each other. :meth:`release` gives the memory back.
    """

    def __init__(self, *, quiet: bool = True, at_once: int | None = None) -> None:
        if at_once is not None and at_once < 1:
            raise UsageError(f"at_once is {at_once}; at least one picture is drawn at once.")
        self.quiet = quiet
        """Whether no progress bar is shown."""
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
        check_are_requests([request])
        if explain:
            _check_explainable(request)
        with self._exclusive(request.base):
            job = self._read(request, pictures or {})
            return self._draw_jobs([job], explain, on_step)[0]

    def run_batch(
        self,
        requests: Sequence[Request],
        *,
        pictures: Mapping[str, Image.Image] | None = None,
        on_step: OnStep | None = None,
    ) -> list[Result]:
        """Draw several requests. Those that agree in all but prompts, image prompts and seed are drawn as one
        batch, each picture within 1e-4 (of the range of a pixel) of what it is alone, unless they ask to be
        ``exact``.

        In ``on_step`` pictures are counted over all requests; :attr:`Step.picture` is the batch's first. With
        it only neighbours are one batch. Raises as :meth:`run`, and then returns none of the results.
        """
        check_are_requests(requests)
        results: dict[int, Result] = {}
        total, before = sum(request.count for request in requests), 0
        with self._exclusive(requests[0].base if requests else ""):
            jobs = [self._read(request, pictures or {}) for request in requests]
            for numbers in batches(jobs, neighbours=on_step is not None):
                told = None if on_step is None else _counted_on(on_step, before, total)
                group = [jobs[number] for number in numbers]
                results |= zip(numbers, self._draw_jobs(group, False, told), strict=True)
                before += sum(job.request.count for job in group)
        return [results[number] for number in range(len(jobs))]

    @property
    def loaded(self) -> tuple[str, ...]:
        """Where the base comes from that is kept loaded, and the names of the adapters."""
        return self._models.names

    @property
    def features(self) -> FeatureCache:
        """Features of the pictures shown before, with how often they were remembered."""
        return self._models.features

    def release(self) -> None:
        """Forget the models and all features; what another thread draws is finished first."""
        if self._thread == threading.get_ident():
            self._models.release()
        else:
            with self._lock:
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
                if (failure := compile_failure(error)) is not None:
                    raise failure from error
                if not _is_of_memory(error):
                    raise
                self.release()
                raise ModelError(
                    f"memory does not suffice to draw with base '{base}': try a smaller --size, and on a GPU "
                    "--dtype float16 or --offload model."
                ) from error
            finally:
                self._thread = None

    def _read(self, request: Request, pictures: Mapping[str, Image.Image]) -> Job:
        """Fill in what the request leaves open, find its models by name, and read its pictures."""
        base = find_base(request.base)
        request = complete(request, base)
        controls = find_controls(request, base)
        check_guidance(request, base, controls)
        motion = video.find_motion(request.motion, base) if request.task == "animate" else None
        inputs = read_inputs(request, pictures, base.defaults.size, base.kind.multiple)
        return Job(base, controls, motion, inputs)

    def _draw_jobs(self, jobs: Sequence[Job], explain: bool, on_step: OnStep | None) -> list[Result]:
        """Load, encode and draw jobs that may be one batch."""
        clock = [time.perf_counter()]
        loaded = self._load(jobs)
        if explain:
            _check_recordable(loaded)
        clock.append(time.perf_counter())
        with _attached(loaded, jobs) as prompted:
            jobs = [_recorded(job, loaded) for job in jobs]
            shots = shots_of(jobs)
            most = 1 if explain else min(together_limit(jobs, loaded), self.at_once or len(shots))
            calls = slices(shots, most, loaded.pipe)
            prompted([job for job, _ in calls[0]])
            clock.append(time.perf_counter())
            notes = [tuple(_notes(job, loaded)) for job in jobs]
            watched = partial(self._watched, loaded, jobs[0], len(shots), on_step, explain)
            drawn, attributions = _draw_calls(loaded, calls, prompted, watched)
            made_with = [provenance(job, loaded) for job in jobs]
        clock.append(time.perf_counter())
        spans = [round(after - before, 3) for before, after in pairwise(clock)]
        timings = dict(zip(("load", "encode", "draw"), spans, strict=True))
        images = iter(drawn)
        return [
            Result(
                [image for _ in range(job.request.count) for image in next(images)],
                job.request,
                of_job,
                timings,
                noted,
                attributions,
                job.inputs.maps,
            )
            for job, of_job, noted in zip(jobs, made_with, notes, strict=True)
        ]

    @contextmanager
    def _watched(
        self, loaded: Loaded, job: Job, total: int, on_step: OnStep | None, explain: bool, start: int
    ) -> Iterator[list[Recorder]]:
        """While one call of the pipeline runs: its scheduler, its progress, and what records where image
        prompts act."""
        with ExitStack() as watch:
            watch.enter_context(fresh_scheduler(loaded.pipe, job.request.scheduler))
            watch.enter_context(hurried(loaded.pipe, job.request.speed))
            assert job.request.size is not None
            watch.enter_context(reported(loaded.pipe, on_step, start, total, job.request.size))
            label = "drawing" if total == 1 else f"drawing {start + 1} of {total}"
            loaded.pipe.set_progress_bar_config(disable=self.quiet, desc=label, leave=False, unit="step")
            watched = list(loaded.adapters.values())[: int(explain)]
            yield [watch.enter_context(adapter.recording()) for adapter in watched]

    def _load(self, jobs: Sequence[Job]) -> Loaded:
        first = jobs[0]
        names = list(dict.fromkeys(name for job in jobs for name in job.adapters))
        return self._models.load(first.request, first.base, first.controls, first.motion, names)


def _draw_calls(
    loaded: Loaded,
    calls: list[list[Shot]],
    prompted: Callable[[Sequence[Job]], None],
    watched: Callable[[int], AbstractContextManager[list[Recorder]]],
) -> tuple[list[list[Image.Image]], tuple[Attribution, ...]]:
    """The pictures of all calls of the pipeline; halves of them where memory does not suffice."""
    images: list[list[Image.Image]] = []
    attributions: list[Attribution] = []
    while calls:
        some = calls.pop(0)
        prompted([job for job, _ in some])
        try:
            with watched(len(images)) as recorders:
                images += draw(loaded, some)
        except (MemoryError, RuntimeError) as error:
            if len(some) == 1 or not _is_of_memory(error):
                raise
            most = len(some) // 2
            calls = [each[at : at + most] for each in (some, *calls) for at in range(0, len(each), most)]
        else:
            attributions += [_in_order(recorder.result(), some[0][0]) for recorder in recorders]
    return images, tuple(attributions)


def generate(request: Request, *, pictures: Mapping[str, Image.Image] | None = None) -> Result:
    """Draw one request with an :class:`Engine` of its own. For several, keep one engine: it keeps the
    models."""
    return Engine().run(request, pictures=pictures)


def complete(request: Request, base: Base) -> Request:
    """The request with everything that it leaves open filled in from the base. Raises
    :class:`UsageError`."""
    check_speed(request, base)
    defaults = base.defaults
    names = ("steps", "guidance", "scheduler")
    changes: dict[str, object] = {
        name: getattr(defaults, name) for name in names if getattr(request, name) is None
    }
    changes["seed"] = secrets.randbelow(2**32) if request.seed is None else request.seed
    if request.task == "animate":
        changes |= video.clip_defaults(request, video.find_motion(request.motion, base))
    elif request.task != "generate":
        changes["strength"] = _strength(request, base)
    if request.controls:
        changes["controls"] = named_controls(request, base)
    filled = request.replace(**changes, **_completed_prompts(request, base))
    if filled.strength is not None and base.kind.drawn_steps(filled.steps or 0, filled.strength) < 1:
        raise UsageError(
            f"strength: {filled.strength:g} of {filled.steps} steps is less than one; nothing would be drawn."
        )
    return filled


def _strength(request: Request, base: Base) -> float | None:
    """The share of the schedule to redraw; ``None`` on a base that sees the picture beside the noise."""
    if not takes(pipeline_class(base, request.task), "strength"):
        if request.strength is not None:
            raise UsageError(
                f"strength: base '{base.name}' draws anew what the text says of the picture; leave it out."
            )
        return None
    return request.strength or (0.6 if request.task == "edit" else 1.0)


def _completed_prompts(request: Request, base: Base) -> dict[str, object]:
    """The adapters' names, and the strength of image prompts that leave it open."""
    if not request.images:
        return {}
    changes: dict[str, object] = {
        "images": tuple(
            prompt
            if prompt.adapter is None
            else prompt.replace(adapter=fitting_adapter(prompt.adapter, base))
            for prompt in request.images
        )
    }
    if not all(prompt.adapter for prompt in request.images):
        changes["adapter"] = fitting_adapter(request.adapter, base)
    if request.scale is None and any(prompt.scale is None for prompt in request.images):
        changes["scale"] = 0.6 if request.prompt else 1.0
    return changes


def _check_explainable(request: Request) -> None:
    if not request.images:
        raise UsageError("explain: there is no image prompt to explain; give one in `images`.")
    if request.task == "animate":
        raise UsageError("explain: it is for stills; draw one with generate.")
    if request.speed == "fast":
        raise UsageError("explain: at speed 'fast' most layers do not run at each step; use 'exact'.")


def _check_recordable(loaded: Loaded) -> None:
    """Raise :class:`UsageError` for an adapter whose tokens cannot be told from the text's while drawing."""
    for name, adapter in loaded.adapters.items():
        if adapter.projection.variant.beside_text:
            raise UsageError(
                f"explain: the base reads the tokens of adapter '{name}' among its text's, so that nobody "
                "can tell where they acted; leave explain out, or show the picture to another adapter."
            )


def _in_order(found: Attribution, job: Job) -> Attribution:
    """Measurements with the prompts in the request's order; they were set adapter by adapter."""
    prompts = job.inputs.prompts
    order = [n for name in job.adapters for n, prompt in enumerate(prompts) if prompt.adapter == name]
    order = order[: len(found.maps)]  # the last may not have acted

    def placed(values: torch.Tensor) -> torch.Tensor:
        whole = values.new_zeros(max(order) + 1, *values.shape[1:])
        whole[order] = values
        return whole

    return replace(found, strength=placed(found.strength), maps=placed(found.maps))


def _counted_on(on_step: OnStep, before: int, total: int) -> OnStep:
    """``on_step`` for a part of several drawings, of which ``before`` pictures are drawn already."""

    def told(step: Step) -> None:
        on_step(replace(step, picture=before + step.picture, pictures=total))

    return told


def _recorded(job: Job, loaded: Loaded) -> Job:
    """The job with the fingerprints of its models, and of a clip in windows their length."""
    known = {"fingerprints": fingerprints(job, loaded.adapters)}
    if job.motion is None:
        return changed(job, **known)
    length, frames = video.window_length(loaded.pipe, job.request), job.request.frames or 0
    return changed(job, context=length if frames > length else job.request.context, **known)


# ---- encoding


@contextmanager
def _attached(loaded: Loaded, jobs: Sequence[Job]) -> Iterator[Callable[[Sequence[Job]], None]]:
    """While open, the adapters and text regions are on the pipeline. Yields what prompts a batch, one job a
    picture; a batch like the one before costs nothing."""
    texts, before = TextRegions(), list[Job]()

    def prompted(batch: Sequence[Job]) -> None:
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
            if adapter.prompt_encoder.borrowed is not None:
                adapter.prompt_encoder.borrowed.files = jobs[0].base.encoder_files
            adapter.set_guidance(jobs[0].request.image_guidance)
            if any(shows_pictures(job, name) for job in jobs):
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


def _notes(job: Job, loaded: Loaded) -> list[str]:
    whole = [name for name, adapter in loaded.adapters.items() if _reads_all(job, name, adapter)]
    notes = [*job.inputs.notes, *crop_notes(job.inputs, whole), *format_notes(loaded.device, loaded.dtype)]
    for name, adapter in loaded.adapters.items():
        if shows_pictures(job, name) and (reader := adapter.face_embedder) is not None:
            note = face_onnx.licence_note(reader.space)
            notes += [note] if note else []
    notes += [*text_notes(job.request, loaded.pipe), *negative_notes(job, loaded.adapters)]
    notes += guidance_notes(job, loaded.pipe)
    return notes + idle_notes(job, loaded) + clip_notes(job, loaded)


def _reads_all(job: Job, name: str, adapter: IPAdapter) -> bool:
    """Whether an adapter reads all of a picture: a face wherever it is, or SigLIP, which squashes."""
    if reads_faces(adapter):
        return True
    encoder = adapter.image_encoder if shows_pictures(job, name) else None
    return encoder is not None and encoder.is_siglip


def _is_of_memory(error: Exception) -> bool:
    """Whether torch or the system ran out of memory; on the CPU and on mps torch only says so in words."""
    message = str(error).lower()
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(
        words in message for words in ("out of memory", "can't allocate memory")
    )
