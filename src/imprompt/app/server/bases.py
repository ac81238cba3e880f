"""What a base that jobs may ask for is, by the catalogue or its own configuration. No weights are read."""

import asyncio
from dataclasses import dataclass

from imprompt.app.server.problems import problem_of, refused
from imprompt.app.server.settings import Settings
from imprompt.errors import ImpromptError
from imprompt.generation.families import find_base


@dataclass(frozen=True)
class Served:
    """What the protocols must know of a base to say in its terms what a client means."""

    distilled: bool = False
    """Whether guidance is an input of the model (FLUX), and classifier-free guidance a scale of its own."""
    flows: bool = False
    """Whether it matches flows; what other programs call Euler is then its own scheduler."""
    steps: int = 30
    """Its own number of steps."""


async def served(name: str, settings: Settings) -> Served:
    """What the base is that jobs know as ``name``. Raises :class:`Problem`."""
    return await asyncio.to_thread(_read, name, settings)


def _read(name: str, settings: Settings) -> Served:
    if name not in settings.known_bases:
        raise refused("base", f"'{name[:80]}' is not offered by this server.", "not_offered")
    try:
        base = find_base(settings.bases.get(name, name))
        return Served(base.kind.distilled, base.kind.denoiser == "transformer", base.defaults.steps)
    except ImpromptError as error:
        raise problem_of(error) from error
