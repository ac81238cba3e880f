"""Field types of image prompts and text regions: what each accepts, in which form it is kept, and its JSON.

In Python pictures may be paths, PIL images or encoded bytes, and masks and features tensors; JSON holds paths
and texts only. Kinds of values are recognised by their attributes, so that nothing here imports torch or PIL.
"""

import numbers
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from imprompt.errors import UsageError
from imprompt.io import check_path
from imprompt.schema import options
from imprompt.schema.profiles import read_profile

Picture: TypeAlias = Any
"""A path, a PIL image, or the bytes of an encoded file."""


def is_tensor(value: object) -> bool:
    """Whether ``value`` is a torch tensor."""
    return hasattr(value, "ndim") and hasattr(value, "detach")


def is_features(value: object) -> bool:
    """Whether ``value`` is an encoder's output: a tensor, or the features of pictures or faces."""
    return is_tensor(value) or hasattr(value, "pooled") or hasattr(value, "embedding")


def is_saved(picture: object) -> bool:
    """Whether ``picture`` is the path of saved features: it ends in ``.safetensors``."""
    return isinstance(picture, str) and picture.lower().endswith(".safetensors")


def path_to_text(value: object) -> object:
    """A path as text; other values as they are."""
    return str(value) if hasattr(value, "__fspath__") else value


PathText = Annotated[str, BeforeValidator(path_to_text), Field(min_length=1, max_length=4096)]
"""A path as text; :class:`pathlib.Path` is accepted."""


def _expanded(value: object) -> object:
    """A path with ``~`` expanded; other values as they are."""
    return check_path(value) if isinstance(value, str | Path) else value


def _listed(value: object) -> object:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""Names, as a text with commas between them too."""
ExpandedPath = Annotated[Path, BeforeValidator(_expanded)]
"""A path; ``~`` at its beginning is the user's home."""


def _plain(value: Any) -> Any:
    """Paths as text, lists as tuples."""
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else path_to_text(value)


def _picture(value: Any, name: str) -> Any:
    is_image = hasattr(value, "convert") and hasattr(value, "size")
    if not (is_image or isinstance(value, str | bytes)):
        raise ValueError(f"{name} cannot be a {type(value).__name__}; give a path, a PIL image or bytes")
    if isinstance(value, str) and not 1 <= len(value) <= 4096:
        raise ValueError(f"{name} is a path of {len(value)} characters; 1 to 4096 are expected")
    return value


def _read_pictures(value: Any) -> Any:
    value = _plain(value)
    if not isinstance(value, tuple):
        return value if value is None else _picture(value, "image")
    if not value:
        raise ValueError("image is an empty list; give at least one picture")
    pictures = tuple(_picture(each, "a picture") for each in value)
    return pictures if len(pictures) > 1 else pictures[0]


def _read_mask(value: Any) -> Any:
    value = _plain(value)
    if isinstance(value, tuple):
        return tuple(each if is_tensor(each) else _picture(each, "a mask") for each in value)
    return value if value is None or is_tensor(value) else _picture(value, "mask")


def _read_negative(value: Any) -> Any:
    value = _plain(value)
    return value if value is None or is_features(value) else _picture(value, "negative")


def _read_features(value: Any) -> Any:
    if value is not None and not is_features(value):
        raise ValueError(f"features cannot be a {type(value).__name__}; give an encoder's output or a tensor")
    return value


def _read_tokens(value: Any) -> Any:
    if value is not None and not is_tensor(value):
        raise ValueError(f"tokens cannot be a {type(value).__name__}; give a tensor (N, T, C)")
    return value


def _read_text(value: Any) -> Any:
    if value is None or is_tensor(value):
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text is empty; say what is drawn inside the mask, or leave it out")
    if len(value) > 20_000:
        raise ValueError(f"text has {len(value)} characters; at most 20000 are read")
    return value


def _numbers(value: Any, kind: Callable[[str], Any]) -> Any:
    """One number, a list, or text such as ``1,0.5`` as a tuple of numbers; other values as they are."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return (value,)
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(parts, Sequence):
        return value
    try:
        return tuple(kind(part) if isinstance(part, str) else part for part in parts)
    except ValueError:
        raise ValueError(f"{value!r} is not a list of numbers") from None


def _read_at(value: Any) -> Any:
    if value is None or value == "each":
        return value
    frames = _numbers(value, int)
    if (
        not isinstance(frames, tuple)
        or not frames
        or not all(map(options.is_whole, frames))
        or not _ascends(frames)
    ):
        raise ValueError(
            f"at: {value!r}; give whole numbers from 0, each larger than the one before it, or 'each'"
        )
    return frames


def _ascends(frames: Sequence[int]) -> bool:
    return all(before < after for before, after in pairwise((-1, *frames)))


def _read_weights(value: Any) -> Any:
    return None if value is None else _numbers(value, float)


def _read_curve(value: Any) -> Any:
    points = options.read_curve(value)
    return value if isinstance(value, str) else points


def _read_select(value: Any) -> Any:
    if value is not None:
        options.read_selection(value)
    return (value,) if isinstance(value, int) else _plain(value)


def _read_face(value: Any) -> Any:
    options.read_face(value)
    return str(value)


def _read_noise(value: Any) -> Any:
    if value is not None:
        options.read_noise(value)
    return value


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, tuple) and all(isinstance(each, str) for each in value):
        return list(value)
    raise UsageError(
        "a picture in memory cannot be written as JSON; name it, and hand it over in `pictures`."
    )


_json = PlainSerializer(_to_json, when_used="json")
_STRING = {"type": "string"}
_PATHS = {"anyOf": [_STRING, {"type": "array", "items": _STRING}]}
_NULLABLE = {"anyOf": [_STRING, {"type": "null"}]}
_FRAMES = {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"const": "each"}, {"type": "null"}]}

Pictures = Annotated[Any, BeforeValidator(_read_pictures), _json, WithJsonSchema(_PATHS)]
Mask = Annotated[Any, BeforeValidator(_read_mask), _json, WithJsonSchema(_NULLABLE)]
Text = Annotated[Any, BeforeValidator(_read_text), _json, WithJsonSchema(_NULLABLE)]
Negative = Annotated[Any, BeforeValidator(_read_negative), _json, WithJsonSchema(_NULLABLE)]
Features = Annotated[SkipJsonSchema[Any], BeforeValidator(_read_features), Field(exclude=True)]
Tokens = Annotated[SkipJsonSchema[Any], BeforeValidator(_read_tokens), Field(exclude=True)]
Weights = Annotated[tuple[Annotated[float, Field(ge=-10, le=10)], ...] | None, BeforeValidator(_read_weights)]
At = Annotated[Any, BeforeValidator(_read_at), WithJsonSchema(_FRAMES)]
ProfileField = Annotated[str | tuple[float, ...] | dict[str, Any], BeforeValidator(read_profile)]
CurveField = Annotated[str | tuple[tuple[float, float], ...], BeforeValidator(_read_curve)]
Select = Annotated[str | tuple[int, ...] | None, BeforeValidator(_read_select)]
Face = Annotated[str, BeforeValidator(_read_face)]
Noise = Annotated[str | None, BeforeValidator(_read_noise)]
