"""``imprompt inpaint``: redraw the masked part of a picture."""

from functools import partial

from imprompt.app.drawing import add_drawing_arguments, draw

HELP = "redraw the masked part of a picture"

add_arguments = partial(add_drawing_arguments, task="inpaint")
run = partial(draw, "inpaint")
