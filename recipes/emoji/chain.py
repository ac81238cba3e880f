"""The queue: every stage in order, resumed after a stop.

On two cores the stages take some thirteen hours, on one H100 with 16 cores 25 minutes. A stage that fails
stops the queue with its name; what is done is kept in ``done.json``. ``ship`` copies the model into the
package when it beats what is there.

    python recipes/emoji/chain.py run --cores 11   # goes on from wherever it stopped
    python recipes/emoji/chain.py status
    python recipes/emoji/chain.py ship -n 48       # measure on validation, copy if better
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Thread

from common import CHECKPOINTS, DEVICE, HERE, MODEL, STATE

FIRST = ("pool.py --seed 2 --count 2000", "pool.py --seed 1 --count 20000", "pool.py --seed 4 --count 10000")
"""What has to be drawn before the first stage."""
BESIDE = {
    "cpu": ("pool.py --seed 1 --count 60000", "motion.py --draw --count 1200",
            "pool.py --seed 5 --count 20000", "pool.py --seed 3 --count 2000"),
    "cuda": ("pool.py --seed 1 --count 120000", "pool.py --seed 5 --count 60000",
             "motion.py --draw --count 9600", "pool.py --seed 1 --count 700000",
             "pool.py --seed 3 --count 2000"),
}  # fmt: skip
"""What is drawn, one after the other, while the stages train."""
STAGES = {
    "cpu": (
        ("vae.py --wider --minutes 80", "encoder.py --minutes 160"),
        ("unet.py --processes 2 --minutes 300",),
        ("adapters.py base --steps 2500", "vae.py --decoder --minutes 60"),
        ("judge.py --minutes 60", "control.py --new --minutes 90"),
        ("words.py --processes 2 --minutes 5",),
        ("motion.py --processes 2 --minutes 25 --word-lr 0",),
    ),
    "cuda": (
        ("vae.py --wider --batch 128 --lr 1e-3 --most 20000 --minutes 4",
         "encoder.py --groups 128 --lr 1e-3 --most 260000 --minutes 4.2"),
        ("unet.py --compile --batch 512 --most 700000 --lr 8e-4 --base-lr 4e-4 "
         "--text-lr 4e-4 --word-lr 1e-3 --minutes 13.2",
         "judge.py --batch 256 --minutes 3.2",
         "vae.py --decoder --batch 128 --lr 8e-4 --minutes 3.5"),
        ("words.py --batch 64 --minutes 0.4",),
        ("adapters.py base --batch 256 --steps 3000 --threads 4",
         "control.py --new --batch 128 --most 100000 --processes 6 --minutes 3.6",
         "motion.py --clips 32 --count 9600 --word-lr 0 --minutes 6"),
    ),
}  # fmt: skip
"""Rows of stages; those of a row run at the same time. Minutes are of a core, or of the GPU they share."""


def name_of(command: str) -> str:
    """A stage's name: what tells its command from others, without numbers that may be given anew."""
    return " ".join(word for word in command.split() if not word.replace(".", "").isdigit())


def start(command: str) -> subprocess.Popen:
    print(f"started {command}", flush=True)
    log = STATE / "logs" / f"{name_of(command).replace('--', '').replace(' ', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    script, *arguments = command.split()
    with log.open("a") as file:
        return subprocess.Popen([sys.executable, str(HERE / script), *arguments], stdout=file, stderr=file)


def finish(jobs: dict[str, subprocess.Popen]) -> None:
    """Wait for the stages; those that ended well are noted as done."""
    failed = []
    for command, job in jobs.items():
        if job.wait():
            failed.append(command)
        else:
            (STATE / "done.json").write_text(json.dumps([*done(), name_of(command)]))
            print(f"done {command}", flush=True)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}: see {STATE / 'logs'}; run the queue again to go on")


def run(cores: int) -> None:
    """Draw and train what is not done yet, with ``cores`` processes that draw."""
    if not (MODEL / "tokenizer").exists():
        from text import make_tokenizer

        make_tokenizer()
    if not (STATE / "icons.npy").exists():
        finish({"icons.py": start("icons.py")})
    for command in FIRST:
        finish({command: start(f"{command} --processes {cores}")})
    draws = Thread(target=draw_beside, args=(cores,))
    draws.start()
    for number, row in enumerate(STAGES[DEVICE]):
        finish({command: start(command) for command in row if name_of(command) not in done()})
        if number == 1 or DEVICE == "cpu":
            draws.join()  # the rows behind need the judge's pictures and the clips


def draw_beside(cores: int) -> None:
    for command in BESIDE[DEVICE]:
        start(f"{command} --processes {cores}").wait()


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

    for row in STAGES[DEVICE]:
        for command in row:
            print(f"{'done   ' if name_of(command) in done() else 'waiting'} {command}")
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
    parser.add_argument("--cores", type=int, default=2, help="processes that draw")
    parser.add_argument("-n", type=int, default=48)
    parser.add_argument(
        "--target", type=Path, default=HERE.parent.parent / "src" / "imprompt" / "assets" / "emoji"
    )
    args = parser.parse_args()
    if args.what == "run":
        run(args.cores)
    elif args.what == "ship":
        ship(args.n, args.target)
    else:
        status()


if __name__ == "__main__":
    main()
