"""Commercial use: with ``IMPROMPT_COMMERCIAL=1`` set, anything that is not free for it is refused.

This goes by the licences of the catalogue, and by what a file is recognised as; files of unknown origin are
the user's own to judge.
"""

import os

from imprompt.catalog import licence_terms
from imprompt.errors import ModelError

SWITCH = "IMPROMPT_COMMERCIAL"
FACES = "non-commercial: trained on the embeddings of InsightFace's models"
KOLORS = "Kolors licence (research; commercial on registration)"


def commercial(licence: str) -> bool:
    """Whether a licence allows commercial use without asking; one that the catalogue does not know, does."""
    return licence_terms().get(licence, True)


def check(what: str, licence: str) -> None:
    """Raise :class:`ModelError` if the switch is set and ``licence`` does not allow commercial use."""
    if os.environ.get(SWITCH, "0") not in ("", "0") and not commercial(licence):
        raise ModelError(
            f"{what} is not for commercial use ({licence}), and {SWITCH} is set. 'imprompt models "
            "--commercial' lists what may."
        )
