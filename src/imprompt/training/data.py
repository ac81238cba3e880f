"""From rows to what each training step shows: target, reference, caption, and what is dropped.

Every draw is a function of ``(run seed, global sample index, purpose)``; sample ``i`` of step ``s`` has the
index ``s × samples per step + i``. So a resumed run draws what the uninterrupted one would have drawn, and
two processes with a batch of 4 draw what one with 8 draws. Held-out pictures never enter the lists that
targets and references are drawn from.
"""

from __future__ import annotations

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
from imprompt.io import seed_for
from imprompt.training.config import ANY_CAPTION, ANY_PICTURE, Augmentation, TrainConfig

WHITE = (255, 255, 255)
LEAST_VALIDATION = 4
BUCKETS = (0.5, 0.6, 0.75, 0.875, 1.0, 8 / 7, 4 / 3, 5 / 3, 2.0)
"""Proportions, width to height, of pictures that are not cropped to squares."""
Option = TypeVar("Option")


def generator_for(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A generator that depends on nothing but its three arguments (see :func:`imprompt.io.seed_for`)."""
    return torch.Generator().manual_seed(seed_for(seed, index, purpose))


def bucket_size(width: int, height: int, side: int, multiple: int) -> tuple[int, int]:
    """The (width, height) of about ``side²`` pixels, multiples of ``multiple``, nearest in proportions."""
    ratio = min(BUCKETS, key=lambda each: abs(each - width / height) / each)
    wide = max(1, round(side * ratio**0.5 / multiple)) * multiple
    return wide, max(1, round(side / ratio**0.5 / multiple)) * multiple


def crop_box(own_width: int, own_height: int, width: int, height: int) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of the largest centred part with the proportions ``width:height``.

    Target and reference are both made from this one crop, so that they show the same thing.
    """
    wide = min(own_width, max(1, round(own_height * width / height)))
    high = min(own_height, max(1, round(own_width * height / width)))
    left, top = (own_width - wide) // 2, (own_height - high) // 2
    return left, top, left + wide, top + high


def augment(image: Image.Image, strength: Augmentation, key: str) -> Image.Image:
    """A changed version of a reference picture: cropped or shrunk, shifted, rotated, mirrored and tinted, on
    white. The same ``key`` gives the same version."""
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
    flips: list[int] = field(default_factory=list)
    """1 where the target is mirrored."""


class Plan:
    """Decides what every training step shows.

    ``rows`` are all rows; ``unusable`` the numbers of those whose picture cannot be read; ``keys`` a hash of
    each picture's content; ``sizes`` each target's (width, height): samples of one step have one size;
    ``per_step`` the samples of a step over all processes. Only rows of the split ``train`` are drawn; when no
    row is held out, at least four of them, chosen by their keys, are set aside for validation (a third of
    them where there are fewer than twelve).
    Raises :class:`InputError` when nothing is left to train on, :class:`UsageError` when a kind of reference
    or caption asked for exists for no picture.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        config: TrainConfig,
        *,
        keys: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        per_step: int,
        unusable: Collection[int] = (),
    ) -> None:
        self.config, self.rows = config, list(rows)
        self._references = config.references or (("self", 1.0),)
        self._drop_text = config.drop_text or 0.0
        self.keys, self.sizes, self.per_step = keys, sizes, per_step
        self._split([(index, row) for index, row in enumerate(rows) if index not in unusable])
        self._partners = self._find_partners()
        self._choices = {index: self._choices_of(index) for index in self.training}
        self._check_references()
        self._epoch: tuple[int, list[int]] = (0, self._order(0))

    def _split(self, usable: Sequence[tuple[int, Row]]) -> None:
        """Set rows aside for validation: those held out, or some of the training rows."""
        config = self.config
        training = [index for index, row in usable if row.trainable]
        held_out = [index for index, row in usable if not row.trainable]
        by_hash = sorted(held_out or training, key=lambda index: self.keys[index])
        count = Counter(self.keys[index] for index in training)
        self.copies = len(training) - len(count)
        """How many training pictures are copies of others."""
        if held_out:
            self.validation = by_hash[: config.validation_rows]
        else:
            wanted = max(LEAST_VALIDATION, len(training) // 20)
            # A picture that is there twice would be trained on as well.
            single = [index for index in by_hash if count[self.keys[index]] == 1]
            self.validation = single[: min(config.validation_rows, wanted, len(training) // 3)]
            training = sorted(set(training) - set(self.validation))
        if not training:
            raise InputError("no picture to train on: every row is held out or could not be read.")
        self.training = training
        self.validates_on_training_rows = not self.validation
        if not self.validation:
            self.validation = by_hash[: config.validation_rows]

    def _check_references(self) -> None:
        there = {mode for choices in self._choices.values() for mode, _, _ in choices}
        for mode, _ in self._references:
            if mode == ANY_PICTURE and mode not in there:
                raise UsageError(
                    "references: no training picture has a caption and another picture beside it; show each "
                    "itself (--set 'references=[[\"self\",1]]')."
                )
            if mode not in there:
                raise UsageError(
                    f"no training picture has another picture of its group '{mode}' and a caption of the "
                    f"kinds {list(self.config.caption_kinds(mode))}; check 'groups' and 'captions' in the "
                    "metadata or leave this reference out."
                )

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
        return self.rows[index].caption

    def other_caption(self, index: int) -> str:
        """A caption of some training picture of other groups that has another one; without its style where
        captions have kinds."""
        row = self.rows[index]
        differ = [
            other for other in self.training if self.rows[other].caption != row.caption
        ] or self.training
        others = [other for other in differ if self.rows[other].groups != row.groups] or differ
        other = self.rows[others[int(self.keys[index][:16], 16) % len(others)]]
        return next(
            (other.captions[kind][0] for kind in ("concept", *other.captions) if other.captions.get(kind)), ""
        )

    def samples(self, indices: Sequence[int]) -> Batch:
        """The samples of these global indices.

        Every training picture is shown as often as it repeats in an epoch, in an order of its own for each
        epoch.
        """
        config = self.config
        batch = Batch([], [], [], [], torch.zeros(len(indices), dtype=torch.bool))
        for place, index in enumerate(indices):
            target = self._at(index)
            luck = torch.rand(6, generator=generator_for(config.seed, "draw", index)).tolist()
            for_mode, for_reference, for_caption, for_view, for_drop, for_flip = luck
            mode, partners, texts = _weighted(self._choices[target], self._references, for_mode)
            drop_text = for_drop < self._drop_text
            if drop_text:  # without words, another picture as reference would teach to ignore it
                mode = "self"
            batch.modes.append(mode)
            batch.targets.append(target)
            batch.references.append(
                target if mode == "self" else _pick_other(partners, target, for_reference)
            )
            batch.views.append(int(for_view * config.views))
            drop_image = self._drop_text <= for_drop < self._drop_text + config.drop_image
            both = 0 <= for_drop - self._drop_text - config.drop_image < config.drop_both
            batch.captions.append("" if drop_text or both else _pick(texts, for_caption))
            batch.image_dropped[place] = drop_image or both
            batch.flips.append(int(for_flip < config.flip))
        return batch

    def _at(self, index: int) -> int:
        epoch, position = divmod(index, len(self._epoch[1]))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][position]

    def _order(self, epoch: int) -> list[int]:
        """The targets of one epoch, which has the same length every time."""
        generator = generator_for(self.config.seed, "order", epoch)
        sizes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index in self.training:
            sizes[self.sizes[index]] += [index] * self.rows[index].repeats
        if len(sizes) == 1:
            return _shuffled(next(iter(sizes.values())), generator)
        steps: list[list[int]] = []
        for _, members in sorted(sizes.items()):
            order = _shuffled(members, generator)
            order += (order * self.per_step)[: -len(order) % self.per_step]  # fill the last step
            steps += [order[at : at + self.per_step] for at in range(0, len(order), self.per_step)]
        return [index for step in _shuffled(steps, generator) for index in step]

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
        for mode, _ in self._references:
            texts = self._texts_of(row, mode)
            if mode == "self":  # a picture without a caption still teaches what it looks like
                choices.append((mode, [index], texts or [""]))
                continue
            group = mode, row.groups.get(mode, "")
            pictures = self.training if mode == ANY_PICTURE else self._partners.get(group, [])
            if texts and len(pictures) > 1:
                choices.append((mode, pictures, texts))
        # A row that allows none of the kinds asked for (an only child of its group) is its own reference.
        return choices or [
            ("self", [index], [text for texts in row.captions.values() for text in texts] or [""])
        ]

    def _texts_of(self, row: Row, mode: str) -> list[str]:
        """The captions of a row that may go with a kind of reference."""
        kinds = self.config.caption_kinds(mode)
        chosen = row.captions if ANY_CAPTION in kinds else kinds
        return [text for kind in chosen for text in row.captions.get(kind, ())]


def _shuffled(values: Sequence[Option], generator: torch.Generator) -> list[Option]:
    return [values[place] for place in torch.randperm(len(values), generator=generator).tolist()]


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
    """Pick uniformly from ``options``, excluding ``own``."""
    found = options[min(int(luck * (len(options) - 1)), len(options) - 2)]
    return options[-1] if found == own else found
