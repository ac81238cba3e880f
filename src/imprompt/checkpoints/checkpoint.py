"""Adapter files: say what one is, read it with every check, write and convert it.

In: a ``.safetensors`` file or a state dict in a published layout. Out: a :class:`Checkpoint` in one form for
all layouts, or one :class:`ModelError` that names the file, what is wrong and what to do. Pickles are opened
by :func:`convert` alone. What exists is in the catalogue, how it is named in
:mod:`imprompt.checkpoints.layouts`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from imprompt.catalog import AdapterRow, Backbone, families, licences
from imprompt.catalog.variants import Variant
from imprompt.checkpoints.identify import (
    FOREIGN,
    LORA,
    NOTED_PUBLISHED,
    NOTED_VARIANT,
    Shape,
    Structure,
    either,
    encoder_of,
    examine,
    identify,
    some,
)
from imprompt.checkpoints.layouts import LAYOUTS, SECTIONS, Layout, our_form, published_form
from imprompt.errors import ModelError, UsageError
from imprompt.io import sha256
from imprompt.weights import (
    flatten,
    iter_tensors,
    load_pickle,
    load_tensors,
    not_finite,
    read_header,
    save_tensors,
)

StateDict: TypeAlias = dict[str, dict[str, Tensor]]
"""``{"image_proj": {...}, "ip_adapter": {...}}``."""

_PROCESSOR = re.compile(
    r"unet\.(?P<stage>down_blocks|up_blocks|mid_block)\.(?P<path>.+)\.attn(?P<kind>[12])\.processor\."
    r"(?P<rest>to_[kv]_ip\.weight|to_(q|k|v|out)_lora\.(down|up)\.weight)"
)
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_STATE_DICT = "the adapter's state dict"
_SOURCE = "imprompt.source_sha256"
T = TypeVar("T")


@dataclass
class Checkpoint:
    """An adapter's weights and what they are. All tensors have been checked against the layout."""

    state: StateDict
    """Weights without the LoRA's: ``image_proj`` under its published names, ``ip_adapter`` as
    ``N.to_k_ip.weight`` and so on for attention site ``N``, whatever the layout."""
    variant: Variant
    tokens: int
    """Tokens of one picture; nominal (257, 729) where there is one of each patch."""
    cross_dim: int
    """Width of the tokens that the attention sites read."""
    feature_width: int
    layers: tuple[int, ...]
    """Numbers of the attention sites, ascending: 1, 3, 5, … on UNets, 0, 1, 2, … on transformers."""
    name: str
    source: str | None = None
    """Path it was read from."""
    published: AdapterRow | None = None
    """The published file that it is, if that is known."""
    base: str = "other"
    """Base family it was made for (a name in the catalogue); ``other``: none of them."""
    lora: dict[str, Tensor] = field(default_factory=dict)
    """FaceID's LoRA, ``N.to_{q,k,v,out}_lora.{down,up}.weight`` for every attention ``N``; else empty."""
    metadata: dict[str, str] = field(default_factory=dict)
    layout: str = "unet"
    """Name of its published layout in :data:`imprompt.checkpoints.layouts.LAYOUTS`."""

    @property
    def backbone(self) -> Backbone:
        """The architecture that its sites are numbered in."""
        return _layout(self.layout).backbone

    @property
    def base_title(self) -> str:
        """The base family's name in messages; empty if it is none of the catalogue."""
        return families()[self.base].title if self.base in families() else ""

    @property
    def licence(self) -> str:
        """What is known of it by the layout alone: that of published face adapters, or of Kolors."""
        if self.variant.embedding is not None and self.base != "other":
            return licences.FACES
        return licences.KOLORS if self.base == "kolors" else ""

    def site(self, number: int) -> dict[str, Tensor]:
        """The weights of one attention site by name: ``to_k_ip.weight``, ``to_v_ip.weight``, and what its
        layout has besides (``to_k_ip.bias``, ``norm_ip.linear.weight``, …)."""
        prefix = f"{number}."
        return {
            key.removeprefix(prefix): value
            for key, value in self.state["ip_adapter"].items()
            if key.startswith(prefix)
        }


@dataclass(frozen=True)
class Inspection:
    """What a file is, for people (``str``) and programs (``to_dict``)."""

    name: str
    path: str
    bytes: int
    variant: str
    """Name in :data:`imprompt.catalog.variants.VARIANTS`; two joined by ``or`` where the file is silent."""
    evidence: str
    """What that rests on: sha256, metadata, dtypes, file name, variant=, or keys and shapes."""
    published: tuple[str, ...]
    """Published files it may be; several have the same shapes, then ``differs`` says how they differ."""
    differs: tuple[str, ...]
    base: str
    """Base family it is for, by its name in the catalogue; ``other``: none of them."""
    backbone: str
    layers: int
    """Number of its attention sites."""
    cross_dim: int
    tokens: int
    feature: str
    feature_width: int
    encoder: str
    face: str | None
    """Face embedding it reads: model pack and whether L2-normalised."""
    negative: str
    lora_rank: int | None
    parameters: dict[str, int]
    dtypes: tuple[str, ...]
    finite: bool | None
    """``None``: not looked at."""
    not_finite: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain lists, dicts, strings and numbers, ready for JSON."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    def __str__(self) -> str:
        total = sum(self.parameters.values())
        parts = ", ".join(f"{part} {count:,}" for part, count in self.parameters.items() if count)
        finite = {None: "not checked", True: "yes", False: f"NO: {some(self.not_finite)}"}[self.finite]
        rows = {
            "adapter": f"{self.name} ({self.bytes:,} bytes)",
            "variant": f"{self.variant} (by {self.evidence})",
            "published as": " or ".join(self.published) or "nothing known",
            "difference": "; ".join(self.differs) if len(self.published) > 1 else "",
            "base": f"{self.base} ({self.backbone}): {self.layers} attention sites of width {self.cross_dim}",
            "tokens": str(self.tokens),
            "reads": f"{self.feature} features of width {self.feature_width}",
            "encoder": self.encoder,
            "face": self.face or "",
            "without image": self.negative,
            "LoRA": f"rank {self.lora_rank}" if self.lora_rank else "",
            "parameters": f"{total:,} ({parts})",
            "dtypes": ", ".join(self.dtypes),
            "finite": finite,
        }
        return "\n".join(f"{label:<14}{value}" for label, value in rows.items() if value)


def read(
    source: str | Path | Mapping[str, object], *, variant: str | None = None, name: str | None = None
) -> Checkpoint:
    """Read an adapter from a ``.safetensors`` file, or a state dict, nested or flat.

    The variant is found by the file's SHA-256, its keys and shapes, metadata, dtypes and name, in this order
    of trust; ``variant`` (of :data:`VARIANTS`, or a published file's name) overrules. Tensors of a state dict
    are not copied, those of a file are in own memory. Raises :class:`ModelError` for what is missing,
    damaged, not finite or no adapter, and where the variant stays open between two that draw differently.
    """
    contents = _open(source, name)
    structure, name = contents.structure, contents.name
    identity = identify(structure, name, variant, contents.metadata, contents.dtypes, contents.file)
    if len(identity.variants) > 1:
        raise ModelError(
            f"adapter '{name}' may be {either(v.name for v in identity.variants)}; the file does not tell. "
            f"They differ: {'; '.join(f'{v.name}: {v.about}' for v in identity.variants)}. Say variant=."
        )
    if isinstance(source, Mapping):
        tensors, _ = our_form(flatten(source, _STATE_DICT))
    else:
        tensors, _ = our_form(load_tensors(Path(source)))
    if bad := [key for key, tensor in tensors.items() if not_finite(tensor)]:
        raise ModelError(f"adapter '{name}' has NaN or infinite weights in {some(bad)}. Get the file again.")
    state = _sections(tensors, name)
    lora = {key: tensor for key, tensor in state["ip_adapter"].items() if LORA.fullmatch(key)}
    sites = {key: tensor for key, tensor in state["ip_adapter"].items() if key not in lora}
    return Checkpoint(
        state={"image_proj": state["image_proj"], "ip_adapter": sites},
        variant=identity.variants[0],
        tokens=structure.tokens,
        cross_dim=structure.cross_dim,
        feature_width=structure.feature_width,
        layers=structure.layers,
        name=name,
        source=str(contents.file) if contents.file else None,
        published=identity.published[0] if len(identity.published) == 1 else None,
        base=structure.family,
        lora=lora,
        metadata=contents.metadata,
        layout=structure.layout.name,
    )


def write(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a ``.safetensors`` file under the published names; the variant goes into the metadata.

    The file appears whole or not at all. Raises :class:`ModelError` for weights that are not finite, and if
    it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"adapters are written as .safetensors, not '{path.name}'.")
    tensors = {f"image_proj.{key}": value for key, value in checkpoint.state["image_proj"].items()}
    for key, value in (checkpoint.state["ip_adapter"] | checkpoint.lora).items():
        tensors[f"ip_adapter.{key}"] = value
    if bad := [key for key, tensor in tensors.items() if not_finite(tensor)]:
        raise ModelError(
            f"adapter '{checkpoint.name}' has NaN or infinite weights in {some(bad)}; not saved."
        )
    names = published_form(tensors, _layout(checkpoint.layout))
    metadata = checkpoint.metadata | {"format": "pt", NOTED_VARIANT: checkpoint.variant.name}
    if checkpoint.published is not None:
        metadata[NOTED_PUBLISHED] = checkpoint.published.published
    save_tensors({names[key]: value for key, value in tensors.items()}, metadata, path)


def convert(source: str | Path, target: str | Path, *, variant: str | None = None) -> Inspection:
    """Convert a ``.bin``, ``.ckpt`` or ``.pt`` (or a training script's whole-model checkpoint) to
    ``.safetensors``.

    Unpickles data only, never code. The result is written whole or not at all, and read back. Raises
    :class:`ModelError` for what :func:`read` refuses, too.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise UsageError(f"convert needs another target than the source '{source}'.")
    tensors = load_tensors(source) if source.suffix == ".safetensors" else load_pickle(source)
    tensors = _trained(tensors)
    contents = _contents(_shapes(tensors), _dtype_names(tensors), {}, source.stem, source)
    identity = identify(contents.structure, source.stem, variant, {}, contents.dtypes, source)
    chosen: str | None = (
        identity.published[0].published if len(identity.published) == 1 else identity.variants[0].name
    )
    if len(identity.variants) > 1:
        chosen = None  # read says which two
    checkpoint = read(tensors, variant=chosen, name=source.stem)
    checkpoint.metadata = {_SOURCE: sha256(source)}
    write(checkpoint, target)
    again = read(target)
    for section, expected in checkpoint.state.items():
        for key, value in expected.items():
            if not torch.equal(again.state[section][key], value):
                raise ModelError(f"'{target}' does not read back as written: '{section}.{key}' differs.")
    return inspect(target)


def inspect(path: str | Path, *, variant: str | None = None, weights: bool = True) -> Inspection:
    """Say what a ``.safetensors`` adapter is. ``weights=False`` reads its header only and skips ``finite``.

    Raises :class:`ModelError` for what is damaged or no adapter; weights that are not finite, or a variant
    that stays open, are told in the result.
    """
    file = Path(path)
    contents = _open(file, None)
    structure = contents.structure
    identity = identify(
        structure, file.stem, variant, contents.metadata, contents.dtypes, file if weights else None
    )
    bad = tuple(key for key, tensor in iter_tensors(file) if not_finite(tensor)) if weights else ()
    kind = identity.variants[0]
    packs = sorted({row.face_pack for row in identity.published if row.face_pack})
    face = None
    if kind.embedding:
        face = (
            f"InsightFace {either(packs) or 'or other'} embedding, {kind.embedding} (non-commercial weights)"
        )
    sizes = {section: _count(shapes.values()) for section, shapes in contents.shapes.items()}
    lora = _count(shape for key, shape in contents.shapes["ip_adapter"].items() if LORA.fullmatch(key))
    return Inspection(
        name=file.stem,
        path=str(file),
        bytes=file.stat().st_size,
        variant=" or ".join(each.name for each in identity.variants),
        evidence=identity.evidence,
        published=tuple(row.published for row in identity.published),
        differs=tuple(f"{row.published}: {row.differs or row.note}" for row in identity.published),
        base=structure.family,
        backbone=structure.backbone,
        layers=len(structure.layers),
        cross_dim=structure.cross_dim,
        tokens=structure.tokens,
        feature=kind.feature,
        feature_width=structure.feature_width,
        encoder=encoder_of(kind, structure),
        face=face,
        negative=kind.negative,
        lora_rank=structure.lora_rank,
        parameters={
            "projection": sizes["image_proj"],
            "keys and values": sizes["ip_adapter"] - lora,
            "LoRA": lora,
        },
        dtypes=tuple(sorted(set(contents.dtypes.values()))),
        finite=not bad if weights else None,
        not_finite=bad,
    )


# ---- containers


@dataclass(frozen=True)
class _Contents:
    """What a file or state dict holds, without its weights."""

    file: Path | None
    name: str
    structure: Structure
    shapes: dict[str, dict[str, Shape]]
    """By section."""
    dtypes: dict[str, str]
    """By key, in our form."""
    metadata: dict[str, str]


def _open(source: str | Path | Mapping[str, object], name: str | None) -> _Contents:
    if isinstance(source, Mapping):
        tensors = flatten(source, _STATE_DICT)
        return _contents(_shapes(tensors), _dtype_names(tensors), {}, name or "adapter", None)
    path = Path(source)
    header, metadata = read_header(path)
    shapes = {key: shape for key, (_, shape) in header.items()}
    dtypes = {key: dtype for key, (dtype, _) in header.items()}
    return _contents(shapes, dtypes, metadata, name or path.stem, path)


def _contents(
    flat: Mapping[str, Shape],
    dtypes: Mapping[str, str],
    metadata: dict[str, str],
    name: str,
    file: Path | None,
) -> _Contents:
    """Keys and shapes examined. Raises :class:`ModelError` that says what the file is if it is no adapter."""
    for pattern, what in FOREIGN:
        if any(re.match(pattern, key) for key in flat):
            raise ModelError(f"'{name}' is no adapter that can be read here, it is {what}.")
    renamed, layout = our_form(flat)
    shapes = _sections(renamed, name)
    odd = [f"{key} ({kind})" for key, kind in dtypes.items() if kind not in _DTYPES.values()]
    if odd:
        raise ModelError(
            f"adapter '{name}' has weights that are not {either(_DTYPES.values())}: {some(odd)}."
        )
    structure = examine(shapes, layout, name)
    return _Contents(file, name, structure, shapes, our_form(dtypes)[0], metadata)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def _dtype_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: _DTYPES.get(value.dtype, str(value.dtype)) for key, value in tensors.items()}


def _sections(flat: Mapping[str, T], name: str) -> dict[str, dict[str, T]]:
    """Keys by their section. Raises :class:`ModelError` for keys of neither."""
    sections: dict[str, dict[str, T]] = {section: {} for section in SECTIONS}
    extra = []
    for key, value in flat.items():
        section, _, rest = key.partition(".")
        if section in sections and rest:
            sections[section][rest] = value
        else:
            extra.append(key)
    if extra:
        raise ModelError(
            f"'{name}' is no adapter: beside 'image_proj.…' and 'ip_adapter.…' it has {some(extra)}."
        )
    return sections


def _layout(name: str) -> Layout:
    return next(layout for layout in LAYOUTS if layout.name == name)


def _trained(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter in a whole-model checkpoint of the reference training scripts; anything else unchanged.

    Their UNet holds the very modules of ``adapter_modules``, and some ways of saving keep shared tensors only
    under the UNet's names, which are numbered here as ``unet.attn_processors`` are.
    """
    named = {key.removeprefix("module."): value for key, value in tensors.items()}
    if not any(key.startswith("image_proj_model.") for key in named):
        return dict(tensors)
    processors = {key: match for key in named if (match := _PROCESSOR.fullmatch(key))}
    # Every attention block has both kinds, so that one of them is enough to count it.
    order = sorted({_block_order(match) for match in processors.values()})
    adapter: dict[str, Tensor] = {}
    for key, match in processors.items():
        number = 2 * order.index(_block_order(match)) + int(match["kind"]) - 1
        adapter[f"ip_adapter.{number}.{match['rest']}"] = named[key]
    for key, value in named.items():
        section, _, rest = key.partition(".")
        if section == "image_proj_model":
            adapter[f"image_proj.{rest}"] = value
        elif section == "adapter_modules":
            adapter[f"ip_adapter.{rest}"] = value
    return adapter


def _block_order(match: re.Match[str]) -> tuple[int, ...]:
    stage = ("down_blocks", "up_blocks", "mid_block").index(match["stage"])
    return stage, *(int(number) for number in re.findall(r"\d+", match["path"]))


def _count(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)
