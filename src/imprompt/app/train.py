"""``imprompt train``: train an adapter on a folder of captioned pictures."""

import argparse
import json
from pathlib import Path

from imprompt.errors import UsageError

HELP = "train an adapter on a folder of captioned pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder of captioned pictures, or a run's .toml or .json")
    parser.add_argument("--out", dest="output", metavar="FOLDER", help="the run's folder")
    for flag in ("base", "kind", "steps", "batch", "lr", "seed", "init", "device"):
        parser.add_argument(f"--{flag}", default=None)
    parser.add_argument("--resume", action="store_true", default=None)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any other field")


def run(args: argparse.Namespace) -> int:
    from imprompt.training.config import TrainConfig

    names = ("output", "base", "kind", "steps", "batch", "lr", "seed", "init", "device", "resume")
    stated = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for pair in args.set:
        name, sign, value = pair.partition("=")
        if not sign:
            raise UsageError(f"--set '{pair}': FIELD=VALUE is expected.")
        try:
            stated[name] = json.loads(value)
        except ValueError:
            stated[name] = value
    source = Path(args.source)
    if source.suffix in (".toml", ".json") and source.is_file():
        config = TrainConfig.read(source, **stated)
    else:
        if "output" not in stated:
            raise UsageError("--out: give the folder that the run is written to.")
        config = TrainConfig.checked({"data": source, **stated})
    from imprompt.training.loop import train

    print(train(config))
    return 0
