"""``imprompt generate``: draw from a text, image prompts, or both."""

import argparse

from imprompt.app.drawing import add_drawing_arguments, draw

HELP = "draw from a text, image prompts, or both"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="what to draw; optional with --image")
    add_drawing_arguments(parser, "generate")


def run(args: argparse.Namespace) -> int:
    return draw("generate", args)
