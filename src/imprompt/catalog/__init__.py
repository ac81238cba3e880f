"""The catalogue of models with an alias, as frozen records read from ``catalog.toml``.

:func:`bases`, :func:`adapters`, :func:`encoders`, :func:`controls` and :func:`motions` map names to records,
:func:`families` describes the kinds of base. The file is read at the first call. Nothing is downloaded or
loaded here, and nothing heavy is imported.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from imprompt.catalog.variants import VARIANTS
from imprompt.errors import UsageError

Backbone = Literal["unet", "flux", "sd3"]
"""The architectures that an adapter's layers are made for."""
BUNDLED = "bundled"
"""In place of a repository: the files come with imprompt."""
ASSETS = Path(__file__).parents[1] / "assets" / "emoji"
"""Folder of the bundled model."""


@dataclass(frozen=True)
class FamilyRow:
    """A kind of base model: what an adapter for it looks like, and the defaults for drawing with it."""

    name: str
    title: str
    """Its name in messages."""
    backbone: Backbone
    cross_dim: int
    """Width of the tokens that its attention sites read."""
    steps: int
    guidance: float
    size: int
    """Side of the square pictures it was trained on, in pixels."""
    sites: int | None = None
    """Number of attention sites that an adapter can have; ``None``: any."""
    text_dim: int | None = None
    """Width of the text before the UNet's own projection; ``None``: there is no such projection."""
    takes: tuple[str, ...] = ()
    """Other families whose adapters fit."""
    adapter: str | None = None
    """The default adapter."""
    motion: str | None = None
    """The default motion adapter."""
    controls: Mapping[str, str] = field(default_factory=dict)
    """The default model for each kind of control."""
    keyframes: Mapping[str, str] = field(default_factory=dict)
    """The same for pictures that stand at one frame of a clip."""


@dataclass(frozen=True)
class Entry:
    """Fields that all models of the catalogue have."""

    name: str
    """The name that is typed."""
    repo: str
    """Hub repository, or :data:`BUNDLED`."""
    licence: str
    """A name of :func:`licence_terms`."""

    @property
    def bundled(self) -> bool:
        """Whether the files come with imprompt."""
        return self.repo == BUNDLED


@dataclass(frozen=True)
class BaseRow(Entry):
    """A diffusion model."""

    family: str
    note: str
    gigabytes: float = 0.0
    """Size of all weights that are read, in half precision."""
    steps: int | None = None
    """Its own default where it is not the family's; so is ``guidance``."""
    guidance: float | None = None
    kind: str | None = None
    """Kind of its pipelines (:data:`imprompt.generation.families.KINDS`) where it is not its family's."""
    inpaint: bool = False
    """Whether its denoiser takes the mask and the masked picture as further channels."""
    half: bool = False
    """Whether the repository also holds fp16 files, half the download."""
    half_only: bool = False
    """Whether it holds no others."""

    @property
    def size(self) -> int:
        """Side of the square pictures it was trained on, in pixels."""
        return families()[self.family].size


@dataclass(frozen=True)
class EncoderRow(Entry):
    """An image encoder."""

    title: str
    """Its name in messages."""
    pooled: int
    """Width of its pooled embedding."""
    hidden: int
    """Width of its hidden states."""
    folder: str = ""
    """Folder in the repository."""
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class AdapterRow(Entry):
    """An image prompt adapter. Rows that are equal but for name, size and hash have files of the same
    shapes."""

    file: str
    family: str
    variant: str
    """Name in :data:`imprompt.catalog.variants.VARIANTS`."""
    tokens: int
    """Tokens of one picture."""
    note: str
    encoder: str | None = None
    """Name of its image encoder; ``None``: it reads face embeddings alone."""
    differs: str = ""
    """How it differs from files of the same shapes."""
    bytes: int | None = None
    megabytes: int = 0
    sha256: str | None = None
    lora_sha256: str | None = None
    """SHA-256 of the LoRA that is published beside it."""
    face_pack: str | None = None
    """InsightFace's models that it reads photos with."""
    published: str = ""
    """Name that its file is identified by: the file's own without its ending, if that says enough."""

    @property
    def pickled(self) -> bool:
        """Whether it is published as a pickle, which ``imprompt convert`` makes safe."""
        return self.file.endswith(".bin")

    @property
    def feature_width(self) -> int:
        """Width of the features that its projection reads first: the encoder's, or a face embedding's 512."""
        feature = VARIANTS[self.variant].feature
        if self.encoder is None or feature == "face+hidden":
            return 512
        encoder = encoders()[self.encoder]
        return encoder.pooled if feature == "pooled" else encoder.hidden


@dataclass(frozen=True)
class ControlRow(Entry):
    """A ControlNet or T2I-Adapter."""

    family: str
    megabytes: int
    """Size of the smallest file that can be used: fp16 if the repository has it."""
    modes: Mapping[str, int | None]
    """Kinds of control that it takes; in a union model, each with its number."""
    folder: str = ""
    """Folder in the repository."""
    half: bool = False
    """Whether the repository also holds fp16 files."""
    favor: Literal["balanced", "prompt", "control"] = "balanced"
    """What it favours in stills from a text with guidance, where a request leaves that open."""
    revision: str | None = None
    """Branch with safetensors, where the main one has pickles only."""
    note: str = ""


@dataclass(frozen=True)
class MotionRow(Entry):
    """A motion adapter: the temporal layers that AnimateDiff puts between a UNet's own."""

    family: str
    megabytes: int
    """Size of the file that is used: fp16 if there is one."""
    note: str
    scheduler: str | None = None
    """Default scheduler of clips drawn with it; ``None``: the base's."""
    half: bool = False


Row = TypeVar("Row", bound=FamilyRow | Entry)


def families() -> Mapping[str, FamilyRow]:
    """The base families by name."""
    return _rows("families", FamilyRow)


def bases() -> Mapping[str, BaseRow]:
    """The diffusion models by name."""
    return _rows("bases", BaseRow)


def encoders() -> Mapping[str, EncoderRow]:
    """The image encoders by name."""
    return _rows("encoders", EncoderRow)


def adapters() -> Mapping[str, AdapterRow]:
    """The image prompt adapters by name."""
    return _rows("adapters", AdapterRow)


def controls() -> Mapping[str, ControlRow]:
    """The ControlNets and T2I-Adapters by name."""
    return _rows("controls", ControlRow)


def motions() -> Mapping[str, MotionRow]:
    """The motion adapters by name."""
    return _rows("motions", MotionRow)


@cache
def licence_terms() -> Mapping[str, bool]:
    """Licence → whether it allows commercial use without asking anyone."""
    return dict(_tables()["licences"])


def family_of(backbone: Backbone, sites: int, cross_dim: int) -> FamilyRow | None:
    """The family whose adapters have this number of sites and width of tokens, if any; adapters of
    transformers may have fewer sites."""
    for row in families().values():
        fits = row.sites in (None, sites) or (backbone != "unet" and sites <= (row.sites or 0))
        if (row.backbone, row.cross_dim) == (backbone, cross_dim) and fits:
            return row
    return None


def bases_for(family: str) -> tuple[str, ...]:
    """Names of the bases that adapters of a family fit."""
    known = families()
    return tuple(
        name for name, row in bases().items() if family in (row.family, *known[row.family].takes)
    )  # fmt: skip


def encoder_with(feature: Literal["pooled", "hidden"], width: int) -> str | None:
    """Titles of the encoders with pooled or hidden features of this width, joined by ``or``, if any."""
    titles = dict.fromkeys(
        row.title for row in encoders().values() if not row.bundled and getattr(row, feature) == width
    )
    return " or ".join(titles) or None


def lookup(table: Mapping[str, Row], name: str, kind: str, others: str) -> Row:
    """The row of a name. Raises :class:`UsageError` with similar names, or all; ``others`` says what may be
    given instead of a name."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name.lower(), table, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(table)}."
    raise UsageError(f"{kind} '{name}' is unknown; {hint} Or give {others}.")


# ---- reading


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "catalog.toml").read_text(encoding="utf-8"))


@cache
def _rows(table: str, kind: type[Row]) -> Mapping[str, Row]:
    rows = {}
    for name, values in _tables()[table].items():
        given = {"name": name, **values}
        if "takes" in given:
            given["takes"] = tuple(given["takes"])
        if "kinds" in given:
            given["modes"] = dict.fromkeys(given.pop("kinds"))
        if table == "adapters":
            given.setdefault("published", Path(given["file"]).stem)
            given.setdefault("megabytes", round(given.get("bytes", 0) / 1e6))
        rows[name] = kind(**given)
    return rows
