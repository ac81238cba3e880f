"""Whatever arrives as a request is either a request that comes back from its JSON, or one line of error."""

import json
import math
import random
import re
from typing import Any

import pytest

from imprompt.errors import ImpromptError, UsageError
from imprompt.output.record import Record
from imprompt.schema.prompt import ImagePrompt, TextRegion
from imprompt.schema.request import ControlRef, Request

SOUND: list[dict[str, Any]] = [
    {"prompt": "an owl", "images": ["a.png"], "seed": 3},
    {
        "prompt": "an owl", "negative": "blurry", "base": "sd15", "adapter": "sd15-plus", "steps": 5,
        "guidance": 6.5, "size": [512, 768], "scheduler": "ddim", "count": 2, "scale": 0.7,
        "images": [{"image": "a.png", "scale": 0.5, "start": 0.1, "end": 0.9, "profile": "style",
                    "mask": "m.png", "feather": 0.1, "curve": "fade-in"}],
        "regions": [{"text": "a dog", "mask": "m.png"}],
        "controls": [{"kind": "canny", "path": "c.png", "scale": 0.5, "end": 0.7, "favor": "prompt"}],
        "loras": [{"path": "l.safetensors", "weight": 0.5}],
        "embeddings": [{"path": "e.safetensors", "token": "<x>"}],
    },
    {"task": "edit", "image": "a.png", "strength": 0.5, "prompt": "x"},
    {"task": "inpaint", "image": "a.png", "mask": "m.png", "prompt": "x", "hashes": {"a.png": "0" * 64}},
    {"task": "animate", "prompt": "x", "frames": 8, "fps": 8, "motion": "m", "shared_noise": 0.5,
     "images": [{"image": "a.png", "at": 0}], "context": 8, "noise_path": "loop"},
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 0.5, 1e9, -1e38, 2**53, 2**70, 10**400, "", "x", "0:1,1:0", "a\0b",
    "~nobody/x",
    "x" * 300, "x" * 30_000, "\ud800", "\x1b[2J\n", "[[[", [], {}, [[]], [None], ["a.png", "b.png"], {"a": 1},
    {"image": "a.png"}, [{"image": "a.png"}] * 70, {"path": None}, [0.1, 0.2], [1e9] * 9, "each", "fp16",
    "cuda:9",
    "512", "512x512", "513x8", [512, 512], ["512", "512"], [8, 8, 8], "../../etc/passwd", "http://x/y.png",
    "owner/name", {"default": 0}, {"up_blocks.1": "x"}, {"*": 1, "up": [1, 2]}, "style:1e9", "nan", "inf",
]  # fmt: skip


def mutated(value: Any, chance: random.Random, depth: int = 0) -> Any:
    """The value with one thing in it replaced, removed, added or wrapped."""
    if depth < 4 and value and isinstance(value, dict | list) and chance.random() < 0.8:
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        key = chance.choice(list(copy)) if isinstance(copy, dict) else chance.randrange(len(copy))
        match chance.randrange(5):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, dict):
                copy[chance.choice([*FIELDS, "unknown", "__class__", "a\nb"])] = chance.choice(VALUES)
            case _:
                copy[key] = mutated(copy[key], chance, depth + 1)
        return copy
    match chance.randrange(8):
        case 0:
            return [value]
        case 1:
            nested = value
            for _ in range(chance.choice([3, 70, 3000])):
                nested = [nested]
            return nested
        case 2 if isinstance(value, str):
            at = chance.randrange(len(value) + 1)
            return value[:at] + chance.choice(["\0", "\x1b", ",", "=", ":", "\u202e", "9" * 50]) + value[at:]
        case 3 if isinstance(value, int | float):
            return chance.choice([-value, repr(value)[:50], [value], value * 10**6, math.copysign(0.0, -1)])
    return chance.choice(VALUES)


FIELDS = sorted(
    {*Request.model_fields, "image", "path", "kind", "text", "weights", "at", "profile", "curve", "model"}
)


def text_of(value: Any) -> str:
    """JSON, also of what no JSON text should hold; lists that are too deep for the encoder by hand."""
    try:
        return json.dumps(value)
    except RecursionError:
        depth = 0
        while isinstance(value, list) and len(value) == 1:
            value, depth = value[0], depth + 1
        return "[" * depth + "0" + "]" * depth if depth else '{"prompt": ' + "[" * 3000 + "]" * 3000 + "}"


def nested(depth: int) -> Any:
    """An object in an object in an object …"""
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


HUGE = 10**400
ODD: list[Any] = [
    *VALUES, HUGE, -HUGE, [[0, HUGE], [1, 1]], [[0, 1], [HUGE, 2]], {"a": HUGE}, {"up_blocks.1": [HUGE]},
    math.nan, math.inf, b"a", {1, 2}, 1j, object(), "1", "9" * 5000, '{"a":' * 3000 + "1" + "}" * 3000,
    '{"up_blocks.1":' + "9" * 5000 + "}", "0:" + "9" * 400, "strong:1e999", "{", nested(3000),
    [{"path": "a"}, {"image": "b"}], [{"path": "a"}, 3], [{"path": "a"}, None], [{"path": ["a"]}],
    [{"path": "a", "weight": "x"}], [{"path": "a", "at": HUGE}], [["a"]],
]  # fmt: skip


def test_any_value_in_any_field_is_read_or_refused() -> None:
    refused = []
    for value in ODD:
        asked: list[dict[str, Any]] = [
            *({"prompt": "x", "images": [{"path": "a"}], name: value} for name in Request.model_fields),
            *({"images": [{"image": "a", name: value}]} for name in ImagePrompt.model_fields),
            *({"images": [{"path": "a", name: value}, "b"]} for name in ("weight", "at", "noise", "curve")),
            *({"regions": [{"text": "a", "mask": "b", name: value}]} for name in TextRegion.model_fields),
            *(
                {"controls": [{"kind": "canny", "path": "a", name: value}]}
                for name in ControlRef.model_fields
            ),
        ]
        for fields in asked:
            try:
                Request.from_mapping(fields)
            except ImpromptError as error:
                refused.append(str(error))
    assert len(refused) > 1000
    assert not [said for said in refused if "\n" in said]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"images": [{"path": "a"}, {"image": "b"}]}, "images.1: it has no `path`"),
        ({"images": [{"path": "a"}], "guidance": "strong"}, "guidance: input should be a valid number"),
        ({"images": [{"image": "a", "curve": [[0, HUGE]]}]}, "is not a finite number"),
        ({"images": [{"image": "a", "profile": {"up_blocks.1": HUGE}}]}, "a finite number is expected"),
        ({"images": [{"image": "a", "profile": '{"a":' * 3000 + "1" + "}" * 3000}]}, "nested too deeply"),
        ({"images": [{"image": "a", "profile": nested(3000)}]}, "nested too deeply"),
        ({"images": [{"image": "a", "noise": 0.5}]}, "KIND or KIND:STRENGTH is expected"),
        ({"images": [{"image": "a", "select": 0.5}]}, "is no list of tokens"),
    ],
)
def test_an_odd_value_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        Request.from_mapping(fields)


def test_5000_requests_are_read_or_refused_in_one_line() -> None:
    chance = random.Random(0)
    read = 0
    messages = set()
    for number in range(5000):
        value: Any = SOUND[number % len(SOUND)]
        for _ in range(chance.choice([1, 1, 2, 4])):
            value = mutated(value, chance)
        text = text_of(value)
        if chance.random() < 0.05:
            at = chance.randrange(len(text))
            text = text[:at] + chance.choice(["", "}", "NaN", "\\ud800", "\x00", '"']) + text[at + 1 :]
        try:
            request = Request.from_json(text)
        except ImpromptError as error:
            messages.add(str(error))
            continue
        read += 1
        assert Request.from_json(request.to_json()) == request
        assert Record.from_json(Record(request).to_json()).request == request
        assert all(line.isprintable() for line in Record(request).lines())
    long = [message for message in messages if "\n" in message or len(message) > 2000]
    assert long == []
    assert read > 300
    assert len(messages) > 500
