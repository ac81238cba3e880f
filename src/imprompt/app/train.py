"""``imprompt train``: train an adapter on captioned pictures.

Of a folder alone everything is chosen: where to start (the base's default adapter), how many steps (by the
number of pictures), a folder for the run, and the step that is kept (the best on held-out pictures).
"""

import argparse
import json
from itertools import count
from pathlib import Path
from typing import Any

from imprompt.errors import UsageError

HELP = "train an adapter on a folder of captioned pictures"

_FIELDS = (
    "base", "kind", "init", "steps", "minutes", "batch", "lr", "seed", "device", "image-encoder",
    "face-model", "on-bad-sample", "cache", "sample-every", "push-to-hub",
)  # fmt: skip
_SHEETS = 4
"""Sheets of samples drawn on the way, where nothing else is said."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from imprompt.training.config import TrainConfig

    parser.add_argument(
        "source", help="captioned pictures: a folder, metadata file, .tar or hf:owner/name; or a run's .toml"
    )
    parser.add_argument("--out", dest="output", metavar="FOLDER", help="the run's folder; default: runs/NAME")
    for flag in _FIELDS:
        about = TrainConfig.model_fields[flag.replace("-", "_")].description or ""
        parser.add_argument(f"--{flag}", default=None, help=about.replace("%", "%%") or None)
    parser.add_argument("--resume", action="store_true", default=None, help="go on from the last checkpoint")
    parser.add_argument("-q", "--quiet", action="store_true", default=None, help="no progress bar")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any other field, as JSON"
    )


def run(args: argparse.Namespace) -> int:
    from imprompt.training.config import TrainConfig

    names = ("output", "resume", "quiet", *(flag.replace("-", "_") for flag in _FIELDS))
    stated = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for pair in args.set:
        name, sign, value = pair.partition("=")
        if not sign:
            raise UsageError(f"--set '{pair}': FIELD=VALUE is expected.")
        stated[name] = _json(value)
    source = Path(args.source)
    if source.suffix in (".toml", ".json") and _is_configuration(source):
        config = TrainConfig.read(source, **stated)
    else:
        stated.setdefault("output", _run_folder(args.source, bool(args.resume)))
        config = TrainConfig.checked({"data": args.source, "keep": "best", **stated})
    from imprompt.training.trainer import train

    quick = "sample_every" not in config.model_fields_set
    print(train(config, sheets=_SHEETS if quick else None))
    return 0


def _is_configuration(path: Path) -> bool:
    """Whether a file is a run's configuration; a JSON list is data."""
    if not path.is_file() or path.suffix == ".toml":
        return True
    return path.read_bytes().lstrip()[:1] != b"["


def _run_folder(source: str, resume: bool) -> Path:
    """``runs/NAME``: with ``resume`` the newest, else one that is free."""
    stem = Path(source.rpartition(":")[2]).stem or "run"
    free = next(number for number in count(1) if not _numbered(stem, number).exists())
    return _numbered(stem, max(1, free - 1) if resume else free)


def _numbered(stem: str, number: int) -> Path:
    return Path("runs") / (stem if number == 1 else f"{stem}-{number}")


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
