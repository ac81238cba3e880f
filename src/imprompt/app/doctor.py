"""``imprompt doctor``: report what is installed and run a self-test."""

import argparse
import json

from imprompt.errors import ModelError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from imprompt.app.diagnosis import examine

    findings = examine()
    if args.json:
        print(json.dumps(findings))
    else:
        for name, value in findings.items():
            print(f"{name:<14} {value}")
    if findings["self-test"].startswith("failed"):
        raise ModelError(f"the self-test {findings['self-test']}")
    return 0
