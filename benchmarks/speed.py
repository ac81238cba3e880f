"""Measure drawing at other speeds and on a compiled denoiser, over drawing as it is, with an image prompt.

Prints JSON: ratios of the time of drawing (medians over interleaved rounds; "again" is the control, the same
request once more) and the mean difference of the pixels, of 255.

With ``--likeness`` it measures instead what `--speed balanced` and `--speed fast` lose on the bundled model's
held-out pictures (20 minutes of one core). Each pair of a picture and the name of another thing is drawn at
every speed from the same noise, and the base's own image encoder compares the drawing with the picture. What
is done is kept in a file, and a later run goes on there. Prints the mean likeness at each speed, and its
difference to `exact` with the 95 % bootstrap interval over the pairs.

    python benchmarks/speed.py [--base emoji] [--rounds 5] [--steps 20] [--compile regional,full]
    python benchmarks/speed.py --likeness pairs.jsonl [--pairs 234] [--steps 20]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from imprompt import Engine, Request
from imprompt.evaluation.cases import Case, read_cases
from imprompt.evaluation.config import EvaluateConfig
from imprompt.evaluation.metrics import bootstrap, cosine, paired
from imprompt.evaluation.scorers import Scorer, load_own
from imprompt.generation.families import find_base

SPEEDS = ("exact", "balanced", "fast")
AT_ONCE = 8


def pairs_of(cases: Sequence[Case], count: int) -> list[tuple[Case, str]]:
    """Every picture with the text of the next, then with that of the one after, and so on."""
    numbers = (divmod(n, len(cases)) for n in range(count))
    return [(cases[n], cases[(n + turn) % len(cases)].text) for turn, n in numbers]


def likeness(
    engine: Engine, scorer: Scorer, part: Sequence[tuple[Case, str]], seed: int, steps: int
) -> list[dict[str, float]]:
    """Each pair's likeness at each speed; the first is drawn with ``seed``, the next with ``seed + 1``, …"""
    shown = scorer.images([case.image for case, _ in part])
    found = {}
    for speed in SPEEDS:
        asked = Request(prompt="a cat", base="emoji", speed=speed, steps=steps)
        requests = [
            asked.replace(prompt=text, images=[case.name], seed=seed + n)
            for n, (case, text) in enumerate(part)
        ]
        drawn = engine.run_batch(requests, pictures={case.name: case.image for case, _ in part})
        found[speed] = cosine(scorer.images([result.images[0] for result in drawn]), shown)
    return [{speed: round(float(found[speed][n]), 5) for speed in SPEEDS} for n in range(len(part))]


def lost(kept: Path, count: int, steps: int) -> dict[str, dict[str, str]]:
    """What the speeds lose over ``count`` pairs, of which ``kept`` has those that were drawn before."""
    base = find_base("emoji")
    assert base.path is not None
    scorer, engine = load_own(base.path), Engine(at_once=AT_ONCE)
    assert scorer is not None
    pairs = pairs_of(read_cases(EvaluateConfig(n=10_000), base)[0], count)
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for start in range(len(rows), len(pairs), AT_ONCE):
        new = likeness(engine, scorer, pairs[start : start + AT_ONCE], start, steps)
        with kept.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
        rows += new
    values = {speed: torch.tensor([row[speed] for row in rows[:count]]) for speed in SPEEDS}
    figures = {speed: {"likeness": str(bootstrap(values[speed]))} for speed in SPEEDS}
    for speed in SPEEDS[1:]:
        figures[speed]["difference"] = str(paired(values[speed], values["exact"]))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="emoji")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", default="", help="ways to compile, with commas; none by default")
    parser.add_argument("--likeness", type=Path, help="where the likeness of each pair is kept")
    parser.add_argument("--pairs", type=int, default=234)
    args = parser.parse_args()
    if args.likeness is not None:
        print(json.dumps(lost(args.likeness, args.pairs, args.steps), indent=2))
        return
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
    differences = {name: float(np.abs(picture - drawn["plain"]).mean()) for name, picture in drawn.items()}
    figures = {
        name: {"time": round(ratios[name], 3), "difference": round(differences[name], 2)} for name in cases
    }
    print(json.dumps(figures | {"seconds": round(median(times["plain"]), 2)}, indent=2))


if __name__ == "__main__":
    main()
