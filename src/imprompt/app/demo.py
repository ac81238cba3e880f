"""``imprompt demo``: draw a contact sheet with the bundled model."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        default="imprompt-demo",
        metavar="FOLDER",
        help="folder for the sheet and its pictures",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that imprompt did not make")
    parser.add_argument("--seed", type=int, default=7, metavar="N", help="seed of all drawings; default: 7")


def run(args: argparse.Namespace) -> int:
    from imprompt.app.contact_sheet import contact_sheet

    print(contact_sheet(args.output, seed=args.seed, overwrite=args.overwrite))
    return 0
