"""``imprompt evaluate``: measure adapters on your pictures, and compare them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from imprompt.app.flags import add_field_flags, flag_help, stated_fields
from imprompt.errors import UsageError
from imprompt.evaluation.config import Contender, EvaluateConfig
from imprompt.io import check_path, write_all

if TYPE_CHECKING:
    from imprompt.evaluation.run import Report

_FLAGS = {
    "base": "NAME", "prompts": "FILE", "only": "TAG", "ignore": "FIELD,…", "n": "", "samples": "",
    "scales": "X,X,…", "steps": "", "guidance": "", "seed": "", "device": "",
    "clip": "NAME", "dino": "NAME", "face_model": "FOLDER", "output": "FOLDER",
}  # fmt: skip
"""Field of the settings → metavar of its flag; empty: by type."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", help=flag_help(EvaluateConfig.model_fields["source"]))
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME[,scale=X][,profile=NAME][,speed=NAME][,label=TEXT]",
        help="an adapter to measure; repeat it to compare several; default: the base's default adapter",
    )
    add_field_flags(parser, EvaluateConfig, _FLAGS)
    parser.add_argument("--json", metavar="FILE", help="also write all figures and settings to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that imprompt did not make")


def run(args: argparse.Namespace) -> int:
    stated = stated_fields(args, EvaluateConfig)
    if "scales" in stated:
        stated["scales"] = tuple(part for part in stated["scales"].split(",") if part)
    contenders = tuple(Contender.parse(text) for text in args.adapter)
    config = EvaluateConfig(**stated, contenders=contenders)

    from imprompt.evaluation.report import table
    from imprompt.evaluation.run import evaluate

    writers = _writers(args, config)
    found = evaluate(config)
    print(table(found), end="")
    write_all({path: write(found).encode() for path, write in writers.items()}, overwrite=True)
    if config.output is not None:
        print(_page(config.output))
    return 0


def _page(folder: Path) -> Path:
    return check_path(folder) / "report.html"


def _writers(args: argparse.Namespace, config: EvaluateConfig) -> dict[Path, Callable[[Report], str]]:
    """What writes each file that is asked for. Raises where it must not be replaced, before any drawing."""
    from imprompt.evaluation import report as reports

    writers: dict[Path, Callable[[Report], str]] = {}
    if args.json is not None:
        writers[check_path(args.json, "--json")] = reports.to_json
    if config.output is not None:
        reports.check_html()
        page = _page(config.output)
        if page in writers:
            raise UsageError(f"--json '{args.json}': that is where the page goes; give another name.")
        writers |= {page.with_suffix(".json"): reports.to_json, page: reports.html}
    if args.overwrite and not writers:
        raise UsageError("--overwrite: there is no file to write; name one with --json or --output.")
    reads = [config.source, config.prompts, *(each.adapter for each in config.contenders)]
    for path in writers:
        reports.check_target(path, overwrite=args.overwrite, reads=reads)
    return writers
