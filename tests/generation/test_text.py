"""Texts longer than the encoder: read in chunks to the last word, with weights and breaks, or it is said."""

import numpy as np
import pytest
import torch

from imprompt.generation.engine import Engine
from imprompt.generation.text import chunk_count, cut_words
from imprompt.schema.prompt import TextRegion
from imprompt.schema.request import Request
from tiny import TEXT_WIDTH, tiny_sd

LONG = (
    "a cute smiling brown bear with a little blue hat that sits on the green grass beside "
    "two very large old blue houses, neon style"
)


@pytest.fixture(scope="module")
def bundled():
    return Engine()


def drawn(engine, prompt, **fields):
    result = engine.run(Request(prompt=prompt, steps=2, seed=1, **fields))
    return np.asarray(result.images[0]).astype(int), result.notes


def test_the_last_word_of_a_long_prompt_matters(bundled):
    one, notes = drawn(bundled, LONG)
    other, _ = drawn(bundled, LONG.replace("neon", "clay"))
    assert not np.array_equal(one, other)
    assert not any("does not read" in note for note in notes)


def test_a_long_negative_goes_with_a_short_prompt(bundled):
    one, _ = drawn(bundled, "a bear", negative=LONG)
    other, _ = drawn(bundled, "a bear", negative=LONG.replace("neon", "clay"))
    assert not np.array_equal(one, other)


def test_a_weight_of_one_is_the_word_and_another_is_not(bundled):
    plain, _ = drawn(bundled, "a bear, neon style")
    one, _ = drawn(bundled, "a (bear:1.0), neon style")
    more, _ = drawn(bundled, "a (bear:1.5), neon style")
    assert np.abs(one - plain).max() <= 1
    assert np.abs(more - plain).max() > 2


def test_a_break_begins_a_chunk(bundled):
    apart, _ = drawn(bundled, "a bear BREAK neon style")
    together, _ = drawn(bundled, "a bear neon style")
    assert not np.array_equal(apart, together)


def test_a_regions_text_that_is_cut_is_said(bundled, pictures):
    region = TextRegion(LONG, str(pictures / "mask.png"))
    _, notes = drawn(bundled, "a bear", regions=[region])
    (note,) = (note for note in notes if "does not read" in note)
    assert note.startswith("regions.0.text: the text encoder does not read its end: '")
    assert note.endswith("neon style'")


def test_weights_in_a_regions_text_are_said_to_be_words(bundled, pictures):
    region = TextRegion("a (red:1.4) hat <lora:toy:0.8>", str(pictures / "mask.png"))
    _, notes = drawn(bundled, "a (big:1.2) bear", regions=[region])
    assert notes == (
        "regions.0.text: '<lora:toy:0.8>' is read as words; a LoRA is given by loras (--lora)",
        "regions.0.text: (word:1.3) and BREAK are read as they are written; regional text has no weights",
    )


def test_tags_of_webui_are_said_to_be_words(bundled):
    _, notes = drawn(bundled, "a <lora:toy:0.8> cat", negative="<hypernet:x:1>")
    assert notes == (
        "prompt: '<lora:toy:0.8>' is read as words; a LoRA is given by loras (--lora)",
        "negative: '<hypernet:x:1>' is read as words; a LoRA is given by loras (--lora)",
    )
    assert not drawn(bundled, "a <cat> & lora:toy")[1]


def test_long_and_short_texts_of_a_batch_are_drawn_as_alone(bundled):
    requests = [Request(prompt=text, steps=2, seed=1) for text in (LONG, "a bear")]
    for result, request in zip(bundled.run_batch(requests), requests, strict=True):
        alone = bundled.run(request).images[0]
        assert np.abs(np.asarray(result.images[0]).astype(int) - np.asarray(alone).astype(int)).max() <= 1


def test_what_fits_is_not_cut(bundled):
    bundled.run(Request(prompt="a", steps=1, seed=1))
    from imprompt.generation.families import find_base
    from imprompt.generation.pipelines import load

    pipe = load(find_base("emoji"), "generate", None)
    assert cut_words(pipe, "a bear, neon style") == ""
    assert cut_words(pipe, LONG).endswith("neon style")


def test_a_learnt_word_counts_as_its_vectors():
    """A text that fits by its words, and not by the vectors that stand for one of them."""
    pipe = tiny_sd()
    pipe.load_textual_inversion({"zorp": torch.randn(8, TEXT_WIDTH)}, token="zorp")
    assert cut_words(pipe, "aaaa bbbb cat") == ""
    assert cut_words(pipe, "aaaa bbbb zorp").startswith("zorp_")
    assert chunk_count(pipe, "aaaa bbbb cat") == 0
    assert chunk_count(pipe, "aaaa bbbb zorp") == 2
