"""A training configuration says what is wrong with it, and what of it a resumed run may change."""

import json
import math

import pytest

from imprompt.errors import UsageError
from imprompt.training.config import TrainConfig


def checked(**values):
    return TrainConfig(**{"data": "pictures", "output": "run", **values})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lr": 0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"steps": 0}, "steps"),
        ({"drop_text": 0.6, "drop_image": 0.6}, "exceed 1"),
        ({"warmup": 10, "steps": 10}, "warmup"),
        ({"references": [("self", 0.5), ("style", 0.4)]}, "sum to 1"),
        ({"references": [("self", 0.5), ("self", 0.5)]}, "once"),
        ({"references": []}, "at least one"),
        ({"references": [("self", 1.5), ("style", -0.5)]}, "above 0"),
        ({"kind": "linnear"}, "linear"),
        ({"learning_rate": 1e-4}, "learning_rate: no such field; known are data, .*, lr"),
        ({"stepz": 5}, "stepz: no such field; did you mean 'steps'"),
        (
            {"augmentation": {"colr": 0.1}},
            "augmentation: colr: no such field; did you mean 'colour'.*crop",
        ),
        ({"kind": "plu"}, "plus"),
        ({"augmentation": {"crop": 1.0}}, "crop"),
        ({"betas": [1.5, 0.9]}, "betas"),
        ({"betas": [0.9, 1]}, "betas"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(values, says):
    with pytest.raises(UsageError, match=says) as caught:
        checked(**values)
    assert "\n" not in str(caught.value)


def test_a_file_is_read_and_overrides_win(tmp_path):
    (tmp_path / "run.toml").write_text('data = "pictures"\noutput = "run"\nsteps = 7\nlr = 1e-3\n')
    config = TrainConfig.read(tmp_path / "run.toml", steps=9)
    assert (config.steps, config.lr) == (9, 1e-3)
    (tmp_path / "run.json").write_text(config.model_dump_json())
    assert TrainConfig.read(tmp_path / "run.json") == config


def test_overrides_of_a_table_leave_the_rest_of_it(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('data = "d"\noutput = "r"\n[augmentation]\ncrop = 0.5\nflip = 0.0\n')
    changed = TrainConfig.read(file, augmentation={"flip": 1.0}, captions={"style": ["full"]})
    assert (changed.augmentation.crop, changed.augmentation.flip) == (0.5, 1.0)
    assert changed.captions == {"style": ("full",)}


def test_a_resumed_run_takes_what_it_does_not_state_from_its_course():
    course = {"steps": 20, "lr": 3e-4, "warmup": 6}
    assert checked().following(course).course() == course
    assert checked(steps=5).following(course).course() == {"steps": 5, "lr": 3e-4, "warmup": 4}
    stated = {"steps": 30, "lr": 1e-3, "warmup": 0}
    assert checked(**stated).following(course).course() == stated


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{"),
        ("a.toml", "x ="),
        ("gone.json", None),
        ("deep.json", "[" * 100_000),
        ("twice.json", '{"data": "d", "output": "o", "steps": 5, "steps": 7}'),
        ("list.json", "[]"),
    ],
)
def test_an_unreadable_file_is_a_usage_error(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=name):
        TrainConfig.read(tmp_path / name)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.toml").write_text('data = "d"\noutput = "o"', encoding="utf-8-sig")
    (tmp_path / "a.json").write_text('{"data": "d", "output": "o"}', encoding="utf-8-sig")
    assert TrainConfig.read(tmp_path / "a.toml") == TrainConfig.read(tmp_path / "a.json")


def test_a_resampler_is_called_plus():
    assert checked(kind="plus").kind == checked(kind="resampler").kind == "plus"


def test_what_is_left_open_is_chosen_by_the_pictures_and_the_start():
    few = checked().resolved("linear", 20, started=True, captioned=True)
    assert (few.steps, few.lr, few.warmup, few.validate_every) == (60, 5e-5, 6, 6)
    assert (few.references, few.drop_text) == ((("any", 1.0),), 0.5)
    assert checked().resolved("linear", 100, started=True, captioned=True).steps == 60
    assert checked().resolved("linear", 100, started=True).steps == 300
    many = checked().resolved("linear", 20_000)
    assert (many.steps, many.lr, many.warmup) == (20_000, 1e-4, 500)
    assert (many.references, many.drop_text) == ((("self", 1.0),), 0.05)
    stated = {
        "steps": 7, "lr": 1.0, "warmup": 0, "validate_every": 5, "drop_text": 0.2,
        "references": (("style", 1.0),),
    }  # fmt: skip
    config = checked(**stated).resolved("plus", 20, started=True, captioned=True)
    assert {name: getattr(config, name) for name in stated} == stated


@pytest.mark.parametrize(
    ("kind", "pictures", "given"),
    [
        ("plus", 3, {}), ("plus", 101, {}), ("faceid", 20, {}), ("plus", 20, {"captioned": False}),
        ("plus", 20, {"started": False}),
    ],
)  # fmt: skip
def test_only_a_few_captioned_pictures_and_a_trained_start_are_told_apart(kind, pictures, given):
    config = checked().resolved(kind, pictures, **{"started": True, "captioned": True} | given)
    assert (config.references, config.drop_text, config.lr) == ((("self", 1.0),), 0.05, 1e-4)


def test_dropped_text_leaves_room_for_what_else_is_dropped():
    config = checked(drop_image=0.6, drop_both=0.1).resolved("plus", 20, started=True, captioned=True)
    assert config.drop_text == pytest.approx(0.3)


def test_identity_leaves_out_what_a_resumed_run_may_change():
    first, second = checked(steps=10, workers=1), checked(steps=20, workers=4, resume=True)
    assert first.identity() == second.identity()
    assert first.identity() == checked(lr=2e-4).identity()
    assert first.identity() != checked(ema=0.5).identity()
    json.dumps(first.identity())
