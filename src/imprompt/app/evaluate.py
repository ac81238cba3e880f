"""``imprompt evaluate``: measure adapters on pictures of yours, and compare them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imprompt.evaluation.config import EvaluateConfig

HELP = "measure adapters on pictures of yours, and compare them on the same seeds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from imprompt.evaluation.config import EvaluateConfig

    fields = EvaluateConfig.model_fields

    def field(flag: str, name: str | None = None, **options: object) -> None:
        name = name or flag.lstrip("-").replace("-", "_")
        about = (fields[name].description or "").replace("%", "%%")
        parser.add_argument(flag, dest=name, help=about or None, default=None, **options)  # type: ignore[arg-type]

    parser.add_argument("source", nargs="?", help=fields["source"].description)
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME[,scale=X][,profile=NAME][,label=TEXT]",
        help="an adapter to measure; give it several times to compare; default: the base's default adapter",
    )
    field("--base", metavar="NAME")
    field("--prompts", metavar="FILE")
    field("--only", metavar="TAG")
    field("-n", "n", metavar="N")
    field("--samples", metavar="K")
    field("--scales", metavar="X,X,…")
    field("--steps", metavar="N")
    field("--guidance", metavar="X")
    field("--seed", metavar="N")
    field("--device")
    field("--clip", metavar="NAME")
    field("--dino", metavar="NAME")
    field("--face-model", metavar="FOLDER")
    field("-o", "output", metavar="FOLDER")
    parser.add_argument("--json", metavar="FILE", help="also write figures and settings to this file")
    parser.add_argument("-q", "--quiet", action="store_true", default=None, help="no progress bar")


def run(args: argparse.Namespace) -> int:
    config = _config(args)

    from imprompt.evaluation import report as reports
    from imprompt.evaluation.run import evaluate
    from imprompt.io import write_atomic

    target = None if args.json is None else Path(args.json)
    if target is not None:
        reports.check_target(target)
    if config.output is not None:
        reports.check_target(config.output / "report.html")
        reports.check_html()
    found = evaluate(config)
    print(reports.table(found), end="")
    if target is not None:
        write_atomic(target, reports.to_json(found).encode(), overwrite=True)
    if config.output is not None:
        write_atomic(config.output / "report.json", reports.to_json(found).encode(), overwrite=True)
        print(write_atomic(config.output / "report.html", reports.html(found).encode(), overwrite=True))
    return 0


def _config(args: argparse.Namespace) -> "EvaluateConfig":
    """The flags as a record. Raises :class:`UsageError`."""
    from imprompt.evaluation.config import Contender, EvaluateConfig

    names = EvaluateConfig.model_fields.keys() & vars(args).keys()
    stated = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "scales" in stated:
        stated["scales"] = tuple(part for part in stated["scales"].split(",") if part)
    contenders = tuple(Contender.parse(text) for text in args.adapter)
    return EvaluateConfig.checked({**stated, "contenders": contenders})
