"""The state that training changes, and a checkpoint holds: weights, their average, the optimizer's state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.errors import ModelError
from imprompt.training import start
from imprompt.training.config import TrainConfig

_STATE = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter."""


class Learned:
    """The trained parameters of an adapter on its device, AdamW for them, and their average.

    Raises :class:`UsageError` when ``config.layers`` names no layer of the UNet.
    """

    def __init__(
        self, adapter: IPAdapter, config: TrainConfig, unet: nn.Module, device: torch.device
    ) -> None:
        self.adapter, self.device = adapter, device
        self.parameters = start.trainable(adapter, config, unet)
        self.fused = device.type in ("cpu", "cuda")
        assert config.lr is not None
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.lr, config.betas, weight_decay=config.weight_decay, fused=self.fused
        )
        self.average = EMAModel(self.parameters, decay=config.ema, foreach=True) if config.ema else None
        if self.average is not None:
            self.average.to(device)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """While this is open, the adapter has its averaged weights."""
        if self.average is None:
            yield
            return
        current = [parameter.detach().clone() for parameter in self.parameters]
        self._write(self.average.shadow_params)
        try:
            yield
        finally:
            self._write(current)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        """Set the weights, not through ``.data``: the adapter looks at how often they were written to."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """All weights, averages and optimizer states by name."""
        found: dict[str, Tensor] = {f"weights.{name}": each for name, each in self.adapter.named_parameters()}
        for number, (name, parameter) in enumerate(self._trained()):
            state = self.optimizer.state[parameter]
            found |= {f"{key}.{name}": torch.as_tensor(value) for key, value in state.items()}
            if self.average is not None:
                found[f"averaged.{name}"] = self.average.shadow_params[number]
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take over what :meth:`tensors` gave. Raises :class:`ModelError` for those of another adapter."""
        for name, parameter in self.adapter.named_parameters():
            value = tensors.get(f"weights.{name}")
            if value is None or value.shape != parameter.shape:
                raise ModelError(
                    f"the checkpoint of step {step} is of another adapter: '{name}' does not fit."
                )
            parameter.copy_(value)
        for number, (name, parameter) in enumerate(self._trained()):
            state = {key: tensors[f"{key}.{name}"] for key in _STATE}
            self.optimizer.state[parameter] = {
                key: value.to(self.device) if key != "step" or self.device.type == "cuda" else value
                for key, value in state.items()
            }
            if self.average is not None:
                self.average.shadow_params[number] = tensors[f"averaged.{name}"].to(self.device)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, each) for name, each in self.adapter.named_parameters() if each.requires_grad]
