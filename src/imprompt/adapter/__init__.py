"""The core: image prompts in the attention of a diffusion model.

``ipadapter`` is the public class. ``encoding`` turns prompts into features, ``prompt`` into tokens, ``batch``
into keys and values, ``attention`` adds them; ``injection`` installs all this in a model, ``backbones`` knows
the models. No task, no pipeline class and no command line is known here.
"""
