"""The command line: ``imprompt COMMAND …``.

Each command is a module of this package with ``HELP``, ``add_arguments(parser)`` and ``run(args) -> int``;
only the chosen one builds a parser, and it imports what is heavy inside ``run``: ``imprompt --help`` never
loads torch. File names and machine-readable results go to stdout, everything else to stderr. An error is one
line and an exit code: 2 usage, 3 model, 4 input, 130 interrupted.
"""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, Protocol, cast

from imprompt.app.hints import for_command, for_flag
from imprompt.app.threads import thread_settings
from imprompt.errors import ImpromptError, UsageError

VERBS = (
    "generate",
    "edit",
    "inpaint",
    "animate",
    "batch",
    "serve",
    "tune",
    "info",
    "models",
    "inspect",
    "convert",
    "embed",
    "profiles",
    "train",
    "evaluate",
    "demo",
    "doctor",
)
"""Commands, in the order ``imprompt --help`` lists them; each is the module ``imprompt.app.NAME``."""

INTERRUPTED = 130
_SHORT_LIVED = ("generate", "edit", "inpaint", "animate")
"""Commands that skip the interpreter's tear-down: see :func:`_exit_now`."""
_GC_THRESHOLD = 100_000


class Verb(Protocol):
    """The interface of a command's module."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UsageError`, with the closest flag for a mistyped one."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message += for_flag(
                unknown.split()[0], (flag for a in self._actions for flag in a.option_strings)
            )
        raise UsageError(f"{message}. See {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; as a program (without ``arguments``) it may exit itself."""
    if arguments is not None:
        return _run(list(arguments))
    given = sys.argv[1:]
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.update(thread_settings(os.environ))
    short = bool(given) and given[0] in _SHORT_LIVED
    if short:
        # Imports create a million objects that stay; scanning them for garbage took 1 s of 8.
        gc.set_threshold(_GC_THRESHOLD)
    code = _run(given)
    if short:
        _exit_now(code)
    return code


def _interrupt(*_: object) -> NoReturn:
    """SIGTERM ends a command as Ctrl-C does: files are cleaned up, exit code 130."""
    raise KeyboardInterrupt


def _exit_now(code: int) -> NoReturn:
    """Exit without the interpreter's tear-down of torch, which took 0.9 s of 8; all files are written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # closed, or nobody reads it any more
            code = code or 1
    os._exit(code)


def _run(given: list[str]) -> int:
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    try:
        return _dispatch(given)
    except KeyboardInterrupt:
        print("imprompt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except ImpromptError as error:
        if debug:
            raise
        print(f"imprompt: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # the last boundary: whatever arrives here is a bug
        if debug:
            raise
        message = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"imprompt: error: unexpected {message} (--debug shows where; please report it)", file=sys.stderr
        )
        return 1


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if given[0] in ("-V", "--version"):
        from imprompt import __version__

        print(f"imprompt {__version__}")
        return 0
    name, *rest = given
    if name not in VERBS:
        raise UsageError(for_command(name, rest, VERBS))
    verb = _load(name)
    parser = Parser(prog=f"imprompt {name}", description=f"{verb.HELP}.", allow_abbrev=False)
    verb.add_arguments(parser)
    try:
        return verb.run(parser.parse_intermixed_args(rest))
    except SystemExit as stop:  # --help
        return int(stop.code or 0)


def _load(name: str) -> Verb:
    return cast("Verb", import_module(f"imprompt.app.{name}"))


def _overview() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: imprompt COMMAND …   (imprompt COMMAND --help lists its options)",
            "",
            "Show a diffusion model a picture and it draws with it.",
            "",
            *(f"  {name:<{width}}  {_load(name).HELP}" for name in VERBS),
            "",
            "  --version, --debug (show a traceback for an error)",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
