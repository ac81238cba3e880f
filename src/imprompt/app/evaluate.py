"""``imprompt evaluate``: measure adapters on your pictures, and compare them."""

import argparse

from imprompt.app.flags import add_field_flags, flag_help, stated_fields
from imprompt.evaluation.config import Contender, EvaluateConfig
from imprompt.io import check_path, write_atomic

_FLAGS = {
    "base": "NAME", "prompts": "FILE", "only": "TAG", "n": "", "samples": "", "scales": "X,X,…", "steps": "",
    "guidance": "", "seed": "", "device": "", "clip": "NAME", "dino": "NAME", "face_model": "FOLDER",
    "output": "FOLDER",
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


def run(args: argparse.Namespace) -> int:
    stated = stated_fields(args, EvaluateConfig)
    if "scales" in stated:
        stated["scales"] = tuple(part for part in stated["scales"].split(",") if part)
    contenders = tuple(Contender.parse(text) for text in args.adapter)
    config = EvaluateConfig(**stated, contenders=contenders)

    from imprompt.evaluation import report as reports
    from imprompt.evaluation.run import evaluate

    targets = [check_path(args.json, "--json")] if args.json is not None else []
    if config.output is not None:
        targets.append(config.output / "report.json")
        reports.check_html()
    for target in targets:
        reports.check_target(target)
    found = evaluate(config)
    print(reports.table(found), end="")
    for target in targets:
        write_atomic(target, reports.to_json(found).encode(), overwrite=True)
    if config.output is not None:
        print(write_atomic(config.output / "report.html", reports.html(found).encode(), overwrite=True))
    return 0
