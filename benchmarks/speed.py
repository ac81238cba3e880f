"""Measure drawing at other speeds and on a compiled denoiser, over drawing as it is, with an image prompt.

Prints JSON: ratios of the time of drawing (medians over interleaved rounds; "again" is the control, the same
request once more) and the mean difference of the pixels, of 255. `imprompt evaluate` measures what is lost in
likeness.

    python benchmarks/speed.py [--base emoji] [--rounds 5] [--steps 20] [--compile regional,full]
"""

import argparse
import json
from statistics import median

import numpy as np

from imprompt import Engine, Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="emoji")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", default="", help="ways to compile, with commas; none by default")
    args = parser.parse_args()
    plain = Request(prompt="a cat", base=args.base, steps=args.steps, seed=1)
    pictures = {"shown": Engine().run(plain).images[0]}
    asked = plain.replace(prompt="an owl", images=["shown"])
    cases = {"plain": asked, "again": asked}
    cases |= {speed: asked.replace(speed=speed) for speed in ("balanced", "fast")}
    cases |= {how: asked.replace(compile=how) for how in args.compile.split(",") if how}
    engines = {name: Engine() for name in cases}
    times: dict[str, list[float]] = {name: [] for name in cases}
    drawn = {}
    for round_ in range(args.rounds + 1):
        for name, request in cases.items():
            result = engines[name].run(request, pictures=pictures)
            drawn[name] = np.asarray(result.images[0]).astype(float)
            if round_:  # the first loads and compiles
                times[name].append(result.timings["draw"])
    ratios = {
        name: median(own / base for own, base in zip(times[name], times["plain"], strict=True))
        for name in cases
    }
    lost = {name: float(np.abs(picture - drawn["plain"]).mean()) for name, picture in drawn.items()}
    figures = {name: {"time": round(ratios[name], 3), "difference": round(lost[name], 2)} for name in cases}
    print(json.dumps(figures | {"seconds": round(median(times["plain"]), 2)}, indent=2))


if __name__ == "__main__":
    main()
