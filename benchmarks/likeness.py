"""Measure what `--speed balanced` and `--speed fast` lose, on the bundled model's held-out pictures.

Each pair of a picture and the name of another thing is drawn at every speed from the same noise; the base's
own image encoder compares the drawing with the picture. What is done is kept in a file, and a later run goes
on there. Prints JSON: the mean likeness of each speed, and its difference to `exact` with the 95 % bootstrap
interval over the pairs.

    python benchmarks/likeness.py pairs.jsonl [--pairs 234] [--steps 20]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from imprompt import Engine, Request
from imprompt.evaluation.config import EvaluateConfig
from imprompt.evaluation.metrics import bootstrap, cosine, paired
from imprompt.evaluation.run import Case, read_cases
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="where the likeness of each pair is kept")
    parser.add_argument("--pairs", type=int, default=234)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    base = find_base("emoji")
    assert base.path is not None
    scorer, engine = load_own(base.path), Engine(at_once=AT_ONCE)
    assert scorer is not None
    pairs = pairs_of(read_cases(EvaluateConfig(n=10_000), base)[0], args.pairs)
    rows = [json.loads(line) for line in args.file.read_text().splitlines()] if args.file.exists() else []
    for start in range(len(rows), len(pairs), AT_ONCE):
        new = likeness(engine, scorer, pairs[start : start + AT_ONCE], start, args.steps)
        with args.file.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
        rows += new
    values = {speed: torch.tensor([row[speed] for row in rows[: args.pairs]]) for speed in SPEEDS}
    figures = {speed: {"likeness": str(bootstrap(values[speed]))} for speed in SPEEDS}
    for speed in SPEEDS[1:]:
        figures[speed]["difference"] = str(paired(values[speed], values["exact"]))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
