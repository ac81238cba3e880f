"""The request: one immutable record of everything that decides a picture.

Python, the command line, HTTP and the metadata of pictures share it. When a request is drawn, the base's
defaults replace fields that are ``None``; the saved picture contains that complete request, which repeats it.
Nothing here imports torch or opens a file; names of models are looked up later.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator

from imprompt.errors import UsageError
from imprompt.io import read_json, seed_for
from imprompt.schema import options
from imprompt.schema.checks import contradictions
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.record import Record, read_flag
from imprompt.schema.upgrade import upgraded
from imprompt.schema.values import PathText, path_to_text

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
"""Name → class of diffusers, and settings that override the base's own scheduler configuration."""

CONTROLS: dict[str, str] = {
    "canny": "edges of any picture",
    "depth": "the depth of a photograph",
    "pose": "the poses of people, as OpenPose draws them",
    "lineart": "a line drawing, dark on light or light on dark",
    "scribble": "a rough sketch of a few strokes",
    "face": "eyes, nose and mouth of the largest face, for InstantID",
    "tile": "the picture itself, to redraw it with detail",
    "seg": "the kinds of things in a photograph, in ADE20K's colours",
    "frame": "animate: the picture itself, as frame number `at`",
    "none": "a finished map of the kind that the model takes",
}
"""Kind of control → what the drawing follows."""

MAX_SIDE = 4096
"""Largest width or height of a drawn picture, in pixels."""
FRAMES = (2, 512)
"""Fewest and most frames of a clip."""
FPS = (0.01, 60)
"""Fewest and most frames per second of a clip; GIF and WebP cannot hold frames of many minutes."""

Task = Literal["generate", "edit", "inpaint", "animate"]
Speed = Literal["exact", "balanced", "fast"]
Favor = Literal["balanced", "prompt", "control"]


class ControlRef(Record):
    """A picture whose structure the drawing follows, by a ControlNet or T2I-Adapter."""

    kind: str = Field(
        description="what the drawing follows: "
        + "; ".join(f"{name}: {what}" for name, what in CONTROLS.items())
    )
    path: PathText
    """File of the picture (or its name among `pictures`), cropped to the output's proportions. animate: one
    picture for all frames, or an animated picture, folder or video with one for each."""
    scale: float = Field(default=1.0, ge=0, le=10)
    """How strictly to follow it: 0 not at all, 1 as trained."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the schedule at which it begins to act; 0: pure noise."""
    end: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the schedule at which it stops acting; 1: finished picture."""
    favor: Favor | None = None
    """ControlNets of UNets: what prevails where control and prompt disagree. prompt weakens the control, the
    finer the block the more; control does so too, and keeps it from the unconditional half of guidance, which
    then strengthens it; ``None``: as suits the model, by `imprompt models`, in stills from a text with
    guidance, else balanced."""
    model: str | None = Field(default=None, min_length=1)
    """Alias, folder or hub id of the ControlNet or T2I-Adapter; MODEL:KIND tells a union model the kind of a
    `none` map; ``None``: the base's default for the kind."""
    at: int | None = Field(default=None, ge=0)
    """animate: the frame at which the picture stands, from 0; SparseCtrl fills in the others."""

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
            raise UsageError("at: a control of kind frame needs its place in the clip, such as at=0.")

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
        return cls.from_flag(f"--control '{text}'", {"kind": kind, "path": path, **values})


_CONTROL_OPTIONS = tuple(name for name in ControlRef.model_fields if name not in ("kind", "path"))


def _letters(name: str) -> str:
    """The name of a scheduler without case, spaces and dashes, in which programs differ: DPM++ 2M Karras."""
    return re.sub(r"[\s_-]", "", name.lower())


def _as_control(value: object) -> object:
    """``KIND:PATH`` as the short form of a control, as the command line takes it."""
    return ControlRef.parse(value) if isinstance(value, str) else value


def _as_prompt(value: object) -> object:
    """A path, or a list of paths, as the short form of an :class:`ImagePrompt`."""
    value = path_to_text(value)
    if type(value).__module__.partition(".")[0] in ("PIL", "numpy", "torch"):
        raise ValueError(
            f"a request names files, and a {type(value).__name__} is none; give pictures in memory to "
            "Engine.run(request, pictures={'name': picture}), and 'name' to the request"
        )
    return {"image": value} if isinstance(value, str | list | tuple) else value


def _as_path(value: object) -> object:
    """A path as the short form of a record with nothing but its path."""
    value = path_to_text(value)
    return {"path": value} if isinstance(value, str) else value


class LoraRef(Record):
    """A LoRA for the base, and how much of it."""

    FLAG = "--lora"
    path: PathText
    """.safetensors file, folder, or owner/name[/file.safetensors] of the hub."""
    weight: float = Field(default=1.0, ge=-10, le=10)
    """Strength; 1 as trained."""


class EmbeddingRef(Record):
    """A word learnt by textual inversion."""

    FLAG = "--embedding"
    path: PathText
    """.safetensors file, or owner/name/file.safetensors of the hub."""
    token: str | None = Field(default=None, min_length=1, max_length=100)
    """The word for it in prompts; ``None``: the one in the file."""


class Request(Record):
    """Everything that decides a picture: equal requests draw equal pictures on one machine.

    ``generate`` draws from text, pictures or both; ``edit`` starts from ``image``; ``inpaint`` repaints
    ``image`` where ``mask`` is white; ``animate`` draws a clip, or redraws ``video``. Each of ``images`` is
    one prompt: a path, a list of paths that share one softmax, or an :class:`ImagePrompt`; what several
    prompts contribute adds up. Raises :class:`UsageError` (one line, naming the field) for values out of
    range, unknown fields, and fields that would have no effect.
    """

    task: Task = "generate"
    """Generate, edit, inpaint or animate."""
    prompt: str = Field(default="", max_length=20_000)
    """What to draw; may be empty with images."""
    negative: str = Field(default="", max_length=20_000)
    """What to avoid; needs guidance above 1, on FLUX true_guidance."""
    images: tuple[Annotated[ImagePrompt, BeforeValidator(_as_prompt)], ...] = Field(default=(), max_length=64)
    """Image prompts, at most 64; each has one or several pictures."""
    regions: tuple[TextRegion, ...] = Field(default=(), max_length=16)
    """Texts that are drawn in one place each, at most 16."""
    controls: tuple[Annotated[ControlRef, BeforeValidator(_as_control)], ...] = Field(
        default=(), max_length=8
    )
    """Pictures whose structure the drawing follows, at most 8."""
    base: str = Field(default="emoji", min_length=1)
    """The model: alias, hub id, folder or .safetensors file."""
    adapter: str | None = Field(default=None, min_length=1)
    """The adapter: alias, file, folder or hub file; ``None``: the base's default."""
    loras: tuple[Annotated[LoraRef, BeforeValidator(_as_path)], ...] = Field(default=(), max_length=16)
    """LoRAs for the base, all active."""
    embeddings: tuple[Annotated[EmbeddingRef, BeforeValidator(_as_path)], ...] = Field(
        default=(), max_length=16
    )
    """Textual inversions: words that the prompts may use."""
    face_model: PathText | None = None
    """Face adapters: folder with a face detector and a recogniser (.onnx); ``None``: the adapter's
    InsightFace pack in InsightFace's own folder."""
    image: PathText | None = None
    """edit, inpaint: the picture to start from."""
    mask: PathText | None = None
    """inpaint: white is redrawn, black is kept; of the picture's proportions."""
    strength: float | None = Field(default=None, gt=0, le=1)
    """edit, inpaint, animate: share of the schedule to redraw; ``None``: 0.6 for edit, 1 for inpaint. FLUX
    Kontext edits without it."""
    scale: float | None = Field(default=None, ge=-10, le=10)
    """Strength of the image prompts: 0 none, 1 as trained; ``None``: 0.6 with text, 1 without."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps of the whole schedule; ``None``: the base's default, often 30."""
    guidance: float | None = Field(default=None, ge=0, le=100)
    """Classifier-free guidance scale, 1 switches it off; ``None``: the base's default, often 7.5."""
    true_guidance: float | None = Field(default=None, ge=0, le=100)
    """FLUX: classifier-free guidance scale beside the distilled one, at twice the work; ``None``: off, as
    with 1, and no negative is read."""
    image_guidance: float | None = Field(default=None, ge=0, le=100)
    """Guidance scale of the image prompts alone; each step then takes half as long again; ``None``: that of
    the text."""
    scheduler: str | None = Field(
        default=None, description=f"{', '.join(SCHEDULERS)}; ``None``: the base's own"
    )
    size: tuple[int, int] | None = None
    """Width and height in pixels, multiples of 8 up to 4096; ``None``: the base's default, for edit and
    inpaint with the picture's proportions. Pictures to start from are cropped to these proportions around
    the centre."""
    count: int = Field(default=1, ge=1, le=100)
    """Number of pictures; picture i gets seed + i."""
    exact: bool = False
    """Draw pictures one by one, each with the same pixels as alone; otherwise pictures are drawn in batches
    where possible, which is faster and differs by 1 of 255 in a few places."""
    speed: Speed = "exact"
    """UNets: exact computes all of each step; balanced computes the uncond rows at every third step only,
    after the first 40 %; fast also the inner blocks, from the start. The picture changes a little."""
    seed: int | None = Field(default=None, ge=0, le=2**53 - 1)
    """Seed of the first picture; ``None``: a random one, which the picture records."""
    frames: int | None = Field(default=None, ge=FRAMES[0], le=FRAMES[1])
    """animate: number of frames; ``None``: the video's, or as many as the motion adapter was trained on, 16.
    More are drawn in sliding windows (FreeNoise)."""
    fps: float | None = Field(default=None, ge=FPS[0], le=FPS[1])
    """animate: frames per second; ``None``: the video's, or 8."""
    motion: str | None = Field(default=None, min_length=1)
    """animate: the motion adapter: alias, folder or hub id; ``None``: the base's default."""
    video: PathText | None = None
    """animate: the video to start from: an animated picture, a folder of frames, or a video file."""
    context: int | None = Field(default=None, ge=4, le=64)
    """animate: frames per sliding window; ``None``: as many as the motion adapter was trained on."""
    shared_noise: float | None = Field(default=None, ge=0, le=1)
    """animate: share of the initial noise's variance that all frames have in common; more makes the clip
    calmer; ``None``: as the motion adapter was trained, or 0."""
    shared_start: float | None = Field(default=None, ge=0, lt=1)
    """animate: position in the schedule, from 0, pure noise, to 1, up to which frames have all noise in
    common, so that the text alone decides what moves; then the clip gets new noise, shared as shared_noise
    says; ``None``: as the motion adapter was trained, or 0, not at all; 0 with a video."""
    noise_path: Literal["apart", "loop"] | None = None
    """animate: how the other initial noise differs between frames: apart, independent; loop, changing slowly
    and returning to its start; ``None``: as the motion adapter was trained, or apart."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$")
    """One of auto, cpu, cuda, cuda:1, xpu and mps."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Number format of the weights; auto: float16 on cuda and mps, float32 on cpu."""
    offload: Literal["none", "adapter", "model", "sequential"] = "none"
    """Move idle parts to main memory, to save GPU memory: adapter, the adapters and image encoders, costs a
    copy of them for each new picture; model, all models, is slower, sequential slowest."""
    quantize: str = Field(default="none", pattern=r"^(none|int8|float8|.+\.gguf)$")
    """Load the denoiser in fewer bits, to save memory: int8, float8, or a .gguf file of the base; the picture
    changes a little."""
    compile: Literal["off", "regional", "full"] = "off"
    """Compile the denoiser with torch.compile, which pays for many pictures of one size: regional compiles
    its transformer blocks; full compiles all of it, which takes minutes, and then draws faster. On a CPU this
    needs a C++ compiler."""
    hashes: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each file that the request names, recorded when drawn; a file that differs is an error."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """Fingerprint of each model's weights, recorded when drawn; weights that differ are an error."""

    @field_validator("images", "regions", "controls", "loras", "embeddings", mode="before")
    @classmethod
    def _one_needs_no_list(cls, value: object) -> object:
        return value if value is None or isinstance(value, list | tuple) else [value]

    @field_validator("dtype", mode="before")
    @classmethod
    def _short_dtype(cls, value: object) -> object:
        return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(str(value), value)

    @field_validator("scheduler")
    @classmethod
    def _scheduler_is_known(cls, value: str | None) -> str | None:
        spelled = {_letters(name): name for name in SCHEDULERS}
        if value is not None and _letters(value) not in spelled:
            raise ValueError(f"{value!r} is unknown; known are {', '.join(SCHEDULERS)}")
        return None if value is None else spelled[_letters(value)]

    @field_validator("size", mode="before")
    @classmethod
    def _size_fits_latents(cls, value: object) -> object:
        value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(value, str):
            sides = re.fullmatch(r"(\d{1,6})(?:[xX×*,](\d{1,6}))?", value.strip())
            if sides is None:
                raise ValueError(f"{value!r} is not a size; write 512 or 768x512 (width x height)")
            value = (int(sides[1]), int(sides[2] or sides[1]))
        if isinstance(value, list | tuple):
            for side in value:
                if isinstance(side, int) and (side % 8 or not 8 <= side <= MAX_SIDE):
                    raise ValueError(f"{side} is not a multiple of 8 between 8 and {MAX_SIDE} pixels")
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
            *(name for prompt in self.images for name in prompt.paths),
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
        return cls(**upgraded(values))

    def content_hash(self) -> str:
        """sha256 of :meth:`to_json`: equal exactly for equal requests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.content_hash())
