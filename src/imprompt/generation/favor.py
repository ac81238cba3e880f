"""What a ControlNet adds to a UNet, weakened in favour of the prompt, or kept from guidance's uncond rows.

:func:`check_favor` refuses before anything is loaded; :func:`favored` is open around one call of a pipeline
and leaves nothing behind. A control that is balanced gets no hook.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from imprompt.errors import UsageError
from imprompt.schema.request import Favor

if TYPE_CHECKING:
    from imprompt.generation.control import Control

FADING = 0.825
"""What a residual is multiplied by once more for each step away from the middle block: ``guess mode`` of
ControlNet's own repository (Zhang et al. 2023), and A1111's modes that are not balanced."""
_ABLE = ("controlnet", "union", "sparse")
"""Kinds of control model whose output is residuals of a UNet's blocks, at each step."""


def check_favor(controls: "Sequence[Control]", *, shared: bool) -> None:
    """Raise :class:`UsageError` for a model that favours neither, and for two ways in a ``shared`` one."""
    for control in controls:
        favor, first = control.favor, controls[0].favor
        if favor != "balanced" and control.net not in _ABLE:
            raise UsageError(
                f"control '{control.ref.path}': favor={favor} is for ControlNets of UNets, and "
                f"'{control.name}' is {control.net_title}; leave it out, and use scale."
            )
        if shared and favor != first:
            raise UsageError(
                f"controls: '{control.name}' is {control.net_title}, which follows all its pictures at once; "
                f"favor must be the same for all, not {first} and {favor}."
            )


@contextmanager
def favored(pipe: Any, controls: "Sequence[Control]", rows: int) -> Iterator[None]:
    """While open, the ControlNets of ``pipe`` add what ``favor`` of their controls says.

    ``rows`` is the number of pictures of the call, or of a clip's frames: a ControlNet that is called with
    more rows has those of classifier-free guidance, the conditional ones last.
    """
    if all(control.favor == "balanced" for control in controls):
        yield
        return
    turns: dict[nn.Module, list[Favor]] = {}  # one model may follow several controls, in their order
    nets = getattr(pipe.controlnet, "nets", [pipe.controlnet])
    for net, control in zip(nets, controls, strict=False):  # a shared model follows all at once
        turns.setdefault(net, []).append(control.favor)
    with ExitStack() as hooks:
        for net, favors in turns.items():
            turn = _Turns(favors, rows)
            hooks.callback(net.register_forward_pre_hook(turn.cut, with_kwargs=True).remove)
            hooks.callback(net.register_forward_hook(turn.weigh).remove)
        yield


def weighed(residuals: Sequence[Tensor], favor: Favor, rows: int) -> list[Tensor]:
    """What a ControlNet adds to a UNet, ``B C h w`` each, from the finest block to the middle one, as
    ``favor`` says.

    ``prompt`` and ``control`` keep the middle block's, and multiply the others by :data:`FADING` for each
    residual between; ``control`` also adds nothing to the rows before the last ``rows``.
    """
    if favor == "balanced":
        return list(residuals)
    last = len(residuals) - 1
    found = [residual * FADING ** (last - place) for place, residual in enumerate(residuals)]
    if favor == "prompt":
        return found
    return [torch.cat((torch.zeros_like(each[:-rows]), each[-rows:])) for each in found]


class _Turns:
    """The calls of one ControlNet in a step, which follows a control at each."""

    def __init__(self, favors: Sequence[Favor], rows: int) -> None:
        self._favors = cycle(favors)
        self._rows = rows
        self._favor: Favor = "balanced"
        self._cut = 0

    def cut(self, _: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
        """Leave out the rows to which nothing will be added. A SparseCtrl hears all rows at once."""
        self._favor = next(self._favors)
        sample = args[0] if args else call["sample"]
        self._cut = max(0, len(sample) - self._rows) if self._favor == "control" and sample.dim() == 4 else 0
        if not self._cut:
            return None

        def kept(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: kept(each) for name, each in value.items()}
            if isinstance(value, list | tuple):
                return [kept(each) for each in value]
            of_rows = isinstance(value, Tensor) and value.dim() and len(value) == len(sample)
            return value[self._cut :] if of_rows else value

        return tuple(kept(each) for each in args), kept(call)

    def weigh(self, _: nn.Module, __: Any, output: Any) -> Any:
        *down, middle = weighed((*output[0], output[1]), self._favor, self._rows)
        if self._cut:
            down, middle = [self._uncut(each) for each in down], self._uncut(middle)
        return down, middle

    def _uncut(self, residual: Tensor) -> Tensor:
        return torch.cat((residual.new_zeros(self._cut, *residual.shape[1:]), residual))
