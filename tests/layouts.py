"""Published adapters by shape: every layout at full size as a sparse file, or narrow with random weights.

Shapes are written down here from the published projections' own dimensions, independently of imprompt; the
parameter counts beside them are the published files'.
"""

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path

import torch

Shapes = dict[str, tuple[int, ...]]

# Widths of a UNet's transformer blocks in the order of attn_processors: down, up, mid.
SD15 = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
SDXL = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10
FAMILIES = {"sd15": (SD15, 768), "sdxl": (SDXL, 2048)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def dense(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def linear(cross: int, width: int, tokens: int = 4) -> Shapes:
    return dense("proj", tokens * cross, width) | norm("norm", cross)


def full_face(cross: int, width: int) -> Shapes:
    return dense("proj.0", width, width) | dense("proj.2", cross, width) | norm("proj.3", cross)


def perceiver(cross: int, width: int, inner: int, heads: int, depth: int = 4) -> Shapes:
    shapes = dense("proj_in", inner, width) | dense("proj_out", cross, inner) | norm("norm_out", cross)
    for i in range(depth):
        shapes |= norm(f"layers.{i}.0.norm1", inner) | norm(f"layers.{i}.0.norm2", inner)
        shapes |= norm(f"layers.{i}.1.0", inner)
        shapes |= {
            f"layers.{i}.0.to_q.weight": (64 * heads, inner),
            f"layers.{i}.0.to_kv.weight": (128 * heads, inner),
            f"layers.{i}.0.to_out.weight": (inner, 64 * heads),
            f"layers.{i}.1.1.weight": (4 * inner, inner),
            f"layers.{i}.1.3.weight": (inner, 4 * inner),
        }
    return shapes


def resampler(cross: int, width: int, inner: int, heads: int, tokens: int = 16, depth: int = 4) -> Shapes:
    return {"latents": (1, tokens, inner)} | perceiver(cross, width, inner, heads, depth)


def face(cross: int, tokens: int = 4, width: int = 512) -> Shapes:
    return (
        dense("proj.0", 2 * width, width) | dense("proj.2", tokens * cross, 2 * width) | norm("norm", cross)
    )


def face_plus(cross: int, width: int = 512, patches: int = 1280, depth: int = 4, tokens: int = 4) -> Shapes:
    inside = perceiver(cross, patches, cross, cross // 64, depth)
    return face(cross, tokens, width) | {f"perceiver_resampler.{key}": shape for key, shape in inside.items()}


def layers(widths: list[int], cross: int) -> Shapes:
    return {
        f"{2 * i + 1}.to_{part}_ip.weight": (width, cross) for i, width in enumerate(widths) for part in "kv"
    }


def lora(widths: list[int], cross: int, rank: int) -> Shapes:
    shapes: Shapes = {}
    for n in range(2 * len(widths)):
        width = widths[n // 2]
        for part in ("q", "k", "v", "out"):
            reads = cross if n % 2 and part in "kv" else width
            shapes[f"{n}.to_{part}_lora.down.weight"] = (rank, reads)
            shapes[f"{n}.to_{part}_lora.up.weight"] = (width, rank)
    return shapes


@dataclass(frozen=True)
class Layout:
    """A published file: what it is, and how many parameters it is known to have (``None``: unknown)."""

    name: str
    image_proj: Shapes
    family: str
    variant: str
    parameters: int | None = None
    rank: int | None = None
    formats: tuple[str, str] = ("F16", "F16")
    base: str = ""
    tokens: int = 4
    shares: tuple[str, ...] = field(default=())
    """Other published files of the same shapes."""
    section: str = "ip_adapter"
    """What the keys and values stand under."""

    @property
    def shapes(self) -> Shapes:
        """All tensors, by flat key."""
        widths, cross = FAMILIES[self.family]
        inside = layers(widths, cross) | (lora(widths, cross, self.rank) if self.rank else {})
        flat = {f"image_proj.{key}": shape for key, shape in self.image_proj.items()}
        return flat | {f"{self.section}.{key}": shape for key, shape in inside.items()}

    def write(self, folder: Path, name: str | None = None, metadata: dict[str, str] | None = None) -> Path:
        """A sparse file of full size: all zeros, and takes no room on the disk."""
        formats = dict(zip(("image_proj", self.section), self.formats, strict=True))
        path = folder / f"{name or self.name}.safetensors"
        sparse(path, {k: (formats[k.split(".")[0]], shape) for k, shape in self.shapes.items()}, metadata)
        return path


_LINEAR = ("ip-adapter_sd15", "ip-adapter_sd15_light", "ip-adapter_sd15_light_v11")
_PLUS = ("ip-adapter-plus_sd15", "ip-adapter-plus-face_sd15", "ip_plus_composition_sd15")
_PLUS_XL = ("ip-adapter-plus_sdxl_vit-h", "ip-adapter-plus-face_sdxl_vit-h", "ip_plus_composition_sdxl")
_FACE_PLUS = ("ip-adapter-faceid-plus_sd15", "ip-adapter-faceid-plusv2_sd15")
_PORTRAIT = ("ip-adapter-faceid-portrait_sd15", "ip-adapter-faceid-portrait-v11_sd15")
_plus, _plus_xl = resampler(768, 1280, 768, 12), resampler(2048, 1280, 1280, 20)
_raw = resampler(2048, 512, 1280, 20)

PUBLISHED = (
    *(Layout(n, linear(768, 1024), "sd15", "linear", 22_319_616, shares=_LINEAR) for n in _LINEAR),
    Layout("ip-adapter_sd15_vit-G", linear(768, 1280), "sd15", "linear", 23_106_048),
    *(Layout(n, _plus, "sd15", "resampler", 49_087_488, tokens=16, shares=_PLUS) for n in _PLUS),
    Layout("ip-adapter-full-face_sd15", full_face(768, 1280), "sd15", "full-face", 21_794_304, tokens=257),
    Layout("ip-adapter_sdxl", linear(2048, 1280), "sdxl", "linear", 351_285_248),
    Layout("ip-adapter_sdxl_vit-h", linear(2048, 1024), "sdxl", "linear", 349_188_096),
    *(Layout(n, _plus_xl, "sdxl", "resampler", 423_748_864, tokens=16, shares=_PLUS_XL) for n in _PLUS_XL),
    Layout("ip-adapter-faceid_sd15", face(768), "sd15", "faceid", 48_354_816, rank=128),
    Layout(
        "ip-adapter-faceid-plus_sd15",
        face_plus(768),
        "sd15",
        "faceid-plus",
        78_260_736,
        rank=128,
        shares=_FACE_PLUS,
    ),
    Layout(
        "ip-adapter-faceid-plusv2_sd15",
        face_plus(768),
        "sd15",
        "faceid-plusv2",
        78_260_736,
        rank=128,
        shares=_FACE_PLUS,
    ),
    Layout("ip-adapter-faceid_sdxl", face(2048), "sdxl", "faceid", 535_507_968, rank=128),
    Layout("ip-adapter-faceid-plusv2_sdxl", face_plus(2048), "sdxl", "faceid-plusv2", 743_707_648, rank=128),
    *(Layout(n, face(768, 16), "sd15", "faceid", 32_291_328, tokens=16, shares=_PORTRAIT) for n in _PORTRAIT),
    Layout("ip-adapter-faceid-portrait_sdxl", face(2048, 16), "sdxl", "faceid", 374_903_808, tokens=16),
    Layout(
        "ip-adapter-faceid-portrait_sdxl_unnorm",
        _raw,
        "sdxl",
        "faceid-raw",
        422_765_824,
        formats=("F32", "F16"),
        tokens=16,
    ),
    Layout(
        "instantid_ip-adapter",
        _raw,
        "sdxl",
        "faceid-raw",
        422_765_824,
        formats=("F32", "F32"),
        tokens=16,
    ),
    Layout(
        "kolors_ip_adapter_plus_general",
        resampler(2048, 1024, 2048, 12),
        "sdxl",
        "resampler",
        506_552_320,
        base="kolors",
        tokens=16,
    ),
    Layout(
        "kolors_ipa-faceid-plus",
        face_plus(4096, patches=1024, tokens=6),
        "sdxl",
        "faceid-plus-kolors",
        1_192_903_680,
        base="kolors",
        tokens=6,
        section="adapter_modules",
    ),
)


def xlabs(tokens: int, sites: int = 19, width: int = 3072, cross: int = 4096, pooled: int = 768) -> Shapes:
    """FLUX XLabs, flat and under its published names."""
    flat: Shapes = {}
    for n in range(sites):
        for part in "kv":
            name = f"double_blocks.{n}.processor.ip_adapter_double_stream_{part}_proj"
            flat |= dense(name, width, cross)
    shapes = dense("proj", tokens * cross, pooled) | norm("norm", cross)
    return flat | {f"ip_adapter_proj_model.{key}": shape for key, shape in shapes.items()}


def instantx_flux(
    tokens: int = 128, sites: int = 57, width: int = 3072, cross: int = 4096, pooled: int = 1152
) -> Shapes:
    """FLUX InstantX."""
    shapes = dense("image_proj.proj.0", 2 * pooled, pooled) | norm("image_proj.norm", cross)
    shapes |= dense("image_proj.proj.2", tokens * cross, 2 * pooled)
    for n in range(sites):
        shapes |= {f"ip_adapter.{n}.to_{part}_ip.weight": (width, cross) for part in "kv"}
    return shapes


def instantx_sd3(
    tokens: int = 64,
    sites: int = 38,
    width: int = 2432,
    head: int = 64,
    inner: int = 1280,
    heads: int = 20,
    hidden: int = 1152,
    depth: int = 4,
    waves: int = 320,
) -> Shapes:
    """SD3.5-Large InstantX."""
    shapes = resampler(width, hidden, inner, heads, tokens, depth)
    shapes |= dense("time_embedding.linear_1", inner, waves) | dense("time_embedding.linear_2", inner, inner)
    for i in range(depth):
        shapes |= dense(f"layers.{i}.2.1", 4 * inner, inner)
    flat = {f"image_proj.{key}": shape for key, shape in shapes.items()}
    for n in range(sites):
        flat |= dense(f"ip_adapter.{n}.norm_ip.linear", 2 * width, inner)
        flat |= {f"ip_adapter.{n}.to_{part}_ip.weight": (width, width) for part in "kv"}
        flat |= {f"ip_adapter.{n}.norm_{part}.weight": (head,) for part in ("q", "k", "ip_k")}
    return flat


def redux(cross: int = 4096, hidden: int = 1152, inner: int = 12288) -> Shapes:
    """FLUX.1 Redux."""
    return dense("redux_up", inner, hidden) | dense("redux_down", cross, inner)


TRANSFORMERS = {
    "flux-ip-adapter": ("xlabs", "flux", xlabs(4), 490.9),
    "flux-ip-adapter-v2": ("xlabs", "flux", xlabs(16), 528.7),
    "flux-dev_ip-adapter": ("instantx-flux", "flux", instantx_flux(), 2645.6),
    "sd35-large_ip-adapter": ("instantx-sd3", "sd35", instantx_sd3(), 797.9),
    "flux1-redux-dev": ("redux", "flux", redux(), 64.5),
}
"""Name it is identified by → variant, family, flat published shapes, millions of parameters that it is
known to have (Redux: half of its 129 MB)."""

SMALL_TRANSFORMERS = {
    "xlabs": xlabs(3, sites=2, width=6, cross=8, pooled=5),
    "instantx-flux": instantx_flux(3, sites=4, width=6, cross=8, pooled=5),
    "instantx-sd3": instantx_sd3(3, 2, width=8, head=4, inner=16, heads=1, hidden=5, depth=2, waves=6),
    "redux": redux(8, 5, 12),
}
"""Narrow shapes of the same, flat and under their published names."""

SMALL = {
    "linear": linear(8, 6, tokens=2),
    "resampler": resampler(8, 6, 16, 1, tokens=3, depth=2),
    "full-face": full_face(8, 6),
    "faceid": face(8, 3, width=5),
    "faceid-plus": face_plus(64, 5, 6, depth=1),
    "faceid-plusv2": face_plus(64, 5, 6, depth=1),
}
"""Narrow shapes of every variant that shapes alone can be: a raw face embedding is told by its width."""


def small(variant: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, dict]:
    """Random weights of a narrow adapter with three layers, nested."""
    random = torch.Generator().manual_seed(seed)
    image_proj = SMALL[variant]
    cross = 64 if "plus" in variant else 8
    return {
        part: {key: torch.randn(shape, generator=random).to(dtype) for key, shape in shapes.items()}
        for part, shapes in (("image_proj", image_proj), ("ip_adapter", layers([4, 6, 4], cross)))
    }


def sparse(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> None:
    """A valid .safetensors of zeros that the file system does not store."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, (kind, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}[kind]
        header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
