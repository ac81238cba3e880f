"""Where a training run computes: device, number format, and the processes that share the work."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from imprompt.errors import UsageError
from imprompt.training.config import TrainConfig


class World:
    """This process among those that train together; alone unless a launcher set ``WORLD_SIZE``."""

    def __init__(self, config: TrainConfig) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.number = int(os.environ.get("RANK", "0")) if self.count > 1 else 0
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and self.count > 1:
            name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        try:
            self.device = torch.device(name)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device '{name}' cannot be used here: {error}") from error
        self.dtype = _arithmetic(config, self.device)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.number == 0

    def __enter__(self) -> None:
        if self.count > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def __exit__(self, *_: object) -> None:
        if self.count > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def agree(self, stop: bool) -> bool:
        """Whether the first process wants to stop: all must end at the same step."""
        if self.count == 1:
            return stop
        answer = torch.tensor([float(stop)], device=self.device)
        distributed.broadcast(answer, 0)
        return bool(answer.item())

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, part in zip(
            tensors, (flat / self.count).split([t.numel() for t in tensors]), strict=True
        ):
            tensor.copy_(part.view_as(tensor))


def _arithmetic(config: TrainConfig, device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        native = any(
            getattr(torch.cpu, name, lambda: False)()
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    else:
        native = False
    if config.dtype == "bfloat16" and not native:
        raise UsageError(
            f"dtype bfloat16: this {device.type} has no bfloat16 arithmetic; use float32 or auto"
        )
    return torch.bfloat16 if native and config.dtype != "float32" else torch.float32
