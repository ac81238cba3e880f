"""What this server offers: limits, models with their licences, and the JSON Schema of a request."""

import json
from functools import lru_cache
from typing import Any

from imprompt import __version__, catalog
from imprompt.app.server.settings import Settings
from imprompt.catalog import AdapterRow, BaseRow, ControlRow, MotionRow
from imprompt.catalog.resolve import is_here
from imprompt.errors import ImpromptError
from imprompt.generation.families import Base, Kind, find_base
from imprompt.io import check_path
from imprompt.schema import options
from imprompt.schema.profiles import PROFILES
from imprompt.schema.request import CONTROLS as CONTROL_KINDS
from imprompt.schema.request import SCHEDULERS, Request


def capabilities(settings: Settings) -> dict[str, Any]:
    """The answer of ``GET /api/v1/capabilities``. Looks which models are on this machine."""
    limits = settings.limits
    return {
        "version": __version__,
        "limits": {
            "queue": limits.queue, "picture_bytes": limits.picture_bytes, "side": limits.side,
            "count": limits.count, "steps": limits.steps, "frames": limits.frames,
        },
        "base": settings.base,
        "bases": _bases(settings),
        "adapters": _adapters(settings),
        "loras": list(settings.loras),
        "controls": [
            _described(name, row, settings) | {"kinds": list(row.modes)}
            for name, row in catalog.controls().items()
        ],
        "control_kinds": CONTROL_KINDS,
        "default_controls": {name: dict(row.controls) for name, row in catalog.families().items()},
        "motions": [
            _described(name, row, settings) | {"default": catalog.families()[row.family].motion == name}
            for name, row in catalog.motions().items()
        ],
        "profiles": list(PROFILES),
        "schedulers": list(SCHEDULERS),
        "combines": list(options.COMBINES),
        "framings": list(options.FRAMINGS),
        "curves": list(options.CURVES),
        "words": _vocabulary(),
        "request": _schema(),
    }  # fmt: skip


def offered_bases(settings: Settings) -> list[str]:
    """Names of the bases that jobs may ask for."""
    return [row["name"] for row in _bases(settings) if row["offered"]]


def _bases(settings: Settings) -> list[dict[str, Any]]:
    return [
        _described(name, row, settings)
        | _of_kind(Base(name, row.repo, row).kind)
        | {"size": row.size}
        | {"inpaint": row.inpaint, "source": "" if row.bundled else row.repo}
        for name, row in catalog.bases().items()
    ] + [
        _added(name, "--model") | _read(source) | {"inpaint": False, "source": ""}
        for name, source in settings.bases.items()
    ]


def _of_kind(kind: Kind) -> dict[str, Any]:
    """What the page must know of a kind: its sizes' multiple, and whether named layer profiles act on it."""
    return {"multiple": kind.multiple, "profiles": kind.denoiser == "unet"}


def _read(source: str) -> dict[str, Any]:
    """The same of a base that the server was started with, as far as its files tell; downloads nothing."""
    unknown = {"family": None, "multiple": None, "profiles": True, "size": None}
    if not check_path(source).exists():
        return unknown
    try:
        base = find_base(source)
        return {"family": base.family, "size": base.defaults.size} | _of_kind(base.kind)
    except ImpromptError:
        return unknown


def _adapters(settings: Settings) -> list[dict[str, Any]]:
    families = catalog.families()
    return [
        _described(name, row, settings)
        | {"megabytes": row.megabytes, "face": row.face_pack is not None}
        | {"default": families[row.family].adapter == name}
        for name, row in catalog.adapters().items()
    ] + [
        _added(name, "--adapter") | {"megabytes": None, "face": False, "default": False}
        for name in settings.adapters
    ]


def _described(
    name: str, row: BaseRow | AdapterRow | ControlRow | MotionRow, settings: Settings
) -> dict[str, Any]:
    """A model of the catalogue: whether it is on this machine, and whether jobs may ask for it."""
    here = is_here(row)
    of_all = {"name": name, "family": row.family, "licence": row.licence, "note": row.note}
    return {**of_all, "here": here, "offered": here or settings.download}


def _added(name: str, flag: str) -> dict[str, Any]:
    """A model that the server was started with."""
    of_all = {"name": name, "family": None, "licence": "see its source", "note": f"added by {flag}"}
    return {**of_all, "here": True, "offered": True}


@lru_cache(1)
def _vocabulary() -> dict[str, list[str]]:
    """What the bundled model knows."""
    return json.loads((catalog.ASSETS / "vocabulary.json").read_text(encoding="utf-8"))


_schema = lru_cache(1)(Request.model_json_schema)
