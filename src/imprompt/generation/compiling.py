"""torch.compile for denoisers, in place: the whole model or each of its transformer blocks.

While a denoiser is compiled, adapters keep its graph the same whatever they show
(:attr:`imprompt.adapter.backbones.base.Call.steady`).
"""

import os
import shutil
import sys

import torch
from torch import nn

from imprompt.errors import ModelError, first_line


def check_compiler(device: torch.device) -> None:
    """Raise :class:`ModelError` where torch.compile has no C++ compiler for the CPU."""
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if device.type == "cpu" and shutil.which(name) is None:
        raise ModelError(
            f"compile: there is no C++ compiler '{name}' on this machine; install one, name it in CXX, or "
            "leave --compile out."
        )


def compile_denoiser(denoiser: nn.Module, how: str) -> None:
    """Compile it as :attr:`imprompt.schema.request.Request.compile` says; its first call does the work."""
    if how == "full":
        denoiser.compile()
    elif how == "regional":
        for part in denoiser.modules():
            if type(part).__name__.endswith("TransformerBlock"):
                part.compile()


def compile_failure(error: Exception) -> ModelError | None:
    """What to say of an error of the compiler's; ``None`` for others."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    return ModelError(f"compile: it failed here ({first_line(error)}); leave --compile out.")
