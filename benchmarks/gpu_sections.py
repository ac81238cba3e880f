"""The sections of gpu.py, which starts this file once for each: see there.

python benchmarks/gpu_sections.py sdxl folder [--device cuda] [--seconds 4] [--quick]
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gpu_transformers
import gpu_unets
import torch
import whole
from gpu_timing import Run

import training


def trained(run: Run) -> None:
    """A training step of the reference recipe over imprompt's."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2**34
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as place:
        base, side, batch, rounds = ("emoji", None, 2, 2) if run.quick else ("sd15", 512, 8, 12)
        run.add("step", training.compared(Path(place), base, batch, side, run.device, rounds))


def drawn(run: Run) -> None:
    """Whole generations of the bundled model over diffusers'."""
    cases = (("float32", 1), ("bfloat16", 1), ("bfloat16", 8), ("float32", 8))
    steps, rounds = (2, 1) if run.quick else (20, 4)
    for dtype, count in cases[: 1 if run.quick else 4]:
        run.add(f"{dtype}, {count}", whole.compared(count, steps, rounds, device=run.device, dtype=dtype))


SECTIONS: dict[str, Callable[[Run], None]] = {
    "sd15": lambda run: gpu_unets.steps(run, "sd15", 64),
    "sdxl": lambda run: gpu_unets.steps(run, "sdxl", 128),
    "flux": gpu_transformers.flux,
    "sd35": gpu_transformers.sd35,
    "training": trained,
    "whole": drawn,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print("ready", flush=True)
    sys.stdin.readline()
    run = Run(args.section, args.out, args.device, args.seconds, args.quick)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    SECTIONS[args.section](run)


if __name__ == "__main__":
    main()
