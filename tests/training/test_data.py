"""What a step shows: drops, references and captions in their shares, nothing held out, always the same."""

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from imprompt.data.rows import Row
from imprompt.errors import InputError, UsageError
from imprompt.training.config import Augmentation, TrainConfig
from imprompt.training.data import Plan, augment, crop_box

CONCEPTS, STYLES = ("cat", "dog", "sun", "cup"), ("noto", "flat", "line")


def config(**values):
    return TrainConfig(**{"data": "x", "output": "y", "batch": 4, **values})


def row(concept, style, split="train"):
    captions = {
        "full": (f"a {concept}, {style} style",),
        "concept": (f"a {concept}",),
        "style": (f"{style} style",),
    }
    return Row(Path(f"{style}/{concept}.png"), captions, {"concept": concept, "style": style}, split)


ROWS = [
    row(concept, style, "held_out_concept" if concept == "cup" else "train")
    for concept in CONCEPTS
    for style in STYLES
]
MIXED = {"references": [("self", 0.4), ("concept", 0.3), ("style", 0.3)]}


def plan_of(rows, config, **more):
    """The plan of rows whose pictures have one size and are told apart by their names."""
    keys = [hashlib.blake2b(row.name.encode(), digest_size=8).hexdigest() for row in rows]
    steps = config.batch * config.accumulate
    return Plan(rows, config, keys=keys, sizes=[(1, 1)] * len(rows), per_step=steps, **more)


def draw(plan, number):
    """Batch ``number`` of the run."""
    size = plan.config.batch
    return plan.samples(range(number * size, (number + 1) * size))


def draws(plan, count=300):
    return [draw(plan, number) for number in range(count)]


def test_held_out_pictures_are_neither_targets_nor_references():
    plan = plan_of(ROWS, config(**MIXED))
    held_out = {index for index, item in enumerate(ROWS) if not item.trainable}
    for batch in draws(plan):
        assert not held_out & {*batch.targets, *batch.references}
    assert set(plan.validation) == held_out


def test_captions_of_held_out_concepts_are_never_drawn():
    plan = plan_of(ROWS, config(**MIXED))
    assert not any("cup" in caption for batch in draws(plan) for caption in batch.captions)


def test_an_unusable_row_is_not_drawn():
    plan = plan_of(ROWS, config(**MIXED), unusable={0, 4})
    for batch in draws(plan, 100):
        assert not {0, 4} & {*batch.targets, *batch.references}


def test_each_reference_goes_with_captions_that_say_what_it_does_not():
    plan = plan_of(ROWS, config(**MIXED, drop_text=0, drop_image=0, drop_both=0))
    seen = Counter()
    for batch in draws(plan):
        for target, reference, caption, mode in zip(
            batch.targets, batch.references, batch.captions, batch.modes, strict=True
        ):
            shown, wanted = ROWS[reference], ROWS[target]
            seen[mode] += 1
            if mode == "self":
                assert reference == target
            elif mode == "style":
                assert reference != target
                assert shown.groups["style"] == wanted.groups["style"]
                assert wanted.groups["concept"] in caption
            else:
                assert reference != target
                assert shown.groups["concept"] == wanted.groups["concept"]
                assert wanted.groups["style"] in caption
    total = sum(seen.values())
    assert seen["self"] / total == pytest.approx(0.4, abs=0.06)
    assert seen["concept"] / total == pytest.approx(0.3, abs=0.06)
    assert seen["style"] / total == pytest.approx(0.3, abs=0.06)


def test_all_other_pictures_of_a_group_are_equally_likely():
    plan = plan_of(ROWS, config(references=[("concept", 1.0)], drop_text=0, drop_both=0))
    seen = Counter(
        batch.references[place]
        for batch in draws(plan, 900)
        for place in range(4)
        if batch.targets[place] == 0
    )
    assert set(seen) == {1, 2}
    assert min(seen.values()) / sum(seen.values()) == pytest.approx(0.5, abs=0.08)


def test_text_image_and_both_are_dropped_in_their_shares():
    plan = plan_of(ROWS, config(drop_text=0.1, drop_image=0.2, drop_both=0.15))
    kinds = Counter(
        (caption == "", bool(dropped))
        for batch in draws(plan, 1500)
        for caption, dropped in zip(batch.captions, batch.image_dropped, strict=True)
    )
    total = sum(kinds.values())
    assert kinds[True, False] / total == pytest.approx(0.1, abs=0.02)
    assert kinds[False, True] / total == pytest.approx(0.2, abs=0.02)
    assert kinds[True, True] / total == pytest.approx(0.15, abs=0.02)


def test_without_words_a_picture_is_its_own_reference():
    plan = plan_of(ROWS, config(**MIXED | {"drop_text": 0.5}))
    pairs = [
        (target == reference, caption == "" and not dropped)
        for batch in draws(plan, 300)
        for target, reference, caption, dropped in zip(
            batch.targets, batch.references, batch.captions, batch.image_dropped.tolist(), strict=True
        )
    ]
    assert all(own for own, wordless in pairs if wordless)
    assert not all(own for own, wordless in pairs if not wordless)


def test_any_other_picture_may_be_the_reference():
    rows = [row(f"thing{number}", f"set{number}") for number in range(8)]
    plan = plan_of(rows, config(references=[("any", 1.0)], drop_text=0.5, drop_image=0, drop_both=0))
    seen = defaultdict(set)
    for batch in draws(plan, 300):
        for target, reference, caption in zip(batch.targets, batch.references, batch.captions, strict=True):
            assert (target == reference) == (caption == "")
            seen[target].add(reference)
    assert all(references == set(plan.training) for references in seen.values())


def test_an_epoch_shows_every_training_picture_once():
    plan = plan_of(ROWS, config(batch=3))
    for epoch in range(3):
        shown = [target for number in range(3) for target in draw(plan, 3 * epoch + number).targets]
        assert sorted(shown) == plan.training


def test_a_draw_depends_on_its_number_alone():
    first, second = plan_of(ROWS, config(**MIXED)), plan_of(ROWS, config(**MIXED))
    forward = [draw(first, number) for number in range(20)]
    backward = [draw(second, number) for number in reversed(range(20))][::-1]
    for one, other in zip(forward, backward, strict=True):
        assert (one.targets, one.references, one.captions, one.views) == (
            other.targets, other.references, other.captions, other.views,
        )  # fmt: skip
        assert torch.equal(one.image_dropped, other.image_dropped)


def test_samples_depend_on_their_indices_and_not_on_the_process_that_asks():
    whole = plan_of(ROWS, config(batch=3)).samples(range(9)).targets
    parts = [plan_of(ROWS, config(batch=3)).samples(range(first, first + 3)).targets for first in (0, 3, 6)]
    assert [target for part in parts for target in part] == whole


def test_captions_lists_every_caption_that_is_drawn_and_the_empty_one():
    plan = plan_of(ROWS, config(**MIXED))
    drawn = {caption for batch in draws(plan) for caption in batch.captions}
    assert drawn <= set(plan.captions)
    assert "" in plan.captions


def test_without_hold_out_a_few_training_pictures_are_set_aside():
    rows = [row(f"thing{number}", "noto") for number in range(100)]
    plan = plan_of(rows, config())
    assert len(plan.validation) == 5
    assert not set(plan.validation) & set(plan.training)
    assert plan_of(rows, config(seed=9)).validation == plan.validation


def test_a_kind_of_reference_that_no_picture_has_is_an_error():
    with pytest.raises(UsageError, match="weather"):
        plan_of(ROWS, config(references=[("weather", 1.0)]))


def test_a_single_picture_has_no_other_to_refer_to():
    with pytest.raises(UsageError, match=r'references=\[\["self",1\]\]'):
        plan_of([row("cat", "noto")], config(references=[("any", 1.0)]))


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(InputError, match="held out"):
        plan_of([row("cat", "noto", "held_out_pair")], config())


@pytest.mark.parametrize(
    ("size", "expected"), [((200, 100), (100, 100)), ((100, 260), (100, 100)), ((7, 7), (7, 7))]
)
def test_the_crop_is_the_largest_centred_part(size, expected):
    left, top, right, bottom = crop_box(*size, 64, 64)
    assert (right - left, bottom - top) == expected


def test_the_crop_is_centred():
    image = Image.new("RGB", (30, 10), "white")
    image.paste("red", (10, 0, 20, 10))
    assert image.crop(crop_box(*image.size, 8, 8)).getcolors() == [(100, (255, 0, 0))]


def test_an_augmented_reference_is_its_keys_alone_and_white_outside():
    image = Image.new("RGB", (64, 64), (0, 80, 200))
    strong = Augmentation(crop=0, shrink=0.5, flip=0, rotate=0, colour=0)
    versions = [augment(image, strong, f"key{number}") for number in range(12)]
    assert [v.tobytes() for v in versions] == [augment(image, strong, f"key{n}").tobytes() for n in range(12)]
    assert len({version.tobytes() for version in versions}) > 3
    colours = {colour for version in versions for _, colour in version.getcolors()}
    assert colours == {(0, 80, 200), (255, 255, 255)}


def test_another_caption_is_not_the_pictures_own_where_captions_repeat():
    said = ["a heart"] * 6 + ["an owl"] * 6
    rows = [Row(Path(f"{n}.png"), {"full": (text,)}) for n, text in enumerate(said)]
    plan = plan_of(rows, config())
    assert all(plan.other_caption(n) not in ("", said[n]) for n in plan.validation)
    alike = plan_of([Row(Path(f"{n}.png"), {"full": ("a heart",)}) for n in range(12)], config())
    assert {alike.other_caption(n) for n in alike.validation} == {"a heart"}
