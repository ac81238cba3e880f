"""``imprompt generate``: draw from a text, image prompts, or both."""

from functools import partial

from imprompt.app.drawing import add_drawing_arguments, draw

HELP = "draw from a text, image prompts, or both"

add_arguments = partial(add_drawing_arguments, task="generate")
run = partial(draw, "generate")
