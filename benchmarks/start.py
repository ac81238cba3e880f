"""How long a newcomer waits: ``imprompt --help``, and a cold ``imprompt generate``, beside bare imports.

Prints JSON: seconds (the fastest of some runs), and the whole generation as a ratio to importing torch and
diffusers.

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
        out = str(Path(folder) / "cat.png")
        figures = {
            "help_s": seconds([imprompt, "--help"], runs),
            "import_s": seconds([sys.executable, "-c", "import torch, diffusers"], runs),
            "generate_20_steps_s": seconds([imprompt, "generate", "a cat", "--steps", "20", "-o", out], runs),
            "repeat_with_image_s": seconds(
                [
                    imprompt,
                    "generate",
                    "an owl",
                    "--image",
                    out,
                    "--steps",
                    "20",
                    "-o",
                    str(Path(folder) / "owl.png"),
                ],
                runs,
            ),
        }
    figures["generate_to_import"] = round(figures["generate_20_steps_s"] / figures["import_s"], 2)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
