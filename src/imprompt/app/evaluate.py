"""``imprompt evaluate``: measure a base and its adapters on held-out pictures."""

import argparse

from imprompt.errors import InputError

HELP = "measure the bundled model, or another, on held-out pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="diffusers folder with eval/ and judge.safetensors")
    parser.add_argument("--judge", help="another judge")
    parser.add_argument("--eval-set", help="another evaluation set")
    parser.add_argument("--adapter", action="append", help="adapter file (repeatable); default: the base's")
    parser.add_argument("-n", metavar="N", help="pictures per figure; default 48")
    for flag in ("steps", "guidance", "seed", "device"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--json", help="write figures and settings to this file")


def run(args: argparse.Namespace) -> int:
    from imprompt.evaluation.report import main as report

    words: list[str] = []
    for name, value in vars(args).items():
        flag = "-n" if name == "n" else "--" + name.replace("_", "-")
        for each in value if isinstance(value, list) else [value]:
            words += [] if each is None else [flag, each]
    if code := report(words):
        raise InputError(f"the evaluation ended with exit code {code}.")
    return 0
