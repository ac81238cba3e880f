"""Requests on a compiled denoiser: the same pictures, and nothing is compiled again for another prompt."""

from pathlib import Path

import pytest
import torch

from compiled import run_unchecked
from imprompt.errors import ModelError, UsageError
from imprompt.generation.compiling import check_compiler
from imprompt.generation.engine import Engine
from imprompt.schema.request import Request

COMPILING = """
import sys
from functools import partial

import numpy as np
import torch
from torch._dynamo.utils import counters

from imprompt.generation.engine import Engine
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.request import Request

# The graphs are those of every backend; this one needs no C++ compiler.
torch.compile = partial(torch.compile, backend="eager")
base, pictures = sys.argv[1:]
ref, other, mask = (f"{pictures}/{name}.png" for name in ("ref", "other", "mask"))
plain = Request(
    base=base, adapter=f"{base}/adapters", prompt="a cat", steps=3, seed=5, guidance=4, size=32,
    images=[ImagePrompt(ref, scale=0.8)],
)

def drawn(request):
    return np.asarray(engine.run(request).images[0]).astype(int)


shown = [
    ImagePrompt(ref, scale=0.3), ImagePrompt(ref, scale=0), ImagePrompt(other, scale=0.8),
    ImagePrompt(ref, scale=0.8, mask=mask), ImagePrompt(other, scale=0.8, mask=mask, feather=0.5),
    ImagePrompt(ref, scale=0.8, end=0.4), ImagePrompt(ref, scale=0.8, curve="fade-out"),
    ImagePrompt(ref, scale=0.8, profile="style"), ImagePrompt(ref, scale=0.8, profile=(1, 0, 0, 0.5)),
    ImagePrompt(ref, scale=0.8, scaling="k+v"), ImagePrompt(ref, scale=0.8, negative=other),
]
engine = Engine()
wanted = [drawn(plain.replace(images=[prompt])) for prompt in shown]
bare = drawn(plain.replace(images=[], adapter=None))
for how in ("regional", "full"):
    torch._dynamo.reset()
    counters.clear()
    first = plain.replace(compile=how)
    engine = Engine()
    drawn(first)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0, how
    for prompt, picture in zip(shown, wanted):
        found = drawn(first.replace(images=[prompt]))
        assert np.abs(found - picture).max() <= 1, (how, prompt)
        assert counters["stats"]["unique_graphs"] == graphs, (how, prompt)
    assert np.abs(drawn(first.replace(images=[], adapter=None)) - bare).max() <= 1, how
    assert engine.run(first).request.compile == how
"""


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")
def test_another_prompt_compiles_nothing_anew_and_draws_as_without_compiling(base, pictures):
    run_unchecked(COMPILING, base, pictures, folder=Path(__file__).parent)


def test_without_a_compiler_one_line_says_so_before_anything_is_loaded(common, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match=r"no C\+\+ compiler 'no-such-compiler' .* leave --compile out"):
        Engine().run(Request(prompt="a cat", compile="full", **common | {"adapter": None}))
    check_compiler(torch.device("cuda"))  # there triton compiles


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speed": "fast", "compile": "full"}, "compile: 'full' .* use 'regional'"),
        ({"offload": "model", "compile": "regional"}, "compile: .* offload 'model' moves it away"),
    ],
)
def test_what_cannot_be_compiled_is_said_in_one_line(fields, message):
    with pytest.raises(UsageError, match=message):
        Request(prompt="a cat", **fields)
