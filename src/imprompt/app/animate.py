"""``imprompt animate``: draw a clip from a text, image prompts, or a video."""

from functools import partial

from imprompt.app.drawing import add_drawing_arguments, draw

HELP = "draw a clip from a text, image prompts, or a video"

add_arguments = partial(add_drawing_arguments, task="animate")
run = partial(draw, "animate")
