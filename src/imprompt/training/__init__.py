"""Making adapters: one configuration, a cache of everything frozen, and the loop (floor 4).

``train(TrainConfig(data=…, output=…))``, or ``train(TrainConfig.read("adapter.toml"))``. The loop, and torch
with it, is loaded when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from imprompt.training.config import Augmentation, TrainConfig

if TYPE_CHECKING:
    from imprompt.training.trainer import train

__all__ = ["Augmentation", "TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from imprompt.training.trainer import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
