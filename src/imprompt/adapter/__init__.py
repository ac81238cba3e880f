"""The core: a picture's tokens become keys and values beside the text's in every cross-attention layer.

``layers`` lists where, ``weighting`` how much in each, ``prompt`` what, ``attention`` reads it, ``adapter``
owns the weights and puts it on a model. Knows no task, no pipeline class and no command line.
"""
