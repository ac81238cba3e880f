"""Refuse models whose licence does not allow commercial use, if ``IMPROMPT_COMMERCIAL=1`` is set.

Licences are those of the catalogue; files that are not in it are not judged, except face and Kolors adapters.
"""

import os

from imprompt.catalog import licence_terms
from imprompt.errors import ModelError

SWITCH = "IMPROMPT_COMMERCIAL"
FACES = "non-commercial: trained on the embeddings of InsightFace's models"
KOLORS = "Kolors licence (research; commercial on registration)"


def commercial(licence: str) -> bool:
    """Whether a licence allows commercial use; ``True`` for licences that the catalogue does not know."""
    return licence_terms().get(licence, True)


def check(what: str, licence: str) -> None:
    """Raise :class:`ModelError` if ``licence`` does not allow commercial use, and the variable is set."""
    if os.environ.get(SWITCH, "0") not in ("", "0") and not commercial(licence):
        raise ModelError(
            f"{what} is not for commercial use ({licence}), and {SWITCH} is set. 'imprompt models "
            "--commercial' lists what may."
        )
