"""Cache of all that the frozen models compute: latents, text states and image features of the whole set, on
disk.

The reference scripts spend half of their time on encoding picture, caption and reference again in every
step. Here each is encoded once and stored under a hash of its content, in a folder named after the encoder's
weights and settings: adding a picture encodes that picture alone, and another run on the same data finds the
rest. Shards are named by a hash of their bytes, so damage is noticed and the pictures are encoded again.
Processes share the encoding. Without a cache folder, pictures are encoded at every step.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from tqdm import tqdm

from imprompt.data.rows import Rejected
from imprompt.errors import InputError, ModelError
from imprompt.training.config import TrainConfig
from imprompt.training.data import augment
from imprompt.training.folder import disk_errors, save_tensors
from imprompt.training.pictures import Pictures, neighbours, to_tensor

SHARD = 256  # pictures or captions a file: an interrupted encoding loses at most so many
ENCODE_BATCH = 16
IN_MEMORY = 4 * 2**30  # bytes of one table up to which it is read whole; above, rows are read from disk

Item: TypeAlias = "dict[str, Tensor] | str"
"""The tensors of one picture or caption, or why it cannot be used."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the encoding, and how to wait for all of them."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


class StoredTable:
    """Rows of several tensors, kept in shards; ``keys`` names each row's content, ``rejected`` has the reason
    for each row that could not be encoded."""

    def __init__(self, folder: Path, keys: Sequence[str], rejected: dict[int, str]) -> None:
        self.keys, self.rejected = keys, dict(rejected)
        self._files: dict[str, Any] = {}
        self._loaded: dict[str, Tensor] | None = None
        self._refused: dict[str, str] = {}
        shards = sorted(folder.glob("*.safetensors"))
        if sum(shard.stat().st_size for shard in shards) <= IN_MEMORY:
            self._loaded = {}
        for shard in shards:
            self._add(shard)
        for index, key in enumerate(keys):
            if key in self._refused:
                self.rejected[index] = self._refused[key]

    def _add(self, shard: Path) -> None:
        """Take in one shard; a damaged one is deleted, so that its rows are missing."""
        content = shard.read_bytes() if self._loaded is not None else None
        if _digest(content if content is not None else shard) != shard.stem:
            shard.unlink(missing_ok=True)
            return
        with safe_open(shard, "pt") as file:
            about = json.loads((file.metadata() or {}).get("rejected", "{}"))
            names = list(file.keys())
        self._refused.update(about)
        if content is not None and self._loaded is not None:
            self._loaded.update(load_tensors(content))
            return
        opened = safe_open(shard, "pt")
        self._files.update(dict.fromkeys(names, opened))

    @property
    def missing(self) -> list[int]:
        """One row of each content that is not there yet."""
        known = {name.rpartition("/")[0] for name in (self._files if self._loaded is None else self._loaded)}
        known |= self._refused.keys()
        first = {key: index for index, key in reversed(list(enumerate(self.keys)))}
        return sorted(
            index for key, index in first.items() if key not in known and index not in self.rejected
        )

    def rows(self, name: str, indices: Sequence[int], views: Sequence[int] | None = None) -> Tensor:
        """The rows ``indices`` of tensor ``name`` as float32; ``views`` picks one of each row's versions."""
        found = []
        for place, index in enumerate(indices):
            key = f"{self.keys[index]}/{name}"
            whole = self._files[key].get_tensor(key) if self._loaded is None else self._loaded[key]
            found.append((whole if views is None else whole[views[place]]).float())
        return torch.stack(found)


class LiveTable:
    """Rows encoded each time they are asked for."""

    def __init__(self, encode: Callable[[Sequence[int]], list[Item]], rejected: dict[int, str]) -> None:
        self.encode, self.rejected = encode, rejected

    def rows(self, name: str, indices: Sequence[int], views: Sequence[int] | None = None) -> Tensor:
        """As :meth:`StoredTable.rows`."""
        with torch.no_grad():
            items = self.encode(indices)
        found = []
        for place, item in enumerate(items):
            if isinstance(item, str):
                raise InputError(f"row {indices[place]} cannot be read any more: {item}")
            found.append((item[name] if views is None else item[name][views[place]]).float().cpu())
        return torch.stack(found)


Table: TypeAlias = StoredTable | LiveTable


@dataclass(frozen=True)
class EncodedSet:
    """The whole set, encoded. ``negative`` stands for a dropped image: by feature, ``1 E`` or ``1 P W``."""

    latents: Table
    features: Table
    feature: tuple[str, ...]
    negative: dict[str, Tensor]
    texts: Table
    caption_index: dict[str, int]
    rejected: list[Rejected]

    def text(self, name: str, captions: Sequence[str]) -> Tensor:
        """Text-encoder output ``name`` (``states`` or ``pooled``) of captions."""
        return self.texts.rows(name, [self.caption_index[caption] for caption in captions])


def fingerprint(*modules: nn.Module) -> str:
    """A hash of modules' weights and names: another encoder can never be taken for this one."""
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

    def encode(picked: Sequence[int]) -> list[Item]:
        decoded = pictures.decode(picked)
        items: list[Item] = []
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        for batch in neighbours(decoded, ENCODE_BATCH):
            if isinstance(batch, str):
                items.append(batch)
                continue
            pixels = torch.stack([to_tensor(one.target) for one in batch]) * 2 - 1
            both = torch.stack([pixels, pixels.flip(-1)][:flips], 1).flatten(0, 1)
            posterior = vae.encode(both.to(device, next(vae.parameters()).dtype)).latent_dist
            mean = (posterior.mean - shift) * vae.config.scaling_factor
            parts = (mean, posterior.std * vae.config.scaling_factor)
            means, stds = (part.float().cpu().unflatten(0, (len(batch), flips)) for part in parts)
            items += [
                {"mean": means[n], "std": stds[n], "crop": torch.tensor(one.crop, dtype=torch.float32)}
                for n, one in enumerate(batch)
            ]
        return items

    settings = f"{fingerprint(vae)} {flips}"
    return _table(config, "latents", settings, encode, pictures, ranks or Ranks())


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
    """Image features of each row in ``config.views`` versions, ``N K …``."""

    def versions(index: int, reference: Image.Image) -> list[Image.Image]:
        seeds = [f"{config.seed}/{pictures.keys[index]}/{view}" for view in range(config.views)]
        return [reference, *(augment(reference, config.augmentation, seed) for seed in seeds[1:])]

    def encode(picked: Sequence[int]) -> list[Item]:
        decoded = dict(zip(picked, pictures.decode(picked), strict=True))
        shown = {i: versions(i, one.reference) for i, one in decoded.items() if not isinstance(one, str)}
        encoded = dict(zip(shown, _encoded(encoder, list(shown.values())), strict=True))
        return [one if isinstance(one, str) else encoded[index] for index, one in decoded.items()]

    settings = f"{encoder.identity} {encoder.feature} {config.views}"
    if config.views > 1:
        settings += f" {config.seed} {config.augmentation.model_dump_json()}"
    name = "features-" + "-".join(encoder.feature)
    return _table(config, name, settings, encode, pictures, ranks or Ranks())


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
    split = {name: rows_.unflatten(0, (len(versions), -1)) for name, rows_ in whole.items()}
    return [{name: tensor[n] for name, tensor in split.items()} for n in range(len(versions))]


def _features(encoder: FeatureEncoder, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    parts = [encoder(batch) for batch in _chunks(images, ENCODE_BATCH)]
    return {name: torch.cat([part[name] for part in parts]) for name in encoder.feature}


def encode_texts(
    pipe: Any, captions: Sequence[str], config: TrainConfig, device: torch.device, ranks: Ranks | None = None
) -> Table:
    """Text ``states`` (``N L C``) and, where the base has it, ``pooled`` text (``N E``) of each caption."""
    encoders = [module for module in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if module]

    def encode(picked: Sequence[int]) -> list[Item]:
        items: list[Item] = []
        for batch in _chunks([captions[index] for index in picked], ENCODE_BATCH):
            outputs = pipe.encode_prompt(
                prompt=list(batch), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            parts = [output.float().cpu() for output in outputs if output is not None]
            names = ("states", "pooled")[: len(parts)]
            items += [
                {name: part[n] for name, part in zip(names, parts, strict=False)} for n in range(len(batch))
            ]
        return items

    keys = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in captions]
    return _table(config, "texts", fingerprint(*encoders), encode, keys, ranks or Ranks())


def _table(
    config: TrainConfig,
    name: str,
    settings: str,
    encode: Callable[[Sequence[int]], list[Item]],
    of: Pictures | Sequence[str],
    ranks: Ranks,
) -> Table:
    """A table of pictures, or of texts by their hashes: what is stored, and the rest encoded now."""
    keys, unread = (of.names, of.unread) if isinstance(of, Pictures) else (of, {})
    if config.cache_folder is None and isinstance(of, Pictures):
        found = enumerate(of.decode(range(len(of.rows))))
        return LiveTable(encode, unread | {index: one for index, one in found if isinstance(one, str)})
    root = config.cache_folder if config.cache_folder is not None else config.output / "cache"
    folder = root / f"{name}-{hashlib.blake2b(settings.encode(), digest_size=10).hexdigest()}"
    folder.mkdir(parents=True, exist_ok=True)
    table = StoredTable(folder, keys, unread)
    missing = table.missing
    ranks.wait()
    mine = missing[ranks.index :: ranks.count]
    with tqdm(total=len(mine), desc=f"encoding {name}", disable=config.quiet or not mine) as bar:
        for picked in _chunks(mine, SHARD):
            with torch.inference_mode():
                items = encode(picked)
            _write_shard(folder, [keys[index] for index in picked], items)
            bar.update(len(picked))
    ranks.wait()
    return StoredTable(folder, keys, unread) if missing else table


def _write_shard(folder: Path, keys: Sequence[str], items: Sequence[Item]) -> None:
    tensors: dict[str, Tensor] = {}
    rejected: dict[str, str] = {}
    for key, item in zip(keys, items, strict=True):
        if isinstance(item, str):
            rejected[key] = item
            continue
        tensors |= {f"{key}/{name}": _compact(name, tensor) for name, tensor in item.items()}
    with disk_errors(folder, "the cache"):
        part = save_tensors(tensors, {"rejected": json.dumps(rejected)}, folder / "shard.part")
        part.replace(folder / f"{_digest(part)}.safetensors")


def _digest(content: bytes | Path) -> str:
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
        return hashlib.file_digest(stream, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def _compact(name: str, tensor: Tensor) -> Tensor:
    """Half precision where the values fit it. Raises :class:`ModelError` for NaN or infinity."""
    if not tensor.isfinite().all():
        raise ModelError(
            f"the frozen model gives values that are not finite ('{name}'); its weights are damaged."
        )
    half = tensor.half()
    return (half if half.isfinite().all() and name != "crop" else tensor.float()).cpu().contiguous()


def _chunks(values: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))
