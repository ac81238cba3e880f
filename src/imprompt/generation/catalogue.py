"""Names people can type and what they stand for: repository, file, licence. Tables only.

Sources: the repositories' own pages and file lists; sizes as published, in MB; sha256 of the published file.
Nothing here is downloaded or loaded, and nothing heavy is imported.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from imprompt.errors import UsageError

Family = Literal["emoji", "sd15", "sdxl"]
BUNDLED = "bundled"
"""In place of a repository: the files come with imprompt."""


@dataclass(frozen=True)
class BaseRow:
    """A diffusion model with a name of its own."""

    repo: str
    family: Family
    licence: str
    size: int
    """Side of the pictures it was trained on, in pixels."""
    note: str
    inpaint: bool = False
    """Whether its UNet has the 9 input channels of an inpainting model."""
    half: bool = False
    """Whether the repository also holds fp16 files, half the download."""


@dataclass(frozen=True)
class AdapterRow:
    """A published image prompt adapter."""

    repo: str
    file: str
    encoder: str
    """Folder of its image encoder in the same repository."""
    family: Family
    licence: str
    megabytes: int
    note: str
    sha256: str | None = None


@dataclass(frozen=True)
class ControlRow:
    """A published ControlNet or T2I-Adapter."""

    repo: str
    family: Family
    licence: str
    megabytes: int
    """Of the smallest file that is read: fp16 where the repository has it."""
    modes: Mapping[str, int | None]
    """Kinds of control it takes → their number in a union model, else ``None``."""
    half: bool = False
    """Whether the repository also holds fp16 files."""
    revision: str | None = None
    """Branch with safetensors, where the main one has pickles only."""
    note: str = ""


BASES: dict[str, BaseRow] = {
    "emoji": BaseRow(BUNDLED, "emoji", "Apache-2.0", 128, "comes with imprompt; runs anywhere"),
    "sd15": BaseRow(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15", "CreativeML OpenRAIL-M", 512,
        "Stable Diffusion 1.5", half=True,
    ),
    "sd15-inpaint": BaseRow(
        "stable-diffusion-v1-5/stable-diffusion-inpainting", "sd15", "CreativeML OpenRAIL-M", 512,
        "its inpainting model", inpaint=True, half=True,
    ),
    "sdxl": BaseRow(
        "stabilityai/stable-diffusion-xl-base-1.0", "sdxl", "CreativeML OpenRAIL++-M", 1024,
        "Stable Diffusion XL", half=True,
    ),
    "sdxl-inpaint": BaseRow(
        "diffusers/stable-diffusion-xl-1.0-inpainting-0.1", "sdxl", "CreativeML OpenRAIL++-M", 1024,
        "its inpainting model", inpaint=True, half=True,
    ),
}  # fmt: skip

_H94, _VIT_H, _VIT_BIGG = "h94/IP-Adapter", "models/image_encoder", "sdxl_models/image_encoder"


def _h94(
    file: str, family: Family, megabytes: int, note: str, sha256: str, encoder: str = _VIT_H
) -> AdapterRow:
    folder = "models" if family == "sd15" else "sdxl_models"
    return AdapterRow(_H94, f"{folder}/{file}", encoder, family, "Apache-2.0", megabytes, note, sha256)


ADAPTERS: dict[str, AdapterRow] = {
    "emoji": AdapterRow(
        BUNDLED, "adapters/ip-adapter_emoji.safetensors", "image_encoder", "emoji", "Apache-2.0", 10,
        "4 tokens: the picture's idea",
    ),
    "emoji-plus": AdapterRow(
        BUNDLED, "adapters/ip-adapter-plus_emoji.safetensors", "image_encoder", "emoji", "Apache-2.0", 10,
        "16 tokens: closer to the picture",
    ),
    "sd15": _h94(
        "ip-adapter_sd15.safetensors", "sd15", 45, "4 tokens",
        "289b45f16d043d0bf542e45831f971dcdaabe18b656f11e86d9dfba7e9ee3369",
    ),
    "sd15-light": _h94(
        "ip-adapter_sd15_light.safetensors", "sd15", 45, "4 tokens, leaves more to the text",
        "0747d08db670535bfa286452a77d93cebad5c677b46d038543f9f2de8690bb26",
    ),
    "sd15-plus": _h94(
        "ip-adapter-plus_sd15.safetensors", "sd15", 98, "16 tokens, closer to the picture",
        "a1c250be40455cc61a43da1201ec3f1edaea71214865fb47f57927e06cbe4996",
    ),
    "sd15-plus-face": _h94(
        "ip-adapter-plus-face_sd15.safetensors", "sd15", 98, "16 tokens, for a cropped face",
        "1c9edc21af6f737dc1d6e0e734190e976cfacf802d6b024b77aa3be922f7569b",
    ),
    "sd15-full-face": _h94(
        "ip-adapter-full-face_sd15.safetensors", "sd15", 44, "257 tokens, for a cropped face",
        "f4a17fb643bf876235a45a0e87a49da2855be6584b28ca04c62a97ab5ff1c6f3",
    ),
    "sd15-vit-g": _h94(
        "ip-adapter_sd15_vit-G.safetensors", "sd15", 46, "4 tokens, of the larger encoder",
        "a26f736af07bb341a83dfea23713531d0575760e8ed947c68cb31a4c62d9c90b", _VIT_BIGG,
    ),
    "sdxl": _h94(
        "ip-adapter_sdxl.safetensors", "sdxl", 703, "4 tokens, of the larger encoder (3.7 GB)",
        "ba1002529e783604c5f326d49f0122025392d1d20ac8d573b3eeb3e6dea4ebb6", _VIT_BIGG,
    ),
    "sdxl-vit-h": _h94(
        "ip-adapter_sdxl_vit-h.safetensors", "sdxl", 698, "4 tokens",
        "ebf05d918348aec7abb02a5e9ecef77e0aaea6914a5c4ea13f50d45eb1681831",
    ),
    "sdxl-plus": _h94(
        "ip-adapter-plus_sdxl_vit-h.safetensors", "sdxl", 848, "16 tokens, closer to the picture",
        "3f5062b8400c94b7159665b21ba5c62acdcd7682262743d7f2aefedef00e6581",
    ),
    "sdxl-plus-face": _h94(
        "ip-adapter-plus-face_sdxl_vit-h.safetensors", "sdxl", 848, "16 tokens, for a cropped face",
        "677ad8860204f7d0bfba12d29e6c31ded9beefdf3e4bbd102518357d31a292c1",
    ),
}  # fmt: skip

DEFAULT_ADAPTERS: dict[Family, str] = {"emoji": "emoji-plus", "sd15": "sd15", "sdxl": "sdxl-vit-h"}
"""Without ``--adapter``. For SD1.5 and SDXL the four-token ones: they leave room for the text, and ViT-H is
the smaller encoder that both share."""


def _v11(name: str, kind: str, **extra: Any) -> ControlRow:
    repo = f"lllyasviel/control_{name}"
    return ControlRow(repo, "sd15", "OpenRAIL", 723, {kind: None}, **{"half": True, **extra})


def _xinsir(name: str, kind: str) -> ControlRow:
    return ControlRow(f"xinsir/controlnet-{name}-sdxl-1.0", "sdxl", "Apache-2.0", 2502, {kind: None})


def _t2i(name: str, kind: str) -> ControlRow:
    repo = f"TencentARC/t2i-adapter-{name}-sdxl-1.0"
    return ControlRow(repo, "sdxl", "Apache-2.0", 158, {kind: None}, half=True, note="T2I-Adapter")


CONTROLS: dict[str, ControlRow] = {
    "emoji-canny": ControlRow(BUNDLED, "emoji", "Apache-2.0", 7, {"canny": None}, note="comes with imprompt"),
    "sd15-canny": _v11("v11p_sd15_canny", "canny"),
    "sd15-canny-v1.0": ControlRow(
        "lllyasviel/sd-controlnet-canny", "sd15", "OpenRAIL", 1450, {"canny": None}, note="the first one"
    ),
    "sd15-depth": _v11("v11f1p_sd15_depth", "depth"),
    "sd15-pose": _v11("v11p_sd15_openpose", "pose"),
    "sd15-lineart": _v11("v11p_sd15_lineart", "lineart"),
    "sd15-scribble": _v11("v11p_sd15_scribble", "scribble"),
    "sd15-seg": _v11("v11p_sd15_seg", "seg"),
    "sd15-tile": _v11("v11f1e_sd15_tile", "tile", half=False, revision="refs/pr/4"),
    "sdxl-canny": ControlRow(
        "diffusers/controlnet-canny-sdxl-1.0", "sdxl", "OpenRAIL++", 5000, {"canny": None}
    ),
    "sdxl-depth": ControlRow(
        "diffusers/controlnet-depth-sdxl-1.0", "sdxl", "OpenRAIL++", 2500, {"depth": None}, half=True
    ),
    "sdxl-pose": _xinsir("openpose", "pose"),
    "sdxl-scribble": _xinsir("scribble", "scribble"),
    "sdxl-tile": _xinsir("tile", "tile"),
    "sdxl-union": ControlRow(
        "xinsir/controlnet-union-sdxl-1.0", "sdxl", "Apache-2.0", 2512,
        {"pose": 0, "depth": 1, "scribble": 2, "canny": 3, "lineart": 3, "seg": 5}, note="union of kinds",
    ),
    "sdxl-t2i-canny": _t2i("canny", "canny"),
    "sdxl-t2i-lineart": _t2i("lineart", "lineart"),
    "sdxl-t2i-sketch": _t2i("sketch", "scribble"),
    "sdxl-t2i-depth": _t2i("depth-midas", "depth"),
    "sdxl-t2i-pose": _t2i("openpose", "pose"),
}  # fmt: skip

UNION_MODES = CONTROLS["sdxl-union"].modes
"""Numbers of the kinds in union models that are not listed here."""

DEFAULT_CONTROLS: dict[Family, dict[str, str]] = {
    "emoji": {"canny": "emoji-canny"},
    "sd15": {
        kind: f"sd15-{kind}" for kind in ("canny", "depth", "pose", "lineart", "scribble", "seg", "tile")
    },
    "sdxl": {kind: f"sdxl-{kind}" for kind in ("canny", "depth", "pose", "scribble", "tile")}
    | {"lineart": "sdxl-union", "seg": "sdxl-union"},
}
"""Without ``model=``: family → kind → alias."""


@dataclass(frozen=True)
class MotionRow:
    """A published motion adapter: the temporal layers that AnimateDiff puts between a UNet's own."""

    repo: str
    family: Family
    licence: str
    megabytes: int
    """Of the file that is read, fp16 where there is one."""
    note: str
    scheduler: str | None = None
    """What it is drawn with when a request leaves it open; ``None``: the base's."""
    half: bool = False


_UNSTATED = "not stated (AnimateDiff's own weights: Apache-2.0)"
MOTIONS: dict[str, MotionRow] = {
    "emoji-motion": MotionRow(BUNDLED, "emoji", "Apache-2.0", 7, "loops of 16 frames"),
    "animatediff": MotionRow(
        "guoyww/animatediff-motion-adapter-v1-5-2", "sd15", _UNSTATED, 910, "AnimateDiff v2, 16 to 32 frames",
        "ddim-linear", half=True,
    ),
    "animatediff-v3": MotionRow(
        "guoyww/animatediff-motion-adapter-v1-5-3", "sd15", _UNSTATED, 837, "AnimateDiff v3, 16 frames",
        "ddim-linear", half=True,
    ),
    "animatediff-sdxl": MotionRow(
        "guoyww/animatediff-motion-adapter-sdxl-beta", "sdxl", _UNSTATED, 950, "AnimateDiff for SDXL, a beta",
        "ddim-linear",
    ),
}  # fmt: skip

DEFAULT_MOTIONS: dict[Family, str] = {
    "emoji": "emoji-motion", "sd15": "animatediff", "sdxl": "animatediff-sdxl",
}  # fmt: skip
"""Without ``--motion``."""

_Row = TypeVar("_Row")


def named(table: Mapping[str, _Row], name: str, kind: str, others: str) -> _Row:
    """The row of an alias. Raises :class:`UsageError` that lists the nearest names, or all."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name.lower(), table, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(table)}."
    raise UsageError(f"{kind} '{name}' is unknown; {hint} Or give {others}.")
