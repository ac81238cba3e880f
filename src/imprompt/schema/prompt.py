"""Image prompts and text regions: the one record of each, for Python, the command line, HTTP and metadata.

An :class:`ImagePrompt` is one or several pictures, how they are encoded, and how strongly, where and when
they act. A :class:`TextRegion` is a text that is drawn in one place. Both are checked here, once; nothing is
decoded or computed. Nothing here imports torch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from imprompt.errors import UsageError
from imprompt.schema import options
from imprompt.schema.profiles import PROFILES
from imprompt.schema.record import Record, read_flag
from imprompt.schema.values import (
    At,
    CurveField,
    Face,
    Features,
    Mask,
    Negative,
    Noise,
    Picture,
    Pictures,
    ProfileField,
    Select,
    Text,
    Tokens,
    Weights,
    is_features,
    is_saved,
    is_tensor,
)

_KNOWN = {"combine": options.COMBINES, "framing": options.FRAMINGS, "scaling": options.SCALINGS}
_FEATHER = Field(
    default=0.0, ge=0, le=1, description="width of the mask's soft edge, as a fraction of its shorter side"
)


class ImagePrompt(Record):
    """One or several pictures that prompt the model: exactly one of image, features and tokens is given.

    Several pictures share one softmax, or are combined into one; several prompts add up. Raises
    :class:`UsageError` (one line, naming the field) for values out of range and for fields that contradict
    each other.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    image: Pictures = None
    """The picture, or a list of pictures: paths, names among `pictures`, or files of features saved by
    `imprompt embed`; in Python also PIL images and encoded bytes."""
    features: Features = None
    """Python: the encoder's output, pooled (N, E) or (E,), or hidden states (N, P, W) or (P, W); of faces an
    embedding (N, E) or (E,), of length 1 where the adapter reads normalised ones."""
    tokens: Tokens = None
    """Python: the projection's output, (N, T, C) or (T, C)."""
    weights: Weights = None
    """One number for each picture: its share of attention with combine=concat, else the factor of its
    features; ``None``: all 1."""
    at: At = None
    """animate: the frame at which each picture stands, from 0, ascending; tokens are interpolated between
    them. each: an animated picture, a folder or a video, with one picture for each frame."""
    adapter: str | None = Field(default=None, min_length=1)
    """The adapter that reads it; ``None``: the request's."""
    scale: float | None = Field(default=None, ge=-10, le=10)
    """Strength: 0 none, 1 as trained, negative pushes away; ``None``: the request's scale; in Python also
    set_prompt's, 1."""
    profile: ProfileField = Field(
        default="linear",
        description="strength in each layer: "
        + ", ".join(PROFILES)
        + "; a factor for the composition: style-and-composition:0.5; a weight for each block: 1,0.5,0; "
        "weights by block name: up_blocks.1:1,default:0, or diffusers' JSON",
    )
    start: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the schedule at which it begins to act; 0: pure noise."""
    end: float = Field(default=1.0, ge=0, le=1)
    """Fraction of the schedule at which it stops acting; 1: finished picture."""
    curve: CurveField = Field(
        default="constant",
        description=f"factor over the schedule: {', '.join(options.CURVES)}, or points such as "
        "0:1,0.5:0.2,1:0 (fraction:factor)",
    )
    mask: Mask = None
    """Picture that is white where the prompt acts; animate: also an animated picture, folder or video, with
    one mask for each frame; in Python also a tensor (H, W) of 0 to 1, or a list with a mask for each
    frame."""
    feather: float = _FEATHER
    text: Text = None
    """Text to draw inside the mask instead of the request's prompt; in Python also its embeddings (T, C)."""
    negative: Negative = None
    """Picture of what to avoid, encoded like the prompt; in Python also features; ``None``: the adapter's
    tokens for no picture."""
    noise: Noise = Field(
        default=None,
        description="avoid the textures of the prompt's first picture: "
        + ", ".join(options.NOISES)
        + ", with :STRENGTH from 0 to 1",
    )
    combine: str = Field(
        default="concat", description="how several pictures become one prompt: " + ", ".join(options.COMBINES)
    )
    framing: str = Field(
        default="crop",
        description="how a picture that is not square fits the encoder's square input: "
        + ", ".join(options.FRAMINGS),
    )
    sharpen: float = Field(default=0.0, ge=0, le=1)
    """How much to sharpen the pictures at the encoder's input size."""
    scaling: str = Field(
        default="v-only", description="what the strength scales: " + ", ".join(options.SCALINGS)
    )
    select: Select = None
    """Tokens of each picture to use, such as 0-3,8; ``None``: all."""
    face: Face = "largest"
    """Face adapters: which face of the picture, largest or a number from 0 (the largest)."""
    s_scale: float | None = Field(default=None, ge=0, le=10)
    """FaceID-PlusV2: weight of the face's appearance beside its identity; ``None``: 1, as trained."""
    frame_curve: CurveField = "constant"
    """animate: factor over the frames, written like curve; 0 is the first frame, 1 the last."""

    def __init__(self, image: Picture | Sequence[Picture] | None = None, **fields: Any) -> None:
        super().__init__(image=image, **fields)

    @field_validator("combine", "framing", "scaling")
    @classmethod
    def _name_is_known(cls, value: str, info: ValidationInfo) -> str:
        assert info.field_name is not None
        return options.canonical(info.field_name, value, _KNOWN[info.field_name])

    def model_post_init(self, _: object) -> None:
        for check in (_check_source, _check_time, _check_mask, _check_pictures, _check_encoding):
            check(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImagePrompt):
            return NotImplemented
        return _same(tuple(dict(self).values()), tuple(dict(other).values()))

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
        pictures, stated = zip(
            read_flag("--image", text, _IMAGE_OPTIONS),
            *(read_flag("--also", each, _OF_PICTURE) for each in also),
            strict=True,
        )
        weights, frames = ([each.pop(name, None) for each in stated] for name in _OF_PICTURE)
        fields: dict[str, Any] = {"image": list(pictures), **stated[0]}
        if set(weights) != {None}:
            fields["weights"] = ["1" if weight is None else weight for weight in weights]
        if set(frames) != {None}:
            fields["at"] = frames if also else frames[0]
        said = " ".join([f"--image '{text}'", *(f"--also '{each}'" for each in also)])
        if also and None in fields.get("at", ()):
            raise UsageError(f"{said}: at: give a frame for each picture of a prompt, or for none.")
        return cls.from_flag(said, fields)


_OF_PICTURE = ("weight", "at")
"""Options of a single picture: what --also takes."""
_IMAGE_OPTIONS = (
    "weight",
    *(name for name in ImagePrompt.model_fields if name not in ("image", "features", "tokens", "weights")),
)


class TextRegion(Record):
    """A text and its place: inside ``mask`` it is read instead of the pipeline's prompt."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    FLAG = "--region"

    text: Text
    """Text to draw there instead of the request's prompt; in Python also its embeddings (T, C)."""
    mask: Mask
    """Picture that is white there; animate: also an animated picture, folder or video, with one mask for each
    frame; in Python also a tensor (H, W) of 0 to 1, or a list with a mask for each frame."""
    feather: float = _FEATHER

    def __init__(self, text: Any = None, mask: Any = None, feather: Any = 0.0, **unknown: Any) -> None:
        super().__init__(text=text, mask=mask, feather=feather, **unknown)

    def model_post_init(self, _: object) -> None:
        for name in ("text", "mask"):
            if getattr(self, name) is None:
                raise UsageError(f"{name}: a region needs one.")


def _same(one: object, other: object) -> bool:
    """Equality, of tensors and features by identity."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (not is_features(one) and one == other)


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
        raise UsageError(f"start: {prompt.start:g} lies after end {prompt.end:g}; it must come before.")


def _check_mask(prompt: ImagePrompt) -> None:
    if prompt.mask is None:
        for name in ("feather", "text"):
            value = getattr(prompt, name)
            if is_tensor(value) or value:
                raise UsageError(f"{name}: has no effect without a mask.")


def _check_pictures(prompt: ImagePrompt) -> None:
    """One weight and one frame for each picture; files of saved features may hold several pictures."""
    if prompt.at == "each" and len(prompt.pictures) != 1:
        raise UsageError("at: each needs one animated picture, folder or video.")
    if prompt.image is None or prompt.reads_saved or prompt.at == "each":
        return
    count = len(prompt.pictures)
    options.read_weights(prompt.combine, count, prompt.weights)
    if prompt.at is not None and len(prompt.at) != count:
        raise UsageError(f"at: {len(prompt.at)} frames are given for {count} pictures; give one for each.")


def _check_encoding(prompt: ImagePrompt) -> None:
    """Fields that act on pictures need pictures."""
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
