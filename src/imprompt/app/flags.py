"""Flags made from the fields of :class:`~imprompt.schema.request.Request`.

A field's description becomes the flag's help; one that begins with tasks ("animate: …") belongs to those
commands only. Values are passed on as text: the record reads and checks them, as for Python and HTTP.
"""

import argparse
import re
import textwrap
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from imprompt.errors import UsageError

_NOT_FLAGS = ("task", "prompt", "image", "hashes", "fingerprints")
"""Fields that are positional, or not for people."""
_REPEATED = {
    "images": ("--image", "PATH[,OPTION=VALUE]…", "a picture to prompt with; repeatable (options below)"),
    "regions": (
        "--region",
        "TEXT,mask=PATH[,feather=X]",
        "a text for one region; repeatable (options below)",
    ),
    "controls": (
        "--control",
        "KIND:PATH[,OPTION=VALUE]…",
        "a picture whose structure to follow; repeatable (below)",
    ),
    "loras": ("--lora", "PATH[,weight=X]", "a LoRA for the base: file, folder or hub id; repeatable"),
    "embeddings": ("--embedding", "PATH[,token=TEXT]", "a textual inversion (.safetensors); repeatable"),
}
"""Fields that hold several records → their flag, which is given once for each."""
_METAVARS = {"size": "WxH", "quantize": "int8|float8|FILE.gguf"}
_TASKS = re.compile(r"((?:generate|edit|inpaint|animate)(?:, (?:generate|edit|inpaint|animate))*): ")


def add_request_flags(parser: argparse.ArgumentParser, model: type[BaseModel], task: str) -> None:
    """Add a flag for every field of ``model`` that has an effect in ``task``."""
    for name, field in model.model_fields.items():
        about = field.description or ""
        tasks = _TASKS.match(about)
        if name in _NOT_FLAGS or (tasks is not None and task not in tasks[1].split(", ")):
            continue
        if name in _REPEATED:
            flag, metavar, about = _REPEATED[name]
            action: Any = _FirstPicture if name == "images" else "append"
            parser.add_argument(flag, dest=name, action=action, metavar=metavar, help=about)
            if name == "images":
                about = "one more picture for the prompt of the --image before it; repeatable"
                parser.add_argument(
                    "--also", dest=name, action=_NextPicture, metavar="PATH[,weight=X][,at=N]", help=about
                )
            continue
        if field.annotation is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=about)
            continue
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            metavar=_METAVARS.get(name) or _metavar(field),
            help=about[tasks.end() if tasks else 0 :].replace("%", "%%"),
        )


class _FirstPicture(argparse.Action):
    """``--image``: begin a prompt, a list of the texts that describe its pictures."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), [values]])


class _NextPicture(argparse.Action):
    """``--also``: one more picture for the last prompt."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if not getattr(namespace, self.dest):
            raise UsageError(f"--also '{values}': it adds to the --image before it; begin with --image.")
        getattr(namespace, self.dest)[-1].append(values)


def describe_options(flag: str, record: type[BaseModel], positional: tuple[str, ...]) -> str:
    """The options of a repeatable flag, one paragraph each, for the end of ``--help``."""
    lines = [f"options of {flag}:"]
    for name, field in record.model_fields.items():
        if name not in positional:
            text = f"{name:<12}{field.description}"
            lines += textwrap.wrap(
                text, 98, initial_indent="  ", subsequent_indent=" " * 14, break_on_hyphens=False
            )
    return "\n".join(lines)


def _metavar(field: FieldInfo) -> str:
    """What stands for a flag's value in its help, by the field's type."""
    kinds = _kinds(field.annotation)
    for kind in kinds:
        if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
    return next((mark for kind, mark in ((int, "N"), (float, "X")) if kind in kinds), "VALUE")


def _kinds(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]
