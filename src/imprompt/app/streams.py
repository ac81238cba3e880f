"""Standard output and error of the program, whatever they lead to.

A letter that the output's encoding lacks becomes a similar one or ``?``, bytes of a file's name that are no
text stay as they are, and a device that takes no more is an :class:`InputError` like that of any other file.
"""

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator

from imprompt.errors import InputError
from imprompt.io import printable

_HANDLER = "imprompt-output"
_SIMILAR = {"…": "...", "│": "|", "×": "x", "·": ".", "→": "->", "–": "-", "“": '"', "”": '"'}
_SIMILAR |= dict(zip("▁▂▃▄▅▆▇█", "12345678", strict=True))  # of bar charts
"""Letters of imprompt's own texts → what stands for them in ASCII."""


class Output(io.TextIOWrapper):
    """A text stream whose failures are :class:`InputError`, but :class:`BrokenPipeError` where nobody reads
    it any more. What is left goes nowhere then, so that the interpreter does not try again at its end."""

    def write(self, text: str) -> int:
        with self._delivering():
            return super().write(text)

    def flush(self) -> None:
        with self._delivering():
            super().flush()

    @contextlib.contextmanager
    def _delivering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # a device
                os.dup2(nowhere.fileno(), self.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise InputError(f"cannot write to the standard output ({error.strerror}).") from error


def prepare_output() -> None:
    """Make ``sys.stdout`` an :class:`Output`, unless it was closed before the start. Where the standard error
    was, what it would be told goes nowhere: ``print`` would write it to the standard output."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123  # for good; a device
    given = sys.stdout
    if not isinstance(given, io.TextIOWrapper):
        return
    codecs.register_error(_HANDLER, _replaced)
    given.flush()
    encoding, lines = given.encoding, given.line_buffering
    sys.stdout = Output(given.detach(), encoding=encoding, errors=_HANDLER, line_buffering=lines)


def tell(line: str) -> None:
    """Print a line to standard error, if anybody can read it."""
    with contextlib.suppress(OSError, ValueError):
        print(f"imprompt: {printable(line)}", file=sys.stderr, flush=True)


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stands for the first letter that cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    try:
        return codecs.lookup_error("surrogateescape")(letter)
    except UnicodeEncodeError:
        return _SIMILAR.get(error.object[error.start], "?"), error.start + 1
