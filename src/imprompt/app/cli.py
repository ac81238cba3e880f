"""The command line: ``imprompt COMMAND …``.

A command is a module of this package with ``add_arguments(parser)`` and ``run(args) -> int``; those that draw
share :mod:`imprompt.app.drawing`. Only the chosen module is imported, and it imports torch inside ``run``, so
that help and usage errors come at once. File names and machine-readable results go to stdout, everything else
to stderr. An error is one line and an exit code: 2 usage, 3 model, 4 input, 130 interrupted.
"""

import argparse
import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, cast

from imprompt import __version__
from imprompt.app.hints import for_command, for_flag
from imprompt.app.streams import prepare_output, tell
from imprompt.app.threads import thread_settings
from imprompt.errors import ImpromptError, InputError, UsageError

VERBS = {
    "generate": "draw from a text, image prompts, or both",
    "edit": "redraw a picture (image-to-image)",
    "inpaint": "redraw the masked part of a picture",
    "animate": "draw a clip from a text, image prompts, or a video",
    "batch": "draw a file of requests, one JSON object a line",
    "serve": "serve a web page and HTTP APIs (OpenAI's, A1111's, imprompt's own)",
    "tune": "find the settings that balance a text and a picture best",
    "info": "show the request stored inside a picture or clip",
    "models": "list the known models with their aliases and licences",
    "inspect": "identify an adapter file and check that it is intact",
    "convert": "convert a pickled adapter, or features in an .ipadpt file, to safetensors",
    "embed": "encode pictures and save their features, to use them later without an encoder",
    "profiles": "show how each profile weights the attention layers",
    "train": "train an adapter on a folder of captioned pictures",
    "evaluate": "measure adapters on your pictures, and compare them on the same seeds",
    "demo": "draw a contact sheet with the bundled model",
    "doctor": "report what is installed and run a self-test",
}
"""Command → what it does, in the order of ``imprompt --help``."""

INTERRUPTED = 130
_DRAWING = ("generate", "edit", "inpaint", "animate")
"""Commands of :mod:`imprompt.app.drawing`; they skip the interpreter's tear-down: see :func:`_exit_now`."""
_GC_THRESHOLD = 100_000


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
    prepare_output()
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.update(thread_settings(os.environ))
    short = bool(given) and given[0] in _DRAWING
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
            if stream is not None:  # closed before the start
                stream.flush()
        except (OSError, ValueError):  # closed, or nobody reads it any more
            code = code or 1
    os._exit(code)


def _run(given: list[str]) -> int:
    end = given.index("--") if "--" in given else len(given)  # what follows is no flag
    debug = "--debug" in given[:end]
    given = [word for word in given[:end] if word != "--debug"] + given[end:]
    try:
        with _warnings_as_lines():
            code = _dispatch(given)
        if sys.stdout is not None:  # closed before the start
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        tell("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    except ImpromptError as error:
        if debug:
            raise
        tell(f"error: {' '.join(str(error).split())}")
        return error.exit_code
    except Exception as error:  # the last boundary: whatever arrives here is a bug
        if debug:
            raise
        message = " ".join(f"{type(error).__name__}: {error}".split())
        tell(f"error: unexpected {message} (--debug shows where; please report it)")
        return 1


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print imprompt's own warnings as it prints notes; those of libraries stay as they are."""
    show, home = warnings.showwarning, Path(__file__).parents[1]

    def say(message: Warning | str, kind: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        if Path(filename).is_relative_to(home):
            tell(str(message))
        else:
            show(message, kind, filename, *rest, **more)

    warnings.showwarning = cast("Any", say)
    try:
        yield
    finally:
        warnings.showwarning = show


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if given[0] in ("-V", "--version"):
        print(f"imprompt {__version__}")
        return 0
    name, *rest = given
    if name not in VERBS:
        raise UsageError(for_command(name, rest, tuple(VERBS)))
    parser, run = parser_of(name)
    try:
        args = _parsed(parser, rest)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    _check_folder()
    return run(args)


def _parsed(parser: Parser, words: list[str]) -> argparse.Namespace:
    """Flags and texts in any order; what follows ``--`` is no flag (argparse forgets it where they mix)."""
    end = words.index("--") if "--" in words else len(words)
    try:
        args = parser.parse_intermixed_args([*words[:end], *(f"\0{word}" for word in words[end + 1 :])])
    except UsageError as error:
        for word in words[:end]:
            if word.startswith("-") and os.path.lexists(word):
                raise UsageError(f"{error} (A file: ./{word})") from error
        raise
    return argparse.Namespace(**{name: _unmarked(value) for name, value in vars(args).items()})


def _unmarked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmarked(each) for each in value]
    return value.removeprefix("\0") if isinstance(value, str) else value


def _check_folder() -> None:
    """Raises :class:`InputError` in a folder that was deleted, where torch itself cannot be loaded."""
    try:
        Path.cwd()
    except OSError as error:
        raise InputError("the current folder is not there any more; change to another one (cd).") from error


def parser_of(verb: str) -> tuple[Parser, Callable[[argparse.Namespace], int]]:
    """The parser of a command, and the function that runs it."""
    module: Any = import_module(f"imprompt.app.{'drawing' if verb in _DRAWING else verb}")
    parser = Parser(prog=f"imprompt {verb}", description=f"{VERBS[verb]}.", allow_abbrev=False)
    if verb in _DRAWING:
        module.add_arguments(parser, verb)
        return parser, partial(module.draw, verb)
    module.add_arguments(parser)
    return parser, module.run


def _overview() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: imprompt COMMAND …   (imprompt COMMAND --help lists its options)",
            "",
            "Show a diffusion model a picture and it draws with it.",
            "",
            *(f"  {name:<{width}}  {about}" for name, about in VERBS.items()),
            "",
            "  --version, --debug (show a traceback for an error)",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
