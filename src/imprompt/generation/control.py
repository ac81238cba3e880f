"""ControlNets, T2I-Adapters and SparseCtrls of a request: find and load them, build diffusers' pipeline.

:func:`find_controls` resolves the models of a request and refuses what does not fit the base before any
weight is read; :func:`load_net` loads one; :func:`controlled` builds diffusers' pipeline with them and
:func:`control_call` its arguments. Image prompts act in the UNet alone: a ControlNet reads the text, or, for
a face control, the face tokens (:mod:`imprompt.generation.identity`). Maps are made
by :mod:`imprompt.generation.annotate`.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import torch
from PIL import Image

from imprompt import catalog
from imprompt.catalog import ControlRow
from imprompt.catalog.resolve import Source, fingerprint_of, resolve
from imprompt.errors import ModelError, UsageError
from imprompt.generation.control_checks import (
    CHECKS,
    check_t2i_fits,
    check_transformer_fits,
    is_t2i_xl,
)
from imprompt.generation.families import KINDS, Base, check_family, stills
from imprompt.generation.favor import check_favor
from imprompt.generation.pipelines import load_part
from imprompt.io import read_json
from imprompt.schema.request import ControlRef, Favor, Request, Task

NetName = Literal["controlnet", "union", "t2i", "sparse", "flux", "sd3"]

Map = Image.Image | tuple[Image.Image, ...]
"""The map that a control follows, at the drawn size; for a control that moves, one for each frame."""


@dataclass(frozen=True)
class _Net:
    """A kind of control model of diffusers."""

    title: str
    class_name: str
    pipelines: Mapping[Task, str] = field(default_factory=dict)
    """diffusers' pipeline of each task; of those for UNets, for SD 1.5 and 2."""
    xl_pipelines: Mapping[Task, str] = field(default_factory=dict)
    shared: bool = False
    """Whether one model follows several controls."""
    kind: str | None = None
    """The only kind of base (:data:`~imprompt.generation.families.KINDS`) that it is for; ``None``: UNets."""


_NETS: dict[NetName, _Net] = {
    "controlnet": _Net(
        "a ControlNet",
        "ControlNetModel",
        stills("StableDiffusionControlNet") | {"animate": "AnimateDiffControlNetPipeline"},
        stills("StableDiffusionXLControlNet")
        | {"animate": "AnimateDiffSDXLControlNetPipeline"},  # of imprompt.generation.sdxl_clips
    ),
    "union": _Net(
        "a ControlNet-Union",
        "ControlNetUnionModel",
        xl_pipelines=stills("StableDiffusionXLControlNetUnion"),
        shared=True,
    ),
    "t2i": _Net(
        "a T2I-Adapter",
        "T2IAdapter",
        stills("StableDiffusionAdapter", "generate"),
        stills("StableDiffusionXLAdapter", "generate"),
    ),
    "sparse": _Net(
        "a SparseCtrl",
        "SparseControlNetModel",
        {"animate": "AnimateDiffSparseControlNetPipeline"},
        shared=True,
    ),
    "flux": _Net("a FLUX ControlNet", "FluxControlNetModel", stills("FluxControlNet"), kind="flux"),
    "sd3": _Net(
        "an SD3 ControlNet",
        "SD3ControlNetModel",
        stills("StableDiffusion3ControlNet", "generate")
        | {"inpaint": "StableDiffusion3ControlNetInpaintingPipeline"},
        kind="sd3",
    ),
}
_UNIONS = {"ControlNetUnionModel": "sdxl-union", "FluxControlNetModel": "flux-union"}
"""Class of a union model → row of the catalogue that has the numbers of its kinds."""
_WIDTHS = {256: "emoji", 768: "SD 1.5", 1024: "SD 2", 2048: "SDXL"}  # of cross-attention


@dataclass(frozen=True)
class Control:
    """One control of a request and the model that it resolves to."""

    ref: ControlRef
    """With the model's name, and what it favours, filled in."""
    net: NetName
    place: Source
    config: Mapping[str, Any]
    """The model's ``config.json``."""
    kind: str
    """Kind of its map, also where the map is given finished."""
    mode: int | None = None
    """Number of the kind in a union model."""

    @property
    def name(self) -> str:
        """The name that was asked for."""
        assert self.ref.model is not None
        return self.ref.model

    @property
    def favor(self) -> Favor:
        """What prevails where it and the prompt disagree."""
        assert self.ref.favor is not None
        return self.ref.favor

    @property
    def source(self) -> str:
        """Folder, or repository and folder: equal for equal models."""
        inside = f"/{self.place.inside}" if self.place.path is None and self.place.inside else ""
        return self.place.folder + inside + (":inpaint" if self.reads_mask else "")

    @property
    def net_title(self) -> str:
        """Kind of model with its article, for messages."""
        return _NETS[self.net].title

    @property
    def title(self) -> str:
        """Name and kind of model, for messages."""
        return f"control '{self.name}' is {self.net_title}"

    @property
    def reads_face(self) -> bool:
        """Whether its ControlNet reads face tokens in place of text, as InstantID's."""
        return self.kind == "face"

    @property
    def reads_mask(self) -> bool:
        """Whether its ControlNet reads the picture that is inpainted and its mask (SD3)."""
        return bool(self.config.get("extra_conditioning_channels"))

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits, see :func:`fingerprint_of`."""
        return fingerprint_of(self.place.weights, self.source)


def named_controls(request: Request, base: Base) -> tuple[ControlRef, ...]:
    """The request's controls with the base's default models filled in, and with what they favour.

    A model's own favour is for stills that are drawn from a text with guidance. Raises :class:`UsageError` if
    the base has no model.
    """
    guidance = base.defaults.guidance if request.guidance is None else request.guidance
    from_text = bool(request.prompt) and guidance > 1 and request.task != "animate"
    named = []
    for ref in request.controls:
        model = ref.model or _default(ref, base)
        row = catalog.controls().get(model.partition(":")[0])
        own = row.favor if row is not None and from_text else "balanced"
        named.append(ref.replace(model=model, favor=ref.favor or own))
    return tuple(named)


def find_controls(request: Request, base: Base) -> tuple[Control, ...]:
    """The request's controls with their models; only configurations are read.

    Raises :class:`UsageError` for an unknown alias, a kind that the model does not take, and models that
    cannot be used together, for this task, or with the options given; :class:`ModelError` for a folder or
    repository that is no ControlNet, or one of another base.
    """
    if not request.controls:
        return ()
    if base.family == "kolors":
        raise ModelError(
            f"controls: base '{base.name}' is a Kolors model; diffusers has no pipeline with controls."
        )
    found = tuple(_find(ref, base, request.task) for ref in named_controls(request, base))
    first = found[0]
    _check_alike(found)
    if base.row is not None or base.path is not None:  # else its kind is known once it is loaded
        _check_kind_of_base(first, base)
    CHECKS[first.net](found, request)
    check_favor(found, shared=_NETS[first.net].shared)
    denoiser = base.path / base.kind.denoiser / "config.json" if base.path is not None else None
    if denoiser is not None and denoiser.is_file():
        config = read_json(denoiser, f"'{denoiser}'", error=ModelError)
        for control in found:
            check_fits(control, config, base)
    windows(found, request)
    return found


def check_fits(control: Control, unet: Mapping[str, Any], base: Base) -> None:
    """Check that a control was made for denoisers like the base's, whose configuration is ``unet``.

    Raises :class:`ModelError`, naming both, when it was not, and :class:`UsageError` where diffusers has no
    pipeline for the two.
    """
    _check_kind_of_base(control, base)
    if _NETS[control.net].kind is not None:
        check_transformer_fits(control, unet, base)
        return
    xl = unet.get("addition_embed_type") == "text_time"
    if xl and control.net == "sparse":
        raise UsageError(
            f"controls: base '{base.name}' is an SDXL model, for which diffusers has no SparseCtrl; SD 1.5 "
            "models take one, and a ControlNet is followed in every frame."
        )
    channels = list(unet["block_out_channels"])
    if control.net == "t2i":
        check_t2i_fits(control, channels[0], xl, base)
        return
    width, own = control.config.get("cross_attention_dim"), unet["cross_attention_dim"]
    if width != own or list(control.config.get("block_out_channels") or ()) != channels:
        other = "" if width != own else " with other channels"
        raise ModelError(
            f"{control.title} for {_family(width)} bases{other}; base '{base.name}' is of the family "
            f"{_family(own)}. See imprompt models."
        )


def load_net(control: Control, dtype: torch.dtype) -> Any:
    """The control's model on the CPU, from safetensors only. Raises :class:`ModelError`."""
    channels = {"extra_conditioning_channels": 1} if control.reads_mask else {}
    return load_part(control.place, getattr(diffusers, _NETS[control.net].class_name), dtype, **channels)


def controlled(pipe: Any, task: Task, controls: Sequence[Control], nets: Mapping[str, Any]) -> Any:
    """diffusers' pipeline of ``task`` with the parts of ``pipe`` and the controls' models.

    ``nets`` has the models by their controls' ``source``. If ``pipe`` starts from a video, so does the new
    pipeline.
    """
    first = controls[0]
    net = _NETS[first.net]
    pipeline = _class(controlled_class(first, task, type(pipe).__name__))
    taken = inspect.signature(pipeline.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    switches = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
    parts |= {name: value for name, value in switches.items() if name in taken}
    models = [nets[control.source] for control in controls]
    single = len(models) == 1 or net.shared
    if first.net == "flux" and len(set(map(id, models))) == 1:
        models = models[:1]  # a union, which diffusers calls once for each map
    part = "adapter" if first.net == "t2i" else "controlnet"
    result = pipeline(**parts, **{part: models[0] if single else models})
    for name in {"image_encoder", "feature_extractor"} & (pipe.components.keys() - taken.keys()):
        setattr(result, name, getattr(pipe, name))  # T2I-Adapter pipelines have no such parts
    result.set_progress_bar_config(disable=True)
    return result


def controlled_class(control: Control, task: Task, around: str) -> str:
    """Name of the pipeline of ``task`` with a control, in place of the pipeline class ``around``."""
    net = _NETS[control.net]
    name = (net.xl_pipelines if "XL" in around else net.pipelines)[task]
    return "AnimateDiffVideoToVideoControlNetPipeline" if "VideoToVideo" in around else name


def _class(name: str) -> Any:
    library = "imprompt.generation.sdxl_clips" if name == "AnimateDiffSDXLControlNetPipeline" else "diffusers"
    return getattr(importlib.import_module(library), name)


def control_call(controls: Sequence[Control], maps: Sequence[Map], request: Request) -> dict[str, Any]:
    """The pipeline's arguments for the controls. ``maps`` has a map of the drawn size for each control, or,
    in a clip, one for each frame."""
    first = controls[0]
    several = len(controls) > 1 or first.net == "union"

    def each(values: Sequence[Any]) -> Any:
        return list(values) if several else values[0]

    starts, ends = zip(*windows(controls, request), strict=True)
    scales = each([control.ref.scale for control in controls])
    if first.net == "t2i":
        call = {"image": each(maps), "adapter_conditioning_scale": scales}
        return call | ({"adapter_conditioning_factor": ends[0]} if is_t2i_xl(first) else {})
    if first.net == "sparse":
        return {
            "conditioning_frames": list(maps),
            "controlnet_frame_indices": [control.ref.at for control in controls],
            "controlnet_conditioning_scale": first.ref.scale,
        }
    call = {
        "controlnet_conditioning_scale": scales,
        "control_guidance_start": each(starts),
        "control_guidance_end": each(ends),
    }
    if first.net in ("union", "flux"):
        call["control_mode"] = each([control.mode for control in controls])
    return call | _map_call(each, maps, request, first)


def _map_call(
    each: Callable[[Sequence[Any]], Any], maps: Sequence[Map], request: Request, first: Control
) -> dict[str, Any]:
    """The argument that holds the maps, which diffusers names by task and kind of net."""
    if request.task == "animate":
        frames = [list(one) if isinstance(one, tuple) else [one] * (request.frames or 0) for one in maps]
        return {"conditioning_frames": each(frames)}
    name = "image" if request.task == "generate" and first.net == "controlnet" else "control_image"
    return {name: each(maps)}


def windows(controls: Sequence[Control], request: Request) -> list[tuple[float, float]]:
    """Each control's start and end as fractions of the steps that are drawn.

    In a request they are fractions of the whole schedule, as for image prompts; with a strength s drawing
    begins at 1 - s. Raises :class:`UsageError` for a window that ends before drawing begins.
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


def _find(ref: ControlRef, base: Base, task: Task) -> Control:
    assert ref.model is not None  # named_controls() filled it in
    name, _, stated = ref.model.partition(":")
    if stated and ref.kind != "none":
        raise UsageError(
            f"control '{ref.path}': model '{ref.model}' says {stated} of a map; that is for none:{ref.path}."
        )
    kind = stated or ref.kind
    place = resolve(name, "control", catalog.controls(), "a folder or a hub id (owner/name)")
    row = place.row if isinstance(place.row, ControlRow) else None
    if row is not None:
        check_family(f"control '{name}'", row, base)
        _check_kind(ref, kind, name, row.modes)
    config = _config_of(place, task)
    net = _net_of(config, name)
    if row is None and (net == "union" or config.get("num_mode") is not None):
        row = catalog.controls()[_UNIONS[_NETS[net].class_name]]
    modes = {} if row is None else row.modes
    _check_kind(ref, kind, name, modes)
    return Control(ref, net, place, config, kind, modes.get(kind))


def _net_of(config: Mapping[str, Any], name: str) -> NetName:
    for key, net in _NETS.items():
        if net.class_name == config.get("_class_name"):
            return key
    raise ModelError(
        f"control '{name}' is a {config.get('_class_name', 'model without a class name')}; ControlNets, "
        "ControlNet-Unions, T2I-Adapters and SparseCtrls of diffusers are followed."
    )


def _check_kind(ref: ControlRef, kind: str, name: str, modes: Mapping[str, int | None]) -> None:
    """``modes``: the kinds that the model takes, if they are known; for a union, with their numbers."""
    if kind == "none" and any(mode is not None for mode in modes.values()):
        raise UsageError(
            f"control '{ref.path}': '{name}' is a ControlNet-Union and must be told what the map is: "
            f"model={name}:{next(iter(modes))}, or another of {', '.join(modes)}."
        )
    if kind != "none" and modes and kind not in modes:
        raise UsageError(f"control '{ref.path}': '{name}' takes {', '.join(modes)}, not {kind}.")


def _config_of(place: Source, task: Task) -> Mapping[str, Any]:
    """``config.json`` of a folder or repository; early ones of SD3 do not say that the model inpaints.

    Raises :class:`ModelError`.
    """
    what = f"control '{place.name}'"
    if place.is_file:
        raise ModelError(f"{what} is a file; a folder of diffusers' layout or a hub id is expected.")
    config: Mapping[str, Any] = read_json(place.file("config.json", what=what), what, error=ModelError)
    if task == "inpaint" and config.get("_class_name") == _NETS["sd3"].class_name:
        return {"extra_conditioning_channels": 1, **config}  # a model that does not will not load
    return config


def _check_alike(controls: Sequence[Control]) -> None:
    first = controls[0]
    for other in controls[1:]:
        if other.net != first.net or (_NETS[first.net].shared and other.source != first.source):
            raise UsageError(
                f"controls: '{first.name}' is {first.net_title}, '{other.name}' {other.net_title}; several "
                "controls must all be ControlNets, all T2I-Adapters, or all of one ControlNet-Union or "
                "SparseCtrl."
            )


def _check_kind_of_base(control: Control, base: Base) -> None:
    """Raise :class:`ModelError` where diffusers has no pipeline for a kind of control and a kind of base."""
    kind = _NETS[control.net].kind
    fits = base.kind.denoiser == "unet" if kind is None else base.kind is KINDS[kind]
    if not fits:
        made_for = "UNets" if kind is None else f"a {KINDS[kind].pipelines['generate']}"
        own = next(iter(base.kind.pipelines.values()))
        raise ModelError(f"{control.title}, which is for {made_for}; base '{base.name}' is a {own}.")


def _family(width: object) -> str:
    known = _WIDTHS.get(width, "another kind") if isinstance(width, int) else "another kind"
    return f"{known} (cross-attention width {width})"
