"""Tell adapters of the same shapes apart: by hash, metadata, dtypes and file name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imprompt.catalog import AdapterRow, adapters
from imprompt.catalog.variants import VARIANTS, Variant
from imprompt.checkpoints.layouts import SECTIONS
from imprompt.checkpoints.structure import Structure, either
from imprompt.errors import ModelError, UsageError
from imprompt.io import sha256

NOTED_VARIANT, NOTED_PUBLISHED = "imprompt.variant", "imprompt.published"
"""Metadata keys of files written here."""


@dataclass(frozen=True)
class Identity:
    """The variants and published files that an adapter may be; one of each if the evidence suffices."""

    variants: tuple[Variant, ...]
    published: tuple[AdapterRow, ...]
    evidence: str


def identify(
    structure: Structure,
    name: str,
    asked: str | None,
    metadata: Mapping[str, str],
    dtypes: Mapping[str, str],
    file: Path | None,
) -> Identity:
    """Identify an adapter by the most reliable evidence there is.

    ``file`` is hashed only if several published files have its shapes, and one of them its size. Raises
    :class:`UsageError` for an unknown ``asked`` variant, :class:`ModelError` for one with other weights.
    """
    rows = [row for row in adapters().values() if not row.bundled and _could_be(row, structure)]
    if asked is not None:
        return _as_asked(structure, rows, name, asked)
    return (
        _by_hash(rows, file)
        or _by_metadata(structure, rows, name, metadata)
        or _by_elimination(structure, rows, name, dtypes)
    )


def _could_be(row: AdapterRow, structure: Structure) -> bool:
    return VARIANTS[row.variant] in structure.variants and (row.family, row.feature_width, row.tokens) == (
        structure.family,
        structure.feature_width,
        structure.tokens,
    )


def _as_asked(structure: Structure, rows: Sequence[AdapterRow], name: str, asked: str) -> Identity:
    named = next((row for row in adapters().values() if asked in (row.published, row.name)), None)
    variant = VARIANTS.get(named.variant if named else asked)
    if variant is None:
        raise UsageError(f"no variant '{asked}'; there are {either(VARIANTS)}, and names of published files.")
    if not _has_weights_of(structure, variant):
        raise ModelError(f"adapter '{name}' cannot be '{asked}': its weights are {_names(structure)}.")
    published = tuple(row for row in rows if row.variant == variant.name and named in (None, row))
    return Identity((variant,), published, "variant=")


def _by_hash(rows: Sequence[AdapterRow], file: Path | None) -> Identity | None:
    if file is None or len(rows) < 2 or all(row.bytes not in (None, file.stat().st_size) for row in rows):
        return None
    found = sha256(file)
    matches = (row for row in rows if row.sha256 == found)
    return next((Identity((VARIANTS[row.variant],), (row,), "sha256") for row in matches), None)


def _by_metadata(
    structure: Structure, rows: Sequence[AdapterRow], name: str, metadata: Mapping[str, str]
) -> Identity | None:
    noted = metadata.get(NOTED_VARIANT)
    if noted is None:
        return None
    variant = VARIANTS.get(noted)
    if variant is None or not _has_weights_of(structure, variant):
        raise ModelError(
            f"adapter '{name}' says it is '{noted}', its weights are {_names(structure)}. Say variant= if "
            "its metadata is wrong."
        )
    same = tuple(row for row in rows if row.variant == noted)
    named = tuple(row for row in same if row.published == metadata.get(NOTED_PUBLISHED))
    return Identity((variant,), named or same, "metadata")


def _by_elimination(
    structure: Structure, rows: Sequence[AdapterRow], name: str, dtypes: Mapping[str, str]
) -> Identity:
    """The variants and published files that agree with the dtypes and the file's name."""
    evidence, stem = "keys and shapes", _plain(name)
    for clue, left in (("dtypes", _of_dtypes(rows, dtypes)), ("file name", _named_in(stem, rows))):
        if len(left) < len(rows):
            evidence, rows = clue, left
            break
    variants = [v for v in structure.variants if not rows or v.name in {row.variant for row in rows}]
    if len(variants) > 1 and (told := _plus_or_v2(stem)):
        evidence, variants, rows = "file name", [told], [row for row in rows if row.variant == told.name]
    return Identity(tuple(variants), tuple(rows), evidence)


def _plus_or_v2(stem: str) -> Variant | None:
    """FaceID-Plus or PlusV2, by the file's name; their weights have the same shapes."""
    if "faceid" not in stem or "plus" not in stem:
        return None
    return VARIANTS["faceid-plusv2" if "plusv2" in stem or "plus_v2" in stem else "faceid-plus"]


def _of_dtypes(rows: Sequence[AdapterRow], dtypes: Mapping[str, str]) -> Sequence[AdapterRow]:
    """Portrait-unnorm has a float32 projection and float16 layers; InstantID has float32 in both."""
    if {row.variant for row in rows} != {"faceid-raw"}:
        return rows
    projection, layers = (
        {kind for key, kind in dtypes.items() if key.startswith(section)} for section in SECTIONS
    )
    if projection != {"F32"} or len(layers) != 1:
        return rows
    pack = {"F16": "buffalo_l", "F32": "antelopev2"}.get(layers.pop())
    return [row for row in rows if row.face_pack == pack] or rows


def _named_in(stem: str, rows: Sequence[AdapterRow]) -> Sequence[AdapterRow]:
    """The rows with the longest published name that the file's name contains."""
    found = [row for row in rows if _plain(row.published) in stem]
    longest = max((len(row.published) for row in found), default=0)
    return [row for row in found if len(row.published) == longest] or rows


def _has_weights_of(structure: Structure, variant: Variant) -> bool:
    """Whether an adapter of this structure can be read as ``variant``."""
    mine = structure.variants[0]
    return (mine.projection, mine.uses_text_projection) == (variant.projection, variant.uses_text_projection)


def _names(structure: Structure) -> str:
    return either(variant.name for variant in structure.variants)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
