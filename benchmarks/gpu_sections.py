"""The sections of gpu.py, which starts this file once for each: see there.

python benchmarks/gpu_sections.py sdxl folder [--device cuda] [--seconds 8] [--quick]
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
        base, side, rounds = ("emoji", None, 2) if run.quick else ("sd15", 512, 12)
        run.add(
            "training", training.compared(Path(place), base, 2 if run.quick else 8, side, run.device, rounds)
        )


def drawn(run: Run) -> None:
    """Whole generations of the bundled model over diffusers'."""
    for dtype in ("float32",) if run.quick else ("float32", "bfloat16"):
        for count in (1,) if run.quick else (1, 8):
            found = whole.compared(
                count, 2 if run.quick else 20, 1 if run.quick else 5, device=run.device, dtype=dtype
            )
            run.add(f"whole, {dtype}, {count}", found)


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
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print("ready", flush=True)
    sys.stdin.readline()
    run = Run(args.section, args.out, args.device, args.seconds, args.quick)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    SECTIONS[args.section](run)


if __name__ == "__main__":
    main()
