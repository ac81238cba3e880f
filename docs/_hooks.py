"""What the pages take from the program itself, so that they cannot differ from it.

``<!-- help: VERB -->`` becomes the command's ``--help``, ``<!-- fields: module.Record -->`` a table of a
record's fields. Roles of reStructuredText in docstrings (``:class:`Name```) become plain code.
"""

import re
from importlib import import_module
from typing import Any

from imprompt.app.cli import parser_of

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>~?([^<]*)</code>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = re.sub(r"<!-- help: (\w+) -->", lambda found: _help(found[1]), markdown)
    return re.sub(r"<!-- fields: ([\w.]+) -->", lambda found: _fields(found[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    return _ROLE.sub(lambda found: f"<code>{found[1].rpartition('.')[2]}</code>", html)


def _help(verb: str) -> str:
    return f"```text\n{parser_of(verb)[0].format_help()}```"


def _fields(name: str) -> str:
    module, _, record = name.rpartition(".")
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for field, info in getattr(import_module(module), record).model_fields.items():
        default = "" if info.default in (None, (), "") else f"`{info.default}`"
        about = " ".join((info.description or "").split()).replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `{field}` | {'required' if info.is_required() else default} | {about} |")
    return "\n".join(rows)
