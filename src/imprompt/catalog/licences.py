"""What may be used commercially, for those who set ``IMPROMPT_COMMERCIAL=1``: anything else is then refused.

It goes by the licences of the catalogue and by what a file is known to be; files of unknown origin are the
user's own to judge. Nothing here imports anything heavy.
"""

import os

from imprompt.errors import ModelError

SWITCH = "IMPROMPT_COMMERCIAL"
FACES = "non-commercial: trained on the embeddings of InsightFace's models"
KOLORS = "Kolors licence (research; commercial on registration)"
_NOT_FREE = ("non-commercial", "on registration", "not stated")


def commercial(licence: str) -> bool:
    """Whether a licence, in the catalogue's words, lets anyone use the thing commercially."""
    return not any(mark in licence for mark in _NOT_FREE)


def check(what: str, licence: str) -> None:
    """Raise :class:`ModelError` when the switch is set and ``licence`` does not allow commercial use."""
    if os.environ.get(SWITCH, "0") not in ("", "0") and not commercial(licence):
        raise ModelError(
            f"{what} is not for commercial use without more ado ({licence}), and {SWITCH} is set. 'imprompt "
            "models --commercial' lists what is."
        )
