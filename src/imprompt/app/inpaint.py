"""``imprompt inpaint``: redraw the masked part of a picture."""

import argparse

from imprompt.app.drawing import add_drawing_arguments, draw

HELP = "redraw the masked part of a picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", nargs="?", metavar="PICTURE", help="the picture to repaint")
    parser.add_argument("prompt", nargs="?", help="what to draw; optional with --image")
    add_drawing_arguments(parser, "inpaint")


def run(args: argparse.Namespace) -> int:
    return draw("inpaint", args)
