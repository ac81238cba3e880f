"""``imprompt animate``: draw a clip from a text, image prompts, or a video."""

import argparse

from imprompt.app.drawing import add_drawing_arguments, draw

HELP = "draw a clip from a text, image prompts, or a video"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="what to draw; optional with --image or --video")
    add_drawing_arguments(parser, "animate")


def run(args: argparse.Namespace) -> int:
    return draw("animate", args)
