"""All ratios that need a GPU, in one run of two to three minutes: steps with image prompts on UNets and on
transformers of the published shapes, a training step, and whole generations of the bundled model.

Weights are random where published ones would have to be downloaded: their values cost nothing. Each section
is a process of its own with a limit of time, so that one that fails or hangs is told in one line and the
others go on. Outputs are compared with diffusers' first; every ratio is a median over interleaved rounds,
with the plain model again beside it as the control. Prints lines as they are measured, and writes gpu.json
and gpu.log.

    python benchmarks/gpu.py [--out folder] [--sections sd15,sdxl,flux,sd35,training,whole] [--seconds 4]
                             [--limit 600]
    python benchmarks/gpu.py --device cpu --quick    # tiny shapes: whether it runs
"""

import argparse
import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path

LIMITS = {"sd15": 60, "sdxl": 75, "flux": 60, "sd35": 60, "training": 90, "whole": 60}
"""Sections in their order, with the most seconds that each may take."""
LEAST = 10
"""Seconds without which a section is not begun."""


class Section:
    """One section in a process of its own, which imports everything and waits until it is its turn."""

    def __init__(self, name: str, out: Path, words: list[str]) -> None:
        self.name = name
        self.log = out / "gpu.log"
        command = [sys.executable, "-u", str(Path(__file__).parent / "gpu_sections.py"), name, str(out)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        self.lines = self.process.stdout

    def run(self, limit: float) -> None:
        """Let it run, and print its lines; those that end too late or badly are told in one."""
        assert self.process.stdin is not None
        began, place = time.monotonic(), self.log.stat().st_size
        killer = threading.Timer(limit, self.process.kill)
        killer.start()
        with contextlib.suppress(OSError):  # it has ended already
            self.process.stdin.write("go\n")
            self.process.stdin.close()
        for line in self.lines:
            print(line, end="", flush=True)
        code = self.process.wait()
        killer.cancel()
        took = time.monotonic() - began
        if code == 0:
            print(f"{self.name}: {took:.0f} s", flush=True)
            return
        text = self.log.read_text(errors="replace")
        said = (text[place:].strip() or text.strip() or "?").splitlines()[-1]
        why = f"stopped after {limit:.0f} s" if took >= limit else f"failed: {said}"
        print(f"{self.name}: {why} (see {self.log})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--sections", default=",".join(LIMITS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each set of interleaved rounds")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of all sections together")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    end = time.monotonic() + args.limit
    args.out.mkdir(parents=True, exist_ok=True)
    words = ["--device", args.device, "--seconds", str(args.seconds), *["--quick"] * args.quick]
    sections = [Section(name, args.out, words) for name in args.sections.split(",")]
    for section in sections:
        section.lines.readline()  # it has imported what it needs
    for section in sections:
        left = min(LIMITS[section.name], end - time.monotonic())
        if left < LEAST:
            print(f"{section.name}: left out, the time is up", flush=True)
            section.process.kill()
        else:
            section.run(left)


if __name__ == "__main__":
    main()
