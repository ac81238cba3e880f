"""Which requests the Engine can draw as one batch. No torch."""

import json

from imprompt.schema.request import Request

_OWN = {"prompt", "negative", "images", "regions", "scale", "adapter", "seed", "hashes", "fingerprints"}
"""Fields that each request of a batch has its own value of."""


def batch_key(request: Request) -> str | None:
    """Equal for requests that can be drawn as one batch; ``None`` for one that is drawn alone."""
    if request.exact or request.count != 1 or request.task == "animate" or request.controls:
        return None
    shared = request.model_dump(mode="json", exclude=_OWN)
    return json.dumps([shared, bool(request.images)], sort_keys=True)
