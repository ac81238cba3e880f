"""The weights of an adapter: a projection, keys and values of each attention site, perhaps a LoRA."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from imprompt.adapter.key_value import KeyValue, key_value_of
from imprompt.adapter.lora import FaceLora
from imprompt.adapter.source import PromptSource
from imprompt.checkpoints.checkpoint import Checkpoint, StateDict, write
from imprompt.io import check_path
from imprompt.projections.build import build_projection
from imprompt.projections.modules import ImageProjection
from imprompt.projections.resamplers import TimedResamplerProjection
from imprompt.weights import times_written


class AdapterWeights(PromptSource):
    """Base of :class:`~imprompt.adapter.ipadapter.IPAdapter`: its weights.

    ``projection`` turns an image encoder's features into tokens; ``module`` has all weights under their
    published names; ``checkpoint`` describes them (its tensors are moved to ``module``).
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.projection: ImageProjection = build_projection(
            checkpoint.variant, checkpoint.state["image_proj"]
        )
        variant = checkpoint.variant
        self.timed, self.token_count = variant.timed, self.projection.tokens
        self.after_block = checkpoint.layout.name == "xlabs"
        self.shows_uncond = variant.negative != "none"
        self.beside_text = variant.beside_text
        self.uses_text_projection = variant.uses_text_projection
        normed = checkpoint.layout.name == "instantx-flux"
        self._layers = {n: key_value_of(checkpoint.site(n), normed=normed) for n in checkpoint.layers}
        numbered = nn.ModuleDict({str(n): layer for n, layer in self._layers.items()})
        self.lora: FaceLora | None = FaceLora.among(numbered, checkpoint.lora) if checkpoint.lora else None
        """A FaceID file's additions to the UNet's own attention, with their ``scale``; else ``None``."""
        self.module = nn.ModuleDict({"image_proj": self.projection, "ip_adapter": numbered})
        self.module.requires_grad_(False).eval()
        self.checkpoint = replace(checkpoint, state={"image_proj": {}, "ip_adapter": {}}, lora={})
        self._slots = [
            (part._parameters, name) for part in self.module.modules() for name in part._parameters
        ]

    def state_dict(self) -> StateDict:
        """The weights in the published nested form (the live tensors, not copies)."""
        nested: StateDict = {"image_proj": {}, "ip_adapter": {}}
        for name, tensor in self.module.state_dict().items():
            part, key = name.split(".", 1)
            nested[part][key] = tensor
        return nested

    def save_pretrained(self, folder: str | Path, weight_name: str = "ip-adapter.safetensors") -> Path:
        """Write the published layout into ``folder``; returns the file's path. Raises :class:`ModelError`
        where it cannot be written, :class:`UsageError` for a name that does not end in ``.safetensors``."""
        path = check_path(folder) / weight_name
        with contextlib.suppress(OSError):  # write() says that there is no folder
            path.parent.mkdir(parents=True, exist_ok=True)
        write(replace(self.checkpoint, state=self.state_dict()), path)
        return path

    def tokens_at(self, features: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timed adapters: features ``(N, P, W)`` to tokens ``(N, T, C)``, and the embedded timestep."""
        assert isinstance(self.projection, TimedResamplerProjection)
        return self.projection(features, timestep=timestep), self.projection.embed_time(timestep)

    def has_site(self, index: int) -> bool:
        """Whether it has keys and values for the site with published number ``index``."""
        return index in self._layers

    def key_value(self, index: int) -> KeyValue:
        """The keys and values of the site with published number ``index``."""
        return self._layers[index]

    def parameters(self) -> Iterator[nn.Parameter]:
        """All trainable weights."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All weights with their published flat names."""
        return self.module.named_parameters()

    def _refine(self, dtype: torch.dtype) -> None:
        """Cast what is read often. Keys and values are made once a prompt, unless timed, and their layers,
        most of an adapter, stay as they are stored: they compute in the finer dtype all the same."""
        for part in (self.projection, *self._read_each_step()):
            part.to(dtype=dtype)

    def _read_each_step(self) -> list[nn.Module]:
        """The layers that each step reads; the others are read once a prompt."""
        parts: list[nn.Module] = [self.module] if self.timed else []
        if self.lora is not None:
            parts += [low for layers in self.lora.layers.values() for low in layers.values()]
        return parts

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the projection's weights."""
        return next(self.module.parameters()).dtype

    def versions(self) -> tuple[object, ...]:
        """A value that differs after any weight or the LoRA's scale has changed."""
        found = [
            (id(weight), weight.data_ptr(), times_written(weight))
            for table, name in self._slots
            if (weight := table[name]) is not None
        ]
        return (None if self.lora is None else self.lora.scale, *found)
