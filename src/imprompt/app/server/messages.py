"""What the server and its worker processes say to each other through their pipe. Plain values, pickled."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know before its first job."""

    pictures: Path
    """Folder of the store's pictures."""
    scratch: Path
    """Folder with one for each job's pictures that are being written, on the same file system."""
    device: str
    dtype: str
    offload: str
    base: str
    """Loaded before the first job."""
    download: bool = False
    """Whether the hub may be asked for models that jobs name; those of ``names`` it always may."""
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    """``bases``, ``adapters``, ``loras``: offered name → what the Engine is given."""


@dataclass(frozen=True)
class Task:
    """One job to draw."""

    id: str
    request: dict[str, Any]
    suffix: str
    """Of the files to write: ``.png``, ``.webp``, ``.mp4``, …"""
    previews: bool


@dataclass(frozen=True)
class Draw:
    """To a worker: draw these jobs as one batch."""

    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Cancel:
    """To a worker: this job is not wanted any more."""

    id: str


@dataclass(frozen=True)
class Stop:
    """To a worker: end."""


@dataclass(frozen=True)
class Ready:
    """From a worker: it waits for jobs."""

    problem: str | None
    """Why it could not load its base, for clients; ``None``: it could."""


@dataclass(frozen=True)
class Stepped:
    """From a worker: a denoising step of a job is done."""

    id: str
    step: int
    steps: int
    """Of all pictures of the job together."""
    preview: bytes | None
    """A small WebP, now and then."""


@dataclass(frozen=True)
class Drawn:
    """From a worker: a job is done and its pictures lie in its scratch folder, named by their ids."""

    id: str
    pictures: tuple[dict[str, Any], ...]
    request: str
    """JSON of the complete request that draws them again."""
    notes: tuple[str, ...]
    timings: dict[str, float]
    batch: int
    """How many jobs were drawn together."""


@dataclass(frozen=True)
class Failed:
    """From a worker: a job cannot be drawn."""

    id: str
    status: int
    code: str
    message: str
    field: str | None


@dataclass(frozen=True)
class Cancelled:
    """From a worker: a job was stopped before it was done."""

    id: str


Answer: TypeAlias = Stepped | Drawn | Failed | Cancelled
"""From a worker, about one job."""


@dataclass(frozen=True)
class Free:
    """From a worker: everything it was given has been answered."""

    memory: int
    """Resident bytes of the process."""
    cache_hits: int
    cache_misses: int
    """Pictures whose features were, or were not, remembered, since the start."""
