"""Adapter files: say what one is, read it with every check, write and convert it.

In: a ``.safetensors`` file or a state dict in the published layout (``image_proj`` and ``ip_adapter``). Out:
a :class:`Checkpoint`, or one :class:`ModelError` that names the file, what is wrong and what to do. Pickles
are opened by :func:`convert` alone. Tables of what exists are in :mod:`imprompt.catalog.published`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from imprompt.catalog import licences
from imprompt.catalog.published import FOREIGN, Published, Variant
from imprompt.checkpoints.files import digest, flatten, load_pickle, load_tensors, read_header, save_tensors
from imprompt.checkpoints.identify import (
    ALSO,
    KEY_VALUE,
    LORA,
    NOTED_PUBLISHED,
    NOTED_VARIANT,
    SECTIONS,
    Shape,
    either,
    encoder_of,
    examine,
    identify,
    some,
)
from imprompt.errors import ModelError, UsageError

StateDict: TypeAlias = dict[str, dict[str, Tensor]]
"""``{"image_proj": {...}, "ip_adapter": {...}}`` with published key names."""

_PROCESSOR = re.compile(
    r"unet\.(?P<stage>down_blocks|up_blocks|mid_block)\.(?P<path>.+)\.attn(?P<kind>[12])\.processor\."
    r"(?P<rest>to_[kv]_ip\.weight|to_(q|k|v|out)_lora\.(down|up)\.weight)"
)
_FORMATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SOURCE = "imprompt.source_sha256"
T = TypeVar("T")


@dataclass
class Checkpoint:
    """An adapter's weights and what they are. All tensors have been checked against the variant."""

    state: StateDict
    """Published keys without the LoRA's, in two sections."""
    variant: Variant
    tokens: int
    """Tokens of one image; of a full-face adapter nominally 257, it makes one of each patch."""
    cross_dim: int
    """Width that the layers read."""
    feature_width: int
    layers: tuple[int, ...]
    """Published odd layer numbers, ascending: 1, 3, 5, …"""
    name: str
    source: str | None = None
    """Path it was read from."""
    published: Published | None = None
    """The published file it is, where that is known."""
    base: str = "other"
    """Base family it was made for, by its layout; ``other``: none of the published ones."""
    lora: dict[str, Tensor] = field(default_factory=dict)
    """FaceID's LoRA, ``N.to_{q,k,v,out}_lora.{down,up}.weight`` for every attention ``N``; else empty."""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def licence(self) -> str:
        """What is known of it by its layout alone: one of a published face adapter or of Kolors."""
        if self.variant.embedding is not None and self.base != "other":
            return licences.FACES
        return licences.KOLORS if self.base == "Kolors" else ""


@dataclass(frozen=True)
class Inspection:
    """What a file is, for people (``str``) and programs (``to_dict``)."""

    name: str
    path: str
    bytes: int
    variant: str
    """Name in ``published.VARIANTS``; two joined by ``or`` where the file is silent."""
    evidence: str
    """What that rests on: sha256, metadata, number format, file name, variant=, or keys and shapes."""
    published: tuple[str, ...]
    """Published files it may be; several have the same shapes, then ``differs`` says how they differ."""
    differs: tuple[str, ...]
    base: str
    layers: int
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
            "base": f"{self.base}: {self.layers} cross-attentions of width {self.cross_dim}",
            "tokens": str(self.tokens),
            "reads": f"{self.feature} features of width {self.feature_width}",
            "encoder": self.encoder,
            "face": self.face or "",
            "without image": self.negative,
            "LoRA": f"rank {self.lora_rank}" if self.lora_rank else "",
            "parameters": f"{total:,} ({parts})",
            "numbers": ", ".join(self.dtypes),
            "finite": finite,
        }
        return "\n".join(f"{label:<14}{value}" for label, value in rows.items() if value)


def read(
    source: str | Path | Mapping[str, object], *, variant: str | None = None, name: str | None = None
) -> Checkpoint:
    """An adapter from a ``.safetensors`` file or a state dict, nested or flat, checked in full.

    The variant is found by the file's SHA-256, its keys and shapes, metadata, number format and name, in this
    order of trust; ``variant`` (of :data:`VARIANTS`, or a published file's name) overrules. Tensors are not
    copied. Raises :class:`ModelError` for what is missing, damaged, not finite or no adapter, and where the
    variant stays open between two that draw differently.
    """
    file, shapes, metadata, dtypes = _open(source)
    name = name or (file.stem if file else "adapter")
    layout = examine(shapes, name)
    identity = identify(layout, name, variant, metadata, dtypes, file)
    if len(identity.variants) > 1:
        raise ModelError(
            f"adapter '{name}' may be {either(v.name for v in identity.variants)}; the file does not tell. "
            f"They differ: {'; '.join(f'{v.name}: {v.about}' for v in identity.variants)}. Say variant=."
        )
    tensors = _flat(source) if isinstance(source, Mapping) else load_tensors(Path(source))
    state = _sections(tensors, name)
    bad = _not_finite(state)
    if bad:
        raise ModelError(f"adapter '{name}' has NaN or infinite weights in {some(bad)}. Get the file again.")
    return Checkpoint(
        state={
            "image_proj": state["image_proj"],
            "ip_adapter": {k: v for k, v in state["ip_adapter"].items() if KEY_VALUE.fullmatch(k)},
        },
        variant=identity.variants[0],
        tokens=layout.tokens,
        cross_dim=layout.cross_dim,
        feature_width=layout.feature_width,
        layers=layout.layers,
        name=name,
        source=str(file) if file else None,
        published=identity.published[0] if len(identity.published) == 1 else None,
        base=layout.family,
        lora={k: v for k, v in state["ip_adapter"].items() if LORA.fullmatch(k)},
        metadata=metadata,
    )


def write(checkpoint: Checkpoint, path: str | Path) -> None:
    """The published layout, flat, as ``.safetensors``; the variant goes into the metadata.

    The file appears whole or not at all. Raises :class:`ModelError` for weights that are not finite and where
    it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"adapters are written as .safetensors, not '{path.name}'.")
    bad = _not_finite(checkpoint.state | {"lora": checkpoint.lora})
    if bad:
        raise ModelError(
            f"adapter '{checkpoint.name}' has NaN or infinite weights in {some(bad)}; not saved."
        )
    tensors = {f"image_proj.{key}": value for key, value in checkpoint.state["image_proj"].items()}
    for key, value in (checkpoint.state["ip_adapter"] | checkpoint.lora).items():
        tensors[f"ip_adapter.{key}"] = value
    metadata = checkpoint.metadata | {"format": "pt", NOTED_VARIANT: checkpoint.variant.name}
    if checkpoint.published is not None:
        metadata[NOTED_PUBLISHED] = checkpoint.published.name
    save_tensors(tensors, metadata, path)


def convert(source: str | Path, target: str | Path, *, variant: str | None = None) -> Inspection:
    """A ``.bin``, ``.ckpt`` or ``.pt`` (or a training script's whole-model checkpoint) to ``.safetensors``.

    Unpickles data only, never code. The result is written whole or not at all and read back. Raises
    :class:`ModelError` for what :func:`read` refuses, too.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise UsageError(f"convert needs another target than the source '{source}'.")
    tensors = load_tensors(source) if source.suffix == ".safetensors" else load_pickle(source)
    tensors = _trained(tensors)
    name = source.stem
    layout = examine(_sections(_shapes(tensors), name), name)
    dtypes = _dtypes({key: _dtype_name(value) for key, value in tensors.items()}, name)
    identity = identify(layout, name, variant, {}, dtypes, source)
    chosen: str | None = (
        identity.published[0].name if len(identity.published) == 1 else identity.variants[0].name
    )
    if len(identity.variants) > 1:
        chosen = None  # read says which two
    checkpoint = read(tensors, variant=chosen, name=name)
    checkpoint.metadata = {_SOURCE: digest(source)}
    write(checkpoint, target)
    again = read(target)
    for section, expected in checkpoint.state.items():
        for key, value in expected.items():
            if not torch.equal(again.state[section][key], value):
                raise ModelError(f"'{target}' does not read back as written: '{section}.{key}' differs.")
    return inspect(target)


def inspect(path: str | Path, *, variant: str | None = None, weights: bool = True) -> Inspection:
    """What a ``.safetensors`` adapter is. ``weights=False`` reads its header only and skips ``finite``.

    Raises :class:`ModelError` for what is damaged or no adapter; weights that are not finite, or a variant
    that stays open, are told in the result.
    """
    file, shapes, metadata, dtypes = _open(path)
    if file is None:
        raise UsageError("inspect takes a file; read takes state dicts.")
    layout = examine(shapes, file.stem)
    identity = identify(layout, file.stem, variant, metadata, dtypes, file if weights else None)
    bad = _not_finite(_sections(load_tensors(file), file.stem)) if weights else ()
    kind = identity.variants[0]
    packs = sorted({row.face_pack for row in identity.published if row.face_pack})
    face = None
    if kind.embedding:
        face = (
            f"InsightFace {either(packs) or 'or other'} embedding, {kind.embedding} (non-commercial weights)"
        )
    sizes = {key: _count(section.values()) for key, section in shapes.items()}
    lora = _count(shape for key, shape in shapes["ip_adapter"].items() if LORA.fullmatch(key))
    return Inspection(
        name=file.stem,
        path=str(file),
        bytes=file.stat().st_size,
        variant=" or ".join(each.name for each in identity.variants),
        evidence=identity.evidence,
        published=tuple(row.name for row in identity.published),
        differs=tuple(f"{row.name}: {row.differs}" for row in identity.published),
        base=layout.family,
        layers=len(layout.layers),
        cross_dim=layout.cross_dim,
        tokens=layout.tokens,
        feature=kind.feature,
        feature_width=layout.feature_width,
        encoder=encoder_of(kind, layout),
        face=face,
        negative=kind.negative,
        lora_rank=layout.lora_rank,
        parameters={
            "projection": sizes["image_proj"],
            "keys and values": sizes["ip_adapter"] - lora,
            "LoRA": lora,
        },
        dtypes=tuple(sorted(set(dtypes.values()))),
        finite=not bad if weights else None,
        not_finite=bad,
    )


# ---- containers


def _open(
    source: str | Path | Mapping[str, object],
) -> tuple[Path | None, dict[str, dict[str, Shape]], dict[str, str], dict[str, str]]:
    """(file, shapes by section, metadata, number format by flat key) without reading a file's weights."""
    if isinstance(source, Mapping):
        tensors = _flat(source)
        dtypes = {key: _dtype_name(value) for key, value in tensors.items()}
        return None, _sections(_shapes(tensors), "adapter"), {}, _dtypes(dtypes, "adapter")
    path = Path(source)
    header, metadata = read_header(path)
    shapes = {key: shape for key, (_, shape) in header.items()}
    dtypes = {key: dtype for key, (dtype, _) in header.items()}
    return path, _sections(shapes, path.stem), metadata, _dtypes(dtypes, path.stem)


def _flat(source: Mapping[str, object]) -> dict[str, Tensor]:
    return flatten(source, "the adapter's state dict")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def _sections(flat: Mapping[str, T], name: str) -> dict[str, dict[str, T]]:
    """Flat keys by their section. Raises :class:`ModelError` that says what the file is if not an adapter."""
    for pattern, what in FOREIGN:
        if any(re.match(pattern, key) for key in flat):
            raise ModelError(f"'{name}' is no adapter that can be read here, it is {what}.")
    sections: dict[str, dict[str, T]] = {section: {} for section in SECTIONS}
    extra = []
    for key, value in flat.items():
        section, _, rest = key.partition(".")
        section = ALSO.get(section, section)
        if section in sections and rest:
            sections[section][rest] = value
        else:
            extra.append(key)
    if extra:
        raise ModelError(
            f"'{name}' is no adapter: beside 'image_proj.…' and 'ip_adapter.…' it has {some(extra)}."
        )
    return sections


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


def _dtypes(dtypes: dict[str, str], name: str) -> dict[str, str]:
    """``dtypes`` itself. Raises :class:`ModelError` for formats that are no weights of an adapter."""
    odd = [f"{key} ({kind})" for key, kind in dtypes.items() if kind not in _FORMATS.values()]
    if odd:
        raise ModelError(
            f"adapter '{name}' has weights that are not {either(_FORMATS.values())}: {some(odd)}."
        )
    return dtypes


def _dtype_name(tensor: Tensor) -> str:
    return _FORMATS.get(tensor.dtype, str(tensor.dtype))


def _not_finite(sections: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, ...]:
    return tuple(
        f"{section}.{key}"
        for section, tensors in sections.items()
        for key, tensor in tensors.items()
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all())
    )


def _count(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)
