"""Measure the start-up time of ``imprompt --help`` and ``imprompt generate`` against importing torch and
diffusers.

Prints JSON: seconds, the fastest of several runs, and the ratio of a generation with 20 steps to the imports.

    python benchmarks/start.py [--runs 3]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds(command: list[str], runs: int) -> float:
    """Wall time of the fastest of ``runs`` runs."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return round(min(times), 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    imprompt = str(Path(sys.executable).with_name("imprompt"))
    with tempfile.TemporaryDirectory() as folder:
        cat, owl = (str(Path(folder) / name) for name in ("cat.png", "owl.png"))
        draw = [imprompt, "generate", "--steps", "20"]
        figures = {
            "help_s": seconds([imprompt, "--help"], runs),
            "import_s": seconds([sys.executable, "-c", "import torch, diffusers"], runs),
            "generate_20_steps_s": seconds([*draw, "a cat", "-o", cat], runs),
            "repeat_with_image_s": seconds([*draw, "an owl", "--image", cat, "-o", owl], runs),
        }
    figures["generate_to_import"] = round(figures["generate_20_steps_s"] / figures["import_s"], 2)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
