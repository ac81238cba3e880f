"""Image encoders: pictures to features for an adapter.

The models are transformers' CLIP vision towers with projection, and SigLIP. Pictures are prepared by its
Pillow processors, so that results do not depend on torchvision.

Dimensions: ``N`` pictures, ``P`` tokens (patches, and CLIP's class token), ``E`` pooled width, ``W`` width of
hidden states, ``S`` side of the model's input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from imprompt.catalog import encoders
from imprompt.catalog.resolve import Source, resolve
from imprompt.encoders.images import load_image
from imprompt.errors import InputError, ModelError, first_line
from imprompt.io import fingerprint
from imprompt.weights import copied_to, silence_library_logging

_PREPROCESSING = "preprocessor_config.json"
_LONGEST = 16_384  # pixels that a picture's long side may be scaled to before its centre is cut out


@dataclass(frozen=True)
class Features:
    """The output of an encoder for ``N`` pictures; a part that another program left out has width 0."""

    pooled: Float[Tensor, "N E"]
    """The projected embedding of each picture (``image_embeds``); of SigLIP ``pooler_output``."""
    hidden: Float[Tensor, "N P W"]
    """All tokens before the last block (``hidden_states[-2]``)."""
    negative_hidden: Float[Tensor, "1 P W"]
    """The hidden states of an all-zero *preprocessed* tensor, with which plus adapters were trained as "no
    picture". For SigLIP zeros, as its adapters were trained."""
    last: Float[Tensor, "N P W"] | None = None
    """The last hidden state, of SigLIP only (FLUX Redux reads it)."""


class ImageEncoder:
    """An image encoder and the processor that prepares its pictures.

    ``model`` is transformers' ``CLIPVisionModelWithProjection`` or ``SiglipVisionModel``; ``processor`` its
    image processor, of which only the settings are used, or ``None`` for the default one at the model's size.
    Those of a pipeline can be used: ``ImageEncoder(pipe.image_encoder, pipe.feature_extractor)``. The weights
    must not change while in use. Raises :class:`ModelError` for settings that transformers does not accept.
    """

    def __init__(self, model: Any, processor: Any = None, *, name: str | None = None) -> None:
        config = getattr(model.config, "vision_config", model.config)
        self.model = model
        self.is_siglip = "siglip" in str(getattr(config, "model_type", ""))
        """Whether it is SigLIP, which has no projection: pooled features are as wide as hidden states."""
        self.hidden_width = int(config.hidden_size)
        self.pooled_width = self.hidden_width if self.is_siglip else int(config.projection_dim)
        self.size = int(config.image_size)
        """Side of the square input in pixels."""
        self.files: tuple[Path, ...] = ()
        """The weights' files, where they were loaded from files."""
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.processor = _processor(processor, self.size, is_siglip=self.is_siglip)
        self.execution_device: torch.device | None = None
        """Where it computes, with copies of its weights; ``None``: where they are."""
        self._negative: tuple[tuple[torch.device, torch.dtype], Tensor] | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Source,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "ImageEncoder":
        """Load an encoder: an alias, a local folder, or ``owner/name[/folder]`` of the hub.

        Without a ``preprocessor_config.json`` with the weights, or in a ``feature_extractor`` beside their
        folder, pictures are prepared as CLIP's (SigLIP's) are. ``torch_dtype`` ``None`` keeps the stored
        dtype. Only safetensors are read. Raises :class:`ModelError` when it is missing, incomplete, or
        neither a CLIP vision tower with projection nor SigLIP.
        """
        name = f"{source}:{subfolder}" if subfolder else str(source)
        others = "a folder or a hub id (owner/name/folder)"
        place = source if isinstance(source, Source) else resolve(name, "image encoder", encoders(), others)
        config = place.config()
        if not config:
            raise ModelError(f"no image encoder at '{name}': there is no config.json.")
        try:
            model, info = _load(place, config, torch_dtype)
        except Exception as error:  # transformers raises nearly anything on damaged or absent files
            raise replace(place, name=name, kind="image encoder").not_loaded(error) from error
        absent = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
        if absent:
            raise ModelError(
                f"'{name}' is not a complete CLIP vision tower with projection: {len(absent)} weights are "
                f"missing, such as '{absent[0]}'."
            )
        encoder = cls(model.requires_grad_(False).eval(), _settings(place), name=name)
        encoder.files = place.weights
        return encoder if device is None else encoder.to(device, None)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "ImageEncoder":
        """Move or cast the model; ``None`` leaves it as it is. Where it is moved to, it computes."""
        if device is not None:
            self.execution_device = None
        if device is not None or dtype is not None:
            self.model.to(device=device, dtype=dtype)
            self._negative = None
        return self

    @property
    def about(self) -> dict[str, object] | None:
        """Everything that features depend on, besides the pictures and their framing; ``None`` where that is
        not known, because the weights were not loaded from files."""
        if not self.files:
            return None
        device, dtype = self._device_and_dtype()
        return {
            "weights": fingerprint(*self.files),
            "preparation": self.processor.to_dict(),
            "device": (self.execution_device or device).type,
            "dtype": str(dtype),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
        }

    @property
    def preparation(self) -> str:
        """The processor's settings, as a key."""
        return repr(sorted(self.processor.to_dict().items()))

    def prepare(self, images: Sequence[Image.Image]) -> Float[Tensor, "N 3 S S"]:
        """The model's input for pictures of any size.

        Raises :class:`InputError` for no picture at all, :class:`ModelError` when the processor makes them
        another size than the model takes.
        """
        if not images:
            raise InputError("no picture to encode; give at least one.")
        bounded = [_bounded(_rgb(image), self.size) for image in images]
        prepared = torch.from_numpy(np.stack(self.processor(bounded).pixel_values))
        if prepared.shape[1:] != (3, self.size, self.size):
            height, width = prepared.shape[2:]
            raise ModelError(
                f"image encoder '{self.name}' takes pictures of {self.size}×{self.size}, its processor makes "
                f"{width}×{height}. Use the processor it was published with."
            )
        return prepared

    def encode(self, images: Sequence[Image.Image]) -> Features:
        """Features of pictures of any size, in the model's dtype, without gradients. Raises as
        :meth:`prepare`."""
        pooled, hidden, last = self._run(self.prepare(images))
        return Features(pooled, hidden, self._negative_hidden(hidden), last if self.is_siglip else None)

    @torch.no_grad()
    def _run(self, prepared: Float[Tensor, "N 3 S S"]) -> tuple[Tensor, Tensor, Tensor]:
        device, dtype = self._device_and_dtype()
        with copied_to(self.model, self.execution_device):
            shown = prepared.to(self.execution_device or device, dtype)
            output = self.model(shown, output_hidden_states=True)
        pooled = output.pooler_output if self.is_siglip else output.image_embeds
        return pooled.to(device), output.hidden_states[-2].to(device), output.last_hidden_state.to(device)

    def _negative_hidden(self, hidden: Tensor) -> Tensor:
        if self.is_siglip:
            return torch.zeros_like(hidden[:1])
        if self._negative is None or self._negative[0] != self._device_and_dtype():
            _, negative, _ = self._run(torch.zeros(1, 3, self.size, self.size))
            self._negative = (self._device_and_dtype(), negative)
        return self._negative[1]

    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        weight = next(self.model.parameters())
        # Weights that wait on meta belong to an offloading hook, which moves its inputs itself.
        return torch.device("cpu") if weight.is_meta else weight.device, weight.dtype


@cache  # each is read from a file
def _versions() -> list[str]:
    """Those of the libraries on which features depend."""
    return [version(name) for name in ("torch", "transformers", "pillow", "numpy")]


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else load_image(image)


def _bounded(image: Image.Image, size: int) -> Image.Image:
    """Crop a very long picture to its middle. The processor would scale all of it, perhaps to gigabytes, and
    then crop the same middle."""
    short, long = sorted(image.size)
    keep = max(short, _LONGEST * short // size)
    if long <= keep:
        return image
    left, top = (max(0, (side - keep) // 2) for side in image.size)
    return image.crop((left, top, left + min(image.width, keep), top + min(image.height, keep)))


def _load(place: Source, config: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    """(model, loading info). Errors of transformers are not caught."""
    import transformers

    siglip = "siglip" in str(config.get("model_type"))
    kind = transformers.SiglipVisionModel if siglip else transformers.CLIPVisionModelWithProjection
    with silence_library_logging():
        return kind.from_pretrained(
            place.folder,
            subfolder=place.inside,
            dtype=dtype or "auto",
            output_loading_info=True,
            use_safetensors=True,
        )


def _processor(given: Any, size: int, *, is_siglip: bool) -> Any:
    """transformers' Pillow processor with the settings of ``given``."""
    import transformers

    name = "SiglipImageProcessor" if is_siglip else "CLIPImageProcessor"
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)  # before transformers 5
    if given is None:
        square = {"height": size, "width": size}
        settings = {"size": square} if is_siglip else {"size": {"shortest_edge": size}, "crop_size": square}
    else:
        settings = dict(given if isinstance(given, Mapping) else given.to_dict())
    try:
        processor = kind.from_dict(settings)
        processor([Image.new("RGB", (2, 2))])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"the image encoder's {_PREPROCESSING} cannot be used: {first_line(error)}."
        ) from error
    return processor


def _settings(place: Source) -> Mapping[str, Any] | None:
    """The published settings of the processor, if any."""
    if place.path is None:
        try:
            place.file(_PREPROCESSING)
        except ModelError:  # most published encoders have none
            return None
        return place.config(_PREPROCESSING)
    beside = Source(place.name, place.path.resolve().parent / "feature_extractor")
    return place.config(_PREPROCESSING) or beside.config(_PREPROCESSING) or None
