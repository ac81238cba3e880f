"""Requests of version 1, as older pictures contain them, in today's form.

Version 1 listed single pictures (``path``, ``weight``, ``at``) with their steering, and joined neighbours
with equal steering into one prompt. It also kept fields without effect: a ``scale`` that every picture
overrode, and negative pictures without guidance.

Pictures drawn before controls could favour anything followed them in a balanced way.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from imprompt.errors import UsageError
from imprompt.schema.options import is_finite

_OF_PICTURE = ("path", "weight", "at")
"""Fields of a single picture in version 1; the others steer the prompt."""


def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a request in today's form; those of today's requests unchanged.

    Raises :class:`UsageError` for a list that holds pictures of version 1 beside anything else.
    """
    values = _balanced(values)
    images = values.get("images")
    if not isinstance(images, list) or not any(map(_is_picture, images)):
        return values
    refs = [_checked(number, ref) for number, ref in enumerate(images)]
    prompts = [_joined(steering, list(same)) for steering, same in groupby(refs, _steering)]
    guidance = values.get("guidance")
    if is_finite(guidance) and guidance <= 1 and values.get("image_guidance") is None:
        prompts = [{**prompt, "negative": None, "noise": None} for prompt in prompts]
    overridden = all(prompt.get("scale") is not None for prompt in prompts)
    return {**values, "images": prompts, **({"scale": None} if overridden else {})}


def _balanced(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A drawn request whose controls do not say what they favour, with what they did."""
    controls = values.get("controls")
    if not values.get("fingerprints") or not isinstance(controls, list):
        return values
    said = [{"favor": "balanced", **ref} if isinstance(ref, Mapping) else ref for ref in controls]
    return {**values, "controls": said}


def _checked(number: int, ref: Any) -> Mapping[str, Any]:
    """An entry of a list of pictures of version 1."""
    if isinstance(ref, str):
        return {"path": ref}
    if not _is_picture(ref):
        raise UsageError(
            f"images.{number}: it has no `path`, and others have one, as version 1 wrote them; "
            "write `image` in all."
        )
    return ref


def _is_picture(ref: object) -> bool:
    """Whether this is a picture of version 1."""
    return isinstance(ref, Mapping) and "path" in ref


def _steering(ref: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in ref.items() if name not in _OF_PICTURE}


def _joined(steering: Mapping[str, Any], refs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One prompt of pictures that have the same steering."""
    prompt: dict[str, Any] = {**steering, "image": [ref["path"] for ref in refs]}
    weights = [ref.get("weight", 1) for ref in refs]
    if any(weight != 1 for weight in weights):
        prompt["weights"] = weights
    frames = [ref["at"] for ref in refs if ref.get("at") is not None]
    if frames:
        prompt["at"] = "each" if frames == ["each"] else frames
    return prompt
