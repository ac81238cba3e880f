"""What can be asked: one immutable, validated record for Python, the command line and a picture's metadata.

A :class:`Request` says everything that decides a picture; fields left at ``None`` mean "as the base likes it"
and are filled in before drawing, so that the request inside a picture is complete and repeats it. Nothing
here imports torch or opens a file. Names of bases and adapters are looked up later.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from imprompt.errors import UsageError
from imprompt.schema import options
from imprompt.schema.profiles import PROFILES, read_profile

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


class _Strict(BaseModel):
    """Frozen, no unknown fields, no NaN, and findings as one :class:`UsageError` of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(findings(type(self), error)) from error

    def replace(self, **changes: object) -> Self:
        """A copy with ``changes``, validated again. Raises :class:`UsageError`."""
        return type(self)(**{**dict(self), **changes})


def _as_path(value: object) -> object:
    return str(value) if hasattr(value, "__fspath__") else value


_Path = Annotated[str, BeforeValidator(_as_path), Field(min_length=1, max_length=4096)]


class ImageRef(_Strict):
    """A picture that prompts the model, and how."""

    path: _Path = Field(
        description="the picture's file (or its name among `pictures`), or features saved by `imprompt embed`"
    )
    scale: float | None = Field(
        default=None,
        ge=-10,
        le=10,
        description="strength of this picture; 0 none, 1 as trained; None: the request's scale",
    )
    mask: _Path | None = Field(
        default=None,
        description="picture that is white where this prompt acts; any size, stretched over the output",
    )
    start: float = Field(
        default=0.0, ge=0, le=1, description="fraction of the schedule where it begins; 0: pure noise"
    )
    end: float = Field(default=1.0, ge=0, le=1, description="where it ends (exclusive); 1: finished picture")
    feather: float = Field(
        default=0.0, ge=0, le=1, description="width of the mask's edge as a fraction of its shorter side"
    )
    text: str | None = Field(
        default=None,
        min_length=1,
        max_length=20_000,
        description="what is drawn inside the mask, in place of the request's prompt",
    )
    profile: str | tuple[float, ...] | dict[str, Any] = Field(
        default="linear",
        description="how the strength is spread over the layers: "
        + ", ".join(PROFILES)
        + "; those with composition take a factor for it, as style-and-composition:0.5; or weights: one a "
        "block as 1,0.5,0, by name as up_blocks.1:1,default:0, or diffusers' JSON",
    )
    adapter: str | None = Field(
        default=None, min_length=1, description="whose picture it is, where not the request's adapter's"
    )

    weight: float = Field(
        default=1.0,
        ge=-10,
        le=10,
        description="this picture's part among those of one prompt: its share of attention with combine "
        "concat, else its factor",
    )
    combine: str = Field(
        default="concat",
        description="how the pictures of one prompt become one: " + ", ".join(options.COMBINES),
    )
    framing: str = Field(
        default="crop",
        description="how a picture that is not square becomes the encoder's square: "
        + ", ".join(options.FRAMINGS),
    )
    sharpen: float = Field(
        default=0.0, ge=0, le=1, description="how much the picture is sharpened at the encoder's size"
    )
    curve: str = Field(
        default="constant",
        description=f"a factor over the schedule: {', '.join(options.CURVES)}, or points as 0:1,0.5:0.2,1:0 "
        "(fraction, factor)",
    )
    scaling: str = Field(
        default="v-only", description="where the strength enters: " + ", ".join(options.SCALINGS)
    )
    select: str | None = Field(
        default=None, description="which tokens of the picture are shown, such as 0-3,8; None: all"
    )
    face: str = Field(
        default="largest",
        description="face adapters: which face of the picture, largest or a number from 0 (the largest)",
    )
    s_scale: float | None = Field(
        default=None, ge=0, le=10, description="FaceID-PlusV2: how much of the face's look is kept; None: 1"
    )

    at: Annotated[int, Field(ge=0)] | Literal["each"] | None = Field(
        default=None,
        description="animate: the frame this picture stands at, from 0; between the pictures of one prompt "
        "their tokens are interpolated. each: path is an animated picture or a folder, with one picture a "
        "frame",
    )
    frame_curve: str = Field(
        default="constant",
        description="animate: a factor over the frames, said like curve; 0 is the first frame, 1 the last",
    )

    negative: _Path | None = Field(
        default=None, description="picture of what to avoid; None: what the adapter learned as no picture"
    )
    noise: str | None = Field(
        default=None,
        description=f"avoid this picture's own textures: {', '.join(options.NOISES)}, with :strength (0 to "
        "1)",
    )

    @field_validator("profile", mode="before")
    @classmethod
    def _profile_is_readable(cls, value: Any) -> Any:
        return read_profile(value)

    @field_validator("feather", "text")
    @classmethod
    def _belongs_to_a_mask(cls, value: Any, info: Any) -> Any:
        if value and info.data.get("mask") is None:
            raise ValueError("has no effect without a mask")
        return value

    @field_validator("combine", "framing", "scaling")
    @classmethod
    def _word_is_known(cls, value: str, info: Any) -> str:
        known = {"combine": options.COMBINES, "framing": options.FRAMINGS, "scaling": options.SCALINGS}
        return options.canonical(info.field_name, value, known[info.field_name])

    @field_validator("curve", "frame_curve")
    @classmethod
    def _curve_is_known(cls, value: str) -> str:
        options.read_curve(value)
        return value

    @field_validator("noise")
    @classmethod
    def _noise_is_known(cls, value: str | None) -> str | None:
        if value is not None:
            options.read_noise(value)
        return value

    @field_validator("select")
    @classmethod
    def _selection_is_readable(cls, value: str | None) -> str | None:
        if value is not None:
            options.read_selection(value)
        return value

    @field_validator("face")
    @classmethod
    def _face_is_known(cls, value: str) -> str:
        options.read_face(value)
        return value

    @field_validator("end")
    @classmethod
    def _ends_after_start(cls, end: float, info: Any) -> float:
        if end < info.data.get("start", 0.0):
            raise ValueError(f"{end} lies before start ({info.data['start']})")
        return end

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``PATH[,scale=…][,mask=…][,start=…][,end=…][,profile=…]…``; the path may hold commas.

        Raises :class:`UsageError` naming the option that is unknown, doubled or no number.
        """
        path, *said = re.split(r",(?=\s*[A-Za-z_]+=)", text)
        values = _options(f"--image '{text}'", said, _IMAGE_OPTIONS)
        try:
            # Not model_validate, in which a UsageError, being a ValueError, would be wrapped once more.
            return cls(path=path, **values)
        except UsageError as error:
            raise UsageError(f"--image '{text}': {error}") from error


_IMAGE_OPTIONS = tuple(name for name in ImageRef.model_fields if name != "path")


class ControlRef(_Strict):
    """A picture whose structure the drawing follows, by a ControlNet or T2I-Adapter."""

    kind: str = Field(
        description="what is taken from it: "
        + "; ".join(f"{name}: {what}" for name, what in CONTROLS.items())
    )
    path: _Path = Field(
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
        """Read ``KIND:PATH[,scale=…][,start=…][,end=…][,model=…][,at=…]``; the path may hold commas and
        colons.

        Raises :class:`UsageError` naming the kind or option that is unknown, doubled or no number.
        """
        kind, colon, rest = text.partition(":")
        if not colon or not rest:
            raise UsageError(
                f"--control '{text}': KIND:PATH is expected, such as canny:{text or 'edges.png'}; kinds are "
                f"{', '.join(CONTROLS)}."
            )
        path, *said = re.split(r",(?=\s*[A-Za-z_]+=)", rest)
        values = _options(f"--control '{text}'", said, _CONTROL_OPTIONS)
        try:
            return cls(kind=kind, path=path, **values)
        except UsageError as error:
            raise UsageError(f"--control '{text}': {error}") from error


_CONTROL_OPTIONS = tuple(name for name in ControlRef.model_fields if name not in ("kind", "path"))


def _options(where: str, said: list[str], known: tuple[str, ...]) -> dict[str, Any]:
    """``key=value`` options of a flag, each once. Raises :class:`UsageError`."""
    values: dict[str, Any] = {}
    for option in said:
        key, _, value = option.strip().partition("=")
        if key not in known:
            raise UsageError(f"{where}: unknown option '{key}'; known are {', '.join(known)}.")
        if key in values:
            raise UsageError(f"{where}: '{key}' is given twice.")
        values[key] = value
    return values


class LoraRef(_Strict):
    """A LoRA for the base, and how much of it."""

    path: _Path = Field(description="its .safetensors, folder, or owner/name[/file.safetensors] of the hub")
    weight: float = Field(default=1.0, ge=-10, le=10, description="its strength; 1 is as trained")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``PATH[,weight=…]``. Raises :class:`UsageError`."""
        return _parsed(cls, text, "--lora")


class EmbeddingRef(_Strict):
    """A word learnt by textual inversion."""

    path: _Path = Field(description="its .safetensors, or owner/name/file.safetensors of the hub")
    token: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="how it is written in prompts; None: its own name",
    )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``PATH[,token=…]``. Raises :class:`UsageError`."""
        return _parsed(cls, text, "--embedding")


class RegionRef(_Strict):
    """What is drawn in one place, with no picture: a text and its mask."""

    text: str = Field(
        min_length=1, max_length=20_000, description="what is drawn there, in place of the request's prompt"
    )
    mask: _Path = Field(description="picture that is white there; any size, stretched over the output")
    feather: float = Field(
        default=0.0, ge=0, le=1, description="width of the mask's edge as a fraction of its shorter side"
    )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``TEXT,mask=PATH[,feather=…]``; the text may hold commas. Raises :class:`UsageError`."""
        return _parsed(cls, text, "--region")


_Ref = TypeVar("_Ref", bound=_Strict)


def _parsed(kind: type[_Ref], text: str, flag: str) -> _Ref:
    """``FIRST[,key=value]…``, where the first is the record's first field."""
    first, *said = re.split(r",(?=\s*[A-Za-z_]+=)", text)
    name, *known = kind.model_fields
    values = _options(f"{flag} '{text}'", said, tuple(known))
    try:
        return kind(**{name: first}, **values)
    except UsageError as error:
        raise UsageError(f"{flag} '{text}': {error}") from error


def _as_image(value: object) -> object:
    """A path as the short form of an :class:`ImageRef`."""
    return {"path": str(value)} if isinstance(value, str) or hasattr(value, "__fspath__") else value


class Request(_Strict):
    """Everything that decides a picture. Two requests that are equal draw equal pictures on one machine.

    ``generate`` draws from text, pictures or both; ``edit`` starts from ``image``; ``inpaint`` repaints
    ``image`` where ``mask`` is white; ``animate`` draws a clip, or redraws ``video``. Consecutive ``images``
    that are steered alike (the same in all but path, weight and ``at``) are several views of one prompt and
    share one softmax, as in diffusers, or are combined as they say; differently steered ones are prompts of
    their own, whose contributions add up.
    Raises :class:`UsageError` (one line, naming the field) for values out of range, unknown fields, and
    fields that would have no effect.
    """

    task: Task = Field(default="generate", description="generate, edit, inpaint or animate")
    prompt: str = Field(default="", max_length=20_000, description="what to draw; may be empty with images")
    negative: str = Field(default="", max_length=20_000, description="what to avoid; needs guidance above 1")
    images: tuple[Annotated[ImageRef, BeforeValidator(_as_image)], ...] = Field(
        default=(), max_length=64, description="image prompts, at most 64"
    )
    regions: tuple[RegionRef, ...] = Field(
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
    loras: tuple[Annotated[LoraRef, BeforeValidator(_as_image)], ...] = Field(
        default=(), max_length=16, description="LoRAs for the base, all active"
    )
    embeddings: tuple[Annotated[EmbeddingRef, BeforeValidator(_as_image)], ...] = Field(
        default=(), max_length=16, description="words of textual inversion the prompts may use"
    )
    face_model: _Path | None = Field(
        default=None,
        description="face adapters: folder of a face detector and recogniser (.onnx); None: the adapter's "
        "own InsightFace pack where InsightFace keeps it",
    )
    image: _Path | None = Field(default=None, description="edit, inpaint: the picture to start from")
    mask: _Path | None = Field(
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
    video: _Path | None = Field(
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
        for problem in self._contradictions():
            raise UsageError(problem)

    def _contradictions(self) -> list[str]:
        """Fields that are missing for the task, or given but without effect."""
        found = []
        needed = {"edit": ("image",), "inpaint": ("image", "mask")}.get(self.task, ())
        for name in ("image", "mask"):
            if name in needed and getattr(self, name) is None:
                found.append(f"{name}: the task {self.task!r} needs one.")
            if name not in needed and getattr(self, name) is not None:
                tasks = "edit and inpaint" if name == "image" else "inpaint"
                found.append(f"{name}: has no effect in the task {self.task!r}; it belongs to {tasks}.")
        if self.task == "generate" and self.strength is not None:
            found.append("strength: has no effect in the task 'generate'; an image prompt's is `scale`.")
        found += self._contradictions_in_time()
        for group in self.groups:
            saved = any(_is_saved(ref.path) for ref in group)  # of how many pictures is not known yet
            try:
                if not saved:
                    options.read_weights(group[0].combine, len(group), [ref.weight for ref in group])
            except UsageError as error:
                found.append(f"images: {error}")
            for name in ("framing", "sharpen"):
                if saved and getattr(group[0], name) != ImageRef.model_fields[name].default:
                    found.append(f"{name}: has no effect on saved features; say it when embedding.")
            if saved and options.read_face(group[0].face):
                found.append("face: has no effect on saved faces; say it when embedding.")
            if group[0].noise is not None and (group[0].negative or _is_saved(group[0].path)):
                found.append(
                    "noise: spoils the picture itself; give no negative and no saved features beside it."
                )
        if not self.images:
            for name in ("scale", "adapter", "face_model", "image_guidance"):
                if getattr(self, name) is not None:
                    found.append(f"{name}: has no effect without an image prompt; give one in `images`.")
            drawn_from_nothing = self.task == "generate" or (self.task == "animate" and self.video is None)
            if not (self.prompt or self.regions or self.controls) and drawn_from_nothing:
                found.append("prompt: give a text, an image prompt, or both.")
        if self.images and self.adapter is not None and all(ref.adapter for ref in self.images):
            found.append("adapter: has no effect, for each image names its own.")
        if self.negative and self.guidance is not None and self.guidance <= 1:
            found.append(f"negative: has no effect with guidance {self.guidance:g}; it needs more than 1.")
        return found

    def _contradictions_in_time(self) -> list[str]:
        """The same of what only a video has."""
        found = []
        if self.task != "animate":
            found += [
                f"{name}: has no effect in the task {self.task!r}; it belongs to animate."
                for name in ("frames", "fps", "motion", "video", "context", "shared_noise", "noise_path")
                if getattr(self, name) is not None
            ]
            if any(ref.at is not None or ref.frame_curve != "constant" for ref in self.images):
                found.append(
                    f"images: at and frame_curve have no effect in the task {self.task!r}; they belong to "
                    "animate."
                )
            if any(ref.at is not None for ref in self.controls):
                found.append(f"controls: at has no effect in the task {self.task!r}; it belongs to animate.")
            return found
        if self.quantize != "none":
            found.append("quantize: clips are drawn by a UNet of their own, which is not quantised.")
        if self.strength is not None and self.video is None:
            found.append(
                "strength: has no effect without a video to start from; an image prompt's is `scale`."
            )
        for group in self.groups:
            at = [ref.at for ref in group]
            if at == ["each"] or all(frame is None for frame in at):
                continue
            if not all(isinstance(frame, int) for frame in at):
                found.append(
                    "images: of the pictures of one prompt either all stand at a frame (at=0, at=8, …), or "
                    "none; at=each stands alone."
                )
            elif any(b <= a for a, b in pairwise(at)):  # type: ignore[operator]
                found.append(f"images: at={at} must ascend, a frame holds one picture of a prompt.")
            elif self.frames is not None and at[-1] >= self.frames:  # type: ignore[operator]
                found.append(
                    f"images: at={at[-1]} lies behind the last of {self.frames} frames, counted from 0."
                )
        return found

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all pictures this request reads, each once, in order."""
        named = [
            self.image,
            self.mask,
            self.video,
            *(name for ref in self.images for name in (ref.path, ref.negative)),
            *self.masks,
            *(control.path for control in self.controls),
        ]
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def masks(self) -> tuple[str, ...]:
        """The names of the masks of image prompts and regions, each once, in order."""
        named = [*(ref.mask for ref in self.images), *(region.mask for region in self.regions)]
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def groups(self) -> tuple[tuple[ImageRef, ...], ...]:
        """Consecutive ``images`` that are steered alike: each group is one prompt with one softmax."""
        groups: list[list[ImageRef]] = []
        for ref in self.images:
            if groups and _steering(ref) == _steering(groups[-1][0]):
                groups[-1].append(ref)
            else:
                groups.append([ref])
        return tuple(tuple(group) for group in groups)

    def single(self, index: int) -> Request:
        """The request that draws just picture ``index`` of this one, which must have a seed. Raises
        :class:`UsageError` when it has none."""
        if self.seed is None:
            raise UsageError("seed: a single picture of a request without a seed cannot be named.")
        return self.replace(seed=randomness(self.seed, index, "noise"), count=1)

    def to_json(self) -> str:
        """Canonical JSON: every field, sorted, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Request:
        """Read :meth:`to_json`'s form, or any JSON object of fields. Raises :class:`UsageError`."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UsageError(f"request: not valid JSON ({error}).") from error
        return cls.from_mapping(values)

    @classmethod
    def from_mapping(cls, values: object) -> Request:
        """Read a mapping of fields. Raises :class:`UsageError`."""
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise UsageError("request: an object of fields is expected.")
        return cls(**values)

    def content_hash(self) -> str:
        """sha256 of :meth:`to_json`: equal exactly for equal requests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.content_hash())


def randomness(seed: int, index: int, purpose: str) -> int:
    """The seed of one random stream: for picture ``index`` of a request, for one ``purpose``.

    ``noise`` is ``seed + index``, so that picture ``i`` is the first of seed ``seed + i`` however many are
    drawn; other purposes are hashed, hence independent of it. Within ``[0, 2**53)``.
    """
    if purpose == "noise":
        return (seed + index) % 2**53
    digest = hashlib.blake2b(f"{purpose}:{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**53


def _steering(ref: ImageRef) -> ImageRef:
    return ref.replace(path="x", weight=1.0, at=None)


def _is_saved(path: str) -> bool:
    return path.lower().endswith(".safetensors")


def findings(model: type[BaseModel], error: ValidationError) -> str:
    """What pydantic found wrong with a record, in one line that names the fields."""
    lines = []
    for item in error.errors(include_url=False):
        field = ".".join(str(place) for place in item["loc"])
        message = item["msg"].removeprefix("Value error, ").rstrip(".")
        if item["type"] == "extra_forbidden":
            message = f"no such field; known are {', '.join(model.model_fields)}"
        elif item["type"] not in ("value_error", "missing"):
            given = repr(item["input"])
            message += f", got {given if len(given) <= 60 else given[:57] + '...'}"
        named = message.startswith((f"{field} ", f"{field}:"))  # a word's reader says the field itself
        lines.append(f"{field}: {message[:1].lower()}{message[1:]}" if field and not named else message)
    return "; ".join(lines) + "."
