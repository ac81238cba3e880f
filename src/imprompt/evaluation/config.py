"""What an evaluation measures: one immutable, validated record. Nothing here imports torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from imprompt.errors import UsageError
from imprompt.schema.record import describe_errors


class Contender(BaseModel):
    """One adapter with its settings: what is compared with the others."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    adapter: str = Field(description="alias, file, run folder or hub name")
    scale: float = Field(default=1.0, ge=-10, le=10)
    profile: str | None = Field(default=None, description="layer profile, as a request has it")
    label: str = Field(default="", description="its name in the report")

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Read ``ADAPTER[,scale=X][,profile=NAME][,label=TEXT]``. Raises :class:`UsageError`."""
        adapter, *options = text.split(",")
        values: dict[str, Any] = {"adapter": adapter}
        for option in options:
            name, sign, value = option.partition("=")
            if not sign:
                raise UsageError(f"--adapter '{text}': NAME,field=value is expected, given '{option}'.")
            values[name] = value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UsageError(f"--adapter '{text}': {describe_errors(cls, error)}") from error

    @property
    def name(self) -> str:
        """Its label, or its file's name with the settings that are not the default ones."""
        if self.label:
            return self.label
        said = [Path(self.adapter).stem if Path(self.adapter).suffix else self.adapter]
        said += [f"scale {self.scale:g}"] if self.scale != 1 else []
        return " ".join([*said, self.profile] if self.profile else said)


class EvaluateConfig(BaseModel):
    """One evaluation: adapters, pictures, texts, and how much is drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: str | None = Field(
        default=None, description="pictures of any form of data.rows; None: the bundled base's held-out ones"
    )
    prompts: Path | None = Field(
        default=None, description="file with a text a line, to go with the pictures; None: other captions"
    )
    only: str | None = Field(default=None, description="use the rows with this tag")
    base: str = Field(default="emoji", description="alias, folder, .safetensors file or hub id")
    contenders: tuple[Contender, ...] = Field(default=(), description="none: the base's default adapter")
    n: int = Field(default=24, ge=1, description="pictures; at most so many, spread over the source")
    samples: int = Field(default=4, ge=1, le=64, description="drawings of each picture (the paper's 4)")
    scales: tuple[float, ...] = Field(
        default=(0.25, 0.5, 0.75, 1.0), description="of the text and picture front; (): none is measured"
    )
    steps: int | None = Field(default=None, ge=1, le=1000, description="None: the base's default")
    guidance: float | None = Field(default=None, ge=0, le=100, description="None: the base's default")
    seed: int = Field(default=0, ge=0, lt=2**31)
    device: str | None = None
    clip: str | None = Field(
        default=None,
        description="CLIP or SigLIP that scores: folder or hub id; None: the base's own encoders",
    )
    dino: str | None = Field(default=None, description="DINO model that scores: folder or hub id")
    face_model: str | None = Field(default=None, description="folder of a face detector and recogniser")
    output: Path | None = Field(
        default=None, description="folder of report.html, report.json and drawings; resumable"
    )
    quiet: bool = False

    @field_validator("scales")
    @classmethod
    def _scales_are_strengths(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(math.isfinite(scale) and 0 <= scale <= 10 for scale in value):
            raise ValueError(f"each from 0 to 10 is expected, given {value}")
        return tuple(dict.fromkeys(value))

    @classmethod
    def checked(cls, values: dict[str, Any]) -> EvaluateConfig:
        """Validate. Raises :class:`UsageError` with one line that names the fields."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UsageError(f"evaluate: {describe_errors(cls, error)}") from error

    def named(self, default: str | None) -> list[tuple[str, Contender]]:
        """The contenders under names of their own; two of one name are told apart by folder, then number."""
        chosen = self.contenders
        if not chosen:
            if default is None:
                raise UsageError(
                    f"evaluate: base '{self.base}' has no default adapter; name one (--adapter)."
                )
            chosen = (Contender(adapter=default),)
        names: list[tuple[str, Contender]] = []
        for each in chosen:
            name, number = each.name, 2
            if sum(other.name == name for other in chosen) > 1 and Path(each.adapter).suffix:
                name = f"{Path(each.adapter).parent.name}/{name}"
            free = name
            while free in dict(names):
                free, number = f"{name} ({number})", number + 1
            names.append((free, each))
        return names
