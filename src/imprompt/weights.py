"""Weight files: the one door through which tensors come in from ``.safetensors``, and out to it.

:mod:`imprompt.tensorfile` checks a file before a tensor is read. Small files (adapters, features, embeddings)
are copied into own memory, so that they may change on the disk while in use. Pickles are read by
:func:`load_pickle` alone, as data.
"""

import contextlib
import ctypes
import importlib
import pickle
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from imprompt.errors import ImpromptError, InputError, ModelError, first_line
from imprompt.io import write_atomic
from imprompt.tensorfile import DTYPES, EXPONENTS, PIECE, file_size, open_tensors

_COPYING = threading.Lock()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors`` file, in own memory. Raises as
    :func:`~imprompt.tensorfile.read_header` does."""
    with open_tensors(path) as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  # no mapping


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickled ``.bin``, ``.pt`` or ``.ckpt``, flat, with dots between nested keys.

    Raises :class:`ModelError` as :func:`unpickle` does, and for what holds anything but tensors.
    """
    content = unpickle(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ModelError(f"'{path}' holds a {type(content).__name__}; a table of tensors was expected.")
    return flatten(content, f"'{path}'")


def unpickle(path: Path) -> object:
    """What torch pickled into a file: data only (``weights_only``), never code.

    Raises :class:`ModelError` for what needs more than that, and for what is damaged.
    """
    file_size(path)
    with path.open("rb") as file:
        start = file.read(64)
    if not start.startswith((b"PK", b"\x80")):
        raise ModelError(f"'{path}' is not a torch pickle; convert reads .bin, .pt and .ckpt files.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"'{path}' holds more than tensors, or is damaged; nothing in it was run. Get the adapter "
            "from its author as .safetensors."
        ) from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"'{path}' is damaged or truncated: {_reason(error)} Get it again.") from error


def flatten(nested: Mapping[str, object], what: str) -> dict[str, Tensor]:
    """Nested tables of tensors as one, dots between the keys.

    Raises :class:`ModelError` for anything but tensors, and for tables that contain themselves.
    """
    flat: dict[str, Tensor] = {}
    for key, value in _leaves(nested, "", what, ()):
        if not isinstance(value, torch.Tensor):
            raise ModelError(f"{what} has a {type(value).__name__} at '{key}'; only tensors are expected.")
        if value.layout is not torch.strided or value.is_quantized:
            raise ModelError(f"{what} has a sparse or quantised tensor at '{key}'; a plain one is expected.")
        if key in flat:
            raise ModelError(f"{what} has '{key}' twice.")
        flat[key] = value
    return flat


def save_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
    *,
    error: type[ImpromptError] = ModelError,
) -> None:
    """Write a ``.safetensors`` file whole or not at all, in place of what is there (:mod:`imprompt.places`
    tells what may be replaced). Raises ``error`` when it cannot be written."""
    if not path.parent.is_dir():
        raise error(f"'{path}' cannot be written: there is no folder '{path.parent}'.")
    seen: set[int] = set()
    plain = {}
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:  # the format has no shared memory
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[key] = tensor
    try:
        write_atomic(path, save(plain, dict(metadata)), overwrite=True)
    except (SafetensorError, InputError) as wrong:
        raise error(f"'{path}' cannot be written: {_reason(wrong)}") from wrong


def not_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds NaN or infinity.

    Looks at the bits, in pieces that fit a processor's cache: many times faster than ``isfinite`` on the CPU.
    """
    if tensor.is_meta:
        return False
    dtype = dtype_name(tensor.dtype)
    if tensor.device.type != "cpu" or dtype not in EXPONENTS:
        return not bool(torch.isfinite(tensor).all())
    width, infinity = EXPONENTS[dtype]
    integer, without_sign = getattr(torch, f"int{8 * width}"), (1 << (8 * width - 1)) - 1
    bits = tensor.detach().contiguous().view(integer).flatten()
    piece = torch.empty(min(PIECE // width, bits.numel()), dtype=integer)
    return any(
        int(torch.bitwise_and(some, without_sign, out=piece[: some.numel()]).max()) >= infinity
        for some in (bits.split(PIECE // width) if bits.numel() else ())
    )


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a floating-point dtype, torch's of any other."""
    name = str(dtype).removeprefix("torch.")
    return DTYPES.get(name, name)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; to a GPU it is copied from pinned memory, so that nothing waits for it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def times_written(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place; ``None`` where torch does not count, in inference mode."""
    return None if tensor.is_inference() else tensor._version


def give_back_memory() -> None:
    """Return freed memory to the system and to other programs on a GPU; glibc and torch keep it else."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def in_float32(model: Any, *, when: bool = True) -> Iterator[None]:
    """While open, a model of diffusers' is in float32, if ``when``; one that already is stays untouched."""
    before = model.dtype
    if not when or before == torch.float32:
        yield
        return
    with silence_library_logging():  # diffusers warns of each cast
        model.to(torch.float32)
    try:
        yield
    finally:
        with silence_library_logging():
            model.to(before)


@contextlib.contextmanager
def copied_to(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """While open, the weights of ``model`` are copies on ``device``; ``None``: they stay where they are.

    Other threads wait for their turn, for two copies of one model would be given up in the wrong order.
    Raises PyTorch's :class:`RuntimeError` for a device that is not there or has no room.
    """
    if device is None:
        yield
        return
    tables: list[dict[str, Any]] = [
        table for part in model.modules() for table in (part._parameters, part._buffers)
    ]
    with _COPYING:
        waiting = [dict(table) for table in tables]
        try:
            for table in tables:
                for name, weight in table.items():
                    if weight is not None:
                        copy = weight.detach().to(device)
                        table[name] = nn.Parameter(copy, False) if isinstance(weight, nn.Parameter) else copy
            yield
        finally:
            for table, before in zip(tables, waiting, strict=True):
                table.update(before)


@contextlib.contextmanager
def silence_library_logging() -> Iterator[None]:
    """While open, diffusers and transformers say nothing about loading.

    Their log levels and progress bars, and the filters of warnings, are afterwards as the user had them.
    """
    import transformers.utils.logging

    libraries: list[Any] = [transformers.utils.logging]
    if "diffusers" in sys.modules:  # not imported for this alone
        libraries.append(importlib.import_module("diffusers.utils.logging"))
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*is deprecated.*")
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")
            # of its own use of its own classes (FluxPosEmbed in FLUX's ControlNet)
            warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
            for library in libraries:
                library.set_verbosity_error()
                library.disable_progress_bar()
            yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


# ---- private


def _leaves(
    nested: Mapping[Any, object], prefix: str, what: str, above: tuple[int, ...]
) -> Iterator[tuple[str, object]]:
    if id(nested) in above or len(above) > 16:
        raise ModelError(f"{what} contains itself, or is nested too deeply, at '{prefix}'.")
    for key, value in nested.items():
        if not isinstance(key, str):
            raise ModelError(f"{what} has the key {key!r}; keys are text.")
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.", what, (*above, id(nested)))
        else:
            yield prefix + key, value


def _reason(error: BaseException) -> str:
    return first_line(error).rstrip(".") + "."
