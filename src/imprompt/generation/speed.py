"""Faster drawing for a little less likeness, on UNets: late steps without guidance, inner blocks run seldom.

:func:`hurried` is open around one call of a pipeline and leaves nothing behind.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from imprompt.adapter.guidance import of_rows
from imprompt.adapter.injection import Injection
from imprompt.errors import UsageError
from imprompt.generation.families import Base
from imprompt.generation.steps import step_count
from imprompt.schema.request import Request, Speed

GUIDED = 0.6
"""Share of the steps that are guided; what guidance changes later is hardly seen."""
_TEXT = "encoder_hidden_states"
EVERY = 3
"""The inner blocks run at every third step."""


def check_speed(request: Request, base: Base) -> None:
    """Raise :class:`UsageError` for a speed that the base cannot be drawn at."""
    if request.speed != "exact" and base.kind.denoiser != "unet":
        raise UsageError(
            f"speed: '{request.speed}' is for UNets, and base '{base.name}' has a transformer; use 'exact'."
        )


@contextmanager
def hurried(pipe: Any, speed: Speed) -> Iterator[None]:
    """While open, ``pipe`` draws at a speed of :class:`~imprompt.schema.request.Request`.

    Raises :class:`UsageError` where the speed has nothing to leave out.
    """
    if speed == "balanced" and getattr(pipe.unet.config, "time_cond_proj_dim", None):
        raise UsageError(
            "speed: this UNet takes guidance as an input, as LCM's do, so 'balanced' leaves out nothing; "
            "use 'exact' or 'fast'."
        )
    with ExitStack() as hurry:
        if speed != "exact":
            for model in (pipe.unet, getattr(pipe, "controlnet", None)):
                if model is not None:
                    hurry.enter_context(guided_early(model, pipe))
        if speed == "fast":
            hurry.enter_context(inner_reused(pipe.unet))
        yield


@contextmanager
def guided_early(model: nn.Module, pipe: Any) -> Iterator[None]:
    """While open, late calls of ``model`` (a UNet or ControlNet) run the cond rows alone.

    Their output stands for the uncond rows too, so that the pipeline's ``e∅ + s (e − e∅)`` is ``e`` exactly.
    """
    injection, calls, halved = Injection.of(model), 0, set[int]()
    whole_text = cond_text = None

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        nonlocal calls, halved, whole_text, cond_text
        calls += 1
        halved = set()
        if not pipe.do_classifier_free_guidance or calls <= round(GUIDED * step_count(pipe)):
            return None
        if injection is not None:
            injection.branches = ("cond",)
        shape = _latents(args, kwargs).shape
        rows = {shape[0], shape[0] * (shape[2] if len(shape) == 5 else 1)}  # of a clip, frames are rows
        halved = {count // 2 for count in rows}
        text, kwargs = kwargs.get(_TEXT), of_rows(_cond, kwargs, rows)
        if text is not whole_text:
            whole_text, cond_text = text, kwargs.get(_TEXT)
        elif text is not None:
            kwargs[_TEXT] = cond_text  # the same object at each step: its keys and values are kept
        return of_rows(_cond, args, rows), kwargs

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        return of_rows(lambda x: torch.cat((x, x)), output, halved)

    off = torch.compiler.disable  # for hooks that count calls
    hooks = [  # first of all, so that adapters see the cond rows
        model.register_forward_pre_hook(off(before), prepend=True, with_kwargs=True),
        model.register_forward_hook(off(after)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if injection is not None:
            injection.branches = None


@contextmanager
def inner_reused(unet: Any, every: int = EVERY) -> Iterator[None]:
    """While open, the blocks of a UNet but the first and the last run at every ``every``-th call, and return
    their last output at the others (after DeepCache, Ma et al. 2024).

    They also run when the number of rows has changed.
    """
    inner = [
        block for block in (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]) if block is not None
    ]
    own = [vars(block).get("forward") for block in inner]  # accelerate's, where parts are offloaded
    age, rows = 0, 0

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal age, rows
        count = len(_latents(args, kwargs))
        age = (age + 1) % every if count == rows else 0
        rows = count

    def reusing(forward: Callable[..., Any]) -> Callable[..., Any]:
        last: Any = None

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            if age == 0:
                last = forward(*args, **kwargs)
            return last

        return run

    hook = unet.register_forward_pre_hook(before, with_kwargs=True)
    for block in inner:
        block.forward = reusing(block.forward)
    try:
        yield
    finally:
        hook.remove()
        for block, forward in zip(inner, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _latents(args: Any, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["sample"]


def _cond(rows: Tensor) -> Tensor:
    """The cond half of a guided batch."""
    return rows[len(rows) // 2 :]
