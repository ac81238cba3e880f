"""The one exception family of imprompt.

Every error a user can cause is an :class:`ImpromptError`; each class carries the exit code the command
line ends with. A message says what was given, what was expected and what to do. Nothing here imports
anything heavy, so that the command line can report an error before torch is loaded.
"""

from typing import ClassVar


class ImpromptError(Exception):
    """Base of all errors raised on purpose. ``exit_code`` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class UsageError(ImpromptError, ValueError):
    """The request itself is wrong: an unknown name, a value out of range, options that exclude each other."""

    exit_code = 2


class ModelError(ImpromptError):
    """A base, adapter or encoder is missing, damaged or not what it says."""

    exit_code = 3


class AdapterMismatch(ModelError):
    """The adapter's weights do not fit the model they are attached to."""


class EncoderMismatch(ModelError):
    """The image features have another width or kind than the adapter was trained on."""


class InputError(ImpromptError, ValueError):
    """A picture, mask or file given by the user cannot be used."""

    exit_code = 4


def first_line(error: BaseException) -> str:
    """What a library's error says, for a message of one line: its first line, with the next where the first
    only announces it; its class's name where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
