"""What a ControlNet makes of the picture that it follows, once for all steps of a generation."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

_MOST = 8
"""Pictures of one model whose features are held at a time."""


@contextmanager
def embedded_once(pipe: Any) -> Iterator[None]:
    """While open, which is during one call of ``pipe``, its UNet ControlNets embed a picture at the first
    step only; diffusers embeds it at each. Nothing is left behind. Does nothing without such a ControlNet.
    """
    nets = getattr(pipe, "controlnet", None)
    with ExitStack() as ends:
        for net in getattr(nets, "nets", [nets]):
            embedding = getattr(net, "controlnet_cond_embedding", None)
            if embedding is not None and not isinstance(embedding.forward, _Once):
                ends.callback(_put_back, embedding, vars(embedding).get("forward"))
                embedding.forward = _Once(embedding.forward)
        yield


class _Once:
    """A function of pictures that remembers what it gave for those in the same place of memory, where they
    are held. Its caller writes neither to them nor to what was given."""

    def __init__(self, embed: Callable[[Tensor], Tensor]) -> None:
        self._embed = embed
        self._held: list[tuple[Tensor, Tensor]] = []

    def __call__(self, conditioning: Tensor) -> Tensor:
        for known, embedded in self._held:
            if _place(known) == _place(conditioning):
                return embedded
        embedded = self._embed(conditioning)
        self._held = [*self._held[1 - _MOST :], (conditioning, embedded)]
        return embedded


def _put_back(module: Any, forward: Any) -> None:
    """Let a module have the ``forward`` of its own that it had (accelerate's hooks are such), or none."""
    del module.forward
    if forward is not None:
        module.forward = forward


def _place(states: Tensor) -> tuple[object, ...]:
    return states.data_ptr(), states.shape, states.stride(), states.dtype, states.device
