"""Which adapter it is: keys and shapes checked one by one, then told apart by hash, metadata and name.

In: shapes by section, and what else a file says. Out: a :class:`Structure` (what the weights can be) and an
:class:`Identity` (what they are taken for, and on what evidence). No tensor is touched here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from imprompt.catalog import AdapterRow, Backbone, adapters, encoder_with, families, family_of
from imprompt.catalog.variants import VARIANTS, Variant
from imprompt.checkpoints.layouts import SECTIONS, Layout
from imprompt.errors import ModelError, UsageError
from imprompt.io import sha256
from imprompt.projections import skeleton

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Mapping[str, Shape]]
"""Section (``image_proj``, ``ip_adapter``) → key → shape."""

SITE = re.compile(
    r"(\d+)\.(to_[kv]_ip\.(?:weight|bias)|norm_ip\.linear\.(?:weight|bias)|norm_(?:q|k|ip_k)\.weight)"
)
"""A weight of an attention site, of whatever layout."""
LORA = re.compile(r"(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")
NOTED_VARIANT, NOTED_PUBLISHED = "imprompt.variant", "imprompt.published"
"""Metadata keys of files written here."""

_ARCFACE = 512  # width of every published face embedding; no published encoder's hidden states are as narrow

FOREIGN = (
    (r"id_adapter|pulid_|(image_proj\.)?id_embedding_mapping\.|image_proj\.mapping_", "a PuLID adapter"),
    (r"(module\.)?image_proj_model\.",
     "a training script's checkpoint: 'imprompt convert' takes the adapter out of it"),
    (r"lora_|.*\.lora(_[AB]|_up|_down|_linear_layer)?\.|(unet|text_encoder)\..*_lora\.|.*(hada|lokr)_w\d",
     "a LoRA (a FaceID adapter brings its own inside: load that adapter; --lora takes one for the base)"),
    (r"control_model\.|(controlnet_)?(down|mid)_blocks?_(controlnet|zero)|controlnet_|input_hint_block|zero_convs",
     "a ControlNet"),
    (r"(adapter\.)?body\.\d", "a T2I-Adapter"),
    (r".*motion_modules?\.", "a motion module (AnimateDiff)"),
    (r"model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|conditioner\.",
     "a whole Stable Diffusion checkpoint"),
    (r"(unet\.)?(down_blocks|up_blocks|mid_block)\.", "a UNet"),
    (r"(transformer\.)?(double|single|joint|transformer|single_transformer)_blocks\.(?!\d+\.processor\.ip_adapter)",
     "a diffusion transformer"),
    (r"(vae\.)?(encoder|decoder)\.(conv|down|up|mid)", "a VAE"),
    (r"(image_encoder\.)?vision_model\.|visual(_projection)?\.", "an image encoder"),
    (r"(text_encoder\.)?text_model\.", "a text encoder"),
    (r"emb_params$|string_to_param|clip_[lg]$|<.*>$", "a textual inversion embedding"),
)  # fmt: skip
"""(what one of its keys matches from the start, what a file with it is). The first match counts."""


# ---- what keys and shapes say


@dataclass(frozen=True)
class Structure:
    """What keys and shapes say of an adapter; widths are of one token or feature."""

    layout: Layout
    variants: tuple[Variant, ...]
    """Those with these keys and shapes."""
    tokens: int
    cross_dim: int
    """Width that the attention sites read."""
    feature_width: int
    patch_width: int | None
    layers: tuple[int, ...]
    """Numbers of its attention sites, ascending."""
    lora_rank: int | None

    @property
    def backbone(self) -> Backbone:
        """The architecture that it is for."""
        return self.layout.backbone

    @property
    def family(self) -> str:
        """The base family of the catalogue that it is for, ``other`` for none of them."""
        if self.cross_dim == families()["kolors"].cross_dim and (
            self.variants[0].uses_text_projection
            or (self.variants[0].name == "resampler" and self.feature_width == 1024)
        ):
            return "kolors"  # SDXL's UNet; of those with this layout only Kolors' adapter reads ViT-L
        if self.layout.numbering == "none":
            return next((n for n, row in families().items() if row.backbone == self.backbone), "other")
        row = family_of(self.backbone, len(self.layers), self.cross_dim)
        return "other" if row is None else row.name


def examine(shapes: Shapes, layout: Layout, name: str) -> Structure:
    """The structure, every key and shape checked. Raises :class:`ModelError`."""
    image_proj, ip_adapter = shapes["image_proj"], shapes["ip_adapter"]
    if not image_proj:
        raise ModelError(f"adapter '{name}' has an empty 'image_proj': no projection to make tokens with.")
    names = next((names for key, names in layout.variants if key in image_proj), None)
    if names is None:
        raise ModelError(
            f"adapter '{name}' has no known projection: of its keys {some(image_proj)} none of "
            f"{either(key for key, _ in layout.variants)} is there."
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
    layers = _sites(ip_adapter, layout, cross_dim, name)
    _check_others(
        ip_adapter, layout, layers, {"cross": cross_dim, "time": getattr(module, "time_width", 0)}, name
    )
    rank = _lora_rank(ip_adapter, layers, name)
    if rank is not None and "face" not in VARIANTS[names[0]].feature:
        raise ModelError(f"adapter '{name}' has LoRA keys, which only face adapters have; it is {names[0]}.")
    if names == ("resampler", "faceid-raw"):
        raw = (module.feature_width, module.cross_dim) == (_ARCFACE, 2048)
        names = names[1:] if raw else names[:1]
    return Structure(
        layout=layout,
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
        detail = "; ".join(f"{fault}: {some(keys)}" for fault, keys in faults.items() if keys)
        raise ModelError(f"{what}: {detail}. Get the file again, or say where it is from.")


def _sites(ip_adapter: Mapping[str, Shape], layout: Layout, cross_dim: int, name: str) -> tuple[int, ...]:
    """Numbers of the attention sites; each one's keys and values are there and agree with the projection."""
    weights = {"to_k_ip.weight", "to_v_ip.weight", *(weight for weight, _ in layout.weights)}
    found: set[int] = set()
    extra = []
    for key in ip_adapter:
        match = SITE.fullmatch(key)
        if match and match[2] in weights:
            found.add(int(match[1]))
        elif not LORA.fullmatch(key) or layout.numbering != "odd":
            extra.append(key)
    if extra:
        raise ModelError(f"adapter '{name}' has keys in 'ip_adapter' that no adapter has: {some(extra)}.")
    if layout.numbering == "none":
        return ()
    if not found:
        raise ModelError(
            f"adapter '{name}' has no to_k_ip and to_v_ip weights in 'ip_adapter'. A known fault of training "
            "scripts that save shared weights once: run 'imprompt convert' on the whole training checkpoint."
        )
    if max(found) > 2 * len(ip_adapter) + 1:  # before listing what is missing up to there
        raise ModelError(f"adapter '{name}' numbers a layer {max(found)}, with {len(found)} layers in all.")
    layers = range(1, max(found) + 1, 2) if layout.numbering == "odd" else range(max(found) + 1)
    needed = [f"{n}.{weight}" for n in layers for weight in sorted(weights)]
    missing = [key for key in needed if key not in ip_adapter]
    if missing or not found <= set(layers):
        even = sorted(found - set(layers))
        detail = [f"missing: {some(missing)}"] if missing else []
        detail += [f"numbered even, which is self-attention: {some(str(n) for n in even)}"] if even else []
        raise ModelError(f"adapter '{name}', ip_adapter: {'; '.join(detail)}. Get the file again.")
    widths = {ip_adapter[f"{n}.to_{part}_ip.weight"][-1:] for n in layers for part in "kv"}
    if widths != {(cross_dim,)}:
        given = sorted(width[0] if width else 0 for width in widths)
        raise ModelError(
            f"adapter '{name}' mixes widths: its projection makes tokens of width {cross_dim}, its layers "
            f"read {either(str(width) for width in given)}. Its parts are from different adapters."
        )
    for n in layers:
        to_k, to_v = (ip_adapter[f"{n}.to_{part}_ip.weight"] for part in "kv")
        if to_k != to_v or len(to_k) != 2 or not to_k[0]:
            raise ModelError(
                f"adapter '{name}', layer {n}: to_k_ip is {to_k} and to_v_ip {to_v}; must agree."
            )
    return tuple(layers)


def _check_others(
    ip_adapter: Mapping[str, Shape], layout: Layout, layers: Sequence[int], sizes: dict[str, int], name: str
) -> None:
    """Raise :class:`ModelError` unless what a site has beside keys and values has the layout's shapes."""
    for n in layers:
        sizes["width"] = ip_adapter[f"{n}.to_k_ip.weight"][0]
        for weight, dims in layout.weights:
            shape = ip_adapter[f"{n}.{weight}"]
            for dim, size in zip(dims, shape, strict=False):
                sizes.setdefault(dim, size)
            wanted = tuple(sizes.get(dim, 0) for dim in dims)
            if shape != wanted:
                raise ModelError(f"adapter '{name}', layer {n}: {weight} is {shape} instead of {wanted}.")


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
        detail = [f"missing {some(missing)}"] if missing else []
        detail += [f"not expected {some(extra)}"] if extra else []
        raise ModelError(f"adapter '{name}' has an incomplete LoRA: {'; '.join(detail)}. Get the file again.")
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
    """Variant and published file, by the most trustworthy evidence there is.

    ``file`` is hashed only where shapes leave a question and its size is a published one. Raises
    :class:`UsageError` for an ``asked`` variant that is none, :class:`ModelError` for one with other weights.
    """
    rows = [row for row in adapters().values() if not row.bundled and _could_be(row, structure)]
    if asked is not None:
        return _as_asked(structure, rows, name, asked)
    if file is not None and len(rows) > 1:
        size = file.stat().st_size
        if any(row.bytes in (size, None) for row in rows):
            found = sha256(file)
            for row in rows:
                if row.sha256 == found:
                    return Identity((VARIANTS[row.variant],), (row,), "sha256")
    noted = metadata.get(NOTED_VARIANT)
    if noted is not None:
        variants = [each for each in structure.variants if each.name == noted]
        if not variants and noted in VARIANTS and _same_modules(VARIANTS[noted], structure.variants[0]):
            variants = [VARIANTS[noted]]
        if not variants:
            raise ModelError(
                f"adapter '{name}' says it is '{noted}', its weights are "
                f"{either(v.name for v in structure.variants)}. Say variant= if its metadata is wrong."
            )
        same = tuple(row for row in rows if row.variant == noted)
        return Identity(
            tuple(variants),
            tuple(r for r in same if r.published == metadata.get(NOTED_PUBLISHED)) or same,
            "metadata",
        )
    evidence = "keys and shapes"
    if len(rows) > 1:
        narrowed = _by_numbers(rows, dtypes)
        if len(narrowed) < len(rows):
            rows, evidence = narrowed, "dtypes"
        else:
            narrowed = _by_name(rows, name)
            if len(narrowed) < len(rows):
                rows, evidence = narrowed, "file name"
    of_rows = {row.variant for row in rows}
    variants = [each for each in structure.variants if not of_rows or each.name in of_rows]
    if len(variants) > 1 and not rows:
        stem = _plain(name)
        if "faceid_plus" in stem:
            v2 = any(mark in stem for mark in ("plusv2", "plus_v2"))
            variants, evidence = [VARIANTS["faceid-plusv2" if v2 else "faceid-plus"]], "file name"
    return Identity(tuple(variants), tuple(rows), evidence)


def _could_be(row: AdapterRow, structure: Structure) -> bool:
    return any(row.variant == variant.name for variant in structure.variants) and (
        row.family,
        row.feature_width,
        row.tokens,
    ) == (structure.family, structure.feature_width, structure.tokens)


def _as_asked(structure: Structure, rows: Sequence[AdapterRow], name: str, asked: str) -> Identity:
    named = next((row for row in adapters().values() if asked in (row.published, row.name)), None)
    variant = VARIANTS.get(named.variant if named else asked)
    if variant is None:
        raise UsageError(f"no variant '{asked}'; there are {either(VARIANTS)}, and names of published files.")
    if not _same_modules(variant, structure.variants[0]):
        raise ModelError(
            f"adapter '{name}' cannot be '{asked}': its weights are "
            f"{either(v.name for v in structure.variants)}."
        )
    published = tuple(row for row in rows if row.variant == variant.name and named in (None, row))
    return Identity((variant,), published, "variant=")


def _same_modules(one: Variant, other: Variant) -> bool:
    """Whether both have the same weights, and so one may be read as the other."""
    return (one.projection, one.uses_text_projection) == (other.projection, other.uses_text_projection)


def _by_numbers(rows: list[AdapterRow], dtypes: Mapping[str, str]) -> list[AdapterRow]:
    """Portrait-unnorm mixes a float32 projection with float16 layers; InstantID is float32 throughout."""
    if {row.variant for row in rows} != {"faceid-raw"}:
        return rows
    mixed = {part: {kind for key, kind in dtypes.items() if key.startswith(part)} for part in SECTIONS}
    if mixed == {"image_proj": {"F32"}, "ip_adapter": {"F16"}}:
        return [row for row in rows if row.face_pack == "buffalo_l"]
    if mixed == {"image_proj": {"F32"}, "ip_adapter": {"F32"}}:
        return [row for row in rows if row.face_pack == "antelopev2"]
    return rows


def _by_name(rows: list[AdapterRow], name: str) -> list[AdapterRow]:
    stem = _plain(name)
    hits = [row for row in rows if _plain(row.published) in stem]
    longest = max((len(row.published) for row in hits), default=0)
    return [row for row in hits if len(row.published) == longest] or _by_mark(rows, stem)


def _by_mark(rows: list[AdapterRow], stem: str) -> list[AdapterRow]:
    """A renamed FaceID-Plus says in its name which of the two it is."""
    if {row.variant for row in rows} != {"faceid-plus", "faceid-plusv2"} or "faceid" not in stem:
        return rows
    v2 = any(mark in stem for mark in ("plusv2", "plus_v2"))
    wanted = "faceid-plusv2" if v2 else "faceid-plus" if "plus" in stem else None
    return [row for row in rows if row.variant == wanted] or rows


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def encoder_of(variant: Variant, structure: Structure) -> str:
    """The image encoder it needs, in words."""
    if variant.feature == "face":
        return "none"
    kind: Literal["pooled", "hidden"] = "pooled" if variant.feature == "pooled" else "hidden"
    width = structure.patch_width or structure.feature_width
    return encoder_with(kind, width) or f"one with {kind} width {width}"


def some(names: Iterable[str]) -> str:
    """The first names, quoted, and how many more there are."""
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def either(names: Iterable[str]) -> str:
    """The names as ``a, b or c``."""
    *most, last = list(names) or [""]
    return f"{', '.join(most)} or {last}" if most else last
