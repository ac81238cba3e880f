"""Check an adapter's keys and shapes: its projection, its attention sites and its LoRA.

In: shapes by section. Out: a :class:`Structure`, or one :class:`ModelError` that names what is wrong. No
tensor is read here. :mod:`imprompt.checkpoints.identify` tells adapters of the same shapes apart.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from imprompt.catalog import Backbone, families, family_of
from imprompt.catalog.variants import VARIANTS, Variant
from imprompt.checkpoints.layouts import Layout
from imprompt.errors import ModelError
from imprompt.projections.shapes import Sizes, expected_shapes, sizes_of

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Mapping[str, Shape]]
"""Section (``image_proj``, ``ip_adapter``) → key → shape."""

LORA = re.compile(r"\d+\.to_(q|k|v|out)_lora\.(down|up)\.weight")
"""A key of FaceID's LoRA."""
_KEY_OR_VALUE = re.compile(r"(\d+)\.to_[kv]_ip\.weight")
_ARCFACE = 512  # width of every published face embedding; no published encoder's hidden states are as narrow

FOREIGN = (
    (r"(pooled|negative_hidden|embedding)$", "saved features, which --image shows"),
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
"""(pattern of a key, what a file with such a key is). The first match counts."""


@dataclass(frozen=True)
class Structure:
    """An adapter's properties that follow from its keys and shapes."""

    layout: Layout
    variants: tuple[Variant, ...]
    """The variants with these keys and shapes."""
    tokens: int
    """Tokens of one picture; nominal (257, 729) for kinds that make one per patch."""
    cross_dim: int
    """Width of the tokens that the attention sites read."""
    feature_width: int
    patch_width: int | None
    layers: tuple[int, ...]
    """Numbers of the attention sites, ascending: 1, 3, 5, … on UNets, 0, 1, 2, … on transformers."""
    lora_rank: int | None

    @property
    def backbone(self) -> Backbone:
        """The architecture it is for."""
        return self.layout.backbone

    @property
    def family(self) -> str:
        """Base family by its name in the catalogue, or ``other``."""
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
    """Check every key and shape of an adapter of that layout. Raises :class:`ModelError`."""
    image_proj, ip_adapter = shapes["image_proj"], shapes["ip_adapter"]
    variants, projection = _projection(image_proj, layout, name)
    cross_dim = projection.cross_dim
    if variants[0] == "faceid-plus" and ip_adapter.get("1.to_k_ip.weight", ())[1:] == (cross_dim // 2,):
        # Kolors' text is twice as wide as its cross-attention, and so are these tokens.
        variants, cross_dim = ("faceid-plus-kolors",), cross_dim // 2
    lora = {key: s for key, s in ip_adapter.items() if LORA.fullmatch(key) and layout.numbering == "odd"}
    if lora and "face" not in VARIANTS[variants[0]].feature:
        raise ModelError(
            f"adapter '{name}' has LoRA keys, which only face adapters have; it is {variants[0]}."
        )
    sites = {key: shape for key, shape in ip_adapter.items() if key not in lora}
    layers = _layers(sites, layout, name)
    sizes = {"cross": cross_dim, "2·cross": 2 * cross_dim, "time": projection.time_width}
    _check_sites(sites, layers, layout, sizes, name)
    return Structure(
        layout=layout,
        variants=tuple(VARIANTS[each] for each in variants),
        tokens=projection.tokens,
        cross_dim=cross_dim,
        feature_width=projection.feature_width,
        patch_width=projection.patch_width,
        layers=layers,
        lora_rank=_lora_rank(lora, layers, name) if lora else None,
    )


def _projection(image_proj: Mapping[str, Shape], layout: Layout, name: str) -> tuple[tuple[str, ...], Sizes]:
    """Names of the variants with this projection, and its sizes."""
    if not image_proj:
        raise ModelError(f"adapter '{name}' has an empty 'image_proj': no projection to make tokens with.")
    variants = next((variants for key, variants in layout.variants if key in image_proj), None)
    if variants is None:
        raise ModelError(
            f"adapter '{name}' has no known projection: of its keys {some(image_proj)} none of "
            f"{either(key for key, _ in layout.variants)} is there."
        )
    try:
        kind = VARIANTS[variants[0]].projection
        sizes = sizes_of(kind, image_proj)
    except ModelError as error:
        raise ModelError(f"adapter '{name}': {error}") from error
    _compare(image_proj, expected_shapes(kind, sizes), f"adapter '{name}', image_proj ({variants[0]})")
    if variants == ("resampler", "faceid-raw"):
        raw = (sizes.feature_width, sizes.cross_dim) == (_ARCFACE, 2048)
        variants = variants[1:] if raw else variants[:1]
    return variants, sizes


def _layers(sites: Mapping[str, Shape], layout: Layout, name: str) -> tuple[int, ...]:
    """Numbers of the attention sites: all that the layout has up to the highest one found."""
    if layout.numbering == "none":
        return ()
    found = {int(match[1]) for key in sites if (match := _KEY_OR_VALUE.fullmatch(key))}
    if not found:
        raise ModelError(
            f"adapter '{name}' has no to_k_ip and to_v_ip weights in 'ip_adapter'. A known fault of training "
            "scripts that save shared weights once: run 'imprompt convert' on the whole training checkpoint."
        )
    last = max(found)
    if last > 2 * len(sites) + 1:  # before listing what is missing up to there
        raise ModelError(f"adapter '{name}' numbers a layer {last}, with {len(found)} layers in all.")
    return tuple(range(1, last + 1, 2) if layout.numbering == "odd" else range(last + 1))


def _check_sites(
    sites: Mapping[str, Shape], layers: Sequence[int], layout: Layout, sizes: dict[str, int], name: str
) -> None:
    """Raise :class:`ModelError` unless every site has the layout's weights, with shapes that agree.

    ``sizes`` are the dimensions given by the projection; others are read from the first weight that has them.
    """
    widths = {shape[-1] for key, shape in sites.items() if _KEY_OR_VALUE.fullmatch(key) and shape}
    if widths and widths != {sizes["cross"]}:
        raise ModelError(
            f"adapter '{name}' mixes widths: its projection makes tokens of width {sizes['cross']}, its "
            f"layers read {either(map(str, sorted(widths)))}. Its parts are from different adapters."
        )
    expected: dict[str, Shape] = {}
    for n in layers:
        sizes.pop("width", None)  # each site's own
        for weight, dims in layout.weights:
            key = f"{n}.{weight}"
            for dim, size in zip(dims, sites.get(key, ()), strict=False):
                sizes.setdefault(dim, max(1, size))
            expected[key] = tuple(sizes.get(dim, 1) for dim in dims)
    numbering = " (layers 1, 3, 5, …; even numbers are self-attention)" if layout.numbering == "odd" else ""
    _compare(sites, expected, f"adapter '{name}', ip_adapter{numbering}")


def _lora_rank(lora: Mapping[str, Shape], layers: Sequence[int], name: str) -> int:
    """The rank of a LoRA, which must have all eight weights for every attention, even numbers too."""
    expected = {
        f"{n}.to_{part}_lora.{half}.weight": lora.get(f"{n}.to_{part}_lora.{half}.weight", ())
        for n in range(layers[-1] + 1)
        for part in ("q", "k", "v", "out")
        for half in ("down", "up")
    }
    _compare(lora, expected, f"adapter '{name}' has an incomplete LoRA")
    ranks = {
        (shape[0] if ".down." in key else shape[1]) if len(shape) == 2 else 0 for key, shape in lora.items()
    }
    if len(ranks) != 1 or 0 in ranks:
        raise ModelError(f"adapter '{name}' has a LoRA of mixed ranks {sorted(ranks)}. Get the file again.")
    return ranks.pop()


def _compare(given: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    """Raise :class:`ModelError` that names the keys that are missing, not expected, or of the wrong shape."""
    faults = {
        "missing": [key for key in expected if key not in given],
        "not expected": [key for key in given if key not in expected],
        "of the wrong shape": [
            f"{key} {given[key]} instead of {shape}"
            for key, shape in expected.items()
            if given.get(key, shape) != shape
        ],
    }
    if any(faults.values()):
        detail = "; ".join(f"{fault}: {some(keys)}" for fault, keys in faults.items() if keys)
        raise ModelError(f"{what}: {detail}. Get the file again, or say where it is from.")


def some(names: Iterable[str]) -> str:
    """The first three names in quotes, and the number of the others."""
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def either(names: Iterable[str]) -> str:
    """Join names as ``a, b or c``."""
    *most, last = list(names) or [""]
    return f"{', '.join(most)} or {last}" if most else last
