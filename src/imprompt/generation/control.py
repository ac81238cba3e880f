"""Controls of a request → ControlNets or T2I-Adapters around a base's pipeline, and what to call it with.

``find_controls`` says what a request's controls stand for, and refuses what does not fit the base, before
any weight is read; ``load_net`` reads one; ``controlled`` makes diffusers' pipeline of the same base with
them; ``control_call`` gives its arguments. Image prompts are attached to the UNet alone: a ControlNet sees
the text's tokens only, as in its training. Finding edges and the like in a picture is ``annotate``'s.
"""

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from imprompt import catalog, hub
from imprompt.catalog import ControlRow
from imprompt.catalog.resolve import Source, resolve
from imprompt.errors import ModelError, UsageError, first_line
from imprompt.generation.families import Base
from imprompt.io import read_json
from imprompt.schema.request import ControlRef, Request, Task
from imprompt.weights import silence_library_logging

Net = Literal["controlnet", "union", "t2i", "sparse"]

Map = Image.Image | tuple[Image.Image, ...]
"""What a control follows, of the drawn size; in a clip where it moves, one a frame."""

_CLASSES: dict[str, Net] = {
    "ControlNetModel": "controlnet",
    "ControlNetUnionModel": "union",
    "T2IAdapter": "t2i",
    "SparseControlNetModel": "sparse",
}
_PIPELINES: dict[tuple[Net, bool], dict[Task, str]] = {  # (kind of net, whether XL) → task → diffusers' class
    ("controlnet", False): {
        "generate": "StableDiffusionControlNetPipeline",
        "edit": "StableDiffusionControlNetImg2ImgPipeline",
        "inpaint": "StableDiffusionControlNetInpaintPipeline",
        "animate": "AnimateDiffControlNetPipeline",
    },
    ("controlnet", True): {
        "generate": "StableDiffusionXLControlNetPipeline",
        "edit": "StableDiffusionXLControlNetImg2ImgPipeline",
        "inpaint": "StableDiffusionXLControlNetInpaintPipeline",
        "animate": "AnimateDiffSDXLControlNetPipeline",  # ours
    },
    ("union", True): {
        "generate": "StableDiffusionXLControlNetUnionPipeline",
        "edit": "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "inpaint": "StableDiffusionXLControlNetUnionInpaintPipeline",
    },
    ("sparse", False): {"animate": "AnimateDiffSparseControlNetPipeline"},
    ("t2i", False): {"generate": "StableDiffusionAdapterPipeline"},
    ("t2i", True): {"generate": "StableDiffusionXLAdapterPipeline"},
}
_SAID: dict[Net, str] = {
    "controlnet": "a ControlNet", "union": "a ControlNet-Union", "t2i": "a T2I-Adapter",
    "sparse": "a SparseCtrl",
}  # fmt: skip
_SHARED: tuple[Net, ...] = ("union", "sparse")
"""Kinds of net of which one model follows several controls."""
_WIDTHS = {256: "emoji", 768: "SD 1.5", 1024: "SD 2", 2048: "SDXL"}  # of cross-attention


@dataclass(frozen=True)
class Control:
    """One control of a request, found: which model, of what kind, and its configuration."""

    ref: ControlRef
    """With its model's name filled in."""
    net: Net
    source: str
    """Folder or hub repository."""
    config: Mapping[str, Any]
    """The model's ``config.json``."""
    mode: int | None = None
    """Number of its kind in a union model."""
    row: ControlRow | None = None
    folder: str = ""
    """Folder in the repository."""

    @property
    def name(self) -> str:
        """The model as it was asked for."""
        assert self.ref.model is not None
        return self.ref.model

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits of a folder's weights (name, size, first megabyte), or of a repository's name."""
        digest = hashlib.sha256(self.source.encode())
        if (folder := Path(self.source)).is_dir():
            digest = hashlib.sha256()
            for file in sorted(folder.glob("*.safetensors")):
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
                with file.open("rb") as stream:
                    digest.update(stream.read(1 << 20))
        return digest.hexdigest()[:12]


def named_controls(refs: Sequence[ControlRef], base: Base) -> tuple[ControlRef, ...]:
    """The controls with the base's default models filled in. Raises :class:`UsageError` if it has none."""
    return tuple(ref if ref.model is not None else ref.replace(model=_default(ref, base)) for ref in refs)


def find_controls(request: Request, base: Base) -> tuple[Control, ...]:
    """What the request's controls stand for; only configurations are read.

    Raises :class:`UsageError` for an unknown alias, a kind that the model does not take, models that cannot
    be used together, for this task or with what is asked of them; :class:`ModelError` for a folder or
    repository that is no ControlNet, or is one of another base.
    """
    if not request.controls:
        return ()
    if base.family == "kolors":
        raise ModelError(
            f"controls: base '{base.name}' is a Kolors model; diffusers has no pipeline with controls."
        )
    found = tuple(_find(ref, base) for ref in named_controls(request.controls, base))
    first = found[0]
    for other in found[1:]:
        if other.net != first.net or (first.net in _SHARED and other.source != first.source):
            raise UsageError(
                f"controls: '{first.name}' is {_SAID[first.net]}, '{other.name}' {_SAID[other.net]}; several "
                "controls must all be ControlNets, all T2I-Adapters, or all of one ControlNet-Union or "
                "SparseCtrl."
            )
    _check_task(found, request)
    _check_places(found, request)
    for control in found:
        if base.path is not None and (base.path / "unet" / "config.json").is_file():
            unet = json.loads((base.path / "unet" / "config.json").read_text("utf-8"))
            check_fits(control, unet, base)
    windows(found, request)
    return found


def check_fits(control: Control, unet: Mapping[str, Any], base: Base) -> None:
    """Raise :class:`ModelError`, naming both, when a control was made for another kind of UNet than the
    base's (``unet``: its configuration); :class:`UsageError` where diffusers has no pipeline for it."""
    xl = unet.get("addition_embed_type") == "text_time"
    if xl and control.net == "sparse":
        raise UsageError(
            f"controls: base '{base.name}' is an SDXL model, for which diffusers has no SparseCtrl; SD 1.5 "
            "models take one, and a ControlNet is followed in every frame."
        )
    ours = list(unet["block_out_channels"])
    said = f"control '{control.name}' is {_SAID[control.net]}"
    if control.net == "t2i":
        channels = list(control.config.get("channels", [0]))
        if str(control.config.get("adapter_type")).endswith("_xl") != xl or channels[0] != ours[0]:
            raise ModelError(
                f"{said} for {'other' if channels[0] != ours[0] else 'SD 1.5' if xl else 'SDXL'} bases; base "
                f"'{base.name}' is {'an SDXL' if xl else 'no SDXL'} model of {ours[0]} channels, not "
                f"{channels[0]}. See imprompt models."
            )
        return
    width, theirs = (control.config.get(name) for name in ("cross_attention_dim", "block_out_channels"))
    if width != unet["cross_attention_dim"] or list(theirs or ()) != ours:
        other = "" if width != unet["cross_attention_dim"] else " with other channels"
        raise ModelError(
            f"{said} for {_family(width)} bases{other}; base '{base.name}' is of the family "
            f"{_family(unet['cross_attention_dim'])}. See imprompt models."
        )


def load_net(control: Control, dtype: Any) -> Any:
    """The control's model on the CPU, from safetensors only. Raises :class:`ModelError`."""
    import diffusers

    name = next(name for name, net in _CLASSES.items() if net == control.net)
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True}
    if control.row is not None:
        options["revision"] = control.row.revision
        if control.row.half and str(dtype) == "torch.float16":
            options["variant"] = "fp16"
    if control.folder:
        options["subfolder"] = control.folder
    try:
        with silence_library_logging():
            return getattr(diffusers, name).from_pretrained(control.source, **options).eval()
    except Exception as error:  # loaders raise nearly anything on damaged or absent files
        what = f"control '{control.name}'"
        if Path(control.source).exists():
            raise ModelError(f"{what} cannot be loaded: {first_line(error)}") from error
        raise hub.failure(what, control.source, error) from error


def controlled(pipe: Any, task: Task, controls: Sequence[Control], nets: Mapping[str, Any]) -> Any:
    """diffusers' pipeline of ``task`` around the parts of ``pipe`` and the controls' ``nets`` (by source).

    A clip that starts from a video is told by ``pipe``.
    """
    import inspect

    first = controls[0]
    name = _PIPELINES[first.net, "XL" in type(pipe).__name__][task]
    if "VideoToVideo" in type(pipe).__name__:
        name = "AnimateDiffVideoToVideoControlNetPipeline"
    library = "imprompt.generation.sdxl_clips" if name == "AnimateDiffSDXLControlNetPipeline" else "diffusers"
    kind = getattr(importlib.import_module(library), name)
    taken = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    switches = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
    parts |= {name: value for name, value in switches.items() if name in taken}
    made = [nets[control.source] for control in controls]
    one = len(made) == 1 or first.net in _SHARED
    result = kind(**parts, **{"adapter" if first.net == "t2i" else "controlnet": made[0] if one else made})
    for name in {"image_encoder", "feature_extractor"} & (pipe.components.keys() - taken.keys()):
        setattr(result, name, getattr(pipe, name))  # no part of T2I-Adapter pipelines, but image prompts look
    result.set_progress_bar_config(disable=True)
    return result


def control_call(controls: Sequence[Control], maps: Sequence[Map], request: Request) -> dict[str, Any]:
    """The pipeline's arguments that say the controls; ``maps`` are of the output's size, one each, or for a
    clip one a frame."""
    first = controls[0]
    starts, ends = zip(*windows(controls, request), strict=True)
    several = len(controls) > 1 or first.net == "union"

    def each(values: Sequence[Any]) -> Any:
        return list(values) if several else values[0]

    scales = each([control.ref.scale for control in controls])
    if first.net == "t2i":
        call = {"image": each(maps), "adapter_conditioning_scale": scales}
        if "_xl" in str(first.config.get("adapter_type")):
            call["adapter_conditioning_factor"] = ends[0]
        return call
    if first.net == "sparse":
        return {
            "conditioning_frames": list(maps),
            "controlnet_frame_indices": [control.ref.at for control in controls],
            "controlnet_conditioning_scale": first.ref.scale,
        }
    image = "image" if request.task == "generate" and first.net == "controlnet" else "control_image"
    shown: list[Any] = list(maps)
    if request.task == "animate":
        assert request.frames is not None
        image = "conditioning_frames"
        shown = [list(one) if isinstance(one, tuple) else [one] * request.frames for one in maps]
    call = {
        image: each(shown),
        "controlnet_conditioning_scale": scales,
        "control_guidance_start": each(starts),
        "control_guidance_end": each(ends),
    }
    if first.net == "union":
        call["control_mode"] = [control.mode for control in controls]
    return call


def windows(controls: Sequence[Control], request: Request) -> list[tuple[float, float]]:
    """Each control's start and end as fractions of the steps that are really drawn.

    A request counts from pure noise, as for image prompts; with ``strength`` s drawing begins at 1 - s of the
    schedule. Raises :class:`UsageError` for a window that ends before drawing begins.
    """
    strength = 1.0 if request.strength is None else request.strength
    found = []
    for control in controls:
        ref = control.ref
        start, end = ((at - (1 - strength)) / strength for at in (ref.start, ref.end))
        if end <= 1e-6:
            raise UsageError(
                f"control '{ref.path}': end {ref.end:g} lies before drawing begins, which with strength "
                f"{strength:g} is at {1 - strength:g} of the schedule; it would have no effect."
            )
        found.append((max(0.0, start), 1.0 if ref.end == 1 else end))
    return found


# ---- private


def _default(ref: ControlRef, base: Base) -> str:
    if ref.kind == "none":
        raise UsageError(
            f"control '{ref.path}': a finished map needs the model that it is for; say model=NAME (imprompt "
            "models lists them)."
        )
    family = catalog.families().get(base.family or "")
    kinds = {} if family is None else family.controls if ref.at is None else family.keyframes
    if ref.kind not in kinds:
        there = f"known for it: {', '.join(kinds)}" if kinds else "none is known for it"
        what = "model" if ref.at is None else "SparseCtrl, which at needs,"
        raise UsageError(
            f"control '{ref.path}': base '{base.name}' has no default {what} for {ref.kind} "
            f"({there}); name one that was made for it by model=NAME."
        )
    return kinds[ref.kind]


def _find(ref: ControlRef, base: Base) -> Control:
    assert ref.model is not None  # named_controls() gave one
    name, _, kind = ref.model.partition(":")
    if kind and ref.kind != "none":
        raise UsageError(
            f"control '{ref.path}': model '{ref.model}' says {kind} of a map; that is for none:{ref.path}."
        )
    source = resolve(name, "control", catalog.controls(), "a folder or a hub id (owner/name)")
    row = source.row if isinstance(source.row, ControlRow) else None
    if row is not None and base.family is not None and row.family != base.family:
        raise ModelError(
            f"control '{name}' is for {row.family} bases; base '{base.name}' is of the family {base.family}. "
            "See imprompt models."
        )
    if row is not None:
        _check_kind(ref, kind or ref.kind, name, row.modes)
    config = _config_of(source)
    net = _CLASSES.get(str(config.get("_class_name")))
    if net is None:
        raise ModelError(
            f"control '{name}' is a {config.get('_class_name', 'model without a class name')}; ControlNets, "
            "ControlNet-Unions, T2I-Adapters and SparseCtrls of diffusers are followed."
        )
    modes = row.modes if row is not None else catalog.controls()["sdxl-union"].modes if net == "union" else {}
    _check_kind(ref, kind or ref.kind, name, modes)
    folder = source.inside if source.path is None else ""
    return Control(ref, net, source.folder, config, modes.get(kind or ref.kind), row, folder)


def _check_kind(ref: ControlRef, kind: str, name: str, modes: Mapping[str, int | None]) -> None:
    """``modes``: what the model takes, where that is known; with numbers, those of a union."""
    if kind == "none" and any(mode is not None for mode in modes.values()):
        raise UsageError(
            f"control '{ref.path}': '{name}' is a ControlNet-Union and must be told what the map is: "
            f"model={name}:{next(iter(modes))}, or another of {', '.join(modes)}."
        )
    if kind != "none" and modes and kind not in modes:
        raise UsageError(f"control '{ref.path}': '{name}' takes {', '.join(modes)}, not {kind}.")


def _config_of(source: Source) -> Mapping[str, Any]:
    """``config.json`` of a folder or repository. Raises :class:`ModelError`."""
    if source.is_file:
        raise ModelError(
            f"control '{source.name}' is a file; a folder of diffusers' layout or a hub id is expected."
        )
    return read_json(
        source.file("config.json", what=f"control '{source.name}'"),
        f"control '{source.name}'",
        error=ModelError,
    )


def _check_task(controls: Sequence[Control], request: Request) -> None:
    """Refuse what diffusers' T2I-Adapters cannot: other tasks, a start, an end where there is no switch."""
    if request.task == "animate" and controls[0].net == "union":
        raise UsageError(
            f"control '{controls[0].name}' is a ControlNet-Union, which diffusers takes for stills only; use "
            "a ControlNet."
        )
    if controls[0].net != "t2i":
        return
    if request.task != "generate":
        raise UsageError(
            f"control '{controls[0].name}' is a T2I-Adapter, which diffusers takes for generate only, not "
            f"for {request.task}; use a ControlNet."
        )
    xl = "_xl" in str(controls[0].config.get("adapter_type"))
    ends = {control.ref.end for control in controls}
    if any(control.ref.start > 0 for control in controls) or (not xl and ends != {1.0}) or len(ends) > 1:
        raise UsageError(
            f"control '{controls[0].name}' is a T2I-Adapter, which acts from the first step"
            + (" to one end for all" if xl else " to the last")
            + "; start and end need a ControlNet."
        )


def _check_places(controls: Sequence[Control], request: Request) -> None:
    """Refuse a picture at a frame for what is no SparseCtrl, and what diffusers' SparseCtrl cannot."""
    first = controls[0]
    if first.net != "sparse":
        for control in controls:
            if control.ref.at is not None:
                raise UsageError(
                    f"control '{control.ref.path}': at={control.ref.at} needs a SparseCtrl, and "
                    f"'{control.name}' is {_SAID[control.net]}, which is followed in every frame."
                )
        return
    if request.task != "animate" or request.video is not None:
        raise UsageError(
            f"control '{first.name}' is a SparseCtrl, which diffusers takes for clips that start from no "
            "video; use a ControlNet."
        )
    assert request.frames is not None
    known = int(first.config.get("motion_max_seq_length", 32))
    if request.frames > known:
        raise UsageError(
            f"control '{first.name}' tells {known} frames apart, not {request.frames}; ask for "
            "fewer --frames."
        )
    places = [control.ref.at for control in controls]
    for control, at in zip(controls, places, strict=True):
        if at is None:
            raise UsageError(
                f"control '{control.ref.path}': '{first.name}' is a SparseCtrl; say the frame that the "
                "picture stands at, such as at=0."
            )
        if at >= request.frames:
            raise UsageError(
                f"control '{control.ref.path}': at={at} lies behind the last of {request.frames} frames, "
                "from 0."
            )
        if control.ref.start > 0 or control.ref.end < 1 or control.ref.scale != first.ref.scale:
            raise UsageError(
                f"control '{control.ref.path}': '{first.name}' is a SparseCtrl, which acts from the "
                "first step to the last, with one scale for all its pictures."
            )
    if len(set(places)) < len(places):
        raise UsageError(
            f"controls: '{first.name}' takes one picture a frame, but two stand at the same one."
        )


def _family(width: object) -> str:
    return f"{_WIDTHS.get(width, 'another kind')} (cross-attention width {width})"  # type: ignore[call-overload]
