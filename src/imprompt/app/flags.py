"""Flags made from the fields of :class:`~imprompt.schema.request.Request`.

A field's description becomes the flag's help; a command has the flags of the fields that act in its task.
Values are passed on as text: the record reads and checks them, as for Python and HTTP.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Mapping
from types import MappingProxyType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from imprompt.errors import UsageError
from imprompt.schema.checks import TASKS_OF_FIELD

if TYPE_CHECKING:  # `imprompt --help` does without pydantic
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

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
_METAVARS = {
    "size": "WxH", "quantize": "int8|float8|FILE.gguf", "negative": "TEXT", "mask": "PATH", "video": "PATH",
    "face_model": "FOLDER", **dict.fromkeys(("base", "adapter", "scheduler", "motion", "device"), "NAME"),
}  # fmt: skip


def add_request_flags(parser: argparse.ArgumentParser, model: type[BaseModel], task: str) -> None:
    """Add a flag for every field of ``model`` that has an effect in ``task``."""
    for name, field in model.model_fields.items():
        tasks = TASKS_OF_FIELD.get(name)
        if name in _NOT_FLAGS or (tasks is not None and task not in tasks):
            continue
        about = flag_help(field).removeprefix(f"{', '.join(tasks or ())}: ")
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
            help=about,
        )


def add_field_flags(
    parser: argparse.ArgumentParser, record: type[BaseModel], fields: Mapping[str, str]
) -> None:
    """Add a flag for each of ``fields`` of a record; it maps their names to metavars, empty: by type."""
    for name, metavar in fields.items():
        field = record.model_fields[name]
        flag = {"n": "-n", "output": "-o"}.get(name) or "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=name, metavar=metavar or _metavar(field), help=flag_help(field))
    parser.add_argument("-q", "--quiet", action="store_true", default=None, help="no progress bar")


def stated_fields(args: argparse.Namespace, record: type[BaseModel]) -> dict[str, Any]:
    """The fields of ``record`` that the flags state."""
    return {
        name: value for name, value in vars(args).items() if value is not None and name in record.model_fields
    }


def flag_help(field: FieldInfo) -> str:
    """A field's description as the help of its flag: no capital, no full stop, nothing of Python's alone, and
    ``None`` is the default."""
    about = " ".join((field.description or "").split()).removesuffix(".")
    about = re.sub(r"; in Python also [^;]*", "", about)
    first = about.partition(" ")[0]
    about = about[:1].lower() + about[1:] if first[1:].islower() else about
    return about.replace("``None``: ", "default: ").replace("%", "%%")


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


def describe_options(
    flag: str, record: type[BaseModel], others: tuple[str, ...], own: Mapping[str, str] = MappingProxyType({})
) -> str:
    """The options of a repeatable flag, one paragraph each, for the end of ``--help``: its ``own``, and all
    fields of the record but ``others``."""
    fields = {name: flag_help(field) for name, field in record.model_fields.items() if name not in others}
    lines = [f"options of {flag}:"]
    for name, about in {**own, **fields}.items():
        text = f"{name:<12}{about}"
        lines += textwrap.wrap(
            text, 98, initial_indent="  ", subsequent_indent=" " * 14, break_on_hyphens=False
        )
    return "\n".join(lines)


def _metavar(field: FieldInfo) -> str:
    """The metavar of a flag, by the field's type."""
    kinds = _kinds(field.annotation)
    for kind in kinds:
        if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
    return next((mark for kind, mark in ((int, "N"), (float, "X")) if kind in kinds), "VALUE")


def _kinds(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]
