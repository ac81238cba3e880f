"""Training passes as CUDA graphs.

Forward and backward of a pass are thousands of short kernels, which Python launches more slowly than a GPU
runs them. A graph is recorded once for each shape of a batch and then replayed in one launch (PyTorch, "CUDA
semantics", whole-network capture).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from imprompt.training.samples import Sample

Pass: TypeAlias = Callable[[Sample], tuple[Tensor, Tensor]]
"""Forward and backward of a sample: each picture's error ``B`` and the loss, both detached."""

_MOST = 4
"""Graphs that are kept. Their memory holds all activations of a pass, shared by all of them."""
_WARM_UP = 2
"""Passes before recording, in which libraries choose their kernels."""


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    sample: Sample
    error: Tensor
    loss: Tensor
    gradients: list[Tensor | None]


class GraphedPass:
    """Does what ``usual`` does, by a graph of each shape; without where none can be recorded.

    The gradients of ``parameters`` are set, not added to.
    """

    def __init__(self, usual: Pass, parameters: Sequence[nn.Parameter], note: Callable[[str], None]) -> None:
        self._usual, self._parameters, self._note = usual, tuple(parameters), note
        self._recorded: dict[object, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._failed = False

    def __call__(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """One pass of a sample that is on the device."""
        shape = tuple((tensor.shape, tensor.dtype) for tensor in sample.tensors)
        recorded = self._recorded.get(shape)
        if recorded is None:
            if self._failed or len(self._recorded) == _MOST:
                return self._usual(sample)
            stream = torch.cuda.current_stream()
            try:
                recorded = self._recorded[shape] = self._record(sample)
            except RuntimeError as error:  # no memory, or a kernel that no graph can hold
                torch.cuda.set_stream(stream)  # an end of recording that fails leaves its own
                self._failed = True
                self._forget_gradients()
                torch.cuda.empty_cache()
                why = str(error).partition("\n")[0]
                self._note(f"no CUDA graph can be recorded ({why}): steps are taken without, more slowly")
                return self._usual(sample)
        for kept, new in zip(recorded.sample.tensors, sample.tensors, strict=True):
            kept.copy_(new)
        recorded.graph.replay()
        for parameter, gradient in zip(self._parameters, recorded.gradients, strict=True):
            parameter.grad = gradient
        return recorded.error.clone(), recorded.loss.clone()

    def _record(self, sample: Sample) -> _Recorded:
        own, stream = sample.map(torch.clone), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._usual(own)
                self._forget_gradients()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            error, loss = self._usual(own)
        return _Recorded(graph, own, error, loss, [parameter.grad for parameter in self._parameters])

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
