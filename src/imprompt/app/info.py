"""``imprompt info``: show the request stored inside a picture."""

import argparse
import json

HELP = "show the request stored inside a picture or clip"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", help="a picture or clip that imprompt made")
    parser.add_argument("--json", action="store_true", help="print the whole record as JSON")


def run(args: argparse.Namespace) -> int:
    from imprompt.output.stills import read_record

    record = read_record(args.picture)
    if args.json:
        print(record.to_json())
        return 0
    for name, value in json.loads(record.request.to_json()).items():
        if value not in (None, "", {}, []):
            print(f"{name:<11} {_one_line(value)}")
    print(
        "made with   " + _one_line(", ".join(f"{name} {value}" for name, value in record.provenance.items()))
    )
    return 0


def _one_line(value: object) -> str:
    """A value as one printable line: no newline or escape sequence of a file reaches the terminal."""
    if isinstance(value, str) and value.isprintable():
        return value
    return json.dumps(value, ensure_ascii=not isinstance(value, dict | list))
