"""Before the first step: read the data, load the base, encode everything frozen, and say which run it is."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from PIL import Image

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.checkpoints.locate import NOTED_ENCODER
from imprompt.data.rows import Rejected, Row, read_dataset
from imprompt.errors import InputError, UsageError
from imprompt.training import cache, start
from imprompt.training.config import TrainConfig
from imprompt.training.data import Plan, bucket_size
from imprompt.training.folder import Identity, data_hash
from imprompt.training.pictures import Pictures, Size

BAD_SHARE, BAD_LEAST = 0.01, 3
"""A run does not begin with more unreadable pictures than this share, and more than this number."""


@dataclass(frozen=True)
class Prepared:
    """Everything a trainer starts with."""

    config: TrainConfig
    """With what was left open filled in."""
    identity: Identity
    pipe: Any
    """The base's pipeline; its text and image encoders are gone."""
    adapter: IPAdapter
    data: cache.EncodedSet
    plan: Plan
    about: dict[str, str]
    """Base, encoder, data and start, for the adapter's metadata and model card."""
    notes: tuple[str, ...]


def prepare(config: TrainConfig, accelerator: Accelerator) -> Prepared:
    """Load and encode what ``config`` names; all processes share the encoding.

    Raises :class:`InputError` for data that cannot be trained on, :class:`ModelError` or :class:`UsageError`
    for a base, encoder or start that does not fit."""
    found = read_dataset(config.data, only=config.only)
    base, pipe = start.load_base(config.base)
    initial = start.load_start(config, base)
    kind = config.kind or (start.kind_of(initial) if initial is not None else "linear")
    config = config.resolved(kind, sum(row.trainable for row in found.rows), initial is not None)
    per_step = config.batch * accelerator.gradient_accumulation_steps * accelerator.num_processes
    rows, rejected = found.rows, list(found.rejected)
    ranks = cache.Ranks(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    pictures = Pictures.read(rows, _target_size(config, pipe), config.workers)

    # One encoder at a time is on the device, and the UNet is not.
    pipe.vae.to(accelerator.device)
    latents = cache.encode_latents(pictures, pipe.vae, config, accelerator.device, ranks)
    reader, encoder_name = start.feature_encoder(config, kind, pipe, initial, accelerator.device)
    if config.cache_folder is not None:
        pipe.vae.to("cpu")
    features = cache.encode_features(pictures, reader, config, ranks)
    negative = reader.negative()
    bad = latents.rejected | features.rejected
    _quarantine(rows, bad, rejected, config)
    plan = Plan(rows, config, unusable=set(bad), keys=pictures.keys, sizes=pictures.sizes, per_step=per_step)
    encoders = [part for part in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if part]
    for part in encoders:
        part.to(accelerator.device)
    texts = cache.encode_texts(pipe, plan.captions, config, accelerator.device, ranks)
    index = {caption: number for number, caption in enumerate(plan.captions)}
    data = cache.EncodedSet(latents, features, reader.feature, negative, texts, index, rejected)

    adapter = initial or start.new_adapter(config, kind, pipe.unet, start.widths(negative))
    identity = Identity(
        config=config.identity(),
        pictures=len(rows),
        data=data_hash(rows, pictures.keys),
        base=cache.fingerprint(pipe.unet, pipe.vae, *encoders),
        encoder=reader.identity,
        start=cache.fingerprint(adapter.module),
        samples_per_step=per_step,
    )
    for name in {"text_encoder", "text_encoder_2", "image_encoder"} & set(pipe.components):
        setattr(pipe, name, None)
    about = {
        "imprompt.base": base.name,
        NOTED_ENCODER: encoder_name,
        "imprompt.data": identity.data,
        "imprompt.pictures": str(len(rows)),
        "imprompt.start": "new weights" if initial is None else initial.checkpoint.name,
    }
    return Prepared(config, identity, pipe, adapter, data, plan, about, tuple(found.notes))


def _target_size(config: TrainConfig, pipe: Any) -> Callable[[bytes], Size]:
    """The rule for a target's (width, height), given its picture's bytes.

    Raises :class:`UsageError` for a resolution that the base cannot have."""
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    side = config.resolution or pipe.unet.config.sample_size * factor
    if side % factor:
        raise UsageError(f"resolution must be a multiple of {factor} for this base, given {side}.")
    if not config.buckets:
        return lambda content: (side, side)
    return lambda content: _bucket(content, side, max(factor, 8))


def _bucket(content: bytes, side: int, multiple: int) -> Size:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return bucket_size(image.width, image.height, side, multiple)
    except Exception:  # said where it is decoded
        return side, side


def _quarantine(
    rows: Sequence[Row], bad: dict[int, str], rejected: list[Rejected], config: TrainConfig
) -> None:
    """List what cannot be used; stop where it is too much to be an accident."""
    rejected += [Rejected(rows[index].name, why) for index, why in sorted(bad.items())]
    if not bad:
        return
    first = f"the first: {rows[min(bad)].name}: {bad[min(bad)]}"
    if len(bad) == len(rows):
        raise InputError(f"none of the {len(rows)} pictures can be trained on ({first}).")
    if config.on_bad_sample == "stop":
        raise InputError(f"{len(bad)} pictures cannot be trained on ({first}).")
    if len(bad) > max(BAD_LEAST, BAD_SHARE * len(rows)):
        raise InputError(
            f"{len(bad)} of {len(rows)} pictures cannot be trained on, more than {BAD_SHARE:.0%} "
            f"({first}). Repair or remove them."
        )
