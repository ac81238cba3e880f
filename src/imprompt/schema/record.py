"""The base of all records: immutable, no unknown fields, errors in one line; and how flags are read.

Nothing here imports torch or opens a file.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from imprompt.errors import UsageError
from imprompt.io import is_text, printable

_LONGEST = 1500  # characters of an error message; a request may have hundreds of errors
_QUOTED = r'"((?:[^"\\]|\\.)*)"'
_PLAIN = {"a valid tuple": "a list", "a valid dictionary( or instance of \\w+)?": "an object of fields"}
"""What pydantic calls types → what everybody does."""
_OPTION = re.compile(rf",\s*([A-Za-z_]\w*)=(?:{_QUOTED}(?=,|$)|(.*?)(?=,\s*[A-Za-z_]\w*=|$))", re.DOTALL)


class Record(BaseModel):
    """Immutable, without unknown fields or NaN; raises one-line :class:`UsageError` for wrong values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    FLAG: ClassVar[str] = ""
    """The command line's flag for one such record."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            for text in value if isinstance(value, list | tuple) else (value,):
                if isinstance(text, str) and not is_text(text):
                    raise UsageError(
                        f"{name}: '{printable(text)}' is not valid Unicode, in which records are written."
                    )
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(describe_errors(type(self), error)) from error
        except RecursionError as error:
            raise UsageError(f"{type(self).__name__}: a value in it is nested too deeply.") from error

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what is written after the record's flag: the first field, and others as ``,NAME=VALUE``.

        Raises :class:`UsageError` naming the option that is unknown, given twice or out of range.
        """
        first, *others = cls.model_fields
        value, stated = read_flag(cls.FLAG, text, tuple(others))
        return cls.from_flag(f"{cls.FLAG} '{text}'", {first: value, **stated})

    @classmethod
    def from_flag(cls, said: str, values: Mapping[str, Any]) -> Self:
        """The record that a flag describes; errors begin with ``said``, the flag as it was given."""
        try:
            return cls(**values)
        except UsageError as error:
            raise UsageError(f"{said}: {error}") from error

    def replace(self, **changes: object) -> Self:
        """A copy with ``changes``, validated again. Raises :class:`UsageError`."""
        return type(self)(**{**dict(self), **changes})


def read_flag(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """Split ``FIRST[,OPTION=VALUE]…`` into the first part and its options.

    Parts may contain commas. A part that contains ``,name=`` goes into double quotes, in which ``\\"`` is a
    quote. Raises :class:`UsageError` naming an option that is unknown, empty or given twice.
    """
    quoted = re.match(_QUOTED + r"\s*(?=,|$)", text)
    if quoted is not None:
        first, rest = _unquoted(quoted[1]), text[quoted.end() :]
    else:
        start = re.search(r",(?=\s*[A-Za-z_]\w*=)", text)
        first, rest = (text, "") if start is None else (text[: start.start()], text[start.start() :])
    options: dict[str, str] = {}
    position = 0
    while position < len(rest):
        option = _OPTION.match(rest, position)
        if option is None:
            raise UsageError(f"{flag} '{text}': OPTION=VALUE is expected at '{rest[position:]}'.")
        name, inside, plain = option.groups()
        if name not in known:
            raise UsageError(
                f"{flag} '{text}': unknown option '{name}'; known are {', '.join(known)}. Text that "
                "contains ',name=' goes into double quotes."
            )
        if name in options:
            raise UsageError(f"{flag} '{text}': '{name}' is given twice.")
        options[name] = plain if inside is None else _unquoted(inside)
        if not options[name].strip():
            raise UsageError(f"{flag} '{text}': '{name}' is empty; {name}=VALUE is expected.")
        position = option.end()
    return first, options


def _unquoted(text: str) -> str:
    return re.sub(r"\\([\"\\])", r"\1", text)


def _shown(value: object) -> str:
    """The value as Python writes it; its type where Python cannot."""
    try:
        return repr(value)
    except (RecursionError, ValueError):  # lists in lists without end, an integer of thousands of digits
        return f"a {type(value).__name__} too large to show"


def describe_errors(model: type[BaseModel], error: ValidationError) -> str:
    """All of pydantic's findings in one line that names the fields."""
    lines = []
    for item in error.errors(include_url=False):
        field = ".".join(str(place) for place in item["loc"] if not str(place).startswith("function-"))
        message = item["msg"].removeprefix("Value error, ").partition(", unable to parse")[0].rstrip(".")
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][-1]), model.model_fields, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            message = f"no such field; {hint}known are {', '.join(model.model_fields)}"
        elif item["type"] not in ("value_error", "missing"):
            for theirs, plain in _PLAIN.items():
                message = re.sub(theirs, plain, message)
            given = _shown(item["input"])
            message += f", got {given if len(given) <= 60 else given[:57] + '...'}"
        named = message.startswith((f"{field} ", f"{field}:"))  # the message names its field
        lines.append(f"{field}: {message[:1].lower()}{message[1:]}" if field and not named else message)
    message = printable("; ".join(lines))
    return f"{message if len(message) <= _LONGEST else message[:_LONGEST] + ' …'}."
