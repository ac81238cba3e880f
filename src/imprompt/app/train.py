"""``imprompt train``: train an adapter on captioned pictures.

A folder of pictures is enough: training then starts from the base's default adapter, takes as many steps as
suit the number of pictures, lets the learning rate fall to 0, writes to a new folder in ``runs``, and keeps
the step that is best on held-out pictures.
"""

import argparse
import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

from imprompt.app.flags import add_field_flags, stated_fields
from imprompt.errors import UsageError
from imprompt.io import check_path
from imprompt.training.config import TrainConfig

_FLAGS = {
    "base": "NAME", "kind": "", "init": "NAME", "steps": "", "minutes": "", "batch": "", "lr": "", "seed": "",
    "device": "", "image_encoder": "NAME", "face_model": "FOLDER", "on_bad_sample": "", "cache": "FOLDER",
    "sample_every": "", "push_to_hub": "NAME",
}  # fmt: skip
"""Field of the configuration → metavar of its flag; empty: by type."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        help="captioned pictures: a folder, metadata file, .tar (also x-{0..9}.tar) or hf:owner/name; or a "
        "configuration (.toml)",
    )
    add("--out", dest="output", metavar="FOLDER", help="folder for the run; default: runs/NAME")
    add_field_flags(parser, TrainConfig, _FLAGS)
    add("--resume", action="store_true", default=None, help="continue from the last checkpoint")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of the configuration, as JSON",
    )


def run(args: argparse.Namespace) -> int:
    stated = stated_fields(args, TrainConfig)
    for pair in args.set:
        name, sign, value = pair.partition("=")
        if not sign:
            raise UsageError(f"--set '{pair}': FIELD=VALUE is expected.")
        if name in stated:
            raise UsageError(f"--set {name}: it is set twice; say it once.")
        _set(stated, name, _json(value))
    source = check_path(args.source, "source")
    if source.suffix in (".toml", ".json") and _is_configuration(source):
        config = TrainConfig.read(source, **stated)
    else:
        stated.setdefault("output", _run_folder(args.source, bool(args.resume)))
        config = TrainConfig(**{"data": args.source, "keep": "best", "schedule": "cosine", **stated})
    from imprompt.training.launch import start_all
    from imprompt.training.trainer import train

    start_all(sys.argv[1:])
    print(train(config))
    return 0


def _is_configuration(path: Path) -> bool:
    """Whether a .toml or .json file is a configuration; a JSON list is data."""
    if not path.is_file() or path.suffix == ".toml":
        return True
    return path.read_bytes().lstrip()[:1] != b"["


def _run_folder(source: str, resume: bool) -> Path:
    """``runs/NAME``: with ``resume`` the newest, else one that is free."""
    place = check_path(source.rpartition(":")[2], "source")
    stem = (place if place.name not in ("", "..") else place.resolve()).stem or "run"
    free = next(number for number in count(1) if not _taken(_numbered(stem, number)))
    return _numbered(stem, max(1, free - 1) if resume else free)


def _taken(folder: Path) -> bool:
    """Whether something lies there beside the cache of a run that was stopped before its first step."""
    if not folder.is_dir():
        return folder.exists()
    return any(each.name not in (".lock", "cache") for each in folder.iterdir())


def _numbered(stem: str, number: int) -> Path:
    return Path("runs") / (stem if number == 1 else f"{stem}-{number}")


def _set(fields: dict[str, Any], name: str, value: Any) -> None:
    """Set a field, or with ``outer.inner`` one of a table."""
    outer, dot, inner = name.partition(".")
    if not dot:
        fields[name] = value
    elif isinstance(table := fields.setdefault(outer, {}), dict):
        if inner in table:
            raise UsageError(f"--set {name}: it is set twice; say it once.")
        table[inner] = value
    else:
        raise UsageError(f"--set {name}: {outer} is {table!r}, not a table; set it alone.")


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
