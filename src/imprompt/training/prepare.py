"""Before the first step: read the data, load the base, encode everything frozen, and say which run it is."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from PIL import ExifTags, Image
from torch import Tensor

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.checkpoints.locate import NOTED_ENCODER
from imprompt.data.read import read_dataset, usable
from imprompt.data.rows import Dataset, Rejected
from imprompt.errors import InputError, UsageError
from imprompt.generation.families import Base
from imprompt.generation.text import cut_words
from imprompt.io import printable
from imprompt.training import cache, start
from imprompt.training.config import ANY_PICTURE, Kind, TrainConfig
from imprompt.training.data import Plan, bucket_size, crop_box
from imprompt.training.folder import Identity, data_hash
from imprompt.training.launch import frozen_dtype
from imprompt.training.pictures import Pictures, Size
from imprompt.training.tables import Ranks, StoredTable, Table

BAD_SHARE, BAD_LEAST = 0.01, 3
"""A run does not begin with more unreadable pictures than this share, and more than this number."""


_SHORT = 30
"""Bytes of a caption that every text encoder reads whole."""


@dataclass(frozen=True)
class Prepared:
    """Everything a trainer starts with."""

    config: TrainConfig
    """With what was left open filled in."""
    identity: Identity
    pipe: Any
    """The base's pipeline with UNet, VAE and scheduler alone, in float32 on the CPU."""
    adapter: IPAdapter
    data: cache.EncodedSet
    plan: Plan
    about: dict[str, str]
    """Base, encoder, data and start, for the adapter's metadata and model card."""
    notes: tuple[str, ...]


def prepare(config: TrainConfig, accelerator: Accelerator, data: Dataset | None = None) -> Prepared:
    """Load and encode what ``config`` names, or ``data`` in its place; all processes share the encoding.

    Raises :class:`InputError` for data that cannot be trained on, :class:`ModelError` or :class:`UsageError`
    for a base, encoder or start that does not fit."""
    if data is None:
        found = read_dataset(config.data, only=config.only, ignore=config.ignore)
    elif config.ignore:
        raise UsageError("ignore: has no effect on rows that are read already; leave it out.")
    else:
        found = usable(data, config.data, only=config.only)
    base = start.find_unet_base(config.base)
    initial = start.load_start(config, base)
    kind = config.kind or (start.kind_of(initial) if initial is not None else "linear")
    training = [row for row in found.rows if row.trainable]
    captioned = all(row.caption for row in training)
    stated = config
    config = config.resolved(kind, len(training), started=initial is not None, captioned=captioned)
    config = config.model_copy(update={"dtype": frozen_dtype(accelerator)})
    pictures = Pictures.read(found.rows, _target_size(config, base), config.workers)
    encoding = _Encoding(config, kind, base, initial, pictures, accelerator)
    encoded, plan = encoding.run(found.rejected)

    pipe = start.load_parts(base, torch.float32, "unet", "vae")
    adapter = initial or start.new_adapter(config, kind, pipe.unet, start.widths(encoded.negative))
    identity = Identity(
        config=config.identity(),
        pictures=len(found.rows),
        data=data_hash(found.rows, pictures.keys),
        base=" ".join((cache.fingerprint(pipe.unet), *encoding.weights)),
        encoder=encoding.image_encoder,
        start=cache.fingerprint(adapter.module),
        samples_per_step=plan.per_step,
    )
    about = {
        "imprompt.base": base.name,
        NOTED_ENCODER: encoding.image_encoder_name,
        "imprompt.data": identity.data,
        "imprompt.pictures": str(len(plan.training)),
        "imprompt.start": "new weights" if initial is None else initial.checkpoint.name,
    }
    odd, idle = _notes(plan, encoded.latents), _idle(config, kind, initial is not None)
    notes = (*found.notes, *encoding.notes, *odd, *idle, *_chosen(stated, config))
    return Prepared(config, identity, pipe, adapter, encoded, plan, about, notes)


def _notes(plan: Plan, latents: Table) -> list[str]:
    """What is odd about the pictures: copies, and small ones."""
    notes = []
    trained = {plan.keys[row] for row in plan.training}
    copied = sum(plan.keys[row] in trained for row in plan.validation)
    if copied and not plan.validates_on_training_rows:
        notes.append(f"{copied} held-out pictures are copies of training pictures: their loss is too good")
    if len({row.caption for row in plan.rows}) == 1:
        notes.append("all pictures have one caption: no sample shows a picture with the caption of another")
    if plan.copies:
        notes.append(f"{plan.copies} training pictures are copies of others")
    if isinstance(latents, StoredTable):
        originals = latents.rows("crop", plan.training)[:, :2].int().tolist()  # height and width
        small = 0
        for row, (height, width) in zip(plan.training, originals, strict=True):
            left, _, right, _ = crop_box(width, height, *plan.sizes[row])
            small += right - left < plan.sizes[row][0]
        if small:
            notes.append(f"{small} training pictures are smaller than what is trained, and are enlarged")
    return notes


def _chosen(stated: TrainConfig, config: TrainConfig) -> list[str]:
    """What was chosen for few pictures."""
    if stated.references is not None or config.references != ((ANY_PICTURE, 1.0),):
        return []
    return [
        f"few pictures: beside a caption another of them is shown, and {config.drop_text:.0%} of the samples "
        "have no caption (references, drop_text)"
    ]


def _idle(config: TrainConfig, kind: Kind, started: bool) -> list[str]:
    """Which options were changed and have no effect in this run."""
    face = kind in ("faceid", "faceid-plus")
    unasked = _unasked(config)
    idle = {
        "captions": f"references ask for no {' or '.join(unasked)}" if unasked else "",
        "tokens": "kind full has a token from each patch" if kind == "full" else "",
        "lora_rank": "only new face adapters have it" if started or not face else "",
        "face_model": "" if face else f"kind {kind} reads no faces",
        "image_encoder": "kind faceid reads faces alone" if kind == "faceid" else "",
        "augmentation": "views is 1" if config.views == 1 else "",
        "sample_guidance": "sample_every is 0" if config.sample_every == 0 else "",
    }
    fields = TrainConfig.model_fields
    return [
        f"{name} has no effect: {why}"
        for name, why in idle.items()
        if why and getattr(config, name) != fields[name].get_default(call_default_factory=True)
    ]


def _unasked(config: TrainConfig) -> list[str]:
    """The kinds of reference that ``captions`` states and ``references`` do not ask for."""
    usual = TrainConfig.model_fields["captions"].get_default(call_default_factory=True)
    asked = dict(config.references or ())
    return [mode for mode, kinds in config.captions.items() if mode not in asked and usual.get(mode) != kinds]


class _Encoding:
    """Encodes pictures and captions with one frozen model in memory at a time (SDXL's two text encoders
    together), in bfloat16 where the run is in it. The UNet is not loaded yet."""

    def __init__(
        self, config: TrainConfig, kind: Kind, base: Base, initial: IPAdapter | None, pictures: Pictures,
        accelerator: Accelerator,
    ) -> None:  # fmt: skip
        self.config, self.kind, self.base, self.initial = config, kind, base, initial
        self.pictures, self.device = pictures, accelerator.device
        # float16 is none of the choices: SDXL's VAE overflows in it.
        self.dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.per_step = config.batch * accelerator.gradient_accumulation_steps * accelerator.num_processes
        self.ranks = Ranks(
            accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
        )
        self.weights: list[str] = []
        """Hashes of the VAE and the text encoders."""
        self.image_encoder, self.image_encoder_name = "", ""
        """A hash, and the name."""
        self.notes: list[str] = []
        """What is odd about the captions."""

    def run(self, before: Sequence[Rejected]) -> tuple[cache.EncodedSet, Plan]:
        """Everything that the steps read, and the plan of what they show."""
        pictures = len(self.pictures.rows) + len(before)
        _check_share(pictures, before, self.config)
        features, negative = self._features()
        latents = self._latents()
        bad, rows = latents.rejected | features.rejected, self.pictures.rows
        rejected = [*before, *(Rejected(rows[index].name, why) for index, why in sorted(bad.items()))]
        _check_share(pictures, rejected, self.config)
        plan = Plan(
            rows, self.config, unusable=set(bad), keys=self.pictures.keys, sizes=self.pictures.sizes,
            per_step=self.per_step,
        )  # fmt: skip
        index = {caption: number for number, caption in enumerate(plan.captions)}
        texts = self._texts(plan.captions)
        return cache.EncodedSet(latents, features, negative, texts, index, rejected), plan

    def _features(self) -> tuple[Table, dict[str, Tensor]]:
        reader, self.image_encoder_name = start.feature_encoder(
            self.config, self.kind, self.base, self.initial, self.device, self.dtype
        )
        self.image_encoder = reader.identity
        table = cache.encode_features(self.pictures, reader, self.config, self.ranks)
        return table, reader.negative()

    def _latents(self) -> Table:
        vae = start.load_parts(self.base, self.dtype, "vae").vae.to(self.device)
        self.weights.append(cache.fingerprint(vae))
        return cache.encode_latents(self.pictures, vae, self.config, self.device, self.ranks)

    def _texts(self, captions: Sequence[str]) -> Table:
        pipe = start.load_parts(self.base, self.dtype, *start.TEXT)
        encoders = [part for part in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if part]
        self.weights.append(cache.fingerprint(*encoders))
        for part in encoders:
            part.to(self.device)
        lost = [end for text in captions if len(text.encode()) >= _SHORT and (end := cut_words(pipe, text))]
        if lost:
            self.notes.append(
                f"{len(lost)} captions are longer than the text encoder reads; the end of the first is lost: "
                f"'{printable(lost[0][:60])}'"
            )
        return cache.encode_texts(pipe, captions, self.config, self.device, self.weights[-1], self.ranks)


def _target_size(config: TrainConfig, base: Base) -> Callable[[bytes], Size]:
    """The rule for a target's (width, height), given its picture's bytes.

    Raises :class:`UsageError` for a resolution that the base cannot have."""
    own, factor = start.own_side(base)
    side = config.resolution or own
    if side % factor:
        raise UsageError(f"resolution must be a multiple of {factor} for this base, given {side}.")
    if not config.buckets:
        return lambda content: (side, side)
    return lambda content: _bucket(content, side, max(factor, 8))


def _bucket(content: bytes, side: int, multiple: int) -> Size:
    try:
        with Image.open(io.BytesIO(content)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            size = (image.height, image.width) if turned else image.size
            return bucket_size(*size, side, multiple)
    except Exception:  # told where it is decoded
        return side, side


def _check_share(pictures: int, rejected: Sequence[Rejected], config: TrainConfig) -> None:
    """Raise :class:`InputError` where those of the pictures that cannot be used are too many to be an
    accident."""
    if not rejected:
        return
    first = f"the first: {rejected[0]}"
    if len(rejected) == pictures:
        raise InputError(f"none of the {pictures} pictures can be trained on ({first}).")
    if config.on_bad_sample == "stop":
        raise InputError(f"{len(rejected)} pictures cannot be trained on ({first}).")
    if len(rejected) > max(BAD_LEAST, BAD_SHARE * pictures):
        raise InputError(
            f"{len(rejected)} of {pictures} pictures cannot be trained on, more than {BAD_SHARE:.0%} "
            f"({first}). Repair or remove them."
        )
