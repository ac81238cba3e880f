"""What the user shows: an image prompt with its strength, place and time, and the same made ready for
attention.

:class:`ImagePrompt` is a request and holds whatever the user has: pictures, an encoder's features or finished
tokens. :func:`as_prompts` reads the short forms. A :class:`CompiledPrompt` is its result: tokens of one
softmax, and what steers them. The outputs of several prompts add up; several pictures of one prompt share a
softmax.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypedDict, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.backbones.base import Site
from imprompt.adapter.frames import Track
from imprompt.adapter.schedule import When
from imprompt.errors import InputError, UsageError
from imprompt.schema import options
from imprompt.schema.options import Curve, Points
from imprompt.schema.profiles import LayerWeights, Profile, layer_weights, read_profile


@runtime_checkable
class DecodedPicture(Protocol):
    """A PIL image, as far as it matters here."""

    @property
    def size(self) -> tuple[int, int]: ...
    def convert(self, mode: str) -> "DecodedPicture": ...


@runtime_checkable
class EncodedPictures(Protocol):
    """An encoder's output for N pictures, see ``imprompt.encoders.clip.Features``."""

    @property
    def pooled(self) -> Tensor: ...
    @property
    def hidden(self) -> Tensor: ...
    @property
    def negative_hidden(self) -> Tensor: ...


@runtime_checkable
class EncodedFaces(Protocol):
    """Faces made ready for an adapter that reads them, see ``imprompt.encoders.face.Faces``."""

    @property
    def embedding(self) -> Tensor: ...
    @property
    def space(self) -> str: ...
    @property
    def patches(self) -> Tensor | None: ...
    @property
    def negative_patches(self) -> Tensor | None: ...


@runtime_checkable
class FaceReader(Protocol):
    """What finds and embeds faces, see ``imprompt.encoders.face.FaceEmbedder``."""

    @property
    def name(self) -> str: ...
    @property
    def space(self) -> str: ...
    def find(self, image: Any) -> Any: ...
    def embed(self, image: Any, face: Any) -> Any: ...


@runtime_checkable
class PictureEncoder(Protocol):
    """What makes features of pictures, see ``imprompt.encoders.clip.ImageEncoder``."""

    @property
    def name(self) -> str: ...
    @property
    def pooled_width(self) -> int: ...
    @property
    def hidden_width(self) -> int: ...
    def encode(self, images: Any) -> EncodedPictures: ...
    def to(self, device: Any, dtype: Any) -> Any: ...


_FINE = 256  # pixels that the shorter side of a mask has at least when it is feathered

Picture: TypeAlias = str | Path | bytes | DecodedPicture


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Pictures that prompt the model: exactly one of ``image``, ``features`` and ``tokens`` is given.

    Raises :class:`UsageError` when a field is not what it says; nothing is decoded or computed yet.
    """

    image: Picture | Sequence[Picture] | None = None
    """A path, PIL image or encoded file; or several, whose tokens then share one softmax."""
    features: Tensor | EncodedPictures | EncodedFaces | None = None
    """The encoder's output: pooled ``(N, E)`` or ``(E,)``, or hidden states ``(N, P, W)`` or ``(P, W)``; for
    face adapters an embedding ``(N, E)`` or ``(E,)``, of length 1 where the adapter reads normalised ones."""
    tokens: Tensor | None = None
    """The projection's output ``(N, T, C)`` or ``(T, C)``."""
    scale: float = 1.0
    """Strength; 0 is exactly no prompt, 1 is as trained, and a negative number pushes away."""
    profile: Profile = "linear"
    """How the scale is spread over the layers, see :mod:`imprompt.schema.profiles`."""
    start: float = 0.0
    end: float = 1.0
    """The window [start, end) of the noise schedule in which it acts: 0 is pure noise, 1 the finished
    picture. Evaluated from the timestep ``t`` as ``1 - t/T``, hence independent of scheduler, steps and
    strength."""
    mask: Picture | Tensor | Sequence[Picture | Tensor] | None = None
    """Where it acts: a picture (white is 1) or a tensor ``(H, W)`` in [0, 1], of any size, stretched over the
    output. Soft values are kept. In a video also one a frame: a list, or a tensor ``(F, H, W)``."""
    feather: float = 0.0
    """Width of the mask's edge, a straight ramp centred on it, as a fraction of its shorter side, 0 to 1."""
    text: str | Tensor | None = None
    """What is said inside the mask in place of the pipeline's prompt: words (the pipeline the adapter is
    attached to encodes them), or their embeddings ``(T, C)``. Scale and window are the picture's alone."""
    negative: Picture | Tensor | EncodedFaces | None = None
    """What the unconditional half sees: a picture, or features (tokens when ``tokens`` are given). ``None``
    is the variant's published rule."""
    combine: str = "concat"
    """How several pictures become one prompt, see :mod:`imprompt.adapter.combine`."""
    weights: Sequence[float] | None = None
    """One number a picture, by default all 1: its share of attention in ``concat``, else its factor."""
    framing: str = "crop"
    """How pictures that are not square become the encoder's square, see :mod:`imprompt.encoders.framing`."""
    sharpen: float = 0.0
    """How much pictures are sharpened at the encoder's size, 0 to 1."""
    curve: Curve = "constant"
    """A factor over the schedule, beside the window: a name of ``options.CURVES`` or points (fraction,
    factor)."""
    scaling: str = "v-only"
    """Where the strength enters, see :mod:`imprompt.adapter.batch`. Window, curve and mask act on what is
    added in every mode."""
    select: str | int | Sequence[int] | None = None
    """Which tokens of each picture are shown, as numbers from 0 or ``"0-3,8"``; ``None`` is all."""
    at: Sequence[int] | None = None
    """Video: the frame each picture stands at, from 0 and ascending. Between two, their tokens are
    interpolated; ``range(F)`` shows each frame a picture of its own, ``None`` all frames the same."""
    frame_curve: Curve = "constant"
    """Video: a factor over the frames, said like ``curve``; 0 is the first frame, 1 the last."""
    face: str | int = "largest"
    """Which face of a picture a face adapter reads: ``"largest"``, or a number from 0, the largest first."""
    s_scale: float | None = None
    """FaceID-PlusV2: weight of the face crop's look beside the identity; ``None`` is 1, as trained."""

    def __post_init__(self) -> None:
        given = [name for name in ("image", "features", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                "an image prompt needs exactly one of image, features and tokens; "
                f"got {' and '.join(given) or 'none'}."
            )
        if isinstance(self.image, Sequence) and not isinstance(self.image, str | bytes) and not self.image:
            raise UsageError("an image prompt's image is an empty list; give at least one picture.")
        _check_number("scale", self.scale)
        for name in ("start", "end"):
            _check_number(name, getattr(self, name))
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(
                    f"{name} is {getattr(self, name)}; a fraction of the schedule from 0 to 1 is expected."
                )
        if self.start > self.end:
            raise UsageError(f"start {self.start} lies after end {self.end}; start must not exceed end.")
        if self.mask is None and self.feather:
            raise UsageError("feather softens a mask's edge; give a mask.")
        if self.mask is None and self.text is not None:
            raise UsageError("text is said inside a mask; give a mask, or say it in the pipeline's prompt.")
        check_feather(self.feather)
        read_profile(self.profile)
        options.read_curve(self.curve)
        options.canonical("scaling", self.scaling, options.SCALINGS)
        combine = options.canonical("combine", self.combine, options.COMBINES)
        if self.image is not None:
            options.read_weights(combine, len(self.pictures), self.weights)
        elif options.canonical("framing", self.framing, options.FRAMINGS) != "crop":
            raise UsageError(f"framing {self.framing!r} is for pictures; features and tokens have none.")
        options.canonical("framing", self.framing, options.FRAMINGS)
        _check_number("sharpen", self.sharpen)
        if not 0 <= self.sharpen <= 1 or (self.sharpen and self.image is None):
            raise UsageError(f"sharpen is {self.sharpen}; from 0 to 1 is expected, and only for pictures.")
        if self.tokens is not None and combine != "concat":
            raise UsageError(
                f"combine {self.combine!r} acts on features; tokens are joined. Give features or images."
            )
        if self.select is not None:
            options.read_selection(self.select)
        options.read_curve(self.frame_curve)
        if self.at is not None:
            Track(tuple(self.at))
        if options.read_face(self.face) and isinstance(self.features, Tensor):
            raise UsageError(f"face {self.face!r} is for pictures; these features are of one face each.")
        if self.s_scale is not None:
            _check_number("s_scale", self.s_scale)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """``image`` as a tuple; empty when features or tokens were given."""
        if self.image is None:
            return ()
        if isinstance(self.image, Sequence) and not isinstance(self.image, str | bytes):
            return tuple(self.image)
        return (self.image,)


class PromptFields(TypedDict, total=False):
    """Fields of :class:`ImagePrompt` that can be said beside a picture."""

    scale: float
    profile: Profile
    start: float
    end: float
    mask: Picture | Tensor | Sequence[Picture | Tensor] | None
    feather: float
    text: str | Tensor | None
    negative: Picture | Tensor | EncodedFaces | None
    combine: str
    weights: Sequence[float] | None
    framing: str
    sharpen: float
    curve: Curve
    scaling: str
    select: str | int | Sequence[int] | None
    at: Sequence[int] | None
    frame_curve: Curve
    face: str | int
    s_scale: float | None


PromptLike: TypeAlias = (
    ImagePrompt
    | Picture
    | Tensor
    | EncodedPictures
    | EncodedFaces
    | Sequence[ImagePrompt]
    | Sequence[Picture]
    | Sequence[Tensor]
)
"""A prompt, or the short forms: a picture or features; a list of pictures is ONE prompt of several pictures
(one softmax, as diffusers without masks), a list of prompts is several prompts (a softmax each, added)."""


def as_prompts(value: PromptLike, fields: PromptFields) -> tuple[ImagePrompt, ...]:
    """The prompts that a short form means, with ``fields`` set on each. Raises :class:`UsageError`."""
    if isinstance(value, list | tuple):
        prompts = [item for item in value if isinstance(item, ImagePrompt)]
        if prompts and len(prompts) == len(value):
            return tuple(replace(prompt, **fields) for prompt in prompts)
        if prompts or not value:
            raise UsageError(
                "a list of image prompts is either all ImagePrompt or all pictures, and not empty; "
                "clear_prompt() removes what was set."
            )
        if all(isinstance(item, Tensor) for item in value):
            return (ImagePrompt(features=_joined(value), **fields),)
        return (ImagePrompt(image=tuple(value), **fields),)
    if isinstance(value, ImagePrompt):
        return (replace(value, **fields),)
    if isinstance(value, Tensor | EncodedPictures | EncodedFaces):
        return (ImagePrompt(features=value, **fields),)
    if isinstance(value, str | Path | bytes | DecodedPicture):
        return (ImagePrompt(image=value, **fields),)
    raise UsageError(
        f"an image prompt cannot be a {type(value).__name__}; give a path, a PIL image, a features tensor, "
        "an ImagePrompt or a list of them."
    )


@dataclass(frozen=True, eq=False)
class CompiledPrompt:
    """An image prompt made ready: the tokens of one softmax and what steers them."""

    tokens: Float[Tensor, "T C"]
    negative: Float[Tensor, "Tn C"] | None
    """``None`` when it is not known; needed only with guidance."""
    scale: float
    profile: Profile
    start: float
    end: float
    mask: Float[Tensor, "1 1 H W"] | None
    curve: Points = ((0.0, 1.0),)
    scaling: str = "v-only"
    log_weight_bias: Float[Tensor, "T"] | None = None
    """Added to the tokens' logits, see :func:`imprompt.adapter.combine.log_weight_bias`."""
    text: Float[Tensor, "Tt D"] | None = None
    """Embeddings of what is said inside the mask, see :mod:`imprompt.adapter.regions`; as wide as the
    cross-attention."""
    track: Track | None = None
    """How it varies over the frames of a video."""
    pictures: int = 1
    """Number of pictures in :attr:`tokens` (timed adapters: in the features that stand there)."""

    def layer_weights(self, layers: Sequence[Site]) -> LayerWeights:
        """Scale times profile for each layer; exactly 0 where the prompt does not act at all."""
        spread = layer_weights(self.profile, layers)
        scale = self.scale if self.acts else 0.0
        return LayerWeights(tuple(scale * weight for weight in spread.weights), spread.negated)

    @property
    def acts(self) -> bool:
        """Whether it does anything at any time."""
        return self.scale != 0.0 and not self.when.never

    @property
    def when(self) -> When:
        """Its place in time."""
        return When(self.start, self.end, self.curve)

    def over_frames(self, frames: int) -> "list[CompiledPrompt]":
        """The row of each frame of a clip. Raises :class:`UsageError` when the clip cannot follow the
        track."""
        track = self.track
        if track is None:
            return [self] * frames
        track.check(frames)
        # A negative that is the same for all pictures is repeated in the row, one length for both kinds.
        paired = self.negative is not None and len(self.negative) == len(self.tokens)
        return [
            replace(
                self,
                tokens=track.tokens(self.tokens, frame),
                negative=track.tokens(self.negative, frame)
                if paired and self.negative is not None
                else self.negative,
                scale=self.scale * factor,
                mask=self.mask if track.masks is None else track.masks[frame],
                track=None,
            )
            for frame, factor in enumerate(track.factors(frames))
        ]


def read_mask(
    mask: Picture | Tensor | None, feather: float = 0.0, *, empty: bool = False
) -> Float[Tensor, "1 1 H W"] | None:
    """A mask as floats in [0, 1], its edges ``feather`` (of the shorter side) wide. Raises
    :class:`InputError` when it is no mask or, unless ``empty`` may be, covers nothing."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        import numpy as np

        from imprompt.encoders.images import load_mask

        picture = load_mask(mask)  # type: ignore[arg-type]  # a PIL image is known here by its shape only
        mask = torch.from_numpy(np.array(picture, dtype=np.uint8))
    if mask.is_complex():
        raise InputError(f"mask has dtype {mask.dtype}; floats in [0, 1], booleans or bytes are expected.")
    values = mask.detach().to(torch.float32) / (255 if mask.dtype == torch.uint8 else 1)
    if (
        values.ndim not in (2, 3, 4)
        or values.numel() != values.shape[-1] * values.shape[-2]
        or not values.numel()
    ):
        raise InputError(f"mask has shape {tuple(mask.shape)}; one picture (H, W) is expected.")
    if not bool(torch.isfinite(values).all()) or values.min() < 0 or values.max() > 1:
        raise InputError("mask has values outside 0 to 1; give floats in [0, 1], booleans or bytes.")
    if not empty and not values.any():
        raise InputError(
            "mask is 0 everywhere, so its image prompt could never act; leave the prompt out instead."
        )
    return feathered(values.reshape(1, 1, *values.shape[-2:]), feather)


def check_feather(width: object) -> None:
    """Raises :class:`UsageError` when it is no fraction of a mask's side."""
    _check_number("feather", width)
    if not 0 <= width <= 1:  # type: ignore[operator]
        raise UsageError(f"feather is {width}; a fraction of the mask's side, 0 to 1, is expected.")


def feathered(mask: Float[Tensor, "1 1 h w"], width: float) -> Float[Tensor, "1 1 H W"]:
    """The mask with each edge a straight ramp of ``width`` (of its shorter side), centred on the edge.

    A box average: what lies half a width away from an edge is untouched, complementary masks stay so, and the
    picture's own border is no edge. A mask too coarse for that comes back finer.
    """
    if width == 0:
        return mask
    finer = -(-_FINE // min(mask.shape[-2:]))
    if finer > 1:
        mask = mask.repeat_interleave(finer, -2).repeat_interleave(finer, -1)
    radius = max(1, round(width * min(mask.shape[-2:]) / 2))
    for pad in ((radius, radius, 0, 0), (0, 0, radius, radius)):
        window = (1, 2 * radius + 1) if pad[0] else (2 * radius + 1, 1)
        mask = F.avg_pool2d(F.pad(mask, pad, mode="replicate"), window, stride=1)
    return mask.clamp(0, 1)


def read_masks(
    mask: Picture | Tensor | Sequence[Picture | Tensor] | None, feather: float = 0.0
) -> tuple[Float[Tensor, "1 1 H W"] | None, tuple[Float[Tensor, "1 1 H W"], ...] | None]:
    """One mask for all frames, or masks of single frames, of which some may be empty. Raises
    :class:`InputError` as :func:`read_mask`."""
    if isinstance(mask, Tensor) and mask.ndim == 3 and len(mask) > 1:
        mask = tuple(mask)
    if not isinstance(mask, list | tuple):
        return read_mask(mask, feather), None  # type: ignore[arg-type]
    masks = tuple(read for one in mask if (read := read_mask(one, feather, empty=True)) is not None)
    if not any(bool(one.any()) for one in masks):
        raise InputError("the masks are 0 in every frame; leave the prompt out instead.")
    return None, masks


def resize_mask(mask: Float[Tensor, "1 1 H W"], size: tuple[int, int]) -> Float[Tensor, "1 1 h w"]:
    """The mask on a layer's grid: exact area averages where it shrinks, bilinear where it grows.

    Area averages keep what no pixel of the mask touches at exactly 0, and complementary masks complementary.
    """
    if size[0] <= mask.shape[-2] and size[1] <= mask.shape[-1]:
        return F.interpolate(mask, size, mode="area")
    return F.interpolate(mask, size, mode="bilinear", align_corners=False)


def _joined(features: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(item.shape[-2:] if item.ndim > 1 else item.shape) for item in features}
    ranks = {item.ndim for item in features}
    if len(shapes) != 1 or len(ranks) != 1:
        raise UsageError(
            "the features of one prompt's pictures have different shapes; give them the same shape."
        )
    rank = ranks.pop()
    return torch.stack(tuple(features)) if rank == 1 else torch.cat(tuple(features))


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UsageError(f"{name} is {value!r}; a finite number is expected.")
