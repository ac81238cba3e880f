"""What a training run is: one immutable, validated record, read from Python, JSON or TOML.

Nothing here imports torch, so that a command line can check a configuration before it loads anything.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from imprompt.errors import UsageError
from imprompt.schema.record import describe_errors

ANY_CAPTION = "*"
"""In ``captions``: every caption the picture has, of whatever kind."""

Kind = Literal["linear", "plus", "full", "faceid", "faceid-plus"]

NOT_IDENTITY = frozenset(
    {
        "data",
        "only",
        "base",
        "image_encoder",
        "face_model",
        "init",
        "output",
        "cache",
        "batch",
        "accumulate",
        "steps",
        "minutes",
        "lr",
        "sample_every",
        "sample_guidance",
        "checkpoint_every",
        "keep_checkpoints",
        "keep",
        "validate_every",
        "log_every",
        "max_skipped",
        "resume",
        "workers",
        "quiet",
        "device",
        "gradient_checkpointing",
        "compile",
        "trackers",
        "push_to_hub",
        "on_bad_sample",
    }
)
"""Fields a resumed run may change. Data, base, encoder and start are known by their contents instead, and
``batch × accumulate × processes`` by its product: see :class:`imprompt.training.folder.Identity`."""


class Augmentation(BaseModel):
    """How a reference picture is changed before it is encoded, so that copying it pixel by pixel is no use.

    Each value is the largest change; the change drawn lies between none and it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop: float = Field(
        default=0.25, ge=0, lt=0.9, description="share of each side that a random crop may cut away"
    )
    shrink: float = Field(
        default=0.3, ge=0, lt=0.9, description="share by which the picture may shrink on white ground"
    )
    shift: float = Field(default=0.1, ge=0, lt=0.5, description="move by up to this share of the side")
    rotate: float = Field(default=10.0, ge=0, le=180, description="degrees either way")
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a mirrored picture")
    colour: float = Field(
        default=0.1, ge=0, lt=1, description="brightness, contrast and saturation, either way"
    )


class TrainConfig(BaseModel):
    """One training run of one adapter on one frozen base.

    The defaults are the paper's (Ye et al. 2023, §4.1.2) where it states a value. What is ``None`` is chosen
    from the data and the start, see :meth:`resolved`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str = Field(description="pictures: a folder, metadata file, .tar, or hf:owner/name; see data.rows")
    only: str | None = Field(default=None, description="use the rows with this tag (a field that is true)")
    base: str = Field(default="emoji", description="alias, folder, .safetensors file or hub id of the base")
    output: Path = Field(description="folder of this run; new, or that of the run to resume")
    kind: Kind | None = Field(
        default=None,
        description="linear: pooled embedding to 4 tokens; plus: patches to 16 by a resampler; full: patches "
        "one by one; faceid, faceid-plus: a face embedding, with a LoRA; None: the start's, else linear",
    )
    tokens: int | None = Field(
        default=None, ge=1, description="image tokens; None: 4, plus 16; full makes one of each patch"
    )
    init: str | None = Field(
        default="auto",
        description="adapter to start from: alias, file, run folder or its checkpoint; auto: the base's "
        "default adapter where its kind agrees; None or new: new weights",
    )
    image_encoder: str | None = Field(
        default=None, description="folder or hub id; None: the start's, the base's, or the catalogue's"
    )
    face_model: str | None = Field(default=None, description="folder of a face detector and recogniser")
    lora_rank: int = Field(default=128, ge=1, description="rank of a face adapter's LoRA")
    layers: tuple[str, ...] = Field(
        default=(), description="train only layers whose name holds one of these, such as up_blocks; (): all"
    )

    steps: int | None = Field(default=None, ge=1, description="optimizer steps; None: by the pictures")
    minutes: float | None = Field(
        default=None, gt=0, description="stop after so long with what is learned by then; resume goes on"
    )
    batch: int = Field(default=8, ge=1, description="pictures per forward pass and process")
    accumulate: int = Field(default=1, ge=1, description="forward passes per optimizer step")
    lr: float | None = Field(
        default=None, gt=0, description="peak learning rate; None: 1e-4, or 3e-5 from a trained adapter"
    )
    weight_decay: float = Field(default=1e-2, ge=0)
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's running averages")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="after warm-up; linear and cosine end at 0"
    )
    clip: float = Field(default=1.0, ge=0, description="largest gradient norm; 0: no clipping")
    max_skipped: int = Field(
        default=10, ge=1, description="stop after so many steps in a row without a finite gradient"
    )
    ema: float = Field(
        default=0.999, ge=0, lt=1, description="decay of the averaged weights that are saved; 0: none"
    )
    min_snr: float | None = Field(
        default=None,
        gt=0,
        description="gamma of min-SNR weighting (Hang et al. 2023; 5 is usual); None: even weights",
    )

    noise_offset: float = Field(
        default=0.0, ge=0, le=1, description="noise common to a whole channel (0.05 is usual for SDXL)"
    )

    drop_text: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of pictures trained with an empty caption; their reference is always themselves, "
        "since nothing else says what to draw",
    )
    drop_image: float = Field(default=0.05, ge=0, le=1, description="share trained with the negative image")
    drop_both: float = Field(default=0.05, ge=0, le=1, description="share trained with neither")
    references: tuple[tuple[str, float], ...] = Field(
        default=(("self", 1.0),),
        description="which picture is shown as reference, with probabilities: 'self' the target itself; any "
        "other name is a kind of group, and another picture of the target's group of that kind is shown",
    )
    captions: dict[str, tuple[str, ...]] = Field(
        default_factory=lambda: {
            "self": (ANY_CAPTION,),
            "concept": ("style", "full"),
            "style": ("concept", "full"),
        },
        description="kinds of caption that may go with each kind of reference; '*' any. What the reference "
        "does not say, the caption must: a reference of the same style needs the concept in the caption",
    )
    views: int = Field(
        default=1, ge=1, description="versions of each reference; the first is the picture itself"
    )
    augmentation: Augmentation = Field(
        default_factory=Augmentation, description="of the versions after the first"
    )

    flip: float = Field(
        default=0.0, ge=0, le=1, description="probability that target and reference are mirrored"
    )

    resolution: int | None = Field(default=None, ge=8, description="side in pixels; None: the base's own")
    buckets: bool = Field(
        default=False,
        description="keep each picture's proportions (nearest of nine) instead of a square crop",
    )
    latent: Literal["mean", "sample"] = Field(
        default="sample", description="the VAE's mean, or a new sample each time"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the frozen model; auto: accelerate's, else bfloat16 where native"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, mps")
    gradient_checkpointing: bool = Field(default=False, description="less memory, about a third more time")
    compile: bool = Field(default=False, description="compile the UNet's repeated blocks")
    save_dtype: Literal["float16", "float32"] = Field(
        default="float16", description="of the finished file; published ones are float16"
    )
    seed: int = Field(default=0, ge=0, lt=2**31)

    cache: Path | None = Field(
        default=None, description="folder of encoded pictures; None: 'cache' in output; none: no cache"
    )
    workers: int = Field(default=2, ge=1, description="threads that decode pictures")
    on_bad_sample: Literal["skip", "stop"] = Field(
        default="skip", description="skip: list it in rejected.txt, and stop above 1 % of the pictures"
    )
    checkpoint_every: int = Field(default=500, ge=1, description="steps")
    keep_checkpoints: int = Field(
        default=2, ge=2, description="an older one is used when the newest is damaged"
    )
    keep: Literal["last", "best"] = Field(
        default="last", description="best: the adapter file holds the step with the lowest validation loss"
    )
    resume: bool = Field(default=False, description="continue from the newest sound checkpoint in output")
    validate_every: int = Field(default=250, ge=1, description="steps")
    sample_every: int = Field(default=0, ge=0, description="steps between sheets of samples; 0: none")
    sample_guidance: float = Field(default=3.0, ge=1, description="guidance scale of the samples")
    validation_rows: int = Field(default=64, ge=1, description="at most so many pictures are validated on")
    log_every: int = Field(default=25, ge=1, description="steps between log lines")
    trackers: tuple[str, ...] | Literal["auto"] = Field(
        default="auto",
        description="of accelerate: tensorboard, wandb, trackio; auto: tensorboard if installed",
    )
    push_to_hub: str | None = Field(default=None, description="hub repository that gets the finished adapter")
    quiet: bool = Field(default=False, description="no progress bar")

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
    def _references_are_shares(cls, value: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
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
        if self.drop_text + self.drop_image + self.drop_both > 1:
            raise ValueError(
                "drop_text + drop_image + drop_both exceed 1: no picture would be trained with both"
            )
        if self.steps is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must end before the last step ({self.steps})")
        return self

    @property
    def cache_folder(self) -> Path | None:
        """Where encoded pictures are kept; ``None``: nowhere, they are encoded at every step."""
        if self.cache is None:
            return self.output / "cache"
        return None if str(self.cache) == "none" else self.cache

    def caption_kinds(self, reference: str) -> tuple[str, ...]:
        """The kinds of caption that may go with a kind of reference; ``("full",)`` when nothing is stated."""
        return self.captions.get(reference, ("full",))

    def resolved(self, kind: Kind, pictures: int, started: bool) -> TrainConfig:
        """Fill in what was left open: ``pictures`` to train on, ``started`` from a trained adapter."""
        steps = min(max(15 * pictures, 300), 3000) if started else min(max(50 * pictures, 1000), 20_000)
        values: dict[str, Any] = {"kind": kind}
        values["steps"] = self.steps or max(steps, self.warmup + 1)
        values["lr"] = self.lr or (3e-5 if started else 1e-4)
        return self.model_copy(update=values)

    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed, as JSON values."""
        values: dict[str, Any] = json.loads(self.model_dump_json(exclude=set(NOT_IDENTITY)))
        return values

    @classmethod
    def read(cls, path: str | Path, **overrides: object) -> TrainConfig:
        """Read a ``.json`` or ``.toml`` file; ``overrides`` win over it.

        Raises :class:`UsageError` when the file is missing, is no such file, or a value is out of range.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as error:
            raise UsageError(f"cannot read the training configuration '{path}': {error.strerror}.") from error
        except ValueError as error:
            kind = path.suffix.lstrip(".") or "JSON"
            raise UsageError(f"'{path}' is not valid {kind}: {error}.") from error
        if not isinstance(values, dict):
            raise UsageError(f"'{path}' holds a {type(values).__name__}; a run's fields are expected.")
        return cls.checked({**values, **overrides})

    @classmethod
    def checked(cls, values: dict[str, object]) -> TrainConfig:
        """Validate. Raises :class:`UsageError` with pydantic's findings, which name the fields."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            unknown = [item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"]
            if unknown:
                raise UsageError(f"training configuration: {_unknown(unknown[0])}") from error
            raise UsageError(f"training configuration: {describe_errors(cls, error)}") from error


def _unknown(place: tuple[int | str, ...]) -> str:
    """An unknown field, with the nearest name of its own level."""
    model: type[BaseModel] = Augmentation if len(place) > 1 else TrainConfig
    near = difflib.get_close_matches(str(place[-1]), model.model_fields, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{'.'.join(map(str, place))}: no such field; {hint}known are {', '.join(model.model_fields)}."
