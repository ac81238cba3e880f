"""Image prompts made ready for attention: the short forms, and the step from features to tokens.

:func:`as_prompts` reads what :meth:`IPAdapter.set_prompt` takes. :func:`compile_prompt` projects an encoded
prompt and puts what steers it beside its tokens. The contributions of several prompts add up; several
pictures of one prompt share a softmax.

Dimensions: N pictures, T tokens, C token width, D text width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from imprompt.adapter.backbones.base import Site
from imprompt.adapter.combine import combine, log_weight_bias
from imprompt.adapter.encoding import EncodedPrompt
from imprompt.adapter.frames import Track, track_of
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
"""A prompt, a picture or features. A list of pictures is ONE prompt of several pictures (one softmax, as in
diffusers without masks), a list of prompts is several prompts (a softmax each, added)."""


def as_prompts(value: PromptLike, fields: Mapping[str, object]) -> tuple[ImagePrompt, ...]:
    """The prompts that a short form means, with ``fields`` set on each. Raises :class:`UsageError`."""
    if isinstance(value, ImagePrompt):
        return (value.replace(**fields),)
    if isinstance(value, Tensor | Features | Faces):
        return (ImagePrompt(features=value, **fields),)
    if isinstance(value, str | Path | bytes | Image.Image):
        return (ImagePrompt(value, **fields),)
    if isinstance(value, list | tuple) and value:
        if all(isinstance(item, ImagePrompt) for item in value):
            return tuple(item.replace(**fields) for item in value if isinstance(item, ImagePrompt))
        if all(isinstance(item, Tensor) for item in value):
            return (ImagePrompt(features=_joined(value), **fields),)
        if not any(isinstance(item, ImagePrompt) for item in value):
            return (ImagePrompt(value, **fields),)
    raise UsageError(
        f"an image prompt cannot be {_described(value)}; give a path, a PIL image, a features tensor, an "
        "ImagePrompt, or a list of either prompts or pictures. clear_prompt() removes what was set."
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


def compile_prompt(
    encoded: EncodedPrompt, projection: ImageProjection, text: Tensor | None
) -> CompiledPrompt:
    """Tokens of an encoded prompt by the adapter's weights as they are now, on their device.

    ``text`` are the embeddings of the prompt's own text. Raises :class:`InputError` for a mask that is none
    and for features so large that the projection overflows, :class:`UsageError` for tokens or frames that do
    not exist.
    """
    prompt = encoded.prompt
    sets = _token_sets(encoded, projection)
    negative = _negative(encoded, projection)
    if prompt.select is not None:
        chosen = list(options.read_selection(prompt.select, sets.shape[1]))
        if negative is not None and not isinstance(encoded.negative, Tensor):
            negative = negative.unflatten(0, (-1, sets.shape[1]))[:, chosen].flatten(0, 1)
        sets = sets[:, chosen]
    tokens = sets.flatten(0, 1)
    if not bool(torch.isfinite(tokens).all()):
        raise InputError("the image features are too large: their projection is not finite.")
    if negative is not None and len(tokens) % len(negative) == 0:
        # The same tokens repeated give the same attention; equal lengths need no padding.
        negative = negative.repeat(len(tokens) // len(negative), 1)
    joined = prompt.combine == "concat"
    each = projection.tokens if projection.variant.timed else sets.shape[1]
    mask, masks = read_masks(prompt.mask, prompt.feather)
    return CompiledPrompt(
        tokens=tokens,
        negative=negative,
        scale=1.0 if prompt.scale is None else prompt.scale,
        profile=prompt.profile,
        start=prompt.start,
        end=prompt.end,
        mask=mask,
        curve=options.read_curve(prompt.curve),
        scaling=prompt.scaling,
        log_weight_bias=log_weight_bias(encoded.weights, each) if joined else None,
        text=text,
        track=track_of(
            encoded.at,
            options.read_curve(prompt.frame_curve),
            masks,
            pictures=len(sets),
            plain=joined and len(set(encoded.weights)) == 1,
        ),
        pictures=len(sets),
    )


def _token_sets(encoded: EncodedPrompt, projection: ImageProjection) -> Float[Tensor, "N T C"]:
    """Each picture's tokens, or those of all combined; of a timed adapter the features they are made of."""
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
    return _project(projection, features, patches, encoded.prompt.s_scale)


def _negative(encoded: EncodedPrompt, projection: ImageProjection) -> Float[Tensor, "T C"] | None:
    """Tokens of the unconditional half: as given, else by the variant's rule; ``None`` if unknown."""
    given, zeros, s_scale = encoded.negative, encoded.zeros, encoded.prompt.s_scale
    if isinstance(given, Tensor):
        return _placed(given, projection).flatten(0, 1)
    if given is not None:
        features, patches = (None if part is None else _placed(part, projection) for part in given)
        assert features is not None
        if projection.variant.timed:
            return features.flatten(0, 1)
        return _project(projection, features, patches, s_scale).flatten(0, 1)
    with_face = projection.feature == "face+hidden"
    rule = projection.variant.negative
    if projection.variant.timed:
        assert encoded.features is not None
        return torch.zeros_like(_placed(encoded.features[0], projection))
    if rule == "zero_features" and not with_face:
        return projection.negative()[0]
    if zeros is None or rule == "none":
        return None
    zeros = _placed(zeros, projection)
    nobody = zeros.new_zeros(1, projection.feature_width)
    return _project(projection, nobody if with_face else zeros, zeros if with_face else None, s_scale)[0]


def _project(
    projection: ImageProjection, features: Tensor, patches: Tensor | None, s_scale: float | None
) -> Float[Tensor, "N T C"]:
    if s_scale is None:
        return projection(features, patches)
    usual, projection.s_scale = projection.s_scale, s_scale
    try:
        return projection(features, patches)
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
