"""Configuration of a training run: one immutable, validated record, from Python, JSON or TOML.

Nothing here imports torch, so that the command line can check a configuration before it loads anything.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from imprompt.errors import UsageError
from imprompt.io import check_path, read_json
from imprompt.schema.record import Record
from imprompt.schema.values import ExpandedPath, Names

ANY_CAPTION = "*"
"""In ``captions``: all captions of the picture, of every kind."""

ANY_PICTURE = "any"
"""In ``references``: another training picture, whatever its groups."""
FEW = range(4, 101)
"""Numbers of pictures that are taken for one style or subject when a trained adapter is fine-tuned."""
FEW_STEPS = 60
"""Steps on them: 180 on 60 pictures took the text's say away, as a higher learning rate does."""
_PAPER: dict[str, Any] = {"lr": 1e-4, "drop_text": 0.05, "references": (("self", 1.0),)}
_FEW: dict[str, Any] = {"lr": 5e-5, "drop_text": 0.5, "references": ((ANY_PICTURE, 1.0),)}
"""With a caption, another picture is the reference, so that the text keeps its say; without one, the picture
itself."""

Beta = Annotated[float, Field(ge=0, lt=1)]
Kind = Literal["linear", "plus", "full", "faceid", "faceid-plus"]

NOT_IDENTITY = frozenset((
    "data", "only", "ignore", "base", "image_encoder", "face_model", "init", "output", "cache", "batch",
    "accumulate", "steps", "minutes", "lr", "warmup", "sample_every", "sample_guidance", "checkpoint_every",
    "keep_checkpoints", "keep", "validate_every", "log_every", "max_skipped", "resume", "workers", "quiet",
    "device", "gradient_checkpointing", "compile", "cuda_graphs", "trackers", "push_to_hub", "on_bad_sample",
))  # fmt: skip
"""Fields that a resumed run may change. Data, base, encoder and start are compared by their contents instead,
and ``batch × accumulate × processes`` by its product: see :class:`imprompt.training.folder.Identity`."""


class Augmentation(Record):
    """Random changes of a reference picture before it is encoded, so that copying its pixels does not help.

    Each value is the largest change; the actual change is drawn between none and that.
    """

    crop: float = Field(default=0.25, ge=0, lt=0.9)
    """Share of each side that a random crop may cut away."""
    shrink: float = Field(default=0.3, ge=0, lt=0.9)
    """Share by which the picture may shrink on white ground."""
    shift: float = Field(default=0.1, ge=0, lt=0.5)
    """Move by up to this share of the side."""
    rotate: float = Field(default=10.0, ge=0, le=180)
    """Degrees either way."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a mirrored picture."""
    colour: float = Field(default=0.1, ge=0, lt=1)
    """Brightness, contrast and saturation, either way."""


class TrainConfig(Record):
    """One training run of one adapter on one frozen base.

    Defaults are the paper's (Ye et al. 2023, §4.1.2) where it states a value. :meth:`resolved` replaces
    ``None`` by values that suit the data and the start.
    """

    data: str
    """Captioned pictures: a folder, metadata file, .tar (also ``x-{0..9}.tar``) or hf:owner/name."""
    only: str | None = None
    """Use only the pictures with this tag (a metadata field that is true)."""
    ignore: Names = ()
    """Fields of records that are not read, with commas between them, such as a split or repeats that mean
    something else."""
    base: str = "emoji"
    """The base: alias, folder, .safetensors file or hub id."""
    output: ExpandedPath
    """Folder of the run; a new one, or that of the run to resume."""
    kind: Kind | None = None
    """Kind of adapter. linear: 4 tokens from the pooled embedding; plus: 16 tokens from the patches; full: a
    token from each patch; faceid, faceid-plus: tokens from a face embedding, with a LoRA; ``None``: that of
    the start, or linear."""
    tokens: int | None = Field(default=None, ge=1)
    """Number of image tokens; ``None``: 4, for plus 16, for full one from each patch."""
    init: str | None = "auto"
    """Adapter to start from: alias, file, folder of a run, or checkpoint; auto: the base's default adapter if
    it is of this kind; new: new weights."""
    image_encoder: str | None = None
    """Image encoder: folder or hub id; ``None``: that of the start or the base."""
    face_model: str | None = None
    """Folder with a face detector and a recogniser (.onnx)."""
    lora_rank: int = Field(default=128, ge=1)
    """Rank of a face adapter's LoRA."""
    layers: tuple[str, ...] = ()
    """Train only layers whose name contains one of these, such as up_blocks; (): all."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; ``None``: by the number of pictures, or those of the run to resume."""
    minutes: float | None = Field(default=None, gt=0)
    """Stop after so many minutes and write the adapter; resume continues."""
    batch: int = Field(default=8, ge=1)
    """Pictures per forward pass and process."""
    accumulate: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; ``None``: 1e-4, 5e-5 for a few pictures (4 to 100 with captions, and a trained
    adapter to start from), or that of the run to resume."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """AdamW's weight decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates of its averages."""
    warmup: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up; ``None``: a tenth of all steps, at most 500, or those of the run to resume."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up; linear and cosine end at 0."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    max_skipped: int = Field(default=10, ge=1)
    """Stop after so many steps in a row without a finite gradient."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the averaged weights, which are saved; 0: no average."""
    min_snr: float | None = Field(default=None, gt=0)
    """Gamma of min-SNR weighting (Hang et al. 2023; 5 is usual); ``None``: no weighting."""

    noise_offset: float = Field(default=0.0, ge=0, le=1)
    """Noise common to a whole channel (0.05 is usual for SDXL)."""

    drop_text: float | None = Field(default=None, ge=0, le=1)
    """Share of samples with an empty caption; the picture itself is then the reference, since nothing else
    says what to draw. ``None``: 0.05, for a few pictures 0.5."""
    drop_image: float = Field(default=0.05, ge=0, le=1)
    """Share of samples with the negative image tokens."""
    drop_both: float = Field(default=0.05, ge=0, le=1)
    """Share of samples with neither."""
    references: tuple[tuple[str, float], ...] | None = None
    """Kinds of reference with their probabilities: 'self' is the target itself, 'any' another training
    picture; another name is a kind of group, from which another picture of the target's group is taken.
    ``None``: self, for a few pictures any."""
    captions: dict[str, tuple[str, ...]] = Field(
        default_factory=lambda: {
            "self": (ANY_CAPTION,),
            "concept": ("style", "full"),
            "style": ("concept", "full"),
        }
    )
    """Kinds of caption that go with each kind of reference; '*' is any. The caption must say what the
    reference does not: with a reference of the same style, the concept."""
    views: int = Field(default=1, ge=1)
    """Versions of each reference; the first is the unchanged picture."""
    augmentation: Augmentation = Field(default_factory=Augmentation)
    """Changes in the versions after the first."""

    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability that target and reference are mirrored."""

    resolution: int | None = Field(default=None, ge=8)
    """Side of the targets in pixels; ``None``: the base's own."""
    buckets: bool = False
    """Keep each picture's proportions, the nearest of nine, instead of cropping to a square."""
    latent: Literal["mean", "sample"] = "sample"
    """Latents: the VAE's mean, or a new sample for each step."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen UNet, in bfloat16 of the encoders too; auto: accelerate's, or bfloat16 if
    the device has it. A run is resumed in the format it began in."""
    device: str = "auto"
    """One of auto, cpu, cuda and mps."""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time."""
    compile: bool = False
    """Compile the UNet's repeated blocks."""
    cuda_graphs: bool = True
    """Replay the kernels of each step in one launch, on one GPU and where a step is one whole pass: not with
    accumulate, compile, gradient_checkpointing, cache none or float16. Steps are faster where Python launches
    kernels more slowly than they run; activations stay in memory."""
    save_dtype: Literal["float16", "float32"] = "float16"
    """Number format of the adapter file; published ones are float16."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of all random choices."""

    cache: ExpandedPath | None = None
    """Folder for encoded pictures, which runs may share: what none has used for 30 days is removed; ``None``:
    'cache' in the run's folder; none: no cache."""
    workers: int = Field(default=2, ge=1)
    """Threads that decode pictures."""
    on_bad_sample: Literal["skip", "stop"] = "skip"
    """Pictures that cannot be used: skip lists them in rejected.txt, and stops above 1 %; stop."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Number of checkpoints to keep; an older one is used when the newest is damaged."""
    keep: Literal["last", "best"] = "last"
    """Weights to write: of the last step, or of the step with the lowest validation loss."""
    resume: bool = False
    """Continue from the newest intact checkpoint in output."""
    validate_every: int | None = Field(default=None, ge=1)
    """Steps between validations; ``None``: a tenth of all steps."""
    sample_every: int | None = Field(default=None, ge=0)
    """Steps between sheets of sample drawings; 0: none; ``None``: every few minutes."""
    sample_guidance: float = Field(default=3.0, ge=1)
    """Guidance scale of the samples."""
    validation_rows: int = Field(default=64, ge=1)
    """Number of pictures to validate on, at most."""
    log_every: int = Field(default=25, ge=1)
    """Steps between log lines."""
    trackers: tuple[str, ...] | Literal["auto"] = "auto"
    """Trackers of accelerate: tensorboard, wandb, trackio; auto: tensorboard if installed."""
    push_to_hub: str | None = None
    """Hub repository to upload the finished adapter to."""
    quiet: bool = False
    """No progress bar."""

    @field_validator("data", "init", mode="before")
    @classmethod
    def _paths_are_names(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("kind", mode="before")
    @classmethod
    def _a_resampler_is_plus(cls, value: object) -> object:
        return "plus" if value == "resampler" else value

    @field_validator("references")
    @classmethod
    def _references_are_shares(
        cls, value: tuple[tuple[str, float], ...] | None
    ) -> tuple[tuple[str, float], ...] | None:
        if value is None:
            return None
        names = [name for name, _ in value]
        if not value or len(set(names)) != len(names):
            raise ValueError(f"each kind of reference once, at least one; given {names}")
        shares = [share for _, share in value]
        if not all(math.isfinite(share) and share > 0 for share in shares):
            raise ValueError(f"probabilities above 0 are needed, given {shares}")
        if abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"probabilities must sum to 1, given {shares} (sum {sum(shares):g})")
        return value

    @model_validator(mode="after")
    def _values_fit_together(self) -> TrainConfig:
        if (self.drop_text or 0) + self.drop_image + self.drop_both > 1:
            raise ValueError(
                "drop_text + drop_image + drop_both exceed 1: no picture would be trained with both"
            )
        if self.steps is not None and (self.warmup or 0) >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must end before the last step ({self.steps})")
        return self

    @property
    def cache_folder(self) -> Path | None:
        """Folder for encoded pictures; ``None``: pictures are encoded at every step."""
        if self.cache is None:
            return self.output / "cache"
        return None if str(self.cache) == "none" else self.cache

    def caption_kinds(self, reference: str) -> tuple[str, ...]:
        """Kinds of caption that go with a kind of reference: unless stated, all with ``any``, else full."""
        return self.captions.get(reference, (ANY_CAPTION,) if reference == ANY_PICTURE else ("full",))

    def course(self) -> dict[str, Any]:
        """The fields that set the learning rate of each step."""
        return {"steps": self.steps, "lr": self.lr, "warmup": self.warmup}

    def following(self, course: Mapping[str, Any]) -> TrainConfig:
        """With the ``course`` of the run to resume where this states none; a longer warm-up than a smaller
        number of steps allows is cut."""
        values = {name: value for name, value in course.items() if getattr(self, name) is None}
        if "warmup" in values and self.steps is not None:
            values["warmup"] = min(values["warmup"], self.steps - 1)
        return self.model_copy(update=values)

    def resolved(
        self, kind: Kind, pictures: int, *, started: bool = False, captioned: bool = False
    ) -> TrainConfig:
        """Replace ``None``, for this number of ``pictures``, with captions or without; ``started`` from a
        trained adapter or not."""
        few = started and captioned and pictures in FEW and self.references is None and "face" not in kind
        usual = FEW_STEPS if few else _steps_for(pictures, started)
        steps = self.steps or max(usual, (self.warmup or 0) + 1)
        chosen: dict[str, Any] = {
            "kind": kind, "steps": steps, "warmup": min(steps // 10, 500),
            "validate_every": max(1, steps // 10), **(_FEW if few else _PAPER),
        }  # fmt: skip
        chosen["drop_text"] = min(chosen["drop_text"], 1 - self.drop_image - self.drop_both)
        return self.model_copy(
            update={name: value for name, value in chosen.items() if getattr(self, name) is None}
        )

    def identity(self) -> dict[str, Any]:
        """Fields that must not change when a run is resumed, as JSON values."""
        values: dict[str, Any] = json.loads(self.model_dump_json(exclude=set(NOT_IDENTITY)))
        return values

    @classmethod
    def read(cls, path: str | Path, **overrides: object) -> TrainConfig:
        """Read a ``.json`` or ``.toml`` file; ``overrides`` win over it, field by field within a table.

        Raises :class:`UsageError` when the file is missing, is no such file, or a value is out of range.
        """
        path = check_path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read the training configuration '{path}': {error.strerror}.") from error
        values = (
            _toml(content, path)
            if path.suffix == ".toml"
            else read_json(content, f"'{path}'", error=UsageError)
        )
        for name, value in overrides.items():
            inside = isinstance(value, dict) and isinstance(values.get(name), dict)
            values[name] = values[name] | value if inside else value
        return cls(**values)


def _toml(content: bytes, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"'{path}' is not valid TOML: {error}.") from error


def _steps_for(pictures: int, started: bool) -> int:
    return min(max(3 * pictures, FEW_STEPS), 3000) if started else min(max(50 * pictures, 1000), 20_000)
