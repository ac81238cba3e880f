"""Everything frozen is computed once: latents, text states and image features of the whole set, on disk.

The reference scripts encode picture, caption and reference anew in every step, half of their time. Here each
is encoded once and kept in safetensors shards named by what they were made from (the pictures' bytes, the
encoder's weights, the settings), so a shard can be stale only by a hash collision, and another run on the
same data finds it. Training then runs UNet and adapter only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from imprompt.data.rows import Rejected, Row
from imprompt.encoders.images import load_image
from imprompt.errors import ImpromptError, ModelError
from imprompt.training.config import TrainConfig
from imprompt.training.data import augment, crop_to_shape

SHARD = 256  # pictures or captions a file: an interrupted encoding loses at most so many
ENCODE_BATCH = 16
IN_MEMORY = 4 * 2**30  # bytes of one table up to which it is read whole; above, rows are read from disk
REFERENCE_SIDE = 512  # references are kept at this size while they wait for the encoder

Encoded = tuple[dict[str, Tensor], dict[int, str]]


class Table:
    """Rows of several tensors, spread over shards; reads a few rows at a time.

    ``rejected``: row number to reason, for rows that could not be encoded (their values are zeros).
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._files = [safe_open(shard, "pt") for shard in shards]
        self._loaded: list[dict[str, Tensor]] | None = None
        self.rejected: dict[int, str] = {}
        for number, file in enumerate(self._files):
            about = json.loads((file.metadata() or {}).get("rejected", "{}"))
            self.rejected.update({number * SHARD + int(index): reason for index, reason in about.items()})
        if sum(shard.stat().st_size for shard in shards) <= IN_MEMORY:
            self._loaded = [{name: file.get_tensor(name) for name in file.keys()} for file in self._files]  # noqa: SIM118

    def rows(self, name: str, indices: Sequence[int], views: Sequence[int] | None = None) -> Tensor:
        """The rows ``indices`` of tensor ``name`` as float32; ``views`` picks one of each row's versions."""
        found = []
        for place, index in enumerate(indices):
            shard, inner = divmod(index, SHARD)
            key = inner if views is None else (inner, views[place])
            whole: Any = (
                self._files[shard].get_slice(name) if self._loaded is None else self._loaded[shard][name]
            )
            found.append(whole[key].float())
        return torch.stack(found)


@dataclass(frozen=True)
class EncodedSet:
    """The whole set, encoded; ``negative`` (``1 E`` or ``1 P W``) stands for a dropped image."""

    latents: Table
    features: Table
    feature: str
    negative: Tensor
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
    rows: Sequence[Row], vae: Any, config: TrainConfig, size: tuple[int, int], device: torch.device
) -> Table:
    """Scaled posterior ``mean`` and ``std``, each ``N 4 h w``, of the rows' centre crops of ``size``."""

    def encode(picked: Sequence[int]) -> Encoded:
        pictures, rejected = _decode(rows, picked, size, config.workers)
        parts: list[tuple[Tensor, Tensor]] = []
        for batch in _chunks(pictures, ENCODE_BATCH):
            pixels = torch.stack([_to_tensor(target) for target, _ in batch]) * 2 - 1
            posterior = vae.encode(pixels.to(device, next(vae.parameters()).dtype)).latent_dist
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            scale = vae.config.scaling_factor
            parts.append(((posterior.mean - shift) * scale, posterior.std * scale))
        mean, std = (torch.cat(column) for column in zip(*parts, strict=True))
        return {"mean": mean, "std": std}, rejected

    return _table(config, "latents", _picture_keys(rows), f"{fingerprint(vae)} {size}", encode)


def encode_features(
    rows: Sequence[Row],
    encoder: Any,
    feature: str,
    config: TrainConfig,
    size: tuple[int, int],
) -> tuple[Table, Tensor]:
    """Image features of each row in ``config.views`` versions, ``N K E`` or ``N K P W``, and the negative.

    ``encoder`` is an :class:`imprompt.encoders.clip.ImageEncoder`, ``feature`` is ``pooled`` or ``hidden``.
    The negative is the published one: a zero embedding (``1 E``) for pooled features, the encoder's output
    for an all-zero preprocessed tensor (``1 P W``) for hidden states.
    """

    def encode(picked: Sequence[int]) -> Encoded:
        pictures, rejected = _decode(rows, picked, size, config.workers)
        versions = [
            reference
            if view == 0
            else augment(reference, config.augmentation, f"{config.seed}/{name}/{view}")
            for (_, reference), name in zip(pictures, (keys[index] for index in picked), strict=True)
            for view in range(config.views)
        ]
        parts = [getattr(encoder.encode(batch), feature).cpu() for batch in _chunks(versions, ENCODE_BATCH)]
        return {feature: torch.cat(parts).unflatten(0, (len(picked), config.views))}, rejected

    keys = _picture_keys(rows)
    settings = f"{fingerprint(encoder.model)} {feature} {size} {config.views}"
    if config.views > 1:
        settings += f" {config.seed} {config.augmentation.model_dump_json()}"
    table = _table(config, f"features-{feature}", keys, settings, encode)
    if feature == "pooled":
        return table, torch.zeros_like(table.rows(feature, [0], [0]))
    return table, encoder.encode([Image.new("RGB", (8, 8))]).negative_hidden.float().cpu()


def encode_texts(pipe: Any, captions: Sequence[str], config: TrainConfig, device: torch.device) -> Table:
    """Text ``states`` (``N L C``) and, where the base has it, ``pooled`` text (``N E``) of each caption."""
    encoders = [module for module in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if module]

    def encode(picked: Sequence[int]) -> Encoded:
        parts: list[tuple[Tensor, ...]] = []
        for batch in _chunks([captions[index] for index in picked], ENCODE_BATCH):
            outputs = pipe.encode_prompt(
                prompt=list(batch), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            parts.append(tuple(output for output in outputs if output is not None))
        named = zip(("states", "pooled"), zip(*parts, strict=True), strict=False)
        return {name: torch.cat(column) for name, column in named}, {}

    return _table(config, "texts", captions, fingerprint(*encoders), encode)


def _table(
    config: TrainConfig,
    name: str,
    keys: Sequence[str],
    settings: str,
    encode: Callable[[Sequence[int]], Encoded],
) -> Table:
    folder = config.cache_folder
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    missing: list[tuple[Path, range]] = []
    for start in range(0, len(keys), SHARD):
        picked = range(start, min(start + SHARD, len(keys)))
        content = json.dumps([name, settings, [keys[index] for index in picked]])
        path = folder / f"{name}-{hashlib.blake2b(content.encode(), digest_size=10).hexdigest()}.safetensors"
        shards.append(path)
        if not _whole(path):
            missing.append((path, picked))
    total = sum(len(picked) for _, picked in missing)
    with tqdm(total=total, desc=f"encoding {name}", unit="", disable=config.quiet or not total) as bar:
        for path, picked in missing:
            with torch.inference_mode():
                tensors, rejected = encode(picked)
            stored = {key: _compact(key, tensor) for key, tensor in tensors.items()}
            part = path.with_name(f"{path.name}.{id(stored)}.part")
            about = {str(index - picked[0]): reason for index, reason in rejected.items()}
            save_file(stored, part, {"rejected": json.dumps(about)})
            part.replace(path)
            bar.update(len(picked))
    return Table(shards)


def _whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except FileNotFoundError:
        return False
    except SafetensorError:  # a damaged shard is made anew
        return False


def _compact(name: str, tensor: Tensor) -> Tensor:
    """Half precision where the values fit it. Raises :class:`ModelError` for NaN or infinity."""
    if not tensor.isfinite().all():
        raise ModelError(
            f"the frozen model gives values that are not finite ('{name}'); its weights are damaged"
        )
    half = tensor.half()
    return (half if half.isfinite().all() else tensor.float()).cpu().contiguous()


def _picture_keys(rows: Sequence[Row]) -> list[str]:
    keys = []
    for row in rows:
        try:
            keys.append(hashlib.blake2b(row.file.read_bytes(), digest_size=16).hexdigest())
        except OSError as error:
            keys.append(f"unreadable: {error.strerror}")
    return keys


def _decode(
    rows: Sequence[Row], picked: Sequence[int], size: tuple[int, int], workers: int
) -> tuple[list[tuple[Image.Image, Image.Image]], dict[int, str]]:
    """Target (``size``) and reference (one crop for both) of each row; a broken one is blank and reported."""
    rejected: dict[int, str] = {}

    def one(index: int) -> tuple[Image.Image, Image.Image]:
        try:
            picture = load_image(rows[index].file)
        except (ImpromptError, OSError) as error:
            rejected[index] = str(error)
            picture = Image.new("RGB", size, (255, 255, 255))
        crop = crop_to_shape(picture, *size)
        reference = crop.copy()
        reference.thumbnail((REFERENCE_SIDE, REFERENCE_SIDE), Image.Resampling.BICUBIC)
        return crop.resize(size, Image.Resampling.LANCZOS) if crop.size != size else crop, reference

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, picked)), rejected


def _to_tensor(image: Image.Image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)


def _chunks(values: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))
