"""Faster drawing of nearly the same picture, on UNets: uncond rows and inner blocks run seldom.

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

GUIDED = 0.4
"""Share of the steps, the first, at which the uncond rows always run: there guidance changes most."""
EVERY = 3
"""The uncond rows and the inner blocks run at every third step."""
_TEXT = "encoder_hidden_states"
_ALL = range(1, 2**31)
"""Any number of rows."""


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
            "speed: this UNet takes guidance as an input, as LCM's do, so 'balanced' saves nothing; "
            "use 'exact' or 'fast'."
        )
    with ExitStack() as hurry:
        if speed != "exact":
            for model in (pipe.unet, getattr(pipe, "controlnet", None)):
                if model is not None:
                    hurry.enter_context(guided_seldom(model, pipe))
        if speed == "fast":
            hurry.enter_context(inner_reused(pipe.unet))
        yield


@contextmanager
def guided_seldom(model: nn.Module, pipe: Any) -> Iterator[None]:
    """While open, most calls of ``model`` (a UNet or ControlNet) after the first run the cond rows alone.

    The uncond rows' output is then taken to be as far from the cond rows' as at the last call that ran both,
    so that the pipeline's ``e∅ + s (e − e∅)`` is ``e + (s − 1) d`` with the ``d = e − e∅`` of that call.
    """
    injection, calls, halved = Injection.of(model), 0, set[int]()
    whole_text = cond_text = None
    apart: Tensor | float = 0.0

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        nonlocal calls, halved, whole_text, cond_text
        first = calls < max(1, round(GUIDED * step_count(pipe)))
        light = pipe.do_classifier_free_guidance and not first and calls % EVERY > 0
        calls += 1
        if injection is not None:
            injection.branches = ("cond",) if light else None
        halved = set()
        if not light:
            return None
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
        nonlocal apart
        if not halved and model is pipe.unet and pipe.do_classifier_free_guidance:
            uncond, cond = output[0].chunk(2)
            apart = cond - uncond
        return of_rows(lambda x: torch.cat((x - apart, x)), output, halved)

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
    their last output at the others (after DeepCache, Ma et al. 2024), of the cond rows where those are alone.

    They also run when the number of rows has changed otherwise.
    """
    inner = [
        block for block in (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]) if block is not None
    ]
    own = [vars(block).get("forward") for block in inner]  # accelerate's, where parts are offloaded
    age, rows, alone = 0, 0, False

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal age, rows, alone
        count = len(_latents(args, kwargs))
        alone = 2 * count == rows
        age = (age + 1) % every if alone or count == rows else 0
        if age == 0:
            rows, alone = count, False

    def reusing(forward: Callable[..., Any]) -> Callable[..., Any]:
        last: Any = None

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            if age == 0:
                last = forward(*args, **kwargs)
            return of_rows(_cond, last, _ALL) if alone else last

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
