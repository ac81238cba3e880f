"""Launching a run: accelerate's device, processes and number format, and work for the main process alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, broadcast_object_list

from imprompt.errors import ImpromptError, UsageError
from imprompt.generation.loading import multiplies_bfloat16
from imprompt.training.config import TrainConfig

T = TypeVar("T")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator for a run. Raises :class:`UsageError` for a device or number format that is missing."""
    if config.device not in ("auto", "cpu", "cuda", "mps"):
        raise UsageError(
            f"device '{config.device}': auto, cpu, cuda or mps is expected; choose among several GPUs with "
            "CUDA_VISIBLE_DEVICES or accelerate config."
        )
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if config.device in there and not there[config.device]():
        raise UsageError(f"device '{config.device}' cannot be used here: torch does not find one.")
    _check_launcher()
    names = _trackers(config)
    return Accelerator(
        cpu=config.device == "cpu"
        or (config.device == "auto" and not any(test() for test in there.values())),
        mixed_precision=_precision(config),
        gradient_accumulation_steps=config.accumulate,
        log_with=names or None,
        project_dir=str(config.output),
    )


def _trackers(config: TrainConfig) -> list[str]:
    """accelerate's trackers by name. Raises :class:`UsageError` for one that it does not know, and for one
    that is not installed."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    if config.trackers == "auto":
        return [name for name in installed if name == "tensorboard"]
    known = [name for name in LoggerType.list() if name != "all"]
    for name in config.trackers:
        if name not in known:
            raise UsageError(f"trackers: there is no '{name}'; accelerate has {', '.join(known)}.")
        if name not in installed:
            raise UsageError(f"trackers: {name} is not installed: pip install {name}.")
    return list(config.trackers)


def start_all(words: Sequence[str]) -> None:
    """Where ``accelerate launch --cpu`` started one process though it was asked for several, start them:
    this process becomes torch's launcher of ``imprompt`` with the arguments ``words``. Else do nothing."""
    count = _asked_for() if _alone() else 1
    if count > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        os.execv(sys.executable, [sys.executable, *launcher, "-m", "imprompt", *words])


def _alone() -> bool:
    """Whether accelerate's launcher started this process alone for several: it starts one on a CPU, and only
    its port shows that there should be more."""
    several = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ
    return several and not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & os.environ.keys()


def _asked_for() -> int:
    """The number of processes in the command line of accelerate's launcher, the parent of this process, or in
    the configuration that it names; 1 if it cannot be read."""
    try:
        words = psutil.Process().parent().cmdline()
        asked = launch_command_parser().parse_args(words[words.index("launch") + 1 :])
        if asked.num_processes is None:
            asked = load_config_from_file(asked.config_file)
    except (psutil.Error, AttributeError, ValueError, OSError):
        return 1
    return int(asked.num_processes) if asked.num_machines in (None, 1) else 1


def _check_launcher() -> None:
    if _alone():
        raise UsageError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; start several with "
            "torchrun --nproc-per-node N -m imprompt train …"
        )


def _precision(config: TrainConfig) -> str | None:
    """accelerate's name of the number format; ``None`` leaves it to accelerate's configuration."""
    on_gpu = config.device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        native = torch.cuda.get_device_capability() >= (8, 0)
    else:
        native = config.device != "mps" and multiplies_bfloat16()
    if config.dtype == "bfloat16" and not native:
        raise UsageError("dtype bfloat16: this device has no bfloat16 arithmetic; use float32 or auto.")
    if config.dtype == "float16" and not on_gpu:
        raise UsageError("dtype float16: gradients of float16 need a GPU; use bfloat16 or float32.")
    if config.dtype == "auto":
        if "ACCELERATE_MIXED_PRECISION" in os.environ:
            return None
        return "bf16" if native else "no"
    return {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[config.dtype]


def frozen_dtype(accelerator: Accelerator) -> str:
    """Name of the number format of the frozen models."""
    return {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision, "float32")


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """Run ``work`` in the main process alone; an error of it is raised in all processes."""
    found, error = None, None
    if accelerator.is_main_process:
        try:
            found = work()
        except ImpromptError as raised:
            error = raised
    if accelerator.num_processes > 1:
        said: list[Any] = [error]
        broadcast_object_list(said)
        error = said[0]
    if error is not None:
        raise error
    return found
