"""Describe an adapter file."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from imprompt.catalog import AdapterRow, encoder_with
from imprompt.catalog.variants import Variant
from imprompt.checkpoints.contents import Contents
from imprompt.checkpoints.structure import LORA, Shapes, Structure, either, some
from imprompt.io import check_path
from imprompt.tensorfile import not_finite_tensors


@dataclass(frozen=True)
class Inspection:
    """Description of an adapter file; ``str`` gives a table, :meth:`to_dict` JSON."""

    name: str
    path: str
    bytes: int
    variant: str
    """Name in :data:`imprompt.catalog.variants.VARIANTS`; two joined by ``or`` if the file does not tell."""
    evidence: str
    """How the variant was found: sha256, metadata, dtypes, file name, variant=, or keys and shapes."""
    published: tuple[str, ...]
    """Published files that it may be; if several, ``differs`` says how they differ."""
    differs: tuple[str, ...]
    base: str
    """Base family by its name in the catalogue, or ``other``."""
    backbone: str
    layers: int
    """Number of attention sites."""
    cross_dim: int
    tokens: int
    feature: str
    feature_width: int
    encoder: str
    face: str | None
    """The face embedding it reads, if any: model pack, and whether normalised."""
    negative: str
    lora_rank: int | None
    parameters: dict[str, int]
    dtypes: tuple[str, ...]
    finite: bool | None
    """``None``: not checked."""
    not_finite: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The fields as lists, dicts, strings and numbers."""
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


def inspect(path: str | Path, *, variant: str | None = None, weights: bool = True) -> Inspection:
    """Describe a ``.safetensors`` adapter. ``weights=False`` reads only the header, and leaves ``finite``
    open.

    Raises :class:`ModelError` for a file that is damaged or no adapter. Weights that are not finite, and
    several possible variants, are reported in the result.
    """
    file = check_path(path)
    contents = Contents.of_file(file)
    structure, identity = contents.structure, contents.identify(variant, hashed=weights)
    bad = not_finite_tensors(file) if weights else ()
    kind = identity.variants[0]
    return Inspection(
        name=contents.name,
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
        encoder=_encoder(kind, structure),
        face=_face(kind, identity.published),
        negative=kind.negative,
        lora_rank=structure.lora_rank,
        parameters=_parameters(contents.shapes),
        dtypes=tuple(sorted(set(contents.dtypes.values()))),
        finite=not bad if weights else None,
        not_finite=bad,
    )


def _encoder(variant: Variant, structure: Structure) -> str:
    """The image encoder that a variant needs, in words."""
    if variant.feature == "face":
        return "none"
    kind: Literal["pooled", "hidden"] = "pooled" if variant.feature == "pooled" else "hidden"
    width = structure.patch_width or structure.feature_width
    return encoder_with(kind, width) or f"one with {kind} width {width}"


def _face(variant: Variant, published: Sequence[AdapterRow]) -> str | None:
    """The face embedding that a variant reads, in words; ``None`` if it reads none."""
    if variant.embedding is None:
        return None
    packs = sorted({row.face_pack for row in published if row.face_pack})
    return (
        f"InsightFace {either(packs) or 'or other'} embedding, {variant.embedding} (non-commercial weights)"
    )


def _parameters(shapes: Shapes) -> dict[str, int]:
    """Number of weights by part."""
    counts = {"projection": 0, "keys and values": 0, "LoRA": 0}
    for section, keys in shapes.items():
        for key, shape in keys.items():
            layer = "LoRA" if LORA.fullmatch(key) else "keys and values"
            counts["projection" if section == "image_proj" else layer] += math.prod(shape)
    return counts
