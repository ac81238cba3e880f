"""The queue: every stage in order, resumed after a stop, each round longer than the one before.

Round 1 gives a whole chain in about three hours of two cores, later rounds improve it from the plateau each
stage kept. A stage that fails stops the queue with its name; what is done is kept in ``done.json``. ``ship``
copies the model into the package when it beats what is there.

    python recipes/emoji/chain.py run              # goes on from wherever it stopped
    python recipes/emoji/chain.py status
    python recipes/emoji/chain.py ship -n 48       # measure on validation, copy if better
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from common import CHECKPOINTS, HERE, MODEL, START, STATE

Stage = tuple[str, list[str]]

DATA: list[list[Stage]] = [
    [("icons", ["icons.py"])],
    [("pool-train", ["pool.py", "--seed", "1", "--count", "60000"]),
     ("pool-validation", ["pool.py", "--seed", "2", "--count", "2000"]),
     ("pool-plain", ["pool.py", "--seed", "4", "--count", "4000"])],
    [("pool-test", ["pool.py", "--seed", "3", "--count", "2000"])],
]  # fmt: skip

ORDER: tuple[tuple[str, ...], ...] = (
    ("vae", "encoder"),
    ("latents", "latents-plain"),
    ("base", "judge"),
    ("captions",),
    ("plus",),
    ("linear", "decoder"),
    ("control", "motion"),
)
"""Stages of one row run at the same time."""

COMMANDS = {
    "vae": ["vae.py"],
    "encoder": ["encoder.py"],
    "latents": ["latents.py"],
    "latents-plain": ["latents.py", "--seed", "4"],
    "base": ["base.py", "--processes", "2"],
    "judge": ["judge.py"],
    "captions": ["adapters.py", "plus", "--captions-only"],
    "plus": ["adapters.py", "plus", "--with-base", "--processes", "2"],
    "linear": ["adapters.py", "base"],
    "decoder": ["vae.py", "--decoder"],
    "control": ["control.py"],
    "motion": ["motion.py"],
}

MINUTES = {
    "vae": (40,),
    "encoder": (40, 100, 160),
    "base": (30,),
    "judge": (10, 20, 30),
    "plus": (100, 300, 550),
    "linear": (20, 50, 100),
    "decoder": (40, 80, 150),
    "control": (15, 45, 90),
    "motion": (25, 70, 150),
}
"""Minutes of a core (of each process) that a stage has trained in all at the end of rounds 1 to 3. Of the
first row only the image encoder learns on after round 1: latents stay what the UNet has learned. The base
learns on within ``plus``."""


def stages() -> list[list[Stage]]:
    """Every row of stages, from the packages to the last round."""
    rows = list(DATA)
    for number in range(3):
        for names in ORDER:
            row: list[Stage] = []
            for name in names:
                minutes = MINUTES.get(name)
                if minutes is None and number == 0:
                    row.append((name, COMMANDS[name]))
                elif minutes and number < len(minutes):
                    row.append((f"{name}-{number + 1}", [*COMMANDS[name], "--minutes", str(minutes[number])]))
            if row:
                rows.append(row)
    return rows


PARTS = (
    "adapters/ip-adapter_emoji.safetensors",
    "adapters/ip-adapter-plus_emoji.safetensors",
    "controlnet-canny",
    "feature_extractor",
    "image_encoder",
    "motion",
    "scheduler",
    "text_encoder",
    "tokenizer",
    "unet",
    "vae",
)
"""What has to be there: parts of two models do not fit each other, so all are shipped or none."""


def done() -> list[str]:
    path = STATE / "done.json"
    return json.loads(path.read_text()) if path.exists() else []


def run(device: str | None) -> None:
    environment = dict(os.environ, EMOJI_STATE=str(STATE), EMOJI_START=str(START))
    if device:
        environment["EMOJI_DEVICE"] = device
    (STATE / "logs").mkdir(parents=True, exist_ok=True)
    for row in stages():
        jobs = {}
        for name, command in row:
            if name in done():
                continue
            with (STATE / "logs" / f"{name}.log").open("a") as log:
                jobs[name] = subprocess.Popen(
                    [sys.executable, str(HERE / command[0]), *command[1:]],
                    stdout=log,
                    stderr=log,
                    env=environment,
                )
            print(f"started {name}", flush=True)
        failed = []
        for name, job in jobs.items():
            if job.wait():
                failed.append(name)
            else:
                (STATE / "done.json").write_text(json.dumps([*done(), name]))
                print(f"done {name}", flush=True)
        if failed:
            raise SystemExit(
                f"{', '.join(failed)} failed: see {STATE / 'logs'}; start the queue again to go on"
            )


def ship(n: int, target: Path) -> None:
    """Measure on validation; copy the model when its score is above the one noted in ``target``."""
    from figures import measure, score, table

    missing = [part for part in PARTS if not (MODEL / part).exists()]
    if missing:
        raise SystemExit(f"not shipped: {', '.join(missing)} not trained yet")
    figures = measure(MODEL, "validation", n)
    print(table(figures))
    mine, noted = score(figures), target / "figures.json"
    theirs = json.loads(noted.read_text())["score"] if noted.exists() else 0.0
    if mine <= theirs:
        raise SystemExit(f"not shipped: score {mine:.4f} on validation, the bundled model has {theirs:.4f}")
    for part in sorted(MODEL.iterdir()):
        if part.is_dir():
            shutil.copytree(part, target / part.name, dirs_exist_ok=True)
        else:
            shutil.copy2(part, target / part.name)
    noted.write_text(json.dumps({"split": "validation", "score": mine, "figures": figures}, indent=1) + "\n")
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 2**20
    print(f"shipped to {target}: score {mine:.4f} (before {theirs:.4f}), {size:.0f} MB")


def status() -> None:
    import torch

    finished = done()
    for row in stages():
        for name, _ in row:
            print(f"{'done   ' if name in finished else 'waiting'} {name}")
    for path in sorted(CHECKPOINTS.glob("*.pt")):
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        if "spent" in state:
            print(
                f"{path.name}: step {state['step']}, {state['spent'] / 60:.0f} of {state['minutes']} minutes"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "status", "ship"))
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("-n", type=int, default=48)
    parser.add_argument(
        "--target", type=Path, default=HERE.parent.parent / "src" / "imprompt" / "assets" / "emoji"
    )
    args = parser.parse_args()
    if args.what == "run":
        run(args.device)
    elif args.what == "ship":
        ship(args.n, args.target)
    else:
        status()


if __name__ == "__main__":
    main()
