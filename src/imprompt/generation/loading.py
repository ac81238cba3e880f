"""Loaded models: one base with its pipelines, controls and motion adapter, and the adapters in use.

:class:`Models` keeps what the last request used, so that the next one starts at once, and releases what
belongs to another base, device, number format or set of LoRAs.
"""

import gc
import platform
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from imprompt.adapter.encoding import FeatureCache
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.store import FeatureStore
from imprompt.errors import UsageError, first_line
from imprompt.generation import video
from imprompt.generation.compiling import check_compiler, compile_denoiser
from imprompt.generation.control import Control, check_fits, controlled, load_net
from imprompt.generation.extras import add_embeddings, add_loras
from imprompt.generation.families import Base
from imprompt.generation.identity import face_adapter
from imprompt.generation.pipelines import for_task, load
from imprompt.generation.text import TextStates
from imprompt.generation.video import Motion
from imprompt.packed import pack
from imprompt.schema.request import Request, Task
from imprompt.weights import give_back_memory

LOADING = threading.RLock()
"""Held while weights are loaded: the libraries change torch's modules for all threads meanwhile."""
_PACKED = ("unet", "transformer", "controlnet", "vae")
"""Parts of a pipeline that take nearly all of its time."""


@dataclass(frozen=True)
class Loaded:
    """The models of one request."""

    pipe: Any
    """diffusers' pipeline of the task, on its device."""
    adapters: dict[str, IPAdapter]
    """By the names of the request, in order of first use."""
    device: torch.device
    dtype: torch.dtype
    texts: TextStates
    """States of the base's last texts."""


class Models:
    """Keeps one base, its controls, one motion adapter, and the adapters of the last request."""

    def __init__(self) -> None:
        self.features = FeatureCache(store=FeatureStore.of_user())
        """Shared by all adapters."""
        self.texts = TextStates()
        self._key: tuple[str, ...] | None = None
        self._pipes: dict[str, Any] = {}
        self._nets: dict[str, Any] = {}
        self._moving: tuple[str, Any] | None = None
        """The last motion adapter's name and its pipeline."""
        self._adapters: dict[tuple[str, str | None], IPAdapter] = {}
        """By name and, of those that read faces, the face model."""

    @property
    def names(self) -> tuple[str, ...]:
        """The base's source and the adapters' names, of what is loaded."""
        base = self._key[:1] if self._key is not None and (self._pipes or self._moving) else ()
        return (*base, *(name for name, _ in self._adapters))

    def release(self) -> None:
        """Forget all models and features, and give their memory back."""
        held = bool(self._pipes or self._moving or self._adapters)
        self._pipes, self._nets, self._key, self._adapters, self._moving = {}, {}, None, {}, None
        self.features.clear()
        self.texts.clear()
        if held:
            _give_back()

    def load(
        self,
        request: Request,
        base: Base,
        controls: Sequence[Control],
        motion: Motion | None,
        adapters: Sequence[str],
    ) -> Loaded:
        """The models that a complete request needs; ``adapters`` are those of its image prompts.

        Raises :class:`ModelError` for what is missing, damaged or does not fit together, :class:`UsageError`
        for a device that is not there and for options without effect.
        """
        device = choose_device(request.device)
        dtype = choose_dtype(request.dtype, device, base)
        if request.offload != "none" and device.type == "cpu":
            raise UsageError(
                f"offload: '{request.offload}' moves parts to a GPU when needed, but the device is the CPU."
            )
        extras = (request.quantize, repr(request.loras), repr(request.embeddings), request.compile)
        if request.compile != "off":
            check_compiler(device)
        key = (base.source, str(device), str(dtype), request.offload, *extras)
        with LOADING:
            if self._key != key:
                self.release()
                self._key = key
            # The adapters first: they are small, and a fault in them is said before gigabytes are read.
            found = self._load_adapters(adapters, request.face_model)
            for adapter in found.values() if request.offload != "none" else ():
                if adapter.execution_device is None:
                    adapter.enable_cpu_offload(device)
            if face_adapter(controls, found) is None:
                _check_face_model(request, found)
            pipe = self._pipe(base, request, motion, device, dtype)
            if controls:
                pipe = self._with_controls(pipe, base, controls, request, device, dtype)
        return Loaded(pipe, found, device, dtype, self.texts)

    def _pipe(
        self, base: Base, request: Request, motion: Motion | None, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """The pipeline of the request's task; other tasks of the same base share its weights."""
        if motion is not None:
            return self._clip_pipe(base, request, motion, device, dtype)
        if request.task not in self._pipes:
            first = not self._pipes
            pipe = self._still(base, request, request.task, dtype)
            if first:
                add_loras(pipe, request.loras)
                compile_denoiser(getattr(pipe, base.kind.denoiser), request.compile)
            self._pipes[request.task] = _placed(pipe, request, device)
        return self._pipes[request.task]

    def _still(self, base: Base, request: Request, task: Task, dtype: torch.dtype) -> Any:
        """The pipeline of a task for stills, around the weights that are loaded, else around new ones."""
        if self._pipes:
            return for_task(next(iter(self._pipes.values())), base, task)
        pipe = load(base, task, dtype, request.quantize)
        add_embeddings(pipe, request.embeddings)
        return pipe

    def _clip_pipe(
        self, base: Base, request: Request, motion: Motion, device: torch.device, dtype: torch.dtype
    ) -> Any:
        if self._moving is None or self._moving[0] != motion.name:
            self._moving = None
            if request.loras and self._pipes:  # a UNet with LoRAs cannot be made to move
                self._pipes = {}
                _give_back()
            still = self._still(base, request, "generate", dtype)
            made = video.motion_pipeline(still, motion, base, dtype)
            add_loras(made, request.loras)
            compile_denoiser(made.unet, request.compile)
            self._moving = (motion.name, _placed(made, request, device))
        pipe = self._moving[1]
        return pipe if request.video is None else _placed(video.video_pipeline(pipe, base), request, device)

    def _with_controls(
        self, pipe: Any, base: Base, controls: Sequence[Control], request: Request, device: torch.device,
        dtype: torch.dtype,
    ) -> Any:  # fmt: skip
        """The pipeline with controls; only the last ones' weights are kept."""
        for control in controls:
            check_fits(control, getattr(pipe, base.kind.denoiser).config, base)
        sources = [control.source for control in controls]
        key = " ".join([request.task, *sources])
        if key not in self._pipes:
            self._pipes = {name: pipe for name, pipe in self._pipes.items() if " " not in name}
            self._nets = {source: net for source, net in self._nets.items() if source in sources}
            for control in controls:
                if control.source not in self._nets:
                    self._nets[control.source] = load_net(control, dtype)
            made = _placed(controlled(pipe, request.task, controls, self._nets), request, device)
            if request.task == "animate":  # a shell around the moving UNet, which `_moving` keeps
                return made
            self._pipes[key] = made
        return self._pipes[key]

    def _load_adapters(self, names: Sequence[str], face_model: str | None) -> dict[str, IPAdapter]:
        kept = {key: adapter for key, adapter in self._adapters.items() if key[0] in names}
        replaced = len(kept) < len(self._adapters)
        self._adapters, found = {}, {}
        if replaced:
            give_back_memory()
        for name in names:
            of_faces, of_pictures = (name, face_model or ""), (name, None)
            adapter = kept.get(of_pictures) or kept.get(of_faces) or _load_adapter(name, face_model)
            adapter.prompt_encoder.cache = self.features
            self._adapters[of_faces if reads_faces(adapter) else of_pictures] = adapter
            found[name] = adapter
        return found


def _give_back() -> None:
    """Give back the memory of pipelines, which refer to themselves."""
    gc.collect()
    give_back_memory()


def _check_face_model(request: Request, adapters: Mapping[str, IPAdapter]) -> None:
    if request.face_model is not None and not any(map(reads_faces, adapters.values())):
        raise UsageError("face_model: has no effect on adapters that read whole pictures; leave it out.")


def reads_faces(adapter: IPAdapter) -> bool:
    """Whether it reads a face in the picture rather than the whole picture."""
    return adapter.projection.variant.reads_faces


def _load_adapter(name: str, face_model: str | None) -> IPAdapter:
    """The adapter; a face adapter with the named face model, or with its own if that is on this machine."""
    adapter = IPAdapter.from_pretrained(name)
    if reads_faces(adapter):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the face models")  # it is among the result's notes
            if face_model is not None:
                adapter.face_embedder = face_model
            else:
                _ = adapter.face_embedder  # looks where InsightFace keeps them; saved faces need none
    return adapter


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU if there is one. Raises :class:`UsageError`."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UsageError(f"device: '{name}' cannot be used here ({reason}); leave it out.") from error
    return device


def choose_dtype(name: str, device: torch.device, base: Base) -> torch.dtype:
    """The number format of that name; ``auto`` is float32 on the CPU, else float16, or bfloat16 for a
    transformer: their weights are published in it, and their activations can exceed float16's range."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if base.kind.denoiser == "transformer" and has_bfloat16 else torch.float16


def multiplies_bfloat16() -> bool:
    """Whether an x86 processor has instructions for bfloat16 (AVX-512 BF16 or AMX)."""
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in tests)


def format_notes(device: torch.device, dtype: torch.dtype) -> list[str]:
    """A note where the processor only imitates the number format: measured, a step of the bundled UNet took
    12 times as long in bfloat16 as in float32 on an AVX2 machine."""
    if device.type != "cpu" or dtype != torch.bfloat16 or platform.machine() not in ("x86_64", "AMD64"):
        return []
    if multiplies_bfloat16():
        return []
    return ["dtype: this processor has no bfloat16 arithmetic and imitates it; float32 is much faster here"]


def _placed(pipe: Any, request: Request, device: torch.device) -> Any:
    """The pipeline on its device, whole or part by part as it is needed."""
    offload = request.offload
    if offload in ("none", "adapter"):
        if device.type != "cpu":  # where it was read to, and `to` walks through all modules
            pipe = pipe.to(device)
        elif request.compile == "off":  # torch.compile orders weights itself
            for name in _PACKED:
                if isinstance(part := getattr(pipe, name, None), nn.Module):
                    pack(part)
        return pipe
    (pipe.enable_model_cpu_offload if offload == "model" else pipe.enable_sequential_cpu_offload)(
        device=device
    )
    return pipe
