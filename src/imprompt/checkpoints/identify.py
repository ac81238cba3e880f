"""Which adapter it is: keys and shapes checked one by one, then told apart by hash, metadata and name.

In: shapes by section, what else a file says. Out: a :class:`Layout` (what the weights can be) and an
:class:`Identity` (what they are taken for, and on what evidence). No tensor is touched here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from imprompt.catalog.published import ENCODERS, FAMILIES, PUBLISHED, VARIANTS, Published, Variant
from imprompt.checkpoints.files import digest
from imprompt.errors import ModelError, UsageError
from imprompt.projections.modules import skeleton

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Mapping[str, Shape]]
"""Section (``image_proj``, ``ip_adapter``) → key → shape."""

SECTIONS = ("image_proj", "ip_adapter")
ALSO = {"adapter_modules": "ip_adapter"}
"""Other names of a section: Kolors' FaceID-Plus has its keys and values under this one."""
KEY_VALUE = re.compile(r"(\d+)\.to_([kv])_ip\.weight")
LORA = re.compile(r"(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")
NOTED_VARIANT, NOTED_PUBLISHED = "imprompt.variant", "imprompt.published"
"""Metadata keys of files written here."""

# First match wins: key of image_proj → the variants that have it.
_BY_KEY = (
    ("perceiver_resampler.proj_in.weight", ("faceid-plus", "faceid-plusv2")),
    ("latents", ("resampler", "faceid-raw")),
    ("proj.3.weight", ("full-face",)),
    ("proj.0.weight", ("faceid",)),
    ("proj.weight", ("linear",)),
)
_ARCFACE = 512  # width of every published face embedding; no published encoder's hidden states are as narrow


# ---- what keys and shapes say


@dataclass(frozen=True)
class Layout:
    """What keys and shapes say of an adapter; widths are of one token or feature."""

    variants: tuple[Variant, ...]
    """Those with these keys and shapes."""
    tokens: int
    cross_dim: int
    """Width that the layers read."""
    feature_width: int
    patch_width: int | None
    layers: tuple[int, ...]
    lora_rank: int | None

    @property
    def family(self) -> str:
        """The base family these layers belong to, ``other`` for none of the published ones."""
        if self.cross_dim == 2048 and (
            self.variants[0].uses_text_projection
            or (self.variants[0].name == "resampler" and self.feature_width == 1024)
        ):
            return "Kolors"  # SDXL's UNet; of those with this layout only Kolors' adapter reads ViT-L
        if self.cross_dim == 256:
            return "emoji"
        return FAMILIES.get((len(self.layers), self.cross_dim), "other")


def examine(shapes: Shapes, name: str) -> Layout:
    """The layout, every key and shape checked. Raises :class:`ModelError`."""
    image_proj, ip_adapter = shapes["image_proj"], shapes["ip_adapter"]
    if not image_proj:
        raise ModelError(f"adapter '{name}' has an empty 'image_proj': no projection to make tokens with.")
    names = next((names for key, names in _BY_KEY if key in image_proj), None)
    if names is None:
        raise ModelError(
            f"adapter '{name}' has no known projection: of its keys {some(image_proj)} none of "
            f"{either(key for key, _ in _BY_KEY)} is there."
        )
    try:
        module = skeleton(VARIANTS[names[0]], image_proj)
    except ModelError as error:
        raise ModelError(f"adapter '{name}': {error}") from error
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    _compare(image_proj, expected, f"adapter '{name}', image_proj ({names[0]})")
    cross_dim = module.cross_dim
    if names[0] == "faceid-plus" and ip_adapter.get("1.to_k_ip.weight", ())[-1:] == (cross_dim // 2,):
        # Kolors' text is twice as wide as its cross-attention, and so are these tokens.
        names, cross_dim = ("faceid-plus-kolors",), cross_dim // 2
    layers = _key_values(ip_adapter, cross_dim, name)
    rank = _lora_rank(ip_adapter, layers, name)
    if rank is not None and "face" not in VARIANTS[names[0]].feature:
        raise ModelError(f"adapter '{name}' has LoRA keys, which only face adapters have; it is {names[0]}.")
    if names == ("resampler", "faceid-raw"):
        raw = (module.feature_width, module.cross_dim) == (_ARCFACE, 2048)
        names = names[1:] if raw else names[:1]
    return Layout(
        variants=tuple(VARIANTS[each] for each in names),
        tokens=module.tokens,
        cross_dim=cross_dim,
        feature_width=module.feature_width,
        patch_width=module.patch_width,
        layers=layers,
        lora_rank=rank,
    )


def _compare(given: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    missing = [key for key in expected if key not in given]
    extra = [key for key in given if key not in expected]
    wrong = [
        f"{key} {given[key]} instead of {expected[key]}"
        for key in expected
        if key in given and tuple(given[key]) != expected[key]
    ]
    faults = {"missing": missing, "not expected": extra, "of the wrong shape": wrong}
    if any(faults.values()):
        said = "; ".join(f"{fault}: {some(keys)}" for fault, keys in faults.items() if keys)
        raise ModelError(f"{what}: {said}. Get the file again, or say where it is from.")


def _key_values(ip_adapter: Mapping[str, Shape], cross_dim: int, name: str) -> tuple[int, ...]:
    """Published layer numbers; every layer's keys and values are there and agree with the projection."""
    extra = [key for key in ip_adapter if not KEY_VALUE.fullmatch(key) and not LORA.fullmatch(key)]
    if extra:
        raise ModelError(f"adapter '{name}' has keys in 'ip_adapter' that no adapter has: {some(extra)}.")
    found = {int(match[1]) for key in ip_adapter if (match := KEY_VALUE.fullmatch(key))}
    if not found:
        raise ModelError(
            f"adapter '{name}' has no to_k_ip and to_v_ip weights in 'ip_adapter'. A known fault of training "
            "scripts that save shared weights once: run 'imprompt convert' on the whole training checkpoint."
        )
    if max(found) > 2 * len(ip_adapter) + 1:  # before listing what is missing up to there
        raise ModelError(f"adapter '{name}' numbers a layer {max(found)}, with {len(found)} layers in all.")
    layers = range(1, max(found) + 1, 2)
    missing = [
        f"{n}.to_{part}_ip.weight"
        for n in layers
        for part in "kv"
        if f"{n}.to_{part}_ip.weight" not in ip_adapter
    ]
    if missing or not found <= set(layers):
        even = sorted(found - set(layers))
        said = [f"missing: {some(missing)}"] if missing else []
        said += [f"numbered even, which is self-attention: {some(str(n) for n in even)}"] if even else []
        raise ModelError(f"adapter '{name}', ip_adapter: {'; '.join(said)}. Get the file again.")
    widths = {ip_adapter[f"{n}.to_{part}_ip.weight"][-1:] for n in layers for part in "kv"}
    if widths != {(cross_dim,)}:
        given = sorted(width[0] if width else 0 for width in widths)
        raise ModelError(
            f"adapter '{name}' mixes widths: its projection makes tokens of width {cross_dim}, its layers "
            f"read {either(str(width) for width in given)}. Its parts are from different adapters."
        )
    for n in layers:
        key, value = (ip_adapter[f"{n}.to_{part}_ip.weight"] for part in "kv")
        if key != value or len(key) != 2 or not key[0]:
            raise ModelError(
                f"adapter '{name}', layer {n}: to_k_ip is {key} and to_v_ip {value}; must agree."
            )
    return tuple(layers)


def _lora_rank(ip_adapter: Mapping[str, Shape], layers: Sequence[int], name: str) -> int | None:
    """The LoRA's rank, ``None`` without one; every attention (even numbers too) has all eight weights."""
    keys = [key for key in ip_adapter if LORA.fullmatch(key)]
    if not keys:
        return None
    expected = {
        f"{n}.to_{part}_lora.{half}.weight"
        for n in range(layers[-1] + 1)
        for part in ("q", "k", "v", "out")
        for half in ("down", "up")
    }
    missing, extra = sorted(expected - set(keys)), sorted(set(keys) - expected)
    if missing or extra:
        said = [f"missing {some(missing)}"] if missing else []
        said += [f"not expected {some(extra)}"] if extra else []
        raise ModelError(f"adapter '{name}' has an incomplete LoRA: {'; '.join(said)}. Get the file again.")
    ranks = {ip_adapter[key][0 if ".down." in key else -1] if ip_adapter[key] else 0 for key in keys}
    flat = [key for key in keys if len(ip_adapter[key]) != 2]
    if flat or len(ranks) != 1:
        raise ModelError(f"adapter '{name}' has a LoRA of mixed ranks {sorted(ranks)}. Get the file again.")
    return ranks.pop()


# ---- which of those it is


@dataclass(frozen=True)
class Identity:
    """What an adapter is, as far as the evidence goes; several where it does not tell them apart."""

    variants: tuple[Variant, ...]
    published: tuple[Published, ...]
    evidence: str


def identify(
    layout: Layout,
    name: str,
    asked: str | None,
    metadata: Mapping[str, str],
    dtypes: Mapping[str, str],
    file: Path | None,
) -> Identity:
    """Variant and published file, by the most trustworthy evidence there is.

    ``file`` is hashed only where shapes leave a question and its size is a published one. Raises
    :class:`UsageError` for an ``asked`` variant that is none, :class:`ModelError` for one with other weights.
    """
    rows = [row for row in PUBLISHED if _could_be(row, layout)]
    if asked is not None:
        return _as_asked(layout, rows, name, asked)
    if file is not None and len(rows) > 1:
        size = file.stat().st_size
        if any(row.bytes in (size, None) for row in rows):
            sha256 = digest(file)
            for row in rows:
                if row.sha256 == sha256:
                    return Identity((VARIANTS[row.variant],), (row,), "sha256")
    noted = metadata.get(NOTED_VARIANT)
    if noted is not None:
        variants = [each for each in layout.variants if each.name == noted]
        if not variants and noted in VARIANTS and _same_modules(VARIANTS[noted], layout.variants[0]):
            variants = [VARIANTS[noted]]
        if not variants:
            raise ModelError(
                f"adapter '{name}' says it is '{noted}', its weights are "
                f"{either(v.name for v in layout.variants)}. Say variant= if its metadata is wrong."
            )
        same = tuple(row for row in rows if row.variant == noted)
        return Identity(
            tuple(variants),
            tuple(r for r in same if r.name == metadata.get(NOTED_PUBLISHED)) or same,
            "metadata",
        )
    evidence = "keys and shapes"
    if len(rows) > 1:
        narrowed = _by_numbers(rows, dtypes)
        if len(narrowed) < len(rows):
            rows, evidence = narrowed, "number format"
        else:
            narrowed = _by_name(rows, name)
            if len(narrowed) < len(rows):
                rows, evidence = narrowed, "file name"
    of_rows = {row.variant for row in rows}
    variants = [each for each in layout.variants if not of_rows or each.name in of_rows]
    if len(variants) > 1 and not rows:
        stem = _plain(name)
        if "faceid_plus" in stem:
            v2 = any(mark in stem for mark in ("plusv2", "plus_v2"))
            variants, evidence = [VARIANTS["faceid-plusv2" if v2 else "faceid-plus"]], "file name"
    return Identity(tuple(variants), tuple(rows), evidence)


def _could_be(row: Published, layout: Layout) -> bool:
    return any(row.variant == variant.name for variant in layout.variants) and (
        row.family,
        row.feature_width,
        row.tokens,
    ) == (layout.family, layout.feature_width, layout.tokens)


def _as_asked(layout: Layout, rows: Sequence[Published], name: str, asked: str) -> Identity:
    named = next((row for row in PUBLISHED if row.name == asked), None)
    variant = VARIANTS.get(named.variant if named else asked)
    if variant is None:
        raise UsageError(f"no variant '{asked}'; there are {either(VARIANTS)}, and names of published files.")
    if not _same_modules(variant, layout.variants[0]):
        raise ModelError(
            f"adapter '{name}' cannot be '{asked}': its weights are "
            f"{either(v.name for v in layout.variants)}."
        )
    published = tuple(row for row in rows if row.variant == variant.name and named in (None, row))
    return Identity((variant,), published, "variant=")


def _same_modules(one: Variant, other: Variant) -> bool:
    """Whether both have the same weights, and so one may be read as the other."""
    return (one.projection, one.uses_text_projection) == (other.projection, other.uses_text_projection)


def _by_numbers(rows: list[Published], dtypes: Mapping[str, str]) -> list[Published]:
    """Portrait-unnorm mixes a float32 projection with float16 layers; InstantID is float32 throughout."""
    if {row.variant for row in rows} != {"faceid-raw"}:
        return rows
    mixed = {part: {kind for key, kind in dtypes.items() if key.startswith(part)} for part in SECTIONS}
    if mixed == {"image_proj": {"F32"}, "ip_adapter": {"F16"}}:
        return [row for row in rows if row.face_pack == "buffalo_l"]
    if mixed == {"image_proj": {"F32"}, "ip_adapter": {"F32"}}:
        return [row for row in rows if row.face_pack == "antelopev2"]
    return rows


def _by_name(rows: list[Published], name: str) -> list[Published]:
    stem = _plain(name)
    hits = [row for row in rows if _plain(row.name) in stem]
    longest = max((len(row.name) for row in hits), default=0)
    return [row for row in hits if len(row.name) == longest] or _by_mark(rows, stem)


def _by_mark(rows: list[Published], stem: str) -> list[Published]:
    """A renamed FaceID-Plus says in its name which of the two it is."""
    if {row.variant for row in rows} != {"faceid-plus", "faceid-plusv2"} or "faceid" not in stem:
        return rows
    v2 = any(mark in stem for mark in ("plusv2", "plus_v2"))
    wanted = "faceid-plusv2" if v2 else "faceid-plus" if "plus" in stem else None
    return [row for row in rows if row.variant == wanted] or rows


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def encoder_of(variant: Variant, layout: Layout) -> str:
    """The image encoder it needs, in words."""
    if variant.feature == "face":
        return "none"
    kind = "pooled" if variant.feature == "pooled" else "hidden"
    width = layout.patch_width or layout.feature_width
    return ENCODERS.get((kind, width), f"one with {kind} width {width}")


def some(names: Iterable[str]) -> str:
    """The first names, quoted, and how many more there are."""
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def either(names: Iterable[str]) -> str:
    """The names as ``a, b or c``."""
    *most, last = list(names) or [""]
    return f"{', '.join(most)} or {last}" if most else last
