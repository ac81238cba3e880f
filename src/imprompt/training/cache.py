"""What the frozen models compute: latents, text states and image features of the whole set.

The reference scripts spend half of their time on encoding picture, caption and reference again in every
step. Here each is encoded once and stored under a hash of its content, in a folder named after the encoder's
weights, their number format and the settings: adding a picture encodes that picture alone, and another run on
the same data finds the rest. Without a cache folder, pictures are encoded at every step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from imprompt.data.rows import Rejected
from imprompt.errors import InputError
from imprompt.training.config import TrainConfig
from imprompt.training.data import augment
from imprompt.training.pictures import Pictures, neighbours, to_tensor
from imprompt.training.tables import (
    ENCODE_BATCH,
    Encode,
    Item,
    LiveTable,
    Ranks,
    Table,
    chunks,
    complete,
    remove_unused,
)
from imprompt.weights import silence_library_logging

PIXELS = 1024 * 1024  # of one pass of the VAE, whose activations are by far larger than its weights
UNUSED_DAYS = 30
"""Age at which files in a cache folder that runs share are removed, if no run used them."""


@dataclass(frozen=True)
class EncodedSet:
    """The whole set, encoded. ``negative`` stands for a dropped image: by feature, ``1 E`` or ``1 P W``, in
    the order in which the projection takes them."""

    latents: Table
    features: Table
    negative: dict[str, Tensor]
    texts: Table
    caption_index: dict[str, int]
    rejected: list[Rejected]

    def text(self, name: str, captions: Sequence[str]) -> Tensor:
        """Text-encoder output ``name`` (``states`` or ``pooled``) of captions."""
        return self.texts.rows(name, [self.caption_index[caption] for caption in captions])


def fingerprint(*modules: nn.Module) -> str:
    """A hash of modules' weights, their names and number formats: another encoder is never taken for this
    one."""
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def encode_latents(
    pictures: Pictures, vae: Any, config: TrainConfig, device: torch.device, ranks: Ranks | None = None
) -> Table:
    """Of each row's target the scaled posterior's ``mean`` and ``std`` (each ``N V 4 h w``, ``V`` 2 where
    targets may be mirrored), and ``crop`` (``N 6``: SDXL's original size, crop corner and target size, height
    first)."""
    flips = 2 if config.flip else 1
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0

    def encode(picked: Sequence[int]) -> list[Item]:
        items: list[Any] = pictures.decode(picked)
        good = [place for place, one in enumerate(items) if not isinstance(one, str)]
        for run in neighbours([items[at].target.size for at in good], ENCODE_BATCH, PIXELS // flips):
            places = [good[at] for at in run]
            pixels = torch.stack([to_tensor(items[at].target) for at in places]) * 2 - 1
            both = torch.stack([pixels, pixels.flip(-1)][:flips], 1).flatten(0, 1)
            posterior = vae.encode(both.to(device, next(vae.parameters()).dtype)).latent_dist
            parts = ((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)
            for at, mean, std in zip(
                places, *(part.cpu().unflatten(0, (-1, flips)) for part in parts), strict=True
            ):
                crop = torch.tensor(items[at].crop, dtype=torch.float32)
                items[at] = {"mean": mean, "std": std, "crop": crop}
        return items

    settings = f"{fingerprint(vae)} {flips} {scale} {shift}"
    return _of_pictures(config, "latents", settings, encode, pictures, ranks)


class FeatureEncoder(Protocol):
    """Turns pictures into features for an adapter."""

    identity: str
    """A hash of the weights that do it."""
    feature: tuple[str, ...]

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Each feature of ``N`` pictures. Raises :class:`InputError` for a picture that has none."""

    def negative(self) -> dict[str, Tensor]:
        """The features for no picture, one row of each."""


class ClipFeatures:
    """``pooled`` or ``hidden`` of an :class:`imprompt.encoders.clip.ImageEncoder`."""

    def __init__(self, encoder: Any, feature: str) -> None:
        self.encoder = encoder
        self.feature: tuple[str, ...] = (feature,)
        self.identity = fingerprint(encoder.model)

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """See :class:`FeatureEncoder`."""
        return {self.feature[0]: getattr(self.encoder.encode(list(images)), self.feature[0]).float().cpu()}

    def negative(self) -> dict[str, Tensor]:
        """Zeros for pooled features; for hidden states what the encoder makes of a zero preprocessed
        tensor."""
        found = self.encoder.encode([Image.new("RGB", (8, 8))])
        if self.feature[0] == "pooled":
            return {"pooled": torch.zeros_like(found.pooled).float().cpu()}
        return {"hidden": found.negative_hidden.float().cpu()}


def encode_features(
    pictures: Pictures, encoder: FeatureEncoder, config: TrainConfig, ranks: Ranks | None = None
) -> Table:
    """Image features of each row in ``config.views`` versions, ``N K …``; where targets may be mirrored,
    those of the same versions mirrored stand behind them."""

    def versions(index: int, reference: Image.Image) -> list[Image.Image]:
        seeds = [f"{config.seed}/{pictures.keys[index]}/{view}" for view in range(config.views)]
        made = [reference, *(augment(reference, config.augmentation, seed) for seed in seeds[1:])]
        return [*made, *map(ImageOps.mirror, made)] if config.flip else made

    def encode(picked: Sequence[int]) -> list[Item]:
        distinct = list(dict.fromkeys(picked))
        decoded = dict(zip(distinct, pictures.decode(distinct), strict=True))
        items: dict[int, Item] = {i: one for i, one in decoded.items() if isinstance(one, str)}
        shown = {i: versions(i, one.reference) for i, one in decoded.items() if not isinstance(one, str)}
        items |= zip(shown, _encoded(encoder, list(shown.values())), strict=True)
        return [items[index] for index in picked]

    settings = f"{encoder.identity} {encoder.feature} {config.views}"
    if config.flip:
        settings += " mirrored"
    if config.views > 1:
        settings += f" {config.seed} {config.augmentation.model_dump_json()}"
    name = "features-" + "-".join(encoder.feature)
    return _of_pictures(config, name, settings, encode, pictures, ranks, refuses="face" in encoder.feature)


def _encoded(encoder: FeatureEncoder, versions: Sequence[list[Image.Image]]) -> list[Item]:
    """Features of each picture's versions; one that has none does not keep the others from theirs."""
    if not versions:
        return []
    try:
        whole = _features(encoder, [image for each in versions for image in each])
    except InputError as error:
        if len(versions) == 1:
            return [str(error)]
        return [item for each in versions for item in _encoded(encoder, [each])]
    split = {name: rows.unflatten(0, (len(versions), -1)) for name, rows in whole.items()}
    return [{name: tensor[n] for name, tensor in split.items()} for n in range(len(versions))]


def _features(encoder: FeatureEncoder, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    parts = [encoder(some) for some in chunks(images, ENCODE_BATCH)]
    return {name: torch.cat([part[name] for part in parts]) for name in encoder.feature}


def encode_texts(
    pipe: Any,
    captions: Sequence[str],
    config: TrainConfig,
    device: torch.device,
    weights: str,
    ranks: Ranks | None = None,
) -> Table:
    """Text ``states`` (``N L C``) and, where the base has it, ``pooled`` text (``N E``) of each caption;
    ``weights`` is a hash of the encoders'."""

    def encode(picked: Sequence[int]) -> list[Item]:
        outputs = pipe.encode_prompt(
            prompt=[captions[index] for index in picked],
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        parts = [output.float().cpu() for output in outputs if output is not None]
        named = dict(zip(("states", "pooled"), parts, strict=False))
        return [{name: part[n] for name, part in named.items()} for n in range(len(picked))]

    keys = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in captions]
    folder = _folder(config, "texts", weights)
    with silence_library_logging():  # diffusers prints the end of each long text
        return complete(folder, keys, {}, encode, ranks or Ranks(), quiet=config.quiet)


def clean(config: TrainConfig, tables: Sequence[Table]) -> str:
    """Remove what is stale, and say so in a line, empty if there is nothing: in the run's own cache all that
    ``tables`` do not use, in a shared one what no run has used for :data:`UNUSED_DAYS`."""
    root = _root(config)
    return remove_unused(root, tables, 0 if root == config.output / "cache" else UNUSED_DAYS)


def _of_pictures(
    config: TrainConfig,
    name: str,
    settings: str,
    encode: Encode,
    pictures: Pictures,
    ranks: Ranks | None,
    *,
    refuses: bool = False,
) -> Table:
    """A table of pictures. ``refuses``: the encoder cannot use some of those that can be decoded."""
    if config.cache_folder is not None:
        folder = _folder(config, name, settings)
        names, unread = pictures.names, pictures.unread
        return complete(folder, names, unread, encode, ranks or Ranks(), quiet=config.quiet)
    check: Callable[[Sequence[int]], Sequence[object]] = encode if refuses else pictures.decode
    bad = dict(pictures.unread)
    for some in chunks(range(len(pictures.rows)), ENCODE_BATCH):
        with torch.no_grad():
            bad |= {i: one for i, one in zip(some, check(some), strict=True) if isinstance(one, str)}
    return LiveTable(encode, bad)


def _root(config: TrainConfig) -> Path:
    """Folder of all tables; captions are stored even where pictures are not."""
    return config.cache_folder or config.output / "cache"


def _folder(config: TrainConfig, name: str, settings: str) -> Path:
    return _root(config) / f"{name}-{hashlib.blake2b(settings.encode(), digest_size=10).hexdigest()}"
