"""Settings of an evaluation: one immutable, validated record. Nothing here imports torch."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import Field, field_validator

from imprompt.errors import UsageError
from imprompt.schema.profiles import read_profile
from imprompt.schema.record import Record
from imprompt.schema.request import Speed
from imprompt.schema.values import ExpandedPath, Names

BARE = "bare base"
"""Name of the base without an adapter in the report."""


class Contender(Record):
    """One adapter with its settings, to be compared with others."""

    FLAG = "--adapter"
    adapter: str
    """Alias, file, folder of a training run, or hub file."""
    scale: float = Field(default=1.0, ge=-10, le=10)
    """Strength of the image prompt."""
    profile: str | None = None
    """Layer profile, as in a request."""
    speed: Speed = "exact"
    """How fast it draws, as in a request."""
    label: str = ""
    """Name in the report."""

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Read ``ADAPTER[,scale=X][,profile=NAME][,speed=NAME][,label=TEXT]``. Raises :class:`UsageError`."""
        found = super().parse(text)
        if "," in found.adapter:
            raise UsageError(f"--adapter '{text}': NAME,field=value is expected.")
        return found

    @field_validator("profile")
    @classmethod
    def _profile_is_known(cls, value: str | None) -> str | None:
        if value is not None:
            read_profile(value)
        return value

    @property
    def name(self) -> str:
        """Its label, or its file's name with the settings that are not the default ones."""
        if self.label:
            return self.label
        said = [Path(self.adapter).stem if Path(self.adapter).suffix else self.adapter]
        said += [f"scale {self.scale:g}"] if self.scale != 1 else []
        said += [self.profile] if self.profile else []
        return " ".join([*said, self.speed] if self.speed != "exact" else said)


class EvaluateConfig(Record):
    """One evaluation: adapters, pictures, texts, and how much is drawn."""

    source: str | None = None
    """Pictures to measure on, with or without captions: a folder, metadata file, .tar (also x-{0..9}.tar) or
    hf:owner/name; ``None``: the bundled base's held-out pictures."""
    prompts: ExpandedPath | None = None
    """Text file with a prompt on each line, to draw with the pictures; ``None``: the captions of other
    pictures."""
    only: str | None = None
    """Use only the pictures with this tag."""
    ignore: Names = ()
    """Fields of records that are not read, with commas between them, such as a split that means something
    else."""
    base: str = "emoji"
    """The model: alias, hub id, folder or .safetensors file."""
    contenders: tuple[Contender, ...] = ()
    """Adapters to compare; (): the base's default adapter."""
    n: int = Field(default=24, ge=1)
    """Number of pictures at most, spread evenly over the source."""
    samples: int = Field(default=4, ge=1, le=64)
    """Drawings of each picture; 4 in the paper."""
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Scales at which text and picture fidelity are plotted; an empty list: no plot."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps; ``None``: the base's default."""
    guidance: float | None = Field(default=None, ge=0, le=100)
    """Classifier-free guidance scale; ``None``: the base's default."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of all drawings."""
    device: str | None = None
    """One of auto, cpu, cuda, cuda:1 and mps; ``None``: auto."""
    clip: str | None = None
    """CLIP or SigLIP to score with: folder or hub id; ``None``: the base's own encoders."""
    dino: str | None = None
    """DINO model to score with: folder or hub id."""
    face_model: str | None = None
    """Folder with a face detector and a recogniser (.onnx), for face adapters and to score identity;
    ``None``: face adapters' InsightFace pack in InsightFace's own folder, and no score of identity."""
    output: ExpandedPath | None = None
    """Folder for report.html, report.json and the drawings; run again, it continues there."""
    quiet: bool = False
    """No progress bar."""

    @field_validator("scales")
    @classmethod
    def _scales_are_strengths(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(math.isfinite(scale) and 0 <= scale <= 10 for scale in value):
            raise ValueError(f"each from 0 to 10 is expected, given {value}")
        return tuple(dict.fromkeys(value))

    def named(self, default: str | None) -> list[tuple[str, Contender]]:
        """The contenders under different names; equal names get their folder's, then a number."""
        chosen = self.contenders
        if not chosen:
            if default is None:
                raise UsageError(
                    f"evaluate: base '{self.base}' has no default adapter; name one (--adapter)."
                )
            chosen = (Contender(adapter=default),)
        names: list[tuple[str, Contender]] = []
        taken = {BARE}
        for each in chosen:
            name, number = each.name, 2
            if sum(other.name == name for other in chosen) > 1 and Path(each.adapter).suffix:
                name = f"{Path(each.adapter).parent.name}/{name}"
            free = name
            while free in taken:
                free, number = f"{name} ({number})", number + 1
            taken.add(free)
            names.append((free, each))
        return names
