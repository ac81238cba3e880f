"""The Ray Train application of ``deploy/``, with two workers on this machine."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imprompt.training import train

APP = Path(__file__).parents[2] / "deploy" / "ray" / "train_app.py"


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("ray") is None or find_spec("pandas") is None, reason="ray[train] is not installed"
)
def test_two_ray_workers_of_2_learn_what_one_process_of_4_learns(make_config, tmp_path):
    one = make_config(output=tmp_path / "one", batch=4, steps=3, save_dtype="float32")
    two = make_config(output=tmp_path / "two", batch=2, steps=3, save_dtype="float32")
    (tmp_path / "two.json").write_text(two.model_dump_json())
    quick = {"RAY_worker_niceness": "0", "RAY_TRAIN_V2_ENABLED": "1"}  # niced, they starve on busy cores
    command = [sys.executable, APP, tmp_path / "two.json", "--workers", "2", "--restarts", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quick, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    path = done.stdout.splitlines()[-1]
    assert path == str(two.output / "ip-adapter.safetensors")
    first, second = load_file(train(one)), load_file(path)
    assert all(torch.allclose(first[name], second[name], atol=2e-5) for name in first)
