"""imprompt: show a diffusion model a picture and it draws with it.

The public names are imported on first use, so that ``import imprompt`` costs milliseconds and never
loads torch by itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imprompt.adapter.ipadapter import IPAdapter
    from imprompt.adapter.regions import TextRegions
    from imprompt.app.embedding import embed
    from imprompt.app.sweep import sweep
    from imprompt.app.tuning import Tuned, tune
    from imprompt.generation.engine import Engine, Result, generate
    from imprompt.schema.prompt import ImagePrompt, TextRegion
    from imprompt.schema.request import Request

__version__ = "0.1.0"

_HOMES = {
    "IPAdapter": "imprompt.adapter.ipadapter",
    "ImagePrompt": "imprompt.schema.prompt",
    "TextRegion": "imprompt.schema.prompt",
    "TextRegions": "imprompt.adapter.regions",
    "Engine": "imprompt.generation.engine",
    "Result": "imprompt.generation.engine",
    "generate": "imprompt.generation.engine",
    "embed": "imprompt.app.embedding",
    "sweep": "imprompt.app.sweep",
    "tune": "imprompt.app.tuning",
    "Tuned": "imprompt.app.tuning",
    "Request": "imprompt.schema.request",
}
__all__ = [
    "Engine",
    "IPAdapter",
    "ImagePrompt",
    "Request",
    "Result",
    "TextRegion",
    "TextRegions",
    "Tuned",
    "__version__",
    "embed",
    "generate",
    "sweep",
    "tune",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'imprompt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
