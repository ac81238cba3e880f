"""What training reads of a drawn picture: numbers, classes and the tokens of captions, as arrays.

They are made beside the pictures (``pool.py``), so that a training step chooses rows of arrays alone.
"""

import hashlib
import json

import numpy as np
from draw import BACKGROUNDS, LOOKS, PLAIN_SEED, caption
from icons import HERE, split_of
from numpy.random import Generator, default_rng

LENGTH = 32
"""Tokens of a caption; the longest has 26."""
WORDS = sorted(json.loads((HERE / "concepts.json").read_text()))
HELD_OUT = np.array([[split_of(f"{word}|{look}") != "train" for word in WORDS] for look in LOOKS])
"""Of each look, the concepts that are never drawn in it for training (bool, looks × concepts). A classifier
that is not told learns that they do not exist there: the image encoder's named 25 % of the validation
pictures instead of 9 once it was told."""
ANY, ALONE, MORE, PARTS, ABSENT = 0, 4, 5, 6, 7
"""Captions of a picture: four that say any part of it, one with the concept alone, one with a little more,
one of a few parts, and one for where the picture itself is not shown."""
CAPTIONS = 8


def say(rng: Generator) -> tuple[bool, bool, bool, bool]:
    """Which of concept, look, palette and background a caption names; a tenth of all captions are empty."""
    if rng.uniform() < 0.1:
        return (False,) * 4
    return tuple(bool(rng.uniform() < p) for p in (0.9, 0.8, 0.75, 0.75))  # type: ignore[return-value]


def say_plain(rng: Generator) -> tuple[bool, bool, bool, bool]:
    """Of a plain picture, mostly what it shows alone."""
    return say(rng) if rng.uniform() < 0.3 else (True, False, False, False)


def captions(fact: dict, seed: int, index: int) -> list[str]:
    """The ``CAPTIONS`` captions of a picture, the same for the same (seed, index)."""
    rng = default_rng([seed, index, 21])
    some = [say_plain(rng) if seed == PLAIN_SEED else say(rng) for _ in range(ALONE)]
    more = (True, *(bool(rng.uniform() < 0.5) for _ in range(3)))
    parts = tuple(bool(rng.uniform() < 0.4) for _ in range(4))
    absent = (True, *(bool(rng.uniform() < 0.6) for _ in range(3)))
    chosen = [*some, (True, False, False, False), more, parts, absent]
    return [caption(fact, rng, one) for one in chosen]  # type: ignore[arg-type]


def numbers(fact: dict) -> np.ndarray:
    """Colours of the background, palette and placement, each about -1…1 (21,)."""
    place = np.mean(fact["places"], 0)
    ground = np.float32(fact["ground_colours"])[[0, -1]]
    return np.concatenate(
        [ground.ravel() / 128 - 1, np.float32(fact["ramp"]).ravel() / 128 - 1, place[:3] * 2 - 1]
    ).astype(np.float32)


def classes(fact: dict) -> list[int]:
    """Concept (-100: none), look, kind of background, how many things less one, and a number for the icon."""
    concept = WORDS.index(fact["concept"]) if fact["concept"] else -100
    code = int.from_bytes(hashlib.sha256(str(fact["code"]).encode()).digest()[:3], "big")
    return [concept, LOOKS.index(fact["look"]), BACKGROUNDS.index(fact["ground"]), fact["count"] - 1, code]
