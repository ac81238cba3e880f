"""``imprompt models``: list the catalogue."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from imprompt import catalog
from imprompt.catalog.licences import commercial
from imprompt.catalog.resolve import is_here
from imprompt.errors import ModelError, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", nargs="?", help="one alias; of a base, also the models that fit it")
    add("--vocabulary", action="store_true", help="print the words that the bundled model knows")
    add("--commercial", action="store_true", help="only models whose licence allows commercial use")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.vocabulary:
        if args.commercial:
            raise UsageError(
                "--commercial: has no effect on --vocabulary, which lists words; give one of them."
            )
        if args.name not in (None, "emoji"):
            raise UsageError(
                f"--vocabulary: only the bundled model 'emoji' has a list of words, not '{args.name}'."
            )
        _print_vocabulary(as_json=args.json)
        return 0
    tables = _tables(args.name, commercial_only=args.commercial)
    if args.json:
        print(
            json.dumps(
                {name: {k: asdict(row) | _cached(row) for k, row in t.items()} for name, t in tables.items()}
            )
        )
    else:
        _print_tables(tables)
    return 0


def _tables(name: str | None, *, commercial_only: bool) -> dict[str, dict[str, Any]]:
    """Kind → alias → row: everything, or ``name`` and what fits it. Raises :class:`UsageError`."""
    tables: dict[str, dict[str, Any]] = {
        "bases": dict(catalog.bases()),
        "adapters": dict(catalog.adapters()),
        "controls": dict(catalog.controls()),
        "motions": dict(catalog.motions()),
    }
    if name is not None:
        catalog.lookup(
            {k: row for t in tables.values() for k, row in t.items()},
            name,
            "model",
            "no name for the whole list",
        )
    base = catalog.bases().get(name or "")
    family = None if base is None else base.family

    def kept(kind: str, alias: str, row: Any) -> bool:
        fits = name in (None, alias) or (kind != "bases" and row.family == family)
        return fits and (commercial(row.licence) or not commercial_only)

    return {kind: {k: row for k, row in t.items() if kept(kind, k, row)} for kind, t in tables.items()}


def _cached(row: Any) -> dict[str, Any]:
    """Whether a base or adapter is on this machine, and a base's size; nothing for other rows."""
    if isinstance(row, catalog.BaseRow):
        return {"cached": is_here(row), "size": row.size}
    return {"cached": is_here(row)} if isinstance(row, catalog.AdapterRow) else {}


def _print_tables(tables: dict[str, dict[str, Any]]) -> None:
    defaults = {name for row in catalog.families().values() for name in (row.adapter, row.motion)}
    headings = {
        "bases": "bases (--base; + is on this machine)",
        "adapters": "adapters (--adapter; * is its base's default, + is on this machine)",
        "controls": "controls (--control KIND:PATH,model=NAME; default: the base's model for the kind)",
        "motions": "motion adapters (--motion; * is its base's default)",
    }
    for kind, table in tables.items():
        if table:
            print(headings[kind])
        for name, row in table.items():
            star = "*" if kind in ("adapters", "motions") and name in defaults else " "
            here = "+" if _cached(row).get("cached") else " "
            print(
                f"{star}{here} {name:<27} {row.family:<6} {_describe(kind, row)}; {row.licence}; {row.repo}"
            )


def _describe(kind: str, row: Any) -> str:
    """Details of a row: size, kinds of control, requirements."""
    if kind == "bases":
        return f"{row.size} px; {row.note}" + (f"; {row.gigabytes:g} GB" if row.gigabytes else "")
    if kind == "controls":
        favor = f"; favor={row.favor}" if row.favor != "balanced" else ""
        return f"{', '.join(row.modes)}{f' ({row.note})' if row.note else ''}; {row.megabytes} MB{favor}"
    face = f"; faces by {row.face_pack}" if kind == "adapters" and row.face_pack else ""
    pickled = "; a pickle: run imprompt convert first" if kind == "adapters" and row.pickled else ""
    return f"{row.note}; {row.megabytes} MB{face}{pickled}"


def _print_vocabulary(*, as_json: bool) -> None:
    path = catalog.ASSETS / "vocabulary.json"
    if not path.is_file():
        raise ModelError("the bundled model's vocabulary.json is missing; install imprompt again.")
    text = path.read_text(encoding="utf-8")
    if as_json:
        print(text.strip())
        return
    known = json.loads(text)
    concepts = [name.replace("-", " ") for name in known["concepts"]]  # as in the training captions
    print(f"{len(concepts)} concepts: {', '.join(concepts)}")
    print(f"{len(known['styles'])} styles: {', '.join(known['styles'])}")
    article = "an" if concepts[0][0] in "aeiou" else "a"
    print(f'Use both in a prompt: "{article} {concepts[0]}, {known["styles"][0]} style".')
