"""The exception family of imprompt.

Every error that a user can cause is an :class:`ImpromptError`. Its class says what went wrong, and carries
the exit code of the command line and the status of the HTTP server. A message says what was given, what was
expected and what to do. Nothing heavy is imported, so that an error is reported before torch is loaded.
"""

from typing import ClassVar


class ImpromptError(Exception):
    """Base class of all errors that imprompt raises on purpose."""

    exit_code: ClassVar[int] = 1
    """Exit status of the command line."""
    http_status: ClassVar[int] = 500
    """Status code of the server's answer."""
    code: ClassVar[str] = "error"
    """What the server's answer calls it, for programs."""


class UsageError(ImpromptError, ValueError):
    """The request is wrong: an unknown name, a value out of range, options that exclude each other."""

    exit_code = 2
    http_status = 400
    code = "invalid_request"


class ModelError(ImpromptError):
    """A base, adapter or encoder is missing, damaged, or not what its name says."""

    exit_code = 3
    http_status = 404
    code = "model_error"


class AdapterMismatch(ModelError):
    """The adapter's weights do not fit the model they are attached to."""

    http_status = 422


class EncoderMismatch(ModelError):
    """The image features have another width or kind than the adapter was trained on."""

    http_status = 422


class InputError(ImpromptError, ValueError):
    """A picture, mask or other file of the user cannot be read or written."""

    exit_code = 4
    http_status = 422
    code = "bad_picture"


class Cancelled(ImpromptError):
    """The run was stopped before it was finished. Raise it in ``on_step`` to stop a run."""

    exit_code = 130
    http_status = 499
    code = "cancelled"


def first_line(error: BaseException) -> str:
    """A library's error in one line: its first line, joined with the second if the first ends with a colon;
    the name of its class if it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
