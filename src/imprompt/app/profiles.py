"""``imprompt profiles``: show how each profile distributes the scale over the layers."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "profile", nargs="?", help="name of a profile, or weights; default: all named profiles"
    )
    parser.add_argument(
        "--base",
        default="emoji",
        metavar="NAME",
        help="the base: emoji, sd15, sdxl or a diffusers folder; default: emoji",
    )
    parser.add_argument("--json", action="store_true", help="print the weights as JSON")


def run(args: argparse.Namespace) -> int:
    from imprompt.app.profile_charts import charts, tables

    print(json.dumps(tables(args.base, args.profile)) if args.json else charts(args.base, args.profile))
    return 0
