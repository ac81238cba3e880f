"""What a training run is: one immutable, validated record, read from Python, JSON or TOML.

Nothing here imports torch, so that a command line can check a configuration before it loads anything.
"""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from imprompt.errors import UsageError
from imprompt.schema.request import findings

ANY_CAPTION = "*"
"""In ``captions``: every caption the picture has, of whatever kind."""

MAY_CHANGE = frozenset(
    {
        "steps",
        "minutes",
        "sample_every",
        "sample_guidance",
        "checkpoint_every",
        "keep_checkpoints",
        "validate_every",
        "log_every",
        "resume",
        "workers",
        "quiet",
        "output",
        "cache",
        "device",
        "gradient_checkpointing",
    }
)
"""Fields that a resumed run may set anew; any other change would make it another run."""


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
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a mirror image")
    colour: float = Field(
        default=0.1, ge=0, lt=1, description="brightness, contrast and saturation, either way"
    )


class TrainConfig(BaseModel):
    """One training run of one adapter on one frozen base.

    The defaults are the paper's (Ye et al. 2023, §4.1.2) where it states a value; the batch size and the
    number of steps are for a small set and belong to the data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: Path = Field(description="folder of captioned pictures, or its metadata.jsonl")
    only: str | None = Field(default=None, description="use the rows with this tag (a field that is true)")
    base: str = Field(default="emoji", description="diffusers folder, hub id or alias of the frozen model")
    output: Path = Field(description="folder of this run; must be new, or hold the run that is resumed")
    kind: Literal["linear", "resampler"] = Field(
        default="linear",
        description="linear: pooled embedding to 4 tokens (base); resampler: patches to 16 (plus)",
    )
    tokens: int | None = Field(
        default=None, ge=1, description="image tokens; None: 4 for linear, 16 for resampler"
    )
    init: Path | None = Field(
        default=None, description="adapter file to continue from instead of fresh weights"
    )
    image_encoder: str | None = Field(
        default=None, description="folder or hub id; None: the base's own image_encoder"
    )

    steps: int = Field(default=10_000, ge=1, description="optimizer steps")
    minutes: float | None = Field(
        default=None, gt=0, description="end after so long with what is learned by then; resume goes on"
    )
    batch: int = Field(default=8, ge=1, description="pictures per forward pass and process")
    accumulate: int = Field(default=1, ge=1, description="forward passes per optimizer step")
    lr: float = Field(default=1e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(default=1e-2, ge=0)
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's running averages")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="after warm-up; cosine ends at 0"
    )
    clip: float = Field(default=1.0, ge=0, description="largest gradient norm; 0: no clipping")
    ema: float = Field(
        default=0.999, ge=0, lt=1, description="decay of the averaged weights that are saved; 0: none"
    )
    min_snr: float | None = Field(
        default=None,
        gt=0,
        description="gamma of min-SNR weighting (Hang et al. 2023; 5 is usual); None: even weights",
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
        default=1, ge=1, description="cached versions of each reference; the first is unchanged"
    )
    augmentation: Augmentation = Field(
        default_factory=Augmentation, description="of the versions after the first"
    )

    resolution: int | None = Field(default=None, ge=8, description="side in pixels; None: the base's own")
    latent: Literal["mean", "sample"] = Field(
        default="sample", description="the VAE's mean, or a new sample each time"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="arithmetic of the frozen model; auto: bfloat16 where the hardware has it"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps")
    gradient_checkpointing: bool = Field(default=False, description="less memory, about a third more time")
    save_dtype: Literal["float16", "float32"] = Field(
        default="float16", description="number format of the finished file; published ones are float16"
    )
    seed: int = Field(default=0, ge=0, lt=2**31)

    cache: Path | None = Field(
        default=None, description="folder of encoded pictures; None: 'cache' inside output"
    )
    workers: int = Field(
        default=2, ge=1, description="threads that decode pictures while the cache is filled"
    )
    checkpoint_every: int = Field(default=500, ge=1, description="steps")
    keep_checkpoints: int = Field(default=2, ge=1)
    resume: bool = Field(
        default=False, description="continue the newest checkpoint in output, if there is one"
    )
    validate_every: int = Field(default=250, ge=1, description="steps")
    sample_every: int = Field(default=0, ge=0, description="steps between sheets of samples; 0: none")
    sample_guidance: float = Field(default=3.0, ge=1, description="guidance the samples are drawn with")
    validation_rows: int = Field(default=64, ge=1, description="at most so many pictures are validated on")
    log_every: int = Field(default=25, ge=1, description="steps between loss lines and checks for NaN")
    quiet: bool = Field(default=False, description="no progress bar")

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
        if self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must end before the last step ({self.steps})")
        return self

    @property
    def cache_folder(self) -> Path:
        """Where encoded pictures are kept."""
        return self.cache if self.cache is not None else self.output / "cache"

    def caption_kinds(self, reference: str) -> tuple[str, ...]:
        """The kinds of caption that may go with a kind of reference; ``("full",)`` when nothing is stated."""
        return self.captions.get(reference, ("full",))

    def identity(self) -> dict[str, object]:
        """What must not change when a run is resumed, as JSON values."""
        return json.loads(self.model_dump_json(exclude=set(MAY_CHANGE)))

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
            raise UsageError(f"cannot read the training configuration '{path}': {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"'{path}' is not valid {path.suffix.lstrip('.') or 'JSON'}: {error}") from error
        return cls.checked({**values, **overrides})

    @classmethod
    def checked(cls, values: dict[str, object]) -> TrainConfig:
        """Validate. Raises :class:`UsageError` with pydantic's findings, which name the fields."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UsageError(f"training configuration: {findings(cls, error)}") from error
