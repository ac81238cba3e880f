"""Compile image prompts: features to tokens, with everything that steers them.

:func:`as_prompts` reads the short forms that :meth:`IPAdapter.set_prompt` takes. :func:`compile_prompt`
projects an encoded prompt. Several prompts add up; several pictures of one prompt share a softmax.

Dimensions: N pictures, T tokens, C token width, D text width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from imprompt.adapter.backbones.base import Site
from imprompt.adapter.combine import combine, log_weight_bias
from imprompt.adapter.encoding import EncodedPrompt
from imprompt.adapter.frames import Track, track_of
from imprompt.adapter.kept import Kept
from imprompt.adapter.masks import read_masks
from imprompt.adapter.schedule import When
from imprompt.encoders.clip import Features
from imprompt.encoders.face import Faces
from imprompt.errors import InputError, UsageError
from imprompt.projections.modules import ImageProjection
from imprompt.schema import options
from imprompt.schema.options import Points
from imprompt.schema.profiles import LayerWeights, Profile, layer_weights
from imprompt.schema.prompt import ImagePrompt
from imprompt.weights import copied_to

PromptLike: TypeAlias = (
    ImagePrompt
    | str
    | Path
    | bytes
    | Image.Image
    | Tensor
    | Features
    | Faces
    | Sequence[ImagePrompt]
    | Sequence[str | Path | bytes | Image.Image]
    | Sequence[Tensor]
)
"""A prompt, a picture or features. A list of pictures is one prompt with several pictures (one softmax, as in
diffusers without masks); a list of prompts is several prompts (one softmax each, added up)."""


def as_prompts(value: PromptLike, fields: Mapping[str, object]) -> tuple[ImagePrompt, ...]:
    """Read a short form; ``fields`` are set on each prompt. Raises :class:`UsageError` for anything else."""
    if isinstance(value, Tensor | Features | Faces):
        return (ImagePrompt(features=value, **fields),)
    items = _items(value)
    prompts = [item for item in items if isinstance(item, ImagePrompt)]
    if not items or 0 < len(prompts) < len(items):
        raise UsageError(
            f"an image prompt cannot be {_described(value)}; give a path, a PIL image, a features tensor, an "
            "ImagePrompt, or a list of either prompts or pictures. clear_prompt() removes what was set."
        )
    if prompts:
        return tuple(prompt.replace(**fields) for prompt in prompts)
    tensors = [item for item in items if isinstance(item, Tensor)]
    if len(tensors) == len(items):
        return (ImagePrompt(features=_joined(tensors), **fields),)
    return (ImagePrompt(tuple(items), **fields),)


def _items(value: object) -> list[object]:
    """The prompts or pictures that a short form lists; empty if it is no short form."""
    if isinstance(value, list | tuple):
        return list(value)
    return [value] if isinstance(value, ImagePrompt | str | Path | bytes | Image.Image) else []


@dataclass(frozen=True, eq=False)
class CompiledPrompt:
    """An image prompt as the attention reads it: the tokens of one softmax, and what steers them."""

    tokens: Float[Tensor, "T C"]
    negative: Float[Tensor, "Tn C"] | None
    """``None`` if unknown; needed only with guidance."""
    scale: float
    profile: Profile = "linear"
    start: float = 0.0
    end: float = 1.0
    mask: Float[Tensor, "1 1 H W"] | None = None
    curve: Points = ((0.0, 1.0),)
    scaling: str = "v-only"
    log_weight_bias: Float[Tensor, " T"] | None = None
    """Bias of the tokens' logits, see :func:`imprompt.adapter.combine.log_weight_bias`."""
    words: str | None = None
    """The text inside the mask, if it was given as words."""
    text: Float[Tensor, "Tt D"] | None = None
    """Embeddings of the text inside the mask, see :mod:`imprompt.adapter.regional`; as wide as the
    cross-attention."""
    track: Track | None = None
    """How it changes over the frames of a video."""
    pictures: int = 1
    """Number of pictures in :attr:`tokens`. (Of timed adapters, ``tokens`` are features.)"""

    def layer_weights(self, layers: Sequence[Site]) -> LayerWeights:
        """Scale times profile for each layer; 0 if the prompt never acts."""
        spread = layer_weights(self.profile, layers)
        scale = self.scale if self.acts else 0.0
        return LayerWeights(tuple(scale * weight for weight in spread.weights), spread.negated)

    @property
    def acts(self) -> bool:
        """Whether it has an effect at any time."""
        return self.scale != 0.0 and not self.when.never

    @property
    def when(self) -> When:
        """When it acts."""
        return When(self.start, self.end, self.curve)

    def over_frames(self, frames: int) -> "list[CompiledPrompt]":
        """One prompt per frame of a clip. Raises :class:`UsageError` if the track does not fit the clip."""
        track = self.track
        if track is None:
            return [self] * frames
        track.check(frames)
        # A negative is interpolated as well if it has tokens for each picture.
        negative = self.negative
        paired = negative is not None and len(negative) == len(self.tokens)
        return [
            replace(
                self,
                tokens=track.tokens(self.tokens, frame),
                negative=track.tokens(negative, frame) if paired and negative is not None else negative,
                scale=self.scale * factor,
                mask=self.mask if track.masks is None else track.masks[frame],
                track=None,
            )
            for frame, factor in enumerate(track.factors(frames))
        ]


class PromptTokens(NamedTuple):
    """The tokens of a prompt, which no strength, mask or window changes."""

    tokens: Float[Tensor, "T C"]
    negative: Float[Tensor, "Tn C"] | None
    log_weight_bias: Float[Tensor, " T"] | None
    """As those of :class:`CompiledPrompt`."""
    pictures: int
    """Number of pictures in :attr:`tokens`."""

    @classmethod
    def of(cls, encoded: EncodedPrompt, projection: ImageProjection) -> "PromptTokens":
        """Project an encoded prompt with the adapter's present weights, on their device or the execution
        device.

        Raises :class:`InputError` for features that are not finite or overflow in the projection,
        :class:`UsageError` for tokens that do not exist.
        """
        prompt = encoded.prompt
        _check_negative(encoded)
        with _s_scale(projection, prompt.s_scale), copied_to(projection, projection.execution_device):
            sets = _token_sets(encoded, projection)
            negative = _negative(encoded, projection)
        if prompt.select is not None:
            chosen = list(options.read_selection(prompt.select, sets.shape[1]))
            if negative is not None and not isinstance(encoded.negative, Tensor):
                negative = negative.unflatten(0, (-1, sets.shape[1]))[:, chosen].flatten(0, 1)
            sets = sets[:, chosen]
        tokens = sets.flatten(0, 1)
        if not bool(torch.isfinite(tokens).all()):
            raise InputError(
                "the image features are too large: their projection is not finite; give an encoder's own."
            )
        if negative is not None and len(tokens) % len(negative) == 0:
            # The same tokens repeated give the same attention; equal lengths need no padding.
            negative = negative.repeat(len(tokens) // len(negative), 1)
        each = projection.tokens if projection.variant.timed else sets.shape[1]
        bias = log_weight_bias(encoded.weights, each) if prompt.combine == "concat" else None
        return cls(tokens, negative, bias, len(sets))


def compile_prompt(
    encoded: EncodedPrompt, projection: ImageProjection, kept: Kept[PromptTokens]
) -> CompiledPrompt:
    """Compile an encoded prompt; its tokens are those in ``kept``, if it was shown before.

    Raises :class:`InputError` for an invalid mask, and for features that are not finite or overflow in the
    projection, :class:`UsageError` for tokens or frames that do not exist.
    """
    prompt, given = encoded.prompt, encoded.negative
    settings = prompt.combine, encoded.weights, str(prompt.select), prompt.s_scale, projection.s_scale
    made = kept.get(
        [
            *(encoded.features, encoded.patches, encoded.zeros, encoded.tokens),
            *(given if isinstance(given, tuple) else (given,)),
        ],
        settings,
        partial(PromptTokens.of, encoded, projection),
    )
    mask, masks = read_masks(prompt.mask, prompt.feather)
    return CompiledPrompt(
        tokens=made.tokens,
        negative=made.negative,
        scale=1.0 if prompt.scale is None else prompt.scale,
        profile=prompt.profile,
        start=prompt.start,
        end=prompt.end,
        mask=mask,
        curve=options.read_curve(prompt.curve),
        scaling=prompt.scaling,
        log_weight_bias=made.log_weight_bias,
        words=prompt.text if isinstance(prompt.text, str) else None,
        text=encoded.text,
        track=track_of(
            encoded.at,
            options.read_curve(prompt.frame_curve),
            masks,
            pictures=made.pictures,
            plain=prompt.combine == "concat" and len(set(encoded.weights)) == 1,
        ),
        pictures=made.pictures,
    )


def _check_negative(encoded: EncodedPrompt) -> None:
    given = encoded.negative if isinstance(encoded.negative, tuple) else (encoded.negative,)
    for part in (encoded.zeros, *given):
        if part is not None and not bool(torch.isfinite(part).all()):
            raise InputError(
                "image features contain NaN or infinite values; encode them again with sound weights."
            )


def _token_sets(encoded: EncodedPrompt, projection: ImageProjection) -> Float[Tensor, "N T C"]:
    """The tokens of each picture, or of all combined; of a timed adapter the features."""
    rule = encoded.prompt.combine
    if encoded.features is None:
        assert encoded.tokens is not None
        return combine(_placed(encoded.tokens, projection), rule, encoded.weights)
    features = combine(_placed(encoded.features, projection), rule, encoded.weights)
    if rule != "concat" and projection.variant.embedding == "normed":
        features = torch.nn.functional.normalize(features, dim=-1)  # as each face's own embedding is
    if projection.variant.timed:
        if encoded.prompt.select is not None:
            raise UsageError("select: has no effect on this adapter, whose tokens change at every step.")
        return features
    patches = encoded.patches
    if patches is not None:
        patches = combine(_placed(patches, projection), rule, encoded.weights)
    return projection(features, patches)


def _negative(encoded: EncodedPrompt, projection: ImageProjection) -> Float[Tensor, "T C"] | None:
    """Tokens of the uncond branch: the prompt's negative, else the variant's default; ``None`` if unknown."""
    given = encoded.negative
    if given is None:
        return _learned_negative(encoded, projection)
    if isinstance(given, Tensor):
        return _placed(given, projection).flatten(0, 1)
    features, patches = given
    features = _placed(features, projection)
    if not projection.variant.timed:
        features = projection(features, None if patches is None else _placed(patches, projection))
    return features.flatten(0, 1)


def _learned_negative(encoded: EncodedPrompt, projection: ImageProjection) -> Float[Tensor, "T C"] | None:
    """The variant's default negative: the tokens (timed adapters: features) it was trained with as no
    picture."""
    if projection.variant.timed:
        assert encoded.features is not None
        return torch.zeros_like(_placed(encoded.features[0], projection))
    rule = projection.variant.negative
    if rule == "zero_features" and projection.feature != "face+hidden":
        return projection.negative()[0]
    if encoded.zeros is None or rule == "none":
        return None
    return projection.negative(_placed(encoded.zeros, projection))[0]


@contextmanager
def _s_scale(projection: ImageProjection, value: float | None) -> Iterator[None]:
    """Set FaceID-PlusV2's ``s_scale`` inside the block; ``None`` leaves the projection's own."""
    usual = projection.s_scale
    projection.s_scale = usual if value is None else value
    try:
        yield
    finally:
        projection.s_scale = usual


def _placed(features: Tensor, projection: ImageProjection) -> Tensor:
    weight = next(projection.parameters())
    return features.to(weight.device, weight.dtype)


def _joined(features: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(item.shape[-2:] if item.ndim > 1 else item.shape) for item in features}
    ranks = {item.ndim for item in features}
    if len(shapes) != 1 or len(ranks) != 1:
        raise UsageError(
            "the features of one prompt's pictures have different shapes; give them the same shape."
        )
    return torch.stack(tuple(features)) if ranks == {1} else torch.cat(tuple(features))


def _described(value: object) -> str:
    if isinstance(value, list | tuple):
        return "an empty list" if not value else "a list of both prompts and pictures"
    return f"a {type(value).__name__}"
