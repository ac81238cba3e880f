"""What this server offers: limits, models with their licences, and the JSON Schema of a request."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from imprompt import __version__, catalog
from imprompt.app.server.settings import Settings
from imprompt.catalog.resolve import is_here
from imprompt.schema import options
from imprompt.schema.profiles import PROFILES
from imprompt.schema.request import CONTROLS as CONTROL_KINDS
from imprompt.schema.request import SCHEDULERS, Request

_ASSETS = Path(__file__).parents[2] / "assets" / "emoji"


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
            {"name": name, "family": row.family, "kinds": list(row.modes), "licence": row.licence,
             "here": settings.download or is_here(row)}
            for name, row in catalog.controls().items()
        ],
        "control_kinds": CONTROL_KINDS,
        "default_controls": {name: dict(row.controls) for name, row in catalog.families().items()},
        "motions": [
            {"name": name, "family": row.family, "licence": row.licence, "note": row.note,
             "default": catalog.families()[row.family].motion == name,
             "here": settings.download or is_here(row)}
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
    rows = [
        {"name": name, "family": row.family, "size": row.size, "licence": row.licence, "note": row.note,
         "inpaint": row.inpaint, "here": is_here(row),
         "offered": settings.download or is_here(row),
         "source": "" if row.bundled else row.repo}
        for name, row in catalog.bases().items()
    ]  # fmt: skip
    return rows + [
        {"name": name, "family": None, "size": None, "licence": "see its source", "note": "added by --model",
         "inpaint": False, "here": True, "offered": True, "source": ""}
        for name in settings.bases
    ]  # fmt: skip


def _adapters(settings: Settings) -> list[dict[str, Any]]:
    rows = []
    for name, row in catalog.adapters().items():
        here = is_here(row)
        rows.append(
            {"name": name, "family": row.family, "licence": row.licence, "note": row.note,
             "megabytes": row.megabytes, "face": row.face_pack is not None, "here": here,
             "offered": here or settings.download, "default": catalog.families()[row.family].adapter == name}
        )  # fmt: skip
    return rows + [
        {"name": name, "family": None, "licence": "see its source", "note": "added by --adapter",
         "megabytes": None, "face": False, "here": True, "offered": True, "default": False}
        for name in settings.adapters
    ]  # fmt: skip


@lru_cache(1)
def _vocabulary() -> dict[str, list[str]]:
    """What the bundled model knows."""
    found: dict[str, list[str]] = json.loads((_ASSETS / "vocabulary.json").read_text(encoding="utf-8"))
    return found


@lru_cache(1)
def _schema() -> dict[str, Any]:
    return Request.model_json_schema()
