"""Checks for each kind of control model, before loading: can diffusers' pipelines do what is asked?"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from imprompt.errors import ModelError, UsageError
from imprompt.generation.families import Base
from imprompt.schema.request import Request

if TYPE_CHECKING:
    from imprompt.generation.control import Control


def is_t2i_xl(control: "Control") -> bool:
    """Whether a T2I-Adapter is for SDXL."""
    return str(control.config.get("adapter_type")).endswith("_xl")


def check_transformer_fits(control: "Control", transformer: Mapping[str, Any], base: Base) -> None:
    """Raise :class:`ModelError` unless a control has the width and the latents of the base's transformer."""
    names = ("num_attention_heads", "attention_head_dim", "in_channels")
    own, theirs = ([int(config.get(name) or 0) for name in names] for config in (control.config, transformer))
    if own[0] * own[1] != theirs[0] * theirs[1] or own[2] != theirs[2]:
        raise ModelError(
            f"{control.title} of width {own[0] * own[1]} for {own[2]} channels; the transformer of base "
            f"'{base.name}' has {theirs[0] * theirs[1]} and {theirs[2]}. See imprompt models."
        )


def check_t2i_fits(control: "Control", channels: int, xl: bool, base: Base) -> None:
    """Raise :class:`ModelError` unless a T2I-Adapter is for UNets of the base's kind and channels."""
    own = next(iter(control.config.get("channels", [0])))
    if is_t2i_xl(control) != xl or own != channels:
        kind = "other" if own != channels else "SD 1.5" if xl else "SDXL"
        raise ModelError(
            f"{control.title} for {kind} bases; base '{base.name}' is {'an SDXL' if xl else 'no SDXL'} model "
            f"of {channels} channels, not {own}. See imprompt models."
        )


def _check_nowhere(controls: "Sequence[Control]", _: Request) -> None:
    """Only SparseCtrls take a picture for a single frame."""
    for control in controls:
        if control.ref.at is not None:
            raise UsageError(
                f"control '{control.ref.path}': at={control.ref.at} needs a SparseCtrl, and "
                f"'{control.name}' is {control.net_title}, which is followed in every frame."
            )


def _check_union(controls: "Sequence[Control]", request: Request) -> None:
    if request.task == "animate":
        raise UsageError(f"{controls[0].title}, which diffusers takes for stills only; use a ControlNet.")
    _check_nowhere(controls, request)


def _check_t2i(controls: "Sequence[Control]", request: Request) -> None:
    """diffusers' T2I-Adapters know one task, no start, and an end only for SDXL."""
    first = controls[0]
    if request.task != "generate":
        raise UsageError(
            f"{first.title}, which diffusers takes for generate only, not for {request.task}; use a "
            "ControlNet."
        )
    xl, ends = is_t2i_xl(first), {control.ref.end for control in controls}
    if any(control.ref.start > 0 for control in controls) or (not xl and ends != {1.0}) or len(ends) > 1:
        raise UsageError(
            f"{first.title}, which acts from the first step"
            + (" to one end for all" if xl else " to the last")
            + "; start and end need a ControlNet."
        )
    _check_nowhere(controls, request)


def _check_sparse(controls: "Sequence[Control]", request: Request) -> None:
    """diffusers' SparseCtrl takes pictures at single frames of a clip that starts from noise."""
    first = controls[0]
    if request.task != "animate" or request.video is not None:
        raise UsageError(
            f"{first.title}, which diffusers takes for clips that start from no video; use a ControlNet."
        )
    assert request.frames is not None
    known = int(first.config.get("motion_max_seq_length", 32))
    if request.frames > known:
        raise UsageError(
            f"control '{first.name}' tells {known} frames apart, not {request.frames}; ask for fewer "
            "--frames."
        )
    for control in controls:
        if problem := _sparse_problem(control, first, request.frames):
            raise UsageError(f"control '{control.ref.path}': {problem}")
    if len({control.ref.at for control in controls}) < len(controls):
        raise UsageError(
            f"controls: '{first.name}' takes one picture for a frame, but two have the same `at`."
        )


def _check_sd3(controls: "Sequence[Control]", request: Request) -> None:
    """diffusers has SD3's ControlNets for generate, and one of them, which reads a mask, for inpaint."""
    first = controls[0]
    if request.task not in ("generate", "inpaint"):
        raise UsageError(
            f"{first.title}, which diffusers takes for generate and inpaint only, not for {request.task}."
        )
    for control in controls:
        if control.reads_mask != (request.task == "inpaint"):
            has, task = ("a", "inpaint") if control.reads_mask else ("no", "generate")
            raise UsageError(
                f"{control.title} with {has} channel for a mask; diffusers takes it for {task} only, not for "
                f"{request.task}."
            )
    if first.reads_mask and (problem := _inpainting_problem(controls, request)):
        raise UsageError(problem)
    _check_nowhere(controls, request)


def _inpainting_problem(controls: "Sequence[Control]", request: Request) -> str | None:
    first = controls[0]
    extra, config = first.config["extra_conditioning_channels"], first.config
    if extra != 1 or config.get("joint_attention_dim", 0) is None or config.get("use_pos_embed") is False:
        return (
            f"{first.title} of another layout than diffusers inpaints with: one channel for the mask, and "
            "text and positions read by itself."
        )
    if len(controls) > 1:
        return f"controls: {len(controls)} are given; diffusers inpaints with one SD3 ControlNet."
    if (first.ref.kind, first.ref.path) != ("none", request.image):
        return (
            f"control '{first.ref.path}': '{first.name}' reads the picture that is inpainted; say "
            f"none:{request.image}."
        )
    if request.strength not in (None, 1):
        return f"strength: {first.title} that draws the masked part from noise; leave it out."
    return None


def _sparse_problem(control: "Control", first: "Control", frames: int) -> str | None:
    ref = control.ref
    if ref.at is None:
        return f"'{first.name}' is a SparseCtrl; say the frame that the picture stands at, such as at=0."
    if ref.at >= frames:
        return f"at={ref.at} lies after the last of {frames} frames, which count from 0."
    if ref.start > 0 or ref.end < 1 or ref.scale != first.ref.scale:
        return (
            f"'{first.name}' is a SparseCtrl, which acts from the first step to the last, with one scale for "
            "all its pictures."
        )
    return None


CHECKS: dict[str, Callable[["Sequence[Control]", Request], None]] = {
    "controlnet": _check_nowhere,
    "union": _check_union,
    "t2i": _check_t2i,
    "sparse": _check_sparse,
    "flux": _check_nowhere,
    "sd3": _check_sd3,
}
"""Kind of control model → raises :class:`UsageError` for what its pipelines cannot do."""
