"""Scripts in processes of their own, without the run-time type check, which torch.compile cannot trace.

One process imports torch, diffusers and imprompt; each script runs in a fork of it.
"""

import multiprocessing
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch._dynamo", "imprompt.generation.engine", "imprompt.training.trainer"])
PARITY = Path(__file__).parent / "parity"
ONE_GRAPH = """
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


def start(script: str, *words: object, folder: Path) -> tuple[BaseProcess, Connection]:
    """Start a script with ``words`` as its arguments, which can import what is in ``folder``. The connection
    says how it ended: None, or what was raised; it is closed before where the process is killed or exits."""
    ours, theirs = _CONTEXT.Pipe()
    child = _CONTEXT.Process(target=_run, args=(script, list(map(str, words)), str(folder), theirs))
    child.start()
    theirs.close()
    return child, ours


def run_unchecked(script: str, *words: object, folder: Path) -> None:
    """Run a script with ``words`` as its arguments; it can import what is in ``folder``. Fail as it does."""
    child, ended = start(script, *words, folder=folder)
    fault = ended.recv()
    child.join()
    assert fault is None, fault


def run_killed(script: str, *words: object) -> None:
    """Run a script with ``words`` as its arguments, and fail unless it ends by SIGKILL."""
    child, ended = start(script, *words, folder=PARITY)
    child.join()
    assert child.exitcode == -signal.SIGKILL, ended.recv()


def check_one_graph(module: str, draw: str, prompts: str) -> None:
    """Draw with ``draw`` of a module in tests/parity, then with each of ``prompts`` (Python, keywords of
    ``set_prompt``), and fail if that compiled anything."""
    run_unchecked(ONE_GRAPH.format(module=module, draw=draw, prompts=prompts), folder=PARITY)


def _run(script: str, words: list[str], folder: str, pipe: Connection) -> None:
    sys.argv = ["script", *words]
    sys.path.insert(0, folder)
    try:
        exec(compile(script, "script", "exec"), {"__name__": "script"})
    except BaseException:
        pipe.send(traceback.format_exc())
    else:
        pipe.send(None)
