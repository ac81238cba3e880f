"""Image features → image tokens.

:mod:`~imprompt.projections.shapes` knows the kinds by the shapes of their weights, without torch;
:mod:`~imprompt.projections.build` makes the modules.
"""
