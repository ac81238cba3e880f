"""``imprompt info``: show the request stored inside a picture."""

import argparse

from imprompt import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", help="a picture or clip that imprompt made")
    parser.add_argument("--json", action="store_true", help="print the whole record as JSON")


def run(args: argparse.Namespace) -> int:
    record = output.read_record(args.picture)
    if args.json:
        print(record.to_json())
        return 0
    print("\n".join(record.lines()))
    return 0
