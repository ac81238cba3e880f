"""Errors as HTTP answers: status, a code that programs can test, a message for people, the field at fault."""

import dataclasses
import re

from imprompt.errors import ImpromptError

_FIELD = re.compile(r"^([a-z_]+(?:\.[a-z0-9_]+)*): ")


@dataclasses.dataclass
class Problem(Exception):
    """An answer other than 2xx, raised anywhere below a route."""

    status: int
    code: str
    message: str
    field: str | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, str | None]:
        """The value of ``error`` in the answer."""
        return {"code": self.code, "message": self.message, "field": self.field}


def refused(field: str, text: str, code: str = "invalid_request", status: int = 422) -> Problem:
    """What is wrong with one field, whose name begins the message."""
    return Problem(status, code, f"{field}: {text}", field)


def problem_of(error: ImpromptError) -> Problem:
    """What to answer for one of the library's own errors."""
    message = " ".join(str(error).split())
    named = _FIELD.match(message)
    return Problem(error.http_status, error.code, message, named[1] if named else None)
