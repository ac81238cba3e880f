"""CLIP vision towers: pictures in, features for an adapter out.

transformers' model runs underneath; pictures are prepared here with Pillow and numpy, exactly as its
``CLIPImageProcessor`` does (resize the short side, crop the centre, normalise), so that no torchvision is
needed.

Dimensions: ``N`` pictures, ``P`` patches and class token, ``E`` pooled width, ``W`` width of hidden states.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from imprompt.encoders.images import load_image
from imprompt.errors import InputError, ModelError, first_line
from imprompt.weights import silence_library_logging

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, R, G, B in 0 to 1
_STD = (0.26862954, 0.26130258, 0.27577711)
_CONFIG, _PREPROCESSING = "config.json", "preprocessor_config.json"


@dataclass(frozen=True)
class Features:
    """What an encoder sees in ``N`` pictures; what another program left out has width 0."""

    pooled: Float[Tensor, "N E"]
    """The projected embedding of each picture (``image_embeds``)."""
    hidden: Float[Tensor, "N P W"]
    """All tokens before the last block (``hidden_states[-2]``)."""
    negative_hidden: Float[Tensor, "1 P W"]
    """The same of an all-zero *preprocessed* tensor, which is the mean colour: what plus adapters learned as
    "no picture"."""


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the model's input; the defaults are CLIP's."""

    resize: int | tuple[int, int] | None = 224
    """The short side in pixels, or (height, width); ``None`` leaves the size alone."""
    crop: tuple[int, int] | None = (224, 224)
    """(height, width) cut from the centre; a smaller picture is surrounded with zeros before normalising."""
    resample: Image.Resampling = Image.Resampling.BICUBIC
    rescale: float = 1 / 255
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Preprocessing":
        """Read a ``preprocessor_config.json``. Raises :class:`ModelError` for what is not understood."""
        try:
            return cls(
                resize=_resize(config.get("size", 224)) if config.get("do_resize", True) else None,
                crop=_crop(config.get("crop_size", 224)) if config.get("do_center_crop", True) else None,
                resample=Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)),
                rescale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1,
                mean=_channels(config.get("image_mean") or _MEAN) if config.get("do_normalize", True) else (),
                std=_channels(config.get("image_std") or _STD) if config.get("do_normalize", True) else (),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"the image encoder's {_PREPROCESSING} cannot be used: {error}. size, crop_size, resample, "
                "image_mean and image_std are expected as CLIP has them."
            ) from error

    def __call__(self, image: Image.Image) -> Float[np.ndarray, "3 h w"]:
        """The model's input for one RGB picture, as transformers computes it, to the bit."""
        if self.resize is not None:
            height, width = self._target(image)
            image = image.resize((width, height), self.resample)
        pixels = np.asarray(image)
        if self.crop is not None:
            pixels = _centre(pixels, *self.crop)
        # In double precision first: the order of roundings is the reference's.
        scaled = (pixels.astype(np.float64) * self.rescale).astype(np.float32)
        if self.mean:
            mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
            scaled = ((scaled - mean) / std).astype(np.float32)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1))

    def _target(self, image: Image.Image) -> tuple[int, int]:
        if isinstance(self.resize, tuple):
            return self.resize
        assert self.resize is not None
        short, long = sorted(image.size)
        stretched = int(self.resize * long / short)
        return (stretched, self.resize) if image.width <= image.height else (self.resize, stretched)


class ImageEncoder:
    """A CLIP vision tower with projection, and how its pictures are prepared.

    ``model`` is transformers' ``CLIPVisionModelWithProjection``; ``processor`` its image processor, of which
    only the settings are used, or ``None`` for CLIP's own at the model's size. A pipeline's objects will do:
    ``ImageEncoder(pipe.image_encoder, pipe.feature_extractor)``. The weights must not change while in use.
    """

    def __init__(self, model: Any, processor: Any = None, *, name: str | None = None) -> None:
        config = getattr(model.config, "vision_config", model.config)
        self.model = model
        self.pooled_width = int(config.projection_dim)
        self.hidden_width = int(config.hidden_size)
        self.size = int(config.image_size)
        """Side of the square input in pixels."""
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.preprocessing = _preprocessing(processor, self.size)
        self._negative: tuple[tuple[torch.device, torch.dtype], Tensor] | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "ImageEncoder":
        """Load a local folder, a hub repository, or ``repository:subfolder``.

        Without a ``preprocessor_config.json`` with the weights, or in a ``feature_extractor`` beside their
        folder, pictures are prepared as CLIP's are. ``torch_dtype`` ``None`` keeps the stored number format.
        Raises :class:`ModelError` when it is not there, incomplete, or no CLIP vision tower with projection.
        """
        from safetensors import SafetensorError
        from transformers import CLIPVisionModelWithProjection

        source = str(source)
        if subfolder is None and not Path(source).exists() and ":" in source:
            source, _, subfolder = source.partition(":")
        name = f"{source}:{subfolder}" if subfolder else source
        if Path(source).exists() and not Path(source, subfolder or "", _CONFIG).is_file():
            raise ModelError(f"no image encoder at '{name}': there is no {_CONFIG}.")
        try:
            with silence_library_logging():
                loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
                    source,
                    subfolder=subfolder or "",
                    dtype=torch_dtype or "auto",
                    output_loading_info=True,
                    use_safetensors=True,
                )
            model, info = loaded
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = first_line(error)
            raise ModelError(f"image encoder '{name}' cannot be loaded: {reason}") from error
        absent = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
        if absent:
            raise ModelError(
                f"'{name}' is no whole CLIP vision tower with projection: {len(absent)} weights are missing, "
                f"such as '{absent[0]}'."
            )
        settings = _settings(source, subfolder)
        encoder = cls(model.requires_grad_(False).eval(), settings, name=name)
        return encoder if device is None else encoder.to(device, None)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "ImageEncoder":
        """Move or cast the model; ``None`` leaves it as it is."""
        if device is not None or dtype is not None:
            self.model.to(device=device, dtype=dtype)
            self._negative = None
        return self

    def encode(self, images: Sequence[Image.Image]) -> Features:
        """Features of pictures of any size, in the model's number format, without gradients.

        Raises :class:`InputError` for no picture at all, :class:`ModelError` when the processor makes them
        another size than the model takes.
        """
        if not images:
            raise InputError("no picture to encode; give at least one.")
        prepared = torch.from_numpy(np.stack([self.preprocessing(_rgb(image)) for image in images]))
        if prepared.shape[1:] != (3, self.size, self.size):
            height, width = prepared.shape[2:]
            raise ModelError(
                f"image encoder '{self.name}' takes pictures of {self.size}×{self.size}, its processor makes "
                f"{width}×{height}. Use the processor it was published with."
            )
        pooled, hidden = self._run(prepared)
        return Features(pooled=pooled, hidden=hidden, negative_hidden=self._negative_hidden())

    @torch.no_grad()
    def _run(self, prepared: Float[Tensor, "N 3 S S"]) -> tuple[Tensor, Tensor]:
        device, dtype = self._place()
        seen = self.model(prepared.to(device, dtype), output_hidden_states=True)
        return seen.image_embeds, seen.hidden_states[-2]

    def _negative_hidden(self) -> Tensor:
        if self._negative is None or self._negative[0] != self._place():
            _, hidden = self._run(torch.zeros(1, 3, self.size, self.size))
            self._negative = (self._place(), hidden)
        return self._negative[1]

    def _place(self) -> tuple[torch.device, torch.dtype]:
        weight = next(self.model.parameters())
        # Weights that wait on meta belong to an offloading hook, which moves its inputs itself.
        return torch.device("cpu") if weight.is_meta else weight.device, weight.dtype


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else load_image(image)


def _preprocessing(processor: Any, size: int) -> Preprocessing:
    if processor is None:
        return Preprocessing(resize=size, crop=(size, size))
    return Preprocessing.from_config(processor if isinstance(processor, Mapping) else processor.to_dict())


def _settings(source: str, subfolder: str | None) -> dict[str, Any] | None:
    """The processor's settings, ``None`` where none are published."""
    if Path(source).exists():
        folder = Path(source, subfolder or "").resolve()
        places = (folder / _PREPROCESSING, folder.parent / "feature_extractor" / _PREPROCESSING)
        path = next((place for place in places if place.is_file()), None)
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(source, _PREPROCESSING, subfolder=subfolder))
        except EntryNotFoundError:  # most published encoders have none
            path = None
    if path is None:
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"'{path}' holds no settings.")
    return settings


def _resize(size: Any) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    if size.get("shortest_edge"):
        if size.get("longest_edge"):
            raise ValueError(f"size {size} with a longest edge is not supported")
        return int(size["shortest_edge"])
    return int(size["height"]), int(size["width"])


def _crop(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _channels(values: Any) -> tuple[float, ...]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre of a picture, surrounded with zeros where it is smaller."""
    if pixels.shape[0] < height or pixels.shape[1] < width:
        # Of an odd difference the larger part goes first, as in the reference.
        up, left = (
            max(want - have + 1, 0) // 2 for want, have in zip((height, width), pixels.shape, strict=False)
        )
        padded = np.zeros((max(height, pixels.shape[0]), max(width, pixels.shape[1]), 3), pixels.dtype)
        padded[up : up + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        pixels = padded
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
