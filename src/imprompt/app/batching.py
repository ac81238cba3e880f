"""Which requests the Engine can draw as one batch. No torch."""

import json

from imprompt.schema.request import Request

_OWN = {"prompt", "negative", "images", "seed", "hashes"}
"""Fields that each request of a batch has its own value of."""


def batch_key(request: Request) -> str | None:
    """Equal for requests that can be drawn as one batch; ``None`` for one that is drawn alone."""
    if request.count != 1 or request.task == "animate":
        return None
    return json.dumps(request.model_dump(mode="json", exclude=_OWN), sort_keys=True)
