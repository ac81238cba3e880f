"""That a compiled transformer compiles nothing anew for another prompt, in a process of its own: the run-time
type check of the tests' own process cannot be traced."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPT = """
import torch
from {module} import {draw}, left, ours, tinydit
from tiny import picture

pipe, graphs = tinydit.flux(), []
adapter = ours(pipe)
adapter.set_prompt(picture(1), scale=0.5, end=0.9)
wanted = {draw}(pipe)
pipe.transformer = torch.compile(
    pipe.transformer, backend=lambda graph, inputs: graphs.append(graph) or graph, dynamic=False
)
torch.testing.assert_close({draw}(pipe), wanted)
count = len(graphs)
for fields in {prompts}:
    adapter.set_prompt(picture(2), **fields)
    {draw}(pipe)
assert count and len(graphs) == count, (count, len(graphs))
"""


def check_one_graph(module: str, draw: str, prompts: str) -> None:
    """Draw with ``draw`` of a module in tests/parity, then with each of ``prompts`` (Python, keywords of
    ``set_prompt``), and fail if that compiled anything."""
    paths = os.pathsep.join([str(HERE / "parity"), str(HERE), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(module=module, draw=draw, prompts=prompts)],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
