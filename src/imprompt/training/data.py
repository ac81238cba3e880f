"""From rows to what each training step shows: target, reference, caption, and what is dropped.

Everything random is a function of ``(seed, number of the batch, purpose)`` alone, so a resumed run draws
exactly what the uninterrupted one would have drawn, without any saved generator state. Pictures held out are
not merely skipped: they never enter the lists that targets and references are drawn from.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from imprompt.data.rows import Row
from imprompt.errors import InputError, UsageError
from imprompt.training.config import ANY_CAPTION, Augmentation, TrainConfig

WHITE = (255, 255, 255)
Option = TypeVar("Option")


def generator_for(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A generator that depends on nothing but its three arguments."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def crop_to_shape(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centred part with the proportions ``width:height``, at the picture's own resolution.

    Target and reference are both made from this one crop, so that they show the same thing.
    """
    if image.width * height > image.height * width:
        cropped_width, cropped_height = max(1, round(image.height * width / height)), image.height
    else:
        cropped_width, cropped_height = image.width, max(1, round(image.width * height / width))
    left, top = (image.width - cropped_width) // 2, (image.height - cropped_height) // 2
    return image.crop((left, top, left + cropped_width, top + cropped_height))


def augment(image: Image.Image, strength: Augmentation, key: str) -> Image.Image:
    """A changed version of a reference picture, the same for the same ``key``: cropped or shrunk, shifted,
    turned, mirrored and tinted, on white ground."""
    draw = random.Random(key)
    width, height = image.size
    if draw.random() < strength.flip:
        image = ImageOps.mirror(image)
    if strength.rotate:
        angle = draw.uniform(-strength.rotate, strength.rotate)
        image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=WHITE)
    if draw.random() < 0.5:
        keep = 1 - draw.uniform(0, strength.crop)
        part_width, part_height = max(1, round(width * keep)), max(1, round(height * keep))
        left, top = draw.randint(0, width - part_width), draw.randint(0, height - part_height)
        image = image.crop((left, top, left + part_width, top + part_height)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
    else:
        keep = 1 - draw.uniform(0, strength.shrink)
        small = image.resize(
            (max(1, round(width * keep)), max(1, round(height * keep))), Image.Resampling.BICUBIC
        )
        left = round((width - small.width) / 2 + draw.uniform(-strength.shift, strength.shift) * width)
        top = round((height - small.height) / 2 + draw.uniform(-strength.shift, strength.shift) * height)
        image = Image.new("RGB", (width, height), WHITE)
        image.paste(small, (left, top))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(1 + draw.uniform(-strength.colour, strength.colour))
    return image


@dataclass(frozen=True)
class Batch:
    """Row numbers and choices of one forward pass, ``B`` of each; a dropped caption is ``""``."""

    targets: list[int]
    references: list[int]
    views: list[int]
    captions: list[str]
    image_dropped: Tensor
    modes: list[str] = field(default_factory=list)


class Plan:
    """Decides what every training step shows.

    ``rows`` are all rows, ``unusable`` the numbers of those whose picture cannot be read; of the others only
    those of the split ``train`` are ever drawn.
    When no row is held out, a few training rows (chosen by a hash of their name, the same in every run) are
    set aside for validation. Raises :class:`InputError` when nothing is left to train on and
    :class:`UsageError` when a kind of reference or caption asked for exists for no picture.
    """

    def __init__(self, rows: Sequence[Row], config: TrainConfig, *, unusable: Collection[int] = ()) -> None:
        self.config = config
        self.rows = list(rows)
        usable_rows = [(index, row) for index, row in enumerate(rows) if index not in unusable]
        training = [index for index, row in usable_rows if row.trainable]
        held_out = [index for index, row in usable_rows if not row.trainable]
        by_hash = sorted(held_out or training, key=lambda index: _name_hash(self.rows[index]))
        if held_out:
            self.validation = by_hash[: config.validation_rows]
        else:
            self.validation = by_hash[: min(config.validation_rows, len(training) // 20)]
            training = sorted(set(training) - set(self.validation))
        if not training:
            raise InputError("no picture to train on: every row is held out or could not be read")
        self.training = training
        self.validates_on_training_rows = not self.validation
        if not self.validation:
            self.validation = by_hash[: config.validation_rows]
        self._partners = self._find_partners()
        self._choices = {index: self._choices_of(index) for index in training}
        usable = Counter(mode for choices in self._choices.values() for mode, _, _ in choices)
        for mode, _ in config.references:
            if not usable[mode]:
                raise UsageError(
                    f"no training picture has another picture of its group '{mode}' and a caption of the "
                    f"kinds {list(config.caption_kinds(mode))}; check 'groups' and 'captions' in the "
                    "metadata or leave this reference out"
                )
        self.usable_modes = dict(usable)
        self._epoch: tuple[int, list[int]] = (-1, [])

    @property
    def captions(self) -> list[str]:
        """Every caption that a step may ask for, sorted, the empty one included."""
        texts = {""} | {self.validation_caption(index) for index in self.validation}
        texts |= {self.other_caption(index) for index in self.validation}
        for choices in self._choices.values():
            texts.update(text for _, _, offered in choices for text in offered)
        return sorted(texts)

    def validation_caption(self, index: int) -> str:
        """The first caption of a validation row, the fullest kind first."""
        row = self.rows[index]
        for kind in ("full", *row.captions):
            if row.captions.get(kind):
                return row.captions[kind][0]
        return ""

    def other_caption(self, index: int) -> str:
        """What some training picture of other groups shows; without its style where captions have kinds."""
        row = self.rows[index]
        others = [other for other in self.training if self.rows[other].groups != row.groups] or self.training
        other = self.rows[others[int(_name_hash(row), 16) % len(others)]]
        return next(
            (other.captions[kind][0] for kind in ("concept", *other.captions) if other.captions.get(kind)), ""
        )

    def draw(self, number: int, *, process: int = 0, processes: int = 1) -> Batch:
        """The batch of forward pass ``number`` (counted over the whole run) on one of ``processes``.

        Every training picture is shown once an epoch, in an order of its own for each epoch.
        """
        config = self.config
        place = (number * processes + process) * config.batch
        targets = [self._at(place + offset) for offset in range(config.batch)]
        luck = torch.rand(config.batch, 5, generator=generator_for(config.seed, f"draw {process}", number))
        references, views, captions, dropped, modes = [], [], [], [], []
        for target, (for_mode, for_reference, for_caption, for_view, for_drop) in zip(
            targets, luck.tolist(), strict=True
        ):
            mode, partners, texts = _weighted(self._choices[target], config.references, for_mode)
            drop_text = for_drop < config.drop_text
            if drop_text:  # without words, another picture as reference would teach to ignore it
                mode = "self"
            modes.append(mode)
            references.append(target if mode == "self" else _pick_other(partners, target, for_reference))
            views.append(int(for_view * config.views))
            drop_image = config.drop_text <= for_drop < config.drop_text + config.drop_image
            both = 0 <= for_drop - config.drop_text - config.drop_image < config.drop_both
            captions.append("" if drop_text or both else _pick(texts, for_caption))
            dropped.append(drop_image or both)
        return Batch(targets, references, views, captions, torch.tensor(dropped), modes)

    def _at(self, place: int) -> int:
        epoch, position = divmod(place, len(self.training))
        if self._epoch[0] != epoch:
            order = torch.randperm(
                len(self.training), generator=generator_for(self.config.seed, "order", epoch)
            )
            self._epoch = (epoch, [self.training[index] for index in order.tolist()])
        return self._epoch[1][position]

    def _find_partners(self) -> dict[tuple[str, str], list[int]]:
        partners: dict[tuple[str, str], list[int]] = defaultdict(list)
        for index in self.training:
            for kind, name in self.rows[index].groups.items():
                partners[kind, name].append(index)
        return partners

    def _choices_of(self, index: int) -> list[tuple[str, list[int], list[str]]]:
        """The kinds of reference this row allows, each with the pictures and captions that may go with it."""
        row = self.rows[index]
        choices: list[tuple[str, list[int], list[str]]] = []
        for mode, _ in self.config.references:
            if mode == "self":
                pictures = [index]
            elif mode in row.groups:
                pictures = self._partners[mode, row.groups[mode]]  # one list for all of the group
            else:
                pictures = []
            kinds = self.config.caption_kinds(mode)
            texts = [
                text
                for kind in (row.captions if ANY_CAPTION in kinds else kinds)
                for text in row.captions.get(kind, ())
            ]
            if mode == "self" and not texts:
                texts = [""]  # a picture without a caption still teaches what it looks like
            if texts and (mode == "self" or len(pictures) > 1):
                choices.append((mode, pictures, texts))
        # A row that allows none of the kinds asked for (an only child of its group) is its own reference.
        return choices or [
            ("self", [index], [text for texts in row.captions.values() for text in texts] or [""])
        ]


def _name_hash(row: Row) -> str:
    return hashlib.blake2b(row.name.encode(), digest_size=8).hexdigest()


def _weighted(
    choices: list[tuple[str, list[int], list[str]]], shares: Sequence[tuple[str, float]], luck: float
) -> tuple[str, list[int], list[str]]:
    weight = dict(shares)
    total = sum(weight.get(mode, 1.0) for mode, _, _ in choices)
    for choice in choices:
        luck -= weight.get(choice[0], 1.0) / total
        if luck < 0:
            return choice
    return choices[-1]


def _pick(options: Sequence[Option], luck: float) -> Option:
    return options[min(int(luck * len(options)), len(options) - 1)]


def _pick_other(options: Sequence[int], own: int, luck: float) -> int:
    """Any of ``options`` but ``own``, each as likely: the last one stands in for ``own`` itself."""
    found = options[min(int(luck * (len(options) - 1)), len(options) - 2)]
    return options[-1] if found == own else found
