"""What blocks do, measured on a tiny model: the shares' formula, the roles, every setting drawn."""

import json
import math

import pytest
import torch

import tiny
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.encoders.clip import ImageEncoder
from imprompt.evaluation.judge import Judge, JudgeNetwork
from imprompt.evaluation.layers import (
    MEASURES,
    Bench,
    _share,
    _span_of_share,
    ablate,
    as_code,
    chart,
    roles_from,
)
from imprompt.evaluation.report import EvalSet, Shown
from imprompt.schema.profiles import Roles


@pytest.fixture(scope="module")
def bench() -> Bench:
    pipe = tiny.tiny_sd()
    encoder = ImageEncoder(*tiny.tiny_encoder(), name="tiny")
    adapter = IPAdapter.from_state_dict(tiny.random_adapter_state(pipe.unet), image_encoder=encoder).attach(
        pipe
    )
    names = ["cat", "dog", "owl"]
    pictures = tuple(
        Shown(name, "noto", "held_out", {"concept": [name]}, tiny.picture(i)) for i, name in enumerate(names)
    )
    judge = Judge(JudgeNetwork(3, 2), names, ["noto", "blob"])
    return Bench.of(pipe, adapter, judge, EvalSet(pictures, pictures), 3, steps=1, batch=2)


def test_every_block_is_measured_alone_and_left_out(bench: Bench) -> None:
    lines: list[str] = []
    found = ablate(bench, lines.append)
    assert [row["t"] for row in found["blocks"]] == [0, 1, 2, 3]
    assert len(lines) == 5
    for row in found["blocks"]:
        assert set(row["share"]) == {"style", "leak", "layout", "likeness"}
        assert set(MEASURES) < set(row["only"])
        assert all(math.isfinite(value) for value in row["share"].values())
        assert all(low <= high for low, high in row["interval"].values())
    assert found["none"] != found["all"]
    assert json.dumps(found)
    assert chart(found).width > 300
    assert roles_from(found["blocks"])["count"] == 4


def test_pairs_are_of_other_concepts(bench: Bench) -> None:
    assert len(bench.pairs) == 3
    assert all(reference.concept != text.concept for reference, text in bench.pairs)


def test_two_references_are_looked_for_on_their_sides(bench: Bench) -> None:
    found, drawn = bench.sides()
    assert drawn[0].size == (64, 32)
    assert found["pictures"] == 3
    assert 0 <= found["nearer"] <= 1


def test_a_share_is_the_mean_of_what_is_brought_and_what_is_missing() -> None:
    assert _share(0.2, 0.8, only=0.5, without=0.6) == pytest.approx((0.5 + 1 / 3) / 2)
    assert _share(0.5, 0.51, only=0.9, without=0.1) == 0  # nothing to share


def test_a_shares_interval_is_that_of_resampled_pairs_the_same_in_all_settings() -> None:
    nothing = torch.linspace(0, 0.3, 24)
    low, high = _span_of_share(nothing, nothing + 0.5, nothing + 0.25, nothing + 0.25)
    assert (low, high) == pytest.approx((0.5, 0.5))  # what pairs have in common falls out
    only = nothing + 0.5 * (torch.arange(24) % 2)
    low, high = _span_of_share(nothing, nothing + 0.5, only, nothing + 0.25)
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65  # a mean of 24 halves, of which the share is half


def test_roles_follow_from_shares() -> None:
    shares = [(0.1, 0.5, 0.2), (0.6, 0.1, 0.2), (0.2, 0.1, 0.1), (0.1, 0.2, 0.1)]
    rows = [
        {"t": t, "share": dict(zip(("style", "leak", "layout"), three, strict=True))}
        for t, three in enumerate(shares)
    ]
    assert roles_from(rows) == {
        "count": 4,
        "composition": {0: 1.0},
        "style": [1, 2],
        "instant_style": [1],
        "layout": [0, 3],
        "precise": {3: 0.1},
    }
    unsure = [{"style": (-0.1, 0.5), "likeness": (0.0, 0.4)}, {"style": (-0.1, 0.5), "likeness": (0.1, 0.4)}]
    for measured in unsure:
        sure = {"style": (0.1, 0.5), "likeness": (0.1, 0.4)}
        found = roles_from([row | {"interval": measured if row["t"] == 2 else sure} for row in rows])
        assert found["style"] == ([1, 2] if measured["likeness"][0] > 0 else [1])
    code = as_code(roles_from(rows))
    made = eval(code, {"Roles": Roles, "frozenset": frozenset})
    assert (made.count, made.composition, made.style) == (4, {0: 1.0}, {1, 2})
