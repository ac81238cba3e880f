"""``imprompt edit``: redraw a picture (image-to-image)."""

from functools import partial

from imprompt.app.drawing import add_drawing_arguments, draw

HELP = "redraw a picture (image-to-image)"

add_arguments = partial(add_drawing_arguments, task="edit")
run = partial(draw, "edit")
