"""``imprompt edit``: image-to-image."""

import argparse

from imprompt.app.drawing import add_drawing_arguments, draw

HELP = "redraw a picture (image-to-image)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", nargs="?", metavar="PICTURE", help="the picture to start from")
    parser.add_argument("prompt", nargs="?", help="what to draw; optional with --image")
    add_drawing_arguments(parser, "edit")


def run(args: argparse.Namespace) -> int:
    return draw("edit", args)
