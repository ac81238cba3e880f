"""Image prompts and text regions: the one record of each, for Python, the command line, HTTP and metadata.

An :class:`ImagePrompt` is one or several pictures, how they are encoded, and how strongly, where and when
they act. A :class:`TextRegion` is a text with a place of its own. Both are checked here, once; nothing is
decoded or computed. In Python pictures may also be PIL images, bytes or tensors; what is written as JSON
holds paths only. Nothing here imports torch.
"""

import numbers
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, Self, TypeAlias

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.json_schema import SkipJsonSchema

from imprompt.errors import UsageError
from imprompt.schema import options
from imprompt.schema.profiles import PROFILES, read_profile
from imprompt.schema.record import Record, read_flag

Picture: TypeAlias = Any
"""A path, a PIL image, or the bytes of an encoded file."""


# ---- kinds of values, told without importing what makes them


def is_tensor(value: object) -> bool:
    """Whether ``value`` is a torch tensor."""
    return hasattr(value, "ndim") and hasattr(value, "detach")


def is_picture(value: object) -> bool:
    """Whether ``value`` can be one picture: a path, bytes or a PIL image."""
    return isinstance(value, str | bytes) or (hasattr(value, "convert") and hasattr(value, "size"))


def is_features(value: object) -> bool:
    """Whether ``value`` is an encoder's output: a tensor, or the features of pictures or faces."""
    return is_tensor(value) or hasattr(value, "pooled") or hasattr(value, "embedding")


def _plain(value: Any) -> Any:
    """Paths as text, lists as tuples."""
    if hasattr(value, "__fspath__"):
        return str(value)
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _checked_picture(value: Any, name: str) -> Any:
    if not is_picture(value):
        raise ValueError(f"{name} cannot be a {type(value).__name__}; give a path, a PIL image or bytes")
    if isinstance(value, str) and not 1 <= len(value) <= 4096:
        raise ValueError(f"{name} is a path of {len(value)} characters; 1 to 4096 are expected")
    return value


def _read_pictures(value: Any) -> Any:
    value = _plain(value)
    if value is None:
        return None
    if isinstance(value, tuple):
        if not value:
            raise ValueError("image is an empty list; give at least one picture")
        found = tuple(_checked_picture(each, "a picture") for each in value)
        return found if len(found) > 1 else found[0]
    return _checked_picture(value, "image")


def _read_mask(value: Any) -> Any:
    value = _plain(value)
    if isinstance(value, tuple):
        return tuple(each if is_tensor(each) else _checked_picture(each, "a mask") for each in value)
    return value if value is None or is_tensor(value) else _checked_picture(value, "mask")


def _read_negative(value: Any) -> Any:
    value = _plain(value)
    return value if value is None or is_features(value) else _checked_picture(value, "negative")


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
    """One number, or text such as ``1,0.5``, as a tuple."""
    if isinstance(value, str):
        value = value.replace(",", " ").split()
        try:
            return tuple(map(kind, value))
        except ValueError:
            raise ValueError(f"{' '.join(value)!r} are no numbers") from None
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return (value,)
    return tuple(value) if isinstance(value, Sequence) else value


def _read_at(value: Any) -> Any:
    if value is None or value == "each":
        return value
    frames = _numbers(value, int)
    if isinstance(frames, tuple) and any(isinstance(frame, str) for frame in frames):
        frames = _numbers(" ".join(map(str, frames)), int)
    whole = isinstance(frames, tuple) and all(isinstance(f, int) and not isinstance(f, bool) for f in frames)
    if not whole or not frames or any(after <= before for before, after in pairwise((-1, *frames))):
        raise ValueError(
            f"at: {value!r}; frames are whole numbers from 0, each later than the one before it, or 'each'"
        )
    return frames


def _read_weights(value: Any) -> Any:
    return None if value is None else _numbers(value, float)


def _read_curve(value: Any) -> Any:
    options.read_curve(value)
    return value if isinstance(value, str) else tuple((float(x), float(y)) for x, y in value)


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


def _refuse_json(value: Any) -> Any:
    """JSON holds paths and texts only."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, tuple) and all(isinstance(each, str) for each in value):
        return list(value)
    raise UsageError(
        "a picture in memory cannot be written as JSON; name it, and hand it over in `pictures`."
    )


_json = PlainSerializer(_refuse_json, when_used="json")
_STRING = {"type": "string"}
_PATHS = {"anyOf": [_STRING, {"type": "array", "items": _STRING}]}
_NULLABLE = {"anyOf": [_STRING, {"type": "null"}]}
_AT = {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"const": "each"}, {"type": "null"}]}
_Pictures = Annotated[Any, BeforeValidator(_read_pictures), _json, WithJsonSchema(_PATHS)]
_Mask = Annotated[Any, BeforeValidator(_read_mask), _json, WithJsonSchema(_NULLABLE)]
_Text = Annotated[Any, BeforeValidator(_read_text), _json, WithJsonSchema(_NULLABLE)]
_Negative = Annotated[Any, BeforeValidator(_read_negative), _json, WithJsonSchema(_NULLABLE)]
_Features = Annotated[SkipJsonSchema[Any], BeforeValidator(_read_features), Field(exclude=True)]
_Tokens = Annotated[SkipJsonSchema[Any], BeforeValidator(_read_tokens), Field(exclude=True)]
_Weight = Annotated[float, Field(ge=-10, le=10)]
_Weights = Annotated[tuple[_Weight, ...] | None, BeforeValidator(_read_weights)]
_At = Annotated[Any, BeforeValidator(_read_at), WithJsonSchema(_AT)]
_Profile = Annotated[str | tuple[float, ...] | dict[str, Any], BeforeValidator(read_profile)]
_Curve = Annotated[str | tuple[tuple[float, float], ...], BeforeValidator(_read_curve)]
_Select = Annotated[str | tuple[int, ...] | None, BeforeValidator(_read_select)]
_Face = Annotated[str, BeforeValidator(_read_face)]
_Noise = Annotated[str | None, BeforeValidator(_read_noise)]
_Feather = Annotated[float, Field(ge=0, le=1)]


class ImagePrompt(Record):
    """One or several pictures that prompt the model: exactly one of image, features and tokens is given.

    Several pictures share one softmax, or are combined into one; several prompts add up. Raises
    :class:`UsageError` (one line, naming the field) for values out of range and for fields that contradict
    each other.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    image: _Pictures = Field(
        default=None,
        description="the picture, or a list of pictures: paths (or names among `pictures`), or features "
        "saved by `imprompt embed`; in Python also PIL images and bytes",
    )
    features: _Features = Field(
        default=None,
        description="Python: the encoder's output, pooled (N, E) or (E,), or hidden states (N, P, W) or "
        "(P, W); of faces an embedding (N, E) or (E,), of length 1 where the adapter reads normalised ones",
    )
    tokens: _Tokens = Field(default=None, description="Python: the projection's output, (N, T, C) or (T, C)")
    weights: _Weights = Field(
        default=None,
        description="one number a picture: its share of attention with combine concat, else its factor; "
        "None: all 1",
    )
    at: _At = Field(
        default=None,
        description="animate: the frame each picture stands at, from 0 and ascending; between two their "
        "tokens are interpolated. each: the picture is animated, or a folder, with one picture a frame",
    )
    adapter: str | None = Field(
        default=None, min_length=1, description="which adapter reads it; None: the request's"
    )
    scale: float | None = Field(
        default=None,
        ge=-10,
        le=10,
        description="strength; 0 none, 1 as trained, negative pushes away; None: the request's scale, in "
        "set_prompt 1",
    )
    profile: _Profile = Field(
        default="linear",
        description="the strength in each layer: "
        + ", ".join(PROFILES)
        + "; those with composition take a factor for it, as style-and-composition:0.5; or weights: one a "
        "block as 1,0.5,0, by name as up_blocks.1:1,default:0, or diffusers' JSON",
    )
    start: float = Field(
        default=0.0, ge=0, le=1, description="fraction of the schedule where it begins; 0: pure noise"
    )
    end: float = Field(default=1.0, ge=0, le=1, description="where it ends (exclusive); 1: finished picture")
    curve: _Curve = Field(
        default="constant",
        description=f"a factor over the schedule: {', '.join(options.CURVES)}, or points as 0:1,0.5:0.2,1:0 "
        "(fraction, factor)",
    )
    mask: _Mask = Field(
        default=None,
        description="picture that is white where the prompt acts; in Python also a tensor (H, W) in 0 to 1, "
        "or a list with one mask a frame",
    )
    feather: _Feather = Field(
        default=0.0, description="width of the mask's edge as a fraction of its shorter side"
    )
    text: _Text = Field(
        default=None,
        description="what is drawn inside the mask, in place of the request's prompt; in Python also its "
        "embeddings (T, C)",
    )
    negative: _Negative = Field(
        default=None,
        description="picture of what to avoid, encoded as the prompt's; in Python also features; None: what "
        "the adapter learned as no picture",
    )
    noise: _Noise = Field(
        default=None,
        description="avoid the first picture's own textures: "
        + ", ".join(options.NOISES)
        + ", with :strength (0 to 1)",
    )
    combine: str = Field(
        default="concat", description="how several pictures become one: " + ", ".join(options.COMBINES)
    )
    framing: str = Field(
        default="crop",
        description="how a picture that is not square becomes the encoder's square: "
        + ", ".join(options.FRAMINGS),
    )
    sharpen: float = Field(
        default=0.0, ge=0, le=1, description="how much pictures are sharpened at the encoder's size"
    )
    scaling: str = Field(
        default="v-only", description="where the strength enters: " + ", ".join(options.SCALINGS)
    )
    select: _Select = Field(
        default=None, description="which tokens of each picture are read, such as 0-3,8; None: all"
    )
    face: _Face = Field(
        default="largest",
        description="face adapters: which face of the picture, largest or a number from 0 (the largest)",
    )
    s_scale: float | None = Field(
        default=None, ge=0, le=10, description="FaceID-PlusV2: weight of the face's look; None: 1, as trained"
    )
    frame_curve: _Curve = Field(
        default="constant",
        description="animate: a factor over the frames, written like curve; 0 is the first frame, 1 the last",
    )

    def __init__(self, image: Picture | Sequence[Picture] | None = None, **fields: Any) -> None:
        super().__init__(image=image, **fields)

    @field_validator("combine", "framing", "scaling")
    @classmethod
    def _name_is_known(cls, value: str, info: ValidationInfo) -> str:
        known = {"combine": options.COMBINES, "framing": options.FRAMINGS, "scaling": options.SCALINGS}
        assert info.field_name is not None
        return options.canonical(info.field_name, value, known[info.field_name])

    def model_post_init(self, _: object) -> None:
        for check in (_check_source, _check_time, _check_mask, _check_pictures, _check_encoding):
            check(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImagePrompt):
            return NotImplemented
        mine, theirs = dict(self), dict(other)
        return all(
            value is theirs[name] or (not is_features(value) and value == theirs[name])
            for name, value in mine.items()
        )

    def __repr_args__(self) -> Iterator[tuple[str, object]]:
        for name, value in self:
            if is_features(value) or value != type(self).model_fields[name].default:
                yield name, value

    def __hash__(self) -> int:
        return hash((self.scale, self.start, self.end, self.framing, self.combine))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """``image`` as a tuple; empty when features or tokens are given."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def paths(self) -> tuple[str, ...]:
        """The files it names: pictures, negative and mask, in this order."""
        named = (
            *self.pictures,
            self.negative,
            *(self.mask if isinstance(self.mask, tuple) else (self.mask,)),
        )
        return tuple(value for value in named if isinstance(value, str))

    @property
    def in_memory(self) -> tuple[str, ...]:
        """The fields that hold more than paths and plain values, and so cannot be written as JSON."""
        found = []
        for name in ("image", "features", "tokens", "mask", "text", "negative"):
            value = getattr(self, name)
            parts = value if isinstance(value, tuple) else (value,)
            if not all(part is None or isinstance(part, str) for part in parts):
                found.append(name)
        return tuple(found)

    @property
    def reads_saved(self) -> bool:
        """Whether one of its pictures is a file of saved features, which may hold several pictures."""
        return any(map(is_saved, self.pictures))

    @classmethod
    def parse(cls, text: str, also: Sequence[str] = ()) -> Self:
        """Read ``--image PATH[,OPTION=VALUE]…`` and the ``--also PATH[,weight=…][,at=…]`` that follow it.

        Options are the record's fields, with ``weight`` for the picture's own of ``weights``. Raises
        :class:`UsageError` naming the option that is unknown, given twice or out of range.
        """
        flags = [("--image", text, _IMAGE_OPTIONS), *(("--also", each, _OF_PICTURE) for each in also)]
        read = [read_flag(*flag) for flag in flags]
        said = " ".join(f"{flag} '{given}'" for flag, given, _ in flags)
        fields: dict[str, Any] = {
            name: value for name, value in read[0][1].items() if name not in _OF_PICTURE
        }
        weights, frames = ([values.get(name) for _, values in read] for name in _OF_PICTURE)
        if any(weights):
            fields["weights"] = [weight or 1.0 for weight in weights]
        if any(frames):
            fields["at"] = "each" if frames == ["each"] else frames
        try:
            _check_frames(frames)
            return cls(image=[path for path, _ in read], **fields)
        except UsageError as error:
            raise UsageError(f"{said}: {error}") from error


def _check_frames(frames: Sequence[str | None]) -> None:
    if any(frames) and not all(frames):
        raise UsageError("at: give a frame for each picture of a prompt, or for none.")


_OF_PICTURE = ("weight", "at")
"""Options of single pictures: those of --also."""
_IMAGE_OPTIONS = (
    "weight",
    *(name for name in ImagePrompt.model_fields if name not in ("image", "features", "tokens", "weights")),
)


class TextRegion(Record):
    """A text and its place: inside ``mask`` it is read instead of the pipeline's prompt."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    text: _Text = Field(
        description="what is drawn there, in place of the request's prompt; in Python also embeddings (T, C)"
    )
    mask: _Mask = Field(
        description="picture that is white there; in Python also a tensor (H, W) in 0 to 1, or a list with "
        "one mask a frame"
    )
    feather: _Feather = Field(
        default=0.0, description="width of the mask's edge as a fraction of its shorter side"
    )

    def __init__(self, text: Any = None, mask: Any = None, feather: Any = 0.0, **unknown: Any) -> None:
        super().__init__(text=text, mask=mask, feather=feather, **unknown)

    def model_post_init(self, _: object) -> None:
        for name in ("text", "mask"):
            if getattr(self, name) is None:
                raise UsageError(f"{name}: a region needs one.")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``--region TEXT,mask=PATH[,feather=…]``. Raises :class:`UsageError`."""
        said, options = read_flag("--region", text, ("mask", "feather"))
        fields: dict[str, Any] = {"text": said, "mask": None, **options}
        try:
            return cls(**fields)
        except UsageError as error:
            raise UsageError(f"--region '{text}': {error}") from error


def is_saved(picture: object) -> bool:
    """Whether a picture's place is taken by a file of features: a path that ends in ``.safetensors``."""
    return isinstance(picture, str) and picture.lower().endswith(".safetensors")


# ---- what the fields of a prompt must agree on


def _check_source(prompt: ImagePrompt) -> None:
    given = [name for name in ("image", "features", "tokens") if getattr(prompt, name) is not None]
    if len(given) != 1:
        raise UsageError(
            "an image prompt needs exactly one of image, features and tokens; "
            f"got {' and '.join(given) or 'none'}."
        )


def _check_time(prompt: ImagePrompt) -> None:
    if prompt.start > prompt.end:
        raise UsageError(f"start: {prompt.start:g} lies after end {prompt.end:g}.")


def _check_mask(prompt: ImagePrompt) -> None:
    if prompt.mask is None:
        for name in ("feather", "text"):
            value = getattr(prompt, name)
            if is_tensor(value) or value:
                raise UsageError(f"{name}: has no effect without a mask.")


def _check_pictures(prompt: ImagePrompt) -> None:
    """That there is one weight and one frame a picture; of saved features the number is not known yet."""
    if prompt.at == "each" and len(prompt.pictures) != 1:
        raise UsageError("at: each needs one picture that is animated, or a folder.")
    if prompt.image is None or prompt.reads_saved or prompt.at == "each":
        return
    count = len(prompt.pictures)
    options.read_weights(prompt.combine, count, prompt.weights)
    if prompt.at is not None and len(prompt.at) != count:
        raise UsageError(f"at: {len(prompt.at)} frames are given for {count} pictures; give one a picture.")


def _check_encoding(prompt: ImagePrompt) -> None:
    """That what acts on pictures has pictures to act on."""
    if prompt.image is None or prompt.reads_saved:
        what = "saved features; set it when embedding" if prompt.reads_saved else "features and tokens"
        for name in ("framing", "sharpen", "face"):
            usual = ImagePrompt.model_fields[name].default
            if getattr(prompt, name) not in (usual, "0" if name == "face" else usual):
                raise UsageError(f"{name}: has no effect on {what}.")
        if prompt.noise is not None:
            raise UsageError(f"noise: it is made of the picture itself and has no effect on {what}.")
    if prompt.noise is not None and prompt.negative is not None:
        raise UsageError("noise: it takes the place of the negative; give no negative beside it.")
    if prompt.tokens is not None and prompt.combine != "concat":
        raise UsageError(f"combine: {prompt.combine!r} acts on features; tokens can only be joined.")
