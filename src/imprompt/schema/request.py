"""The request: one immutable record of everything that decides a picture.

It is the same for Python, the command line, HTTP and the metadata of pictures. Fields left at ``None`` take
the base's defaults when the request is drawn, so that the request inside a picture is complete and repeats
it. Nothing here imports torch or opens a file; names of models are looked up later.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from itertools import groupby
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, field_validator

from imprompt.errors import UsageError
from imprompt.io import read_json, seed_for
from imprompt.schema import options
from imprompt.schema.checks import contradictions
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.record import PathText, Record, read_flag

SCHEDULERS: dict[str, tuple[str, dict[str, object]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False}),
    "dpm++2m-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {"use_karras_sigmas": False}),
    "lcm": ("LCMScheduler", {}),
    "ddim-linear": (
        "DDIMScheduler",
        {"clip_sample": False, "timestep_spacing": "linspace", "beta_schedule": "linear", "steps_offset": 1},
    ),
}
"""Name → diffusers' class and what is set besides the base's own scheduler configuration."""

CONTROLS: dict[str, str] = {
    "canny": "edges of any picture",
    "depth": "how near each place of a photograph is",
    "pose": "the limbs of people, as OpenPose draws them",
    "lineart": "a line drawing, dark on light or light on dark",
    "scribble": "a rough drawing of a few strokes",
    "face": "eyes, nose and mouth of the largest face, for InstantID",
    "tile": "the picture itself, to be drawn anew in detail",
    "seg": "what each place of a photograph is, in ADE20K's colours",
    "frame": "animate: the picture itself, as the frame it stands `at`",
    "none": "a finished map of the kind that the model wants",
}
"""Kind of control → what is taken from the picture."""

MAX_SIDE = 4096
"""Largest width or height of a drawn picture, in pixels."""

Task = Literal["generate", "edit", "inpaint", "animate"]


class ControlRef(Record):
    """A picture whose structure the drawing follows, by a ControlNet or T2I-Adapter."""

    kind: str = Field(
        description="what is taken from it: "
        + "; ".join(f"{name}: {what}" for name, what in CONTROLS.items())
    )
    path: PathText = Field(
        description="the picture's file (or its name among `pictures`); cropped to the output's proportions. "
        "animate: a picture for all frames, or an animated picture, a folder or a video with one a frame"
    )
    scale: float = Field(
        default=1.0, ge=0, le=10, description="how strictly it is followed; 0 not, 1 as trained"
    )
    start: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of the schedule where it begins; 0: pure noise"
    )
    end: float = Field(default=1.0, gt=0, le=1, description="where it ends; 1: finished picture")
    model: str | None = Field(
        default=None,
        min_length=1,
        description="alias, folder or hub id of the ControlNet or T2I-Adapter; NAME:KIND says of a `none` "
        "map what it is to a union model; None: the base's default for the kind",
    )
    at: int | None = Field(
        default=None,
        ge=0,
        description="animate: the frame that the picture stands at, from 0, which SparseCtrl moves between",
    )

    @field_validator("kind")
    @classmethod
    def _kind_is_known(cls, value: str) -> str:
        return options.canonical("kind", value, CONTROLS)

    @field_validator("end")
    @classmethod
    def _ends_after_start(cls, end: float, info: Any) -> float:
        if end <= info.data.get("start", 0.0):
            raise ValueError(f"{end} does not lie after start ({info.data['start']})")
        return end

    def model_post_init(self, _: object) -> None:
        if self.kind == "frame" and self.at is None:
            raise UsageError("at: a frame stands somewhere in the clip; say where, such as at=0.")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``--control KIND:PATH[,OPTION=VALUE]…``; quotes go around ``"KIND:PATH"``.

        Raises :class:`UsageError` naming the kind or option that is unknown, given twice or out of range.
        """
        named, values = read_flag("--control", text, _CONTROL_OPTIONS)
        kind, _, path = named.partition(":")
        if not path:
            raise UsageError(
                f"--control '{text}': KIND:PATH is expected, such as canny:{text or 'edges.png'}; kinds are "
                f"{', '.join(CONTROLS)}."
            )
        return _parsed(cls, "--control", text, {"kind": kind, "path": path, **values})


_CONTROL_OPTIONS = tuple(name for name in ControlRef.model_fields if name not in ("kind", "path"))


_R = TypeVar("_R", bound=Record)


def _parsed(record: type[_R], flag: str, text: str, values: Mapping[str, Any]) -> _R:
    try:
        return record(**values)
    except UsageError as error:
        raise UsageError(f"{flag} '{text}': {error}") from error


def _as_prompt(value: object) -> object:
    """A path, or a list of paths, as the short form of an :class:`ImagePrompt`."""
    return (
        {"image": value} if isinstance(value, str | list | tuple) or hasattr(value, "__fspath__") else value
    )


def _as_path(value: object) -> object:
    """A path as the short form of a record with nothing but its path."""
    return {"path": str(value)} if isinstance(value, str) or hasattr(value, "__fspath__") else value


class LoraRef(Record):
    """A LoRA for the base, and how much of it."""

    path: PathText = Field(
        description="its .safetensors, folder, or owner/name[/file.safetensors] of the hub"
    )
    weight: float = Field(default=1.0, ge=-10, le=10, description="its strength; 1 is as trained")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``PATH[,weight=…]``. Raises :class:`UsageError`."""
        path, values = read_flag("--lora", text, ("weight",))
        return _parsed(cls, "--lora", text, {"path": path, **values})


class EmbeddingRef(Record):
    """A word learnt by textual inversion."""

    path: PathText = Field(description="its .safetensors, or owner/name/file.safetensors of the hub")
    token: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="how it is written in prompts; None: its own name",
    )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``PATH[,token=…]``. Raises :class:`UsageError`."""
        path, values = read_flag("--embedding", text, ("token",))
        return _parsed(cls, "--embedding", text, {"path": path, **values})


class Request(Record):
    """Everything that decides a picture: equal requests draw equal pictures on one machine.

    ``generate`` draws from text, pictures or both; ``edit`` starts from ``image``; ``inpaint`` repaints
    ``image`` where ``mask`` is white; ``animate`` draws a clip, or redraws ``video``. Each of ``images`` is
    one prompt: a path, a list of paths that share one softmax, or an :class:`ImagePrompt`; what several
    prompts contribute adds up. Raises :class:`UsageError` (one line, naming the field) for values out of
    range, unknown fields, and fields that would have no effect.
    """

    task: Task = Field(default="generate", description="generate, edit, inpaint or animate")
    prompt: str = Field(default="", max_length=20_000, description="what to draw; may be empty with images")
    negative: str = Field(default="", max_length=20_000, description="what to avoid; needs guidance above 1")
    images: tuple[Annotated[ImagePrompt, BeforeValidator(_as_prompt)], ...] = Field(
        default=(), max_length=64, description="image prompts, at most 64; each of one or several pictures"
    )
    regions: tuple[TextRegion, ...] = Field(
        default=(), max_length=16, description="places with a text of their own, at most 16"
    )
    controls: tuple[ControlRef, ...] = Field(
        default=(), max_length=8, description="pictures whose structure is followed, at most 8"
    )
    base: str = Field(
        default="emoji",
        min_length=1,
        description="the model: alias, hub id, folder or .safetensors",
    )
    adapter: str | None = Field(
        default=None, min_length=1, description="alias, file, folder or hub file; None: the base's default"
    )
    loras: tuple[Annotated[LoraRef, BeforeValidator(_as_path)], ...] = Field(
        default=(), max_length=16, description="LoRAs for the base, all active"
    )
    embeddings: tuple[Annotated[EmbeddingRef, BeforeValidator(_as_path)], ...] = Field(
        default=(), max_length=16, description="words of textual inversion the prompts may use"
    )
    face_model: PathText | None = Field(
        default=None,
        description="face adapters: folder of a face detector and recogniser (.onnx); None: the adapter's "
        "own InsightFace pack where InsightFace keeps it",
    )
    image: PathText | None = Field(default=None, description="edit, inpaint: the picture to start from")
    mask: PathText | None = Field(
        default=None, description="inpaint: white is repainted, black kept; of the picture's proportions"
    )
    strength: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="edit, inpaint, animate: share of the schedule that is redrawn; None: 0.6 for edit, 1 "
        "for inpaint",
    )
    scale: float | None = Field(
        default=None,
        ge=-10,
        le=10,
        description="strength of the image prompts; 0 none, 1 as trained; None: 0.6 with text, 1 without",
    )
    steps: int | None = Field(
        default=None, ge=1, le=1000, description="denoising steps of the whole schedule; None: the base's, 30"
    )
    guidance: float | None = Field(
        default=None, ge=0, le=100, description="classifier-free guidance; 1 is none; None: the base's, 7.5"
    )
    image_guidance: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="guidance towards the image prompts, apart from the text's; half again the work; None: "
        "the same for both",
    )
    scheduler: str | None = Field(default=None, description=f"{', '.join(SCHEDULERS)}; None: the base's own")
    size: tuple[int, int] | None = Field(
        default=None,
        description=f"width and height in pixels, multiples of 8 up to {MAX_SIDE}; None: the base's own, and "
        "for edit and inpaint the picture's proportions at that area. Pictures to start from are cropped "
        "around the centre to these proportions and resampled",
    )
    count: int = Field(default=1, ge=1, le=100, description="how many pictures; number i has seed + i")
    exact: bool = Field(
        default=False,
        description="draw pictures one by one, each bit for bit as alone; else as batches where they can be, "
        "which is faster and differs by 1 of 255 here and there",
    )
    seed: int | None = Field(
        default=None, ge=0, le=2**53 - 1, description="start of the randomness; None: chosen and recorded"
    )
    frames: int | None = Field(
        default=None,
        ge=2,
        le=512,
        description="animate: how many frames; None: those of the video, else the motion adapter's, 16. More "
        "than the motion adapter saw are drawn in sliding windows (FreeNoise)",
    )
    fps: float | None = Field(
        default=None, gt=0, le=60, description="animate: frames a second; None: the video's, else 8"
    )
    motion: str | None = Field(
        default=None,
        min_length=1,
        description="animate: the motion adapter: alias, folder or hub id; None: the base's default",
    )
    video: PathText | None = Field(
        default=None,
        description="animate: the video to start from: an animated picture, a folder of frames, or a video "
        "file",
    )
    context: int | None = Field(
        default=None,
        ge=4,
        le=64,
        description="animate: frames of one window; None: as many as the motion adapter saw",
    )
    shared_noise: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="animate: part of the first noise's variance that all frames share, which calms the "
        "clip; None: what the motion adapter was trained with, else 0",
    )
    noise_path: Literal["apart", "loop"] | None = Field(
        default=None,
        description="animate: the rest of that noise is each frame's own (apart), or changes little by "
        "little and comes back to where it began (loop); None: what suits the motion adapter, else apart",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$",
        description="auto, cpu, cuda, cuda:1 or mps",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="number format; auto: float16 on cuda and mps, float32 on cpu"
    )
    offload: Literal["none", "model", "sequential"] = Field(
        default="none",
        description="keep idle parts in main memory: model is slower, sequential slowest",
    )
    quantize: str = Field(
        default="none",
        pattern=r"^(none|int8|float8|.+\.gguf)$",
        description="the UNet in fewer bits, to save memory: int8, float8 (by torchao), or a .gguf file "
        "of the base's; the picture changes a little",
    )
    hashes: dict[str, str] = Field(
        default_factory=dict,
        description="sha256 of each file named here, recorded when drawn; a file that differs is an error",
    )
    fingerprints: dict[str, str] = Field(
        default_factory=dict,
        description="a fingerprint of each model's weights, recorded when drawn; weights that differ are an "
        "error",
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _short_dtype(cls, value: object) -> object:
        return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(str(value), value)

    @field_validator("scheduler")
    @classmethod
    def _scheduler_is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in SCHEDULERS:
            raise ValueError(f"{value!r} is unknown; known are {', '.join(SCHEDULERS)}")
        return value

    @field_validator("size", mode="before")
    @classmethod
    def _size_fits_latents(cls, value: object) -> object:
        value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(value, str):
            sides = re.fullmatch(r"(\d{1,6})(?:[xX×*,](\d{1,6}))?", value.strip())
            if sides is None:
                raise ValueError(f"{value!r} is no size; write 512 or 768x512 (width x height)")
            value = (int(sides[1]), int(sides[2] or sides[1]))
        if isinstance(value, list | tuple):
            for side in value:
                if isinstance(side, int) and (side % 8 or not 8 <= side <= MAX_SIDE):
                    raise ValueError(f"{side} is no multiple of 8 between 8 and {MAX_SIDE} pixels")
        return value

    def model_post_init(self, _: object) -> None:
        for problem in contradictions(self):
            raise UsageError(problem)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all pictures this request reads, each once, in order."""
        named = [
            self.image,
            self.mask,
            self.video,
            *(name for prompt in self.images for name in prompt.paths if name not in self.masks),
            *self.masks,
            *(control.path for control in self.controls),
        ]
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def masks(self) -> tuple[str, ...]:
        """The names of the masks of image prompts and regions, each once, in order."""
        named = [*(prompt.mask for prompt in self.images), *(region.mask for region in self.regions)]
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def single(self, index: int) -> Request:
        """The request that draws picture ``index`` of this one alone. Raises :class:`UsageError` without a
        seed."""
        if self.seed is None:
            raise UsageError("seed: a single picture of a request without a seed cannot be named.")
        return self.replace(seed=seed_for(self.seed, index), count=1)

    def to_json(self) -> str:
        """Canonical JSON: every field, sorted, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read :meth:`to_json`'s form, or any JSON object of fields. Raises :class:`UsageError`."""
        return cls.from_mapping(read_json(text, "request", error=UsageError))

    @classmethod
    def from_mapping(cls, values: object) -> Self:
        """Read a mapping of fields, also of an earlier version. Raises :class:`UsageError`."""
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise UsageError("request: an object of fields is expected.")
        return cls(**_upgraded(values))

    def content_hash(self) -> str:
        """sha256 of :meth:`to_json`: equal exactly for equal requests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.content_hash())


def _upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fields of version 1 in today's form; others as they are.

    Version 1 listed single pictures (``path``, ``weight``, ``at``) and made one prompt of neighbours that
    were alike in all else. It also kept what had no effect: a ``scale`` that all pictures overruled, and
    pictures to avoid without guidance.
    """
    images = values.get("images")
    if not isinstance(images, list) or not any(isinstance(ref, Mapping) and "path" in ref for ref in images):
        return values
    refs = [{"path": ref} if isinstance(ref, str) else dict(ref) for ref in images]
    prompts = [
        _joined_refs(steering, list(alike))
        for steering, alike in groupby(
            refs, lambda ref: {k: v for k, v in ref.items() if k not in _OF_PICTURE}
        )
    ]
    if (values.get("guidance") or 2) <= 1 and values.get("image_guidance") is None:
        prompts = [{**prompt, "negative": None, "noise": None} for prompt in prompts]
    upgraded = {**values, "images": prompts}
    if all(prompt.get("scale") is not None for prompt in prompts):
        upgraded["scale"] = None
    return upgraded


_OF_PICTURE = ("path", "weight", "at")
"""What version 1 said of each picture; all else was of the prompt."""


def _joined_refs(steering: Mapping[str, Any], refs: list[dict[str, Any]]) -> dict[str, Any]:
    """One prompt of the pictures of version 1 that were steered alike."""
    prompt: dict[str, Any] = {**steering, "image": [ref["path"] for ref in refs]}
    if any(ref.get("weight", 1) != 1 for ref in refs):
        prompt["weights"] = [ref.get("weight", 1) for ref in refs]
    frames = [ref["at"] for ref in refs if ref.get("at") is not None]
    if frames:
        prompt["at"] = "each" if frames == ["each"] else frames
    return prompt
