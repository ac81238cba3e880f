"""Request → pictures: what the command line, Python and (later) the server call.

An :class:`Engine` fills in what a request leaves open, reads its pictures, shows them to the base through
the adapter, and lets the ordinary diffusers pipeline draw. It keeps the last base and adapter, and features
by picture content, so that the next request starts at once. Every picture is drawn alone with a generator of
its own: number ``i`` is the first picture of seed ``seed + i``, whatever the count.
"""

import hashlib
import platform
import secrets
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.adapter.prompt import EncodedFaces, EncodedPictures, ImagePrompt
from imprompt.adapter.recorder import Attribution
from imprompt.adapter.regions import TextRegion, TextRegions
from imprompt.encoders import face as faces
from imprompt.encoders.features import is_saved, joined, shown_name
from imprompt.encoders.framing import encode, noisy
from imprompt.encoders.images import content_hash, frame_count, load_image, load_mask
from imprompt.errors import InputError, ModelError, UsageError, first_line
from imprompt.generation import video
from imprompt.generation.annotate import annotate_frames
from imprompt.generation.control import (
    Control,
    Map,
    check_fits,
    control_call,
    controlled,
    find_controls,
    load_net,
    named_controls,
)
from imprompt.generation.extras import add_embeddings, add_loras
from imprompt.generation.families import (
    Base,
    find_adapter,
    find_base,
    for_task,
    load,
    load_adapter,
    scheduler_for,
)
from imprompt.generation.steps import OnStep, Step, reported
from imprompt.schema import options
from imprompt.schema.request import ImageRef, Request, randomness

_KEPT_FEATURES = 64  # pictures whose features are remembered
_LOST = 0.15  # share of a picture that may be cropped away unsaid
_ASPECT = 0.02  # how far a mask's proportions may be from its picture's


@dataclass(frozen=True)
class Result:
    """Pictures, the complete request that draws them again, and with what and how fast they were drawn."""

    images: list[Image.Image]
    request: Request
    """With everything filled in: seed, defaults, hashes of the pictures that were read."""
    provenance: dict[str, str]
    """Versions, device, number format, fingerprints of base and adapter."""
    timings: dict[str, float]
    """Seconds: load, encode, draw."""
    notes: tuple[str, ...] = ()
    """What the user should know, such as that a picture was cropped."""
    attributions: tuple[Attribution, ...] = ()
    """Where each image prompt acted, one a picture, when it was asked for."""
    maps: tuple[Map, ...] = ()
    """What each of the request's controls followed, of the drawn size; one a frame where it moved."""


@dataclass
class _Shown:
    """The pictures of one request, decoded."""

    prompts: dict[str, Image.Image] = field(default_factory=dict)
    masks: dict[str, Image.Image] = field(default_factory=dict)
    controls: dict[str, list[Image.Image]] = field(default_factory=dict)
    """One picture, or as many as the clip has frames."""
    start: Image.Image | None = None
    region: Image.Image | None = None
    """Where to inpaint; white is drawn anew."""
    films: dict[str, list[Image.Image]] = field(default_factory=dict)
    """What has frames: pictures and masks per frame."""
    film: list[Image.Image] | None = None
    """The video to start from, and its frames a second."""
    fps: float | None = None
    still: list[str] = field(default_factory=list)
    """Animated pictures of which the first frame was taken."""

    def mask(self, name: str) -> Image.Image | list[Image.Image]:
        """The mask of that name, or its frames."""
        return self.films[name] if name in self.films else self.masks[name]


class Engine:
    """Draws requests one after the other; keeps one base and one adapter loaded.

    Not for several threads at once. :meth:`release` gives the memory back.
    """

    def __init__(self, *, quiet: bool = True) -> None:
        self.quiet = quiet
        """Whether no progress bar is shown."""
        self._pipes: dict[str, Any] = {}
        self._nets: dict[str, Any] = {}
        self._loaded: tuple[str, ...] | None = None
        self._adapters: dict[str, IPAdapter] = {}
        self._moving: tuple[str, Any] | None = None
        """The last motion adapter's name and its pipeline."""
        self._face_model: str | None = None
        self._features: OrderedDict[tuple[str, ...], EncodedPictures | EncodedFaces] = OrderedDict()

    def run(
        self,
        request: Request,
        *,
        pictures: Mapping[str, Image.Image] | None = None,
        explain: bool = False,
        on_step: OnStep | None = None,
    ) -> Result:
        """Draw a request. Names in it are looked up in ``pictures`` first, then as files. With ``explain`` it
        is measured where each image prompt acts (:attr:`Result.attributions`), which draws the same and takes
        longer. ``on_step`` is called after each denoising step; what it raises ends the drawing.

        Raises :class:`InputError` for pictures that cannot be used, :class:`UsageError` and
        :class:`ModelError` for what does not fit together, and :class:`ModelError` when a picture comes out
        as NaN or empty, or memory does not suffice; nothing stays attached to the base then.
        """
        try:
            return self._run(request, pictures or {}, explain, on_step)
        except (MemoryError, RuntimeError) as error:
            if not _of_memory(error):
                raise
            self.release()
            raise ModelError(
                f"memory does not suffice to draw with base '{request.base}': try a smaller --size, and on a "
                "GPU --dtype float16 or --offload model."
            ) from error

    def run_batch(
        self,
        requests: Sequence[Request],
        *,
        pictures: Mapping[str, Image.Image] | None = None,
        on_step: OnStep | None = None,
    ) -> list[Result]:
        """Draw several requests; each result is that of :meth:`run`. In ``on_step`` pictures are counted over
        all requests.

        Raises as :meth:`run`, and then returns none of the results.
        """
        total, before, results = sum(request.count for request in requests), 0, []
        for request in requests:
            told = None if on_step is None else _counted_on(on_step, before, total)
            results.append(self.run(request, pictures=pictures, on_step=told))
            before += request.count
        return results

    def release(self) -> None:
        """Forget the base, the adapter and all features."""
        self._pipes, self._nets, self._loaded, self._adapters = {}, {}, None, {}
        self._moving = None
        self._features.clear()

    # ---- private

    def _run(
        self, request: Request, pictures: Mapping[str, Image.Image], explain: bool, on_step: OnStep | None
    ) -> Result:
        clock = [time.perf_counter()]
        if explain and not request.images:
            raise UsageError("explain: there is no image prompt to explain; give one in `images`.")
        if explain and request.task == "animate":
            raise UsageError("explain: it is for stills; draw one with generate.")
        base = find_base(request.base)
        request = complete(request, base)
        controls = find_controls(request, base)
        shown, hashes = _read(request, pictures)
        request = request.replace(hashes=hashes)
        if shown.film is not None:
            shown.film, fps = video.fitted(shown.film, shown.fps, request)
            request = request.replace(frames=len(shown.film), fps=fps)
            if request.video in shown.controls:  # followed where it is redrawn
                shown.controls[request.video] = shown.film
        video.check_counts(request, shown.films, shown.controls)
        device = _device(request)
        dtype = _dtype(request, device)
        size, notes = _size(request, base, shown)
        notes += _cropped(request, shown)
        request = request.replace(size=size)
        maps = tuple(_map(ref.kind, shown.controls[ref.path], size) for ref in request.controls)
        extras = (request.quantize, repr(request.loras), repr(request.embeddings))
        self._keep_only((base.source, str(device), str(dtype), request.offload, *extras))
        # The adapter first: it is small, and what is wrong with it is said before gigabytes are read.
        adapters = self._load_adapters(request)
        pipe = self._pipe(base, request, device, dtype)
        if controls:
            pipe = self._controlled(pipe, base, controls, request, device, dtype)
        if request.task == "animate":
            request = request.replace(context=video.window(pipe, request))
        clock.append(time.perf_counter())
        own = pipe.scheduler
        attributions: list[Attribution] = []
        texts = TextRegions()
        try:
            for name, adapter in adapters.items():
                adapter.attach(pipe)
                adapter.set_guidance(request.image_guidance)
                self._show(adapter, request, shown, name)
                if shown.prompts and (reader := adapter.face_embedder) is not None:
                    note = faces.licence_note(reader.space)
                    notes += [note] if note else []
            if request.regions:
                texts.attach(pipe).set(
                    [TextRegion(ref.text, shown.mask(ref.mask), ref.feather) for ref in request.regions]
                )
            provenance = self._provenance(base, adapters, bool(shown.prompts), device, dtype)
            if request.task == "animate":
                motion = video.find_motion(request.motion, base)
                provenance["motion"] = f"{motion.name} {motion.fingerprint}"
            if controls:
                provenance["controls"] = ", ".join(f"{net.name} {net.fingerprint}" for net in controls)
            clock.append(time.perf_counter())
            call = _call(request, size, shown)
            if controls:
                call |= control_call(controls, maps, request)
            images: list[Image.Image] = []
            for index in range(request.count):
                pipe.scheduler = scheduler_for(pipe, request.scheduler)
                with reported(pipe, on_step, index, request.count):
                    if explain:
                        with next(iter(adapters.values())).recording() as recorder:
                            images.append(self._draw(pipe, call, request, index))
                        attributions.append(recorder.result())
                    elif request.task == "animate":
                        images += self._draw_clip(pipe, call, request, shown, index)
                    else:
                        images.append(self._draw(pipe, call, request, index))
        finally:
            pipe.scheduler = own
            pipe.maybe_free_model_hooks()  # a drawing that was ended leaves offloaded parts on the device
            for adapter in adapters.values():
                adapter.clear_prompt()
                adapter.set_guidance(None)
                adapter.detach()
            texts.detach()
        if request.task == "inpaint":
            assert shown.start is not None
            assert shown.region is not None
            kept = _fitted(shown.start, size)
            region = _fitted(shown.region, size)
            images = [Image.composite(image, kept, region) for image in images]
        clock.append(time.perf_counter())
        spans = [round(after - before, 3) for before, after in pairwise(clock)]
        return Result(
            images,
            request,
            provenance,
            dict(zip(("load", "encode", "draw"), spans, strict=True)),
            tuple(notes),
            tuple(attributions),
            maps,
        )

    def _keep_only(self, key: tuple[str, ...]) -> None:
        """Release what belongs to another base, place, number format or set of LoRAs."""
        if self._loaded != key:
            self.release()
            self._loaded = key

    def _pipe(self, base: Base, request: Request, device: torch.device, dtype: torch.dtype) -> Any:
        """The pipeline of the request's task on its device; other tasks of the same base share weights."""
        if request.task == "animate":
            return self._moving_pipe(base, request, device, dtype)
        if request.task not in self._pipes:
            if self._pipes:
                pipe = for_task(next(iter(self._pipes.values())), base, request.task)
            else:
                pipe = load(base, request.task, dtype, request.quantize)
                add_loras(pipe, request.loras)
                add_embeddings(pipe, request.embeddings)
            self._pipes[request.task] = _placed(pipe, request.offload, device)
        return self._pipes[request.task]

    def _controlled(
        self, pipe: Any, base: Base, controls: Sequence[Control], request: Request, device: torch.device,
        dtype: torch.dtype,
    ) -> Any:  # fmt: skip
        """The pipeline of the request's task with its controls; of the last ones the weights are kept."""
        for control in controls:
            check_fits(control, pipe.unet.config, base)
        sources = [control.source for control in controls]
        key = " ".join([request.task, *sources])
        if key not in self._pipes:
            self._pipes = {name: pipe for name, pipe in self._pipes.items() if " " not in name}
            self._nets = {source: net for source, net in self._nets.items() if source in sources}
            for control in controls:
                if control.source not in self._nets:
                    self._nets[control.source] = load_net(control, dtype)
            made = _placed(controlled(pipe, request.task, controls, self._nets), request.offload, device)
            if request.task == "animate":  # a shell around the moving UNet, which `_moving` keeps
                return made
            self._pipes[key] = made
        return self._pipes[key]

    def _moving_pipe(self, base: Base, request: Request, device: torch.device, dtype: torch.dtype) -> Any:
        motion = video.find_motion(request.motion, base)
        if self._moving is None or self._moving[0] != motion.name:
            self._moving = None
            if self._pipes:
                still = for_task(next(iter(self._pipes.values())), base, "generate")
            else:
                still = load(base, "generate", dtype)
            pipe = _placed(video.moving(still, motion, base, dtype), request.offload, device)
            self._moving = (motion.name, pipe)
        pipe = self._moving[1]
        return (
            pipe if request.video is None else _placed(video.from_video(pipe, base), request.offload, device)
        )

    def _load_adapters(self, request: Request) -> dict[str, IPAdapter]:
        """The adapters of all images by name, in order of first use."""
        names = dict.fromkeys(_adapter_of(ref, request) for ref in request.images)
        self._adapters = {name: adapter for name, adapter in self._adapters.items() if name in names}
        if request.face_model != self._face_model:
            self._adapters = {name: each for name, each in self._adapters.items() if not _reads_faces(each)}
            self._face_model = request.face_model
        for name in names:
            if name not in self._adapters:
                self._adapters[name] = _with_faces(load_adapter(name), request.face_model)
        if request.face_model is not None and not any(map(_reads_faces, self._adapters.values())):
            raise UsageError("face_model: has no effect on adapters that read whole pictures; leave it out.")
        return {name: self._adapters[name] for name in names}

    def _show(self, adapter: IPAdapter, request: Request, shown: _Shown, name: str) -> None:
        prompts = []
        for group in request.groups:
            first = group[0]
            if _adapter_of(first, request) != name:
                continue
            features, weights = self._encode(adapter, group, shown)
            prompts.append(
                ImagePrompt(
                    features=features,
                    combine=first.combine,
                    weights=weights,
                    curve=first.curve,
                    scaling=first.scaling,
                    select=first.select,
                    face=first.face,
                    s_scale=first.s_scale,
                    scale=request.scale if first.scale is None else first.scale,  # type: ignore[arg-type]
                    profile=first.profile,
                    start=first.start,
                    end=first.end,
                    mask=None if first.mask is None else shown.mask(first.mask),
                    at=self._places(group, request),
                    frame_curve=first.frame_curve,
                    feather=first.feather,
                    text=first.text,
                    negative=self._negative(adapter, first, shown),
                )
            )
        adapter.set_prompt(prompts)

    @staticmethod
    def _places(group: Sequence[ImageRef], request: Request) -> Sequence[int] | None:
        """The frames of one prompt's pictures."""
        if group[0].at == "each":
            assert request.frames is not None
            return range(request.frames)
        at = [ref.at for ref in group if isinstance(ref.at, int)]
        return at or None

    def _encode(
        self, adapter: IPAdapter, group: Sequence[ImageRef], shown: _Shown
    ) -> tuple[EncodedPictures | EncodedFaces, list[float] | None]:
        """The features of one prompt's pictures; of those that are saved, without an encoder. And each
        picture's weight: a file of several counts as so many."""
        if group[0].at == "each":
            return self._encode_pictures(adapter, shown.films[group[0].path], group[0]), None
        parts: list[Any] = []
        weights: list[float] = []
        for decoded, some in groupby(group, key=lambda ref: ref.path in shown.prompts):
            refs = list(some)
            if decoded:
                images = [shown.prompts[ref.path] for ref in refs]
                parts.append(self._encode_pictures(adapter, images, group[0]))
                weights += [ref.weight for ref in refs]
                continue
            for ref in refs:
                saved = adapter.load_features(Path(ref.path).expanduser())
                parts.append(saved)
                held = saved.embedding if isinstance(saved, EncodedFaces) else saved.pooled
                weights += [ref.weight] * len(held)
        if len(parts) == 1:
            return parts[0], weights
        return faces.joined(parts) if isinstance(parts[0], EncodedFaces) else joined(parts), weights

    def _negative(
        self, adapter: IPAdapter, ref: ImageRef, shown: _Shown
    ) -> torch.Tensor | EncodedFaces | None:
        """Features of what the unconditional half sees, where the request says so."""
        if ref.noise is not None:
            kind, strength = options.read_noise(ref.noise)
            # One noise whatever the seed: pictures are prompts, and prompts are the same for every seed.
            spoiled = noisy(shown.prompts[ref.path], kind, strength)
            found = self._encode_pictures(adapter, [spoiled], ref)
        elif ref.negative is not None:
            found, _ = self._encode(adapter, [ref.replace(path=ref.negative)], shown)
        else:
            return None
        if isinstance(found, EncodedFaces):
            return found
        return found.hidden if adapter.projection.feature == "hidden" else found.pooled

    def _encode_pictures(
        self, adapter: IPAdapter, images: list[Image.Image], first: ImageRef
    ) -> EncodedPictures | EncodedFaces:
        if _reads_faces(adapter):
            key = (adapter.checkpoint.name, str(self._face_model), first.face, *map(content_hash, images))
            if key not in self._features:
                self._features[key] = adapter.encode(images, first.framing, face=first.face)
            return self._kept(key)
        encoder = adapter.image_encoder
        if encoder is None:
            place = adapter.published_encoder
            fetch = (
                "" if place is None else f", or: hf download {place.source} --include '{place.subfolder}/*'"
            )
            raise ModelError(
                f"adapter '{adapter.checkpoint.name}' has no image encoder: none that fits lies next to it, "
                "comes with the base, or is in the hub's cache. Put an image_encoder folder beside the "
                f"adapter's file{fetch}."
            )
        key = (encoder.name, first.framing, f"{first.sharpen}", *(content_hash(image) for image in images))
        if key not in self._features:
            self._features[key] = encode(encoder, images, first.framing, sharpen=first.sharpen)  # type: ignore[arg-type]
        return self._kept(key)

    def _kept(self, key: tuple[str, ...]) -> EncodedPictures | EncodedFaces:
        """Remembered features, as the latest used; the oldest are forgotten."""
        self._features.move_to_end(key)
        while len(self._features) > _KEPT_FEATURES:
            self._features.popitem(last=False)
        return self._features[key]

    def _draw(self, pipe: Any, call: dict[str, Any], request: Request, index: int) -> Image.Image:
        assert request.seed is not None
        generator = torch.Generator().manual_seed(randomness(request.seed, index, "noise"))
        label = "drawing" if request.count == 1 else f"drawing {index + 1} of {request.count}"
        pipe.set_progress_bar_config(disable=self.quiet, desc=label, leave=False, unit="step")
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.filterwarnings("ignore", message=".*invalid value encountered in cast.*")
            pixels = pipe(**call, generator=generator, output_type="np").images[0]
        return _checked(pixels)

    def _draw_clip(
        self, pipe: Any, call: dict[str, Any], request: Request, shown: _Shown, index: int
    ) -> list[Image.Image]:
        assert request.seed is not None
        assert request.size is not None
        generator = torch.Generator().manual_seed(randomness(request.seed, index, "noise"))
        label = "drawing" if request.count == 1 else f"drawing {index + 1} of {request.count}"
        pipe.set_progress_bar_config(disable=self.quiet, desc=label, leave=False, unit="step")
        film = None if shown.film is None else [_fitted(frame, request.size) for frame in shown.film]
        return [_checked(frame) for frame in video.draw(pipe, call, request, film, generator)]

    def _provenance(
        self,
        base: Base,
        adapters: Mapping[str, IPAdapter],
        encoded: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, str]:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        said = {part: version(part) for part in ("imprompt", "torch", "diffusers", "transformers")}
        said |= {"device": f"{device} ({name})", "dtype": str(dtype).removeprefix("torch.")}
        said["base"] = f"{base.name} {base.fingerprint}"
        if adapters:
            said["adapter"] = ", ".join(adapter.checkpoint.name for adapter in adapters.values())
            # Asking for the encoder loads it, which saved features are there to avoid.
            towers = [adapter.image_encoder for adapter in adapters.values()] if encoded else []
            names = dict.fromkeys(shown_name(getattr(tower, "name", "none")) for tower in towers)
            said["encoder"] = ", ".join(names) or "none"
        return said


def _counted_on(on_step: OnStep, before: int, total: int) -> OnStep:
    """``on_step`` for a part of several drawings, of which ``before`` pictures are drawn already."""

    def told(step: Step) -> None:
        on_step(replace(step, picture=before + step.picture, pictures=total))

    return told


def _reads_faces(adapter: IPAdapter) -> bool:
    return adapter.projection.variant.embedding is not None


def _with_faces(adapter: IPAdapter, face_model: str | None) -> IPAdapter:
    """The adapter with the face model it reads photos with: the named one, or its own where that is here."""
    if _reads_faces(adapter):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the face models")  # said in the result's notes
            if face_model is not None:
                adapter.face_embedder = face_model
            else:
                _ = adapter.face_embedder  # looks where InsightFace keeps them; saved faces need none
    return adapter


def generate(request: Request, *, pictures: Mapping[str, Image.Image] | None = None) -> Result:
    """Draw one request with an :class:`Engine` of its own. For several, keep one engine: it keeps the
    models."""
    return Engine().run(request, pictures=pictures)


def complete(request: Request, base: Base) -> Request:
    """The request with everything that it leaves open filled in from the base. Raises
    :class:`UsageError`."""
    likes = base.defaults
    changes: dict[str, object] = {
        "steps": likes.steps if request.steps is None else request.steps,
        "guidance": likes.guidance if request.guidance is None else request.guidance,
        "scheduler": likes.scheduler if request.scheduler is None else request.scheduler,
        "seed": secrets.randbelow(2**32) if request.seed is None else request.seed,
    }
    if request.task == "animate":
        changes |= video.completed(request, base)
    elif request.task != "generate" and request.strength is None:
        changes["strength"] = 0.6 if request.task == "edit" else 1.0
    if request.controls:
        changes["controls"] = named_controls(request.controls, base)
    if request.images:
        if not all(ref.adapter for ref in request.images):
            changes["adapter"] = find_adapter(request.adapter, base)
        changes["images"] = tuple(
            ref if ref.adapter is None else ref.replace(adapter=find_adapter(ref.adapter, base))
            for ref in request.images
        )
        if request.scale is None:
            changes["scale"] = 0.6 if request.prompt else 1.0
    filled = request.replace(**changes)
    if filled.strength is not None and int(filled.steps * filled.strength) < 1:  # type: ignore[operator]
        raise UsageError(
            f"strength: {filled.strength:g} of {filled.steps} steps is less than one; nothing would be drawn."
        )
    return filled


def _adapter_of(ref: ImageRef, request: Request) -> str:
    name = ref.adapter or request.adapter
    assert name is not None  # complete() found one
    return name


# ---- pictures in


def _read(request: Request, pictures: Mapping[str, Image.Image]) -> tuple[_Shown, dict[str, str]]:
    """All pictures decoded, and the hashes of those that are files."""
    shown, hashes = _Shown(), {}
    moving = {request.video, *(ref.path for ref in request.images if ref.at == "each")}
    if request.task == "animate":
        moving |= {*request.masks, *(ref.path for ref in request.controls if ref.at is None)}
    for name in request.files:
        if name in pictures:
            continue
        path = Path(name).expanduser()
        if not path.is_file() and not (name in moving and path.is_dir()):
            wrong = (
                f"'{name}' is a folder; a picture is expected."
                if path.is_dir()
                else f"there is no file '{name}'."
            )
            raise InputError(f"{_field(request, name)}: {wrong}")
        hashes[name] = _hash(path)
        if request.hashes.get(name, hashes[name]) != hashes[name]:
            raise InputError(
                f"'{name}' is not the picture that the request was made with (its sha256 differs); give the "
                "right one, or ask anew without the recorded hashes."
            )

    def source(name: str) -> Image.Image | Path:
        return pictures[name] if name in pictures else Path(name).expanduser()

    refs: tuple[ImageRef, ...] = request.images
    names = [name for ref in refs for name in (ref.path, ref.negative) if name is not None]
    shown.prompts = {
        name: load_image(source(name))
        for name in names
        if name not in moving and (name in pictures or not is_saved(name))
    }
    shown.still = [n for n in request.files if n not in moving and frame_count(source(n)) > 1]
    for name in dict.fromkeys(ref.path for ref in refs if ref.at == "each"):
        shown.films[name], _ = video.read_film(source(name), name)
    if request.video is not None:
        shown.film, shown.fps = video.read_film(source(request.video), request.video)
    for name in request.masks:
        if request.task == "animate" and (Path(name).is_dir() or frame_count(source(name)) > 1):
            frames, _ = video.read_film(source(name), name)
            shown.films[name] = [frame.convert("L") for frame in frames]
            continue
        shown.masks[name] = load_mask(source(name))
        if shown.masks[name].getextrema()[1] == 0:
            field_name = _field(request, name)
            raise InputError(f"{field_name}: mask '{name}' is black everywhere: it would act nowhere.")
    for name in dict.fromkeys(ref.path for ref in request.controls):
        film = name in moving and video.moves(source(name))
        shown.controls[name] = video.read_film(source(name), name)[0] if film else [load_image(source(name))]
    if request.image is not None:
        shown.start = load_image(source(request.image))
    if request.mask is not None:
        assert shown.start is not None
        shown.region = load_mask(source(request.mask))
        _check_region(shown.region, shown.start, request)
    return shown, hashes


def _field(request: Request, name: str) -> str:
    """Which field of the request names that file, such as ``images.0.mask``."""

    def places(value: object, here: str) -> Iterator[str]:
        if isinstance(value, dict | list | tuple):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in pairs:
                yield from places(inner, f"{here}.{key}" if here else f"{key}")
        elif value == name:
            yield here

    return next(places(request.model_dump(), ""), "pictures")


def _hash(path: Path) -> str:
    """sha256 of a file, or of the files of a folder in the order of their names."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(inside for inside in path.iterdir() if inside.is_file()):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _check_region(region: Image.Image, start: Image.Image, request: Request) -> None:
    if abs(region.width * start.height / (region.height * start.width) - 1) > _ASPECT:
        raise InputError(
            f"mask '{request.mask}' is {region.width}×{region.height}, picture '{request.image}' "
            f"{start.width}×{start.height}: they must have the same proportions."
        )
    if region.getextrema()[1] == 0:
        raise InputError(
            f"mask '{request.mask}' is black everywhere: nothing would be drawn. White is drawn."
        )


def _size(request: Request, base: Base, shown: _Shown) -> tuple[tuple[int, int], list[str]]:
    """Width and height to draw, and what to tell about it."""
    side = base.defaults.size
    start = shown.start if shown.film is None else shown.film[0]
    if request.size is not None:
        size = request.size
    elif start is None:
        size = (side, side)
    else:
        stretch = (side * side / (start.width * start.height)) ** 0.5
        size = (_multiple(start.width * stretch), _multiple(start.height * stretch))
    notes = []
    if start is not None and start.size != size:
        notes.append(
            f"'{request.image or request.video}' is {start.width}×{start.height}, "
            f"drawn at {size[0]}×{size[1]}"
        )
    for name, (image, *_) in shown.controls.items():
        if abs(image.width * size[1] / (image.height * size[0]) - 1) > _ASPECT:
            notes.append(
                f"control '{name}' is {image.width}×{image.height}: cropped around the centre to the "
                f"proportions of {size[0]}×{size[1]}"
            )
    if shown.region is not None and shown.region.getextrema()[0] == 255:
        notes.append(f"mask '{request.mask}' is white everywhere: all is drawn anew")
    return size, notes


def _cropped(request: Request, shown: _Shown) -> list[str]:
    """What to tell about pictures of which the encoder's centre crop leaves out much."""
    notes = [f"'{name}' is animated; its first frame is taken" for name in shown.still]
    for ref in {ref.path: ref for ref in request.images if ref.framing == "crop"}.values():
        if ref.path in shown.prompts:
            short, long = sorted(shown.prompts[ref.path].size)
            if (lost := 1 - short / long) > _LOST:
                notes.append(
                    f"'{ref.path}': {lost:.0%} lies outside the centre square that is seen; framing=pad, "
                    "squash or tile shows all of it"
                )
    return notes


def _map(kind: str, pictures: Sequence[Image.Image], size: tuple[int, int]) -> Map:
    """What a control follows, found in the picture or in each frame."""
    found = tuple(annotate_frames(kind, [_fitted(picture, size) for picture in pictures]))
    return found[0] if len(found) == 1 else found


def _multiple(side: float) -> int:
    return max(8, round(side / 8) * 8)


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cropped around the centre to the proportions of ``size`` and resampled; untouched if it is that
    size."""
    if image.size == size:
        return image
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = size[0] / scale, size[1] / scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))


# ---- the call, and pictures out


def _call(request: Request, size: tuple[int, int], shown: _Shown) -> dict[str, Any]:
    """What the diffusers pipeline is called with, but for the generator."""
    assert request.guidance is not None
    call: dict[str, Any] = {
        "prompt": request.prompt,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
    }
    if request.guidance > 1:
        call["negative_prompt"] = request.negative
    if request.task != "edit":
        call |= {"width": size[0], "height": size[1]}
    if shown.start is not None:
        call |= {"image": _fitted(shown.start, size), "strength": request.strength}
    if shown.region is not None:
        call["mask_image"] = _fitted(shown.region, size)
    return call


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


# ---- where it runs


def _of_memory(error: Exception) -> bool:
    """Whether torch or the system ran out of memory; on the CPU and on mps torch only says so in words."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(
        words in said for words in ("out of memory", "can't allocate memory")
    )


def _device(request: Request) -> torch.device:
    if request.device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(request.device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UsageError(f"device: '{request.device}' cannot be used here ({reason}).") from error
    return device


def _dtype(request: Request, device: torch.device) -> torch.dtype:
    if request.dtype != "auto":
        chosen: torch.dtype = getattr(torch, request.dtype)
        return chosen
    return torch.float32 if device.type == "cpu" else torch.float16


def _placed(pipe: Any, offload: str, device: torch.device) -> Any:
    """The pipeline on its device, whole or part by part as it is needed."""
    if offload == "none":
        return pipe.to(device)
    if device.type == "cpu":
        raise UsageError(f"offload: '{offload}' moves parts to a GPU when needed, but the device is the CPU.")
    (pipe.enable_model_cpu_offload if offload == "model" else pipe.enable_sequential_cpu_offload)(
        device=device
    )
    return pipe
