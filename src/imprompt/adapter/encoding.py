"""Image prompts → what an adapter's projection reads: the one way from pictures to features.

A :class:`PromptEncoder` belongs to one adapter. It knows which features the adapter was trained on, finds the
image encoder or face model that makes them, and remembers features by the pictures' content. Whoever sets a
prompt (Python, the command line, a request) comes through :meth:`PromptEncoder.encode`.

Dimensions: N pictures, E pooled width, P patches and class token, W hidden width, T tokens, C token width.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import TypeAlias
from weakref import WeakSet

import torch
from PIL import Image
from torch import Tensor

from imprompt.adapter.faces import FaceInput
from imprompt.checkpoints.checkpoint import Checkpoint
from imprompt.checkpoints.locate import EncoderPlace, published_encoders
from imprompt.encoders import features as saved
from imprompt.encoders import framing
from imprompt.encoders.clip import Features, ImageEncoder
from imprompt.encoders.face import Faces
from imprompt.encoders.face import joined as join_faces
from imprompt.encoders.face import load as load_faces
from imprompt.encoders.images import content_hash, load_frames, load_image
from imprompt.encoders.store import FeatureStore
from imprompt.errors import AdapterMismatch, EncoderMismatch, InputError, UsageError
from imprompt.projections.modules import ImageProjection
from imprompt.schema import options
from imprompt.schema.prompt import ImagePrompt, Picture, is_saved

EncoderLike: TypeAlias = ImageEncoder | str | Path | None
Encoded: TypeAlias = Features | Faces


class FeatureCache:
    """Features by encoder, settings and pictures' content; the least recently used are forgotten."""

    def __init__(self, limit: int = 256 * 1024 * 1024, store: FeatureStore | None = None) -> None:
        self._store = store
        """Where pictures' features are kept for later processes too."""
        self._limit = limit
        """In bytes."""
        self.hits = self.misses = 0
        """How often features were remembered, and were not, since the start."""
        self._kept: OrderedDict[Hashable, Encoded] = OrderedDict()
        self._lock = Lock()

    def get(
        self, key: Hashable, make: Callable[[], Encoded], lasting: Mapping[str, object] | None = None
    ) -> Encoded:
        """The features of ``key``, made if they are not remembered; ``lasting`` is their key in the store."""
        with self._lock:
            if key in self._kept:
                self.hits += 1
                self._kept.move_to_end(key)
                return self._kept[key]
        store = None if lasting is None else self._store
        found = None if store is None or lasting is None else store.get(lasting)
        made = make() if found is None else found
        if store is not None and lasting is not None and found is None and isinstance(made, Features):
            store.put(lasting, made)
        with self._lock:
            self.hits += found is not None
            self.misses += found is None
            self._kept[key] = made
            while self._kept and sum(map(_bytes, self._kept.values())) > self._limit:
                self._kept.popitem(last=False)
        return made

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """An image prompt with its features, before the projection. Shapes are those the projection reads."""

    prompt: ImagePrompt
    features: Tensor | None
    """``N …``; ``None`` when tokens are given."""
    patches: Tensor | None
    """``N P W``: the face crops' hidden states, for FaceID-Plus."""
    zeros: Tensor | None
    """What the negative is made of by the variant's rule: hidden states ``1 P W`` of an all-zero input, or
    pooled features ``1 E`` of a black picture."""
    tokens: Tensor | None
    """``N T C``, when they are given."""
    negative: tuple[Tensor, Tensor | None] | Tensor | None
    """Features and patches to avoid, or tokens; ``None``: by the variant's rule."""
    weights: tuple[float, ...]
    """One a picture; a file of several pictures counts as so many."""
    at: tuple[int, ...] | None
    """The frame of each picture."""


class PromptEncoder:
    """The way into one adapter: encodes prompts with the image encoder or face model that fits."""

    def __init__(
        self, checkpoint: Checkpoint, projection: ImageProjection, image_encoder: EncoderLike
    ) -> None:
        self.name = checkpoint.name
        self._projection = projection
        self.face = None if checkpoint.variant.embedding is None else FaceInput(checkpoint)
        """What reads faces, of an adapter that does."""
        self.cache = FeatureCache()
        self.places: tuple[EncoderPlace, ...] = ()
        """Where an image encoder may be found when one is needed."""
        self.borrowed: ImageEncoder | None = None
        """The pipeline's own image encoder, where it fits."""
        self.encoder: ImageEncoder | None = None
        """The given or loaded one."""
        self.beside: WeakSet[PromptEncoder] = WeakSet()
        """Those of other adapters on the same UNet, with which a loaded encoder is shared."""
        if isinstance(image_encoder, str | Path):
            self.places = (EncoderPlace.named(image_encoder),)
            self._check_widths(*self.places[0].widths(), str(image_encoder))
        elif image_encoder is not None:
            self.use(image_encoder)

    # ---- image encoders

    def use(self, encoder: ImageEncoder | None) -> None:
        """Encode with ``encoder`` from now on. Raises :class:`EncoderMismatch` when its widths do not fit."""
        if encoder is not None:
            self._check_widths(encoder.pooled_width, encoder.hidden_width, encoder.name)
        self.encoder = encoder

    def borrow_from(self, pipe: object) -> ImageEncoder | None:
        """The pipeline's own image encoder, when it has one that fits."""
        model, processor = getattr(pipe, "image_encoder", None), getattr(pipe, "feature_extractor", None)
        if model is None or processor is None:
            return None
        encoder = ImageEncoder(model, processor)
        return encoder if self.fits(encoder.pooled_width, encoder.hidden_width) else None

    @property
    def image_encoder(self) -> ImageEncoder | None:
        """The given encoder, else the pipeline's own, else the one beside the weights or in the hub's cache.

        The last is loaded now, unless an adapter on the same UNet has it. Raises :class:`EncoderMismatch`
        when only encoders of other widths lie beside the weights.
        """
        if self.encoder is None and self.borrowed is None and self._projection.feature != "face":
            self.encoder = self._load()
        return self.encoder or self.borrowed

    def _load(self) -> ImageEncoder | None:
        cached = (place for place in published_encoders() if place.cached)
        for place in (*self.places, *cached):
            if not self.fits(*place.widths()):
                continue
            for other in self.beside:
                if other.encoder is not None and other.encoder.name == str(place):
                    return other.encoder
            weight = next(self._projection.parameters())
            dtype = weight.dtype if weight.device.type != "cpu" else torch.float32
            return ImageEncoder.from_pretrained(
                place.source, subfolder=place.subfolder, torch_dtype=dtype, device=weight.device
            )
        found = "; ".join(f"{place}: {place.widths()}" for place in self.places if any(place.widths()))
        if found:
            raise EncoderMismatch(
                f"adapter '{self.name}' needs an image encoder with {self.needs}; next to it there are only "
                f"others (pooled, hidden width): {found}. Pass image_encoder=."
            )
        return None

    @property
    def published(self) -> EncoderPlace | None:
        """Where an image encoder that fits is published; the hub is not asked."""
        return next((place for place, widths in published_encoders().items() if self.fits(*widths)), None)

    @property
    def needs(self) -> str:
        """The features the adapter reads, in words."""
        if self._projection.patch_width is not None:
            return f"hidden features of width {self._projection.patch_width}"
        return f"{self._projection.feature} features of width {self._projection.feature_width}"

    def fits(self, pooled: int, hidden: int) -> bool:
        """Whether an image encoder of these widths gives what the adapter reads."""
        if self._projection.patch_width is not None:
            return self._projection.patch_width == hidden
        width = {"pooled": pooled, "hidden": hidden}.get(self._projection.feature)
        return self._projection.feature_width == width

    def _check_widths(self, pooled: int, hidden: int, name: str) -> None:
        if self._projection.feature == "face":
            raise EncoderMismatch(
                f"adapter '{self.name}' reads face embeddings alone and no image encoder's features; leave "
                f"out '{name}'."
            )
        if not self.fits(pooled, hidden):
            raise EncoderMismatch(
                f"adapter '{self.name}' needs {self.needs}, image encoder '{name}' gives pooled width "
                f"{pooled} and hidden width {hidden}. Pass the encoder it was trained with."
            )

    def _needed_encoder(self) -> ImageEncoder:
        if (encoder := self.image_encoder) is None:
            place = self.published
            fetch = (
                "" if place is None else f", or: hf download {place.source} --include '{place.subfolder}/*'"
            )
            raise EncoderMismatch(
                f"adapter '{self.name}' needs {self.needs} and has no image encoder: none that fits lies "
                "next to it, comes with the base, or is in the hub's cache. Pass image_encoder= (an encoder, "
                "a folder, or repo:subfolder), give features for a picture, or put an image_encoder folder "
                f"beside the adapter's file{fetch}."
            )
        return encoder

    # ---- pictures to features

    def encode(self, prompt: ImagePrompt) -> EncodedPrompt:
        """Everything about a prompt that does not depend on the adapter's weights.

        Raises :class:`UsageError` for fields without effect on this adapter, :class:`EncoderMismatch` without
        an encoder or face model, or for features of another kind, :class:`InputError` for pictures that
        cannot be read, or have no such face.
        """
        self._check_fields(prompt)
        features = patches = zeros = tokens = None
        counts: list[int] = []
        if prompt.tokens is not None:
            tokens = self._given_tokens(prompt.tokens)
        elif prompt.features is not None:
            features, patches, zeros = self._split(prompt.features)
        else:
            pictures = prompt.pictures
            if prompt.at == "each":
                pictures = tuple(load_frames(pictures[0])[0])
            found, counts = self.read(pictures, prompt)
            features, patches, zeros = self._split(found)
        if features is not None and self._projection.variant.negative == "black_picture":
            zeros = self._black_picture()
        shown = tokens if features is None else features
        assert shown is not None
        count = len(shown)
        weights = prompt.weights
        if weights is not None and counts:
            weights = tuple(w for w, n in zip(weights, counts, strict=True) for _ in range(n))
        return EncodedPrompt(
            prompt,
            features,
            patches,
            zeros,
            tokens,
            self._negative(prompt),
            options.read_weights(prompt.combine, count, weights),
            tuple(range(count)) if prompt.at == "each" else prompt.at,
        )

    def read(self, pictures: Sequence[Picture], prompt: ImagePrompt) -> tuple[Encoded, list[int]]:
        """Features of ``pictures`` as ``prompt`` has them framed, sharpened and so on, and how many pictures
        each of them holds: a file of saved features may hold several."""
        parts: list[Encoded] = []
        counts: list[int] = []
        for stored, some in groupby(pictures, is_saved):
            if stored:
                parts += [self.load(path) for path in some]
                counts += [_count(part) for part in parts[len(counts) :]]
                continue
            images = list(some)
            parts.append(self._encoded(images, prompt))
            counts += [1] * len(images)
        return _joined(parts), counts

    def _encoded(self, pictures: Sequence[Picture], prompt: ImagePrompt) -> Encoded:
        names = [picture if isinstance(picture, str) else "the given picture" for picture in pictures]
        images = [load_image(picture) for picture in pictures]
        hashes = tuple(map(content_hash, images))
        if self.face is not None:
            look = None if self._projection.patch_width is None else self._needed_encoder()
            key = (self.face.reader, look and look.model, self.face.crop, prompt.face, hashes)
            return self.cache.get(key, partial(self.face.read, images, names, prompt.face, look))
        encoder = self._needed_encoder()
        dtype = next(encoder.model.parameters()).dtype
        make = partial(framing.encode, encoder, images, prompt.framing, sharpen=prompt.sharpen)
        lasting: dict[str, object] | None = None
        if (about := encoder.about) is not None:
            shown = {"framing": prompt.framing, "sharpen": prompt.sharpen, "pictures": hashes}
            lasting = {**about, **shown}
        return self.cache.get((encoder.model, dtype, prompt.framing, prompt.sharpen, hashes), make, lasting)

    def load(self, path: str | Path) -> Encoded:
        """Features that ``imprompt embed`` saved.

        Raises :class:`EncoderMismatch` when another kind of encoder made them, :class:`InputError` when the
        file holds none.
        """
        if self.face is not None:
            return load_faces(path)
        found = saved.load(path)
        pooled, hidden = found.features.pooled.shape[-1], found.features.hidden.shape[-1]
        if not self.fits(pooled, hidden):
            raise EncoderMismatch(
                f"'{path}' holds features of encoder '{found.encoder}' (pooled width {pooled}, hidden width "
                f"{hidden}); adapter '{self.name}' needs {self.needs}. Embed the picture with this adapter."
            )
        return found.features

    def _black_picture(self) -> Tensor | None:
        """Pooled features ``(1, E)`` of a black picture, XLabs' negative; ``None`` without an encoder."""
        encoder = self.image_encoder
        if encoder is None:
            return None
        black = Image.new("RGB", (32, 32))
        make = partial(framing.encode, encoder, [black], "crop", sharpen=0.0)
        dtype = next(encoder.model.parameters()).dtype
        found = self.cache.get((encoder.model, dtype, "black picture"), make)
        return found.pooled if isinstance(found, Features) else None

    def _negative(self, prompt: ImagePrompt) -> tuple[Tensor, Tensor | None] | Tensor | None:
        """What the unconditional half sees, encoded as the prompt's own pictures are."""
        given = prompt.negative
        if prompt.noise is not None:
            picture = prompt.pictures[0]
            image = load_frames(picture)[0][0] if prompt.at == "each" else load_image(picture)
            # One noise whatever the seed: pictures are prompts, and prompts are the same for every seed.
            given = framing.noisy(image, *options.read_noise(prompt.noise))
        if given is None:
            return None
        if prompt.tokens is not None and isinstance(given, Tensor):
            return self._given_tokens(given)
        if not isinstance(given, Tensor | Features | Faces):
            given, _ = self.read((given,), prompt)
        features, patches, _ = self._split(given, negative=True)
        return features, patches

    def _split(
        self, given: Tensor | Encoded, *, negative: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(features, patches, zeros) as the projection reads them. Raises for those of another kind."""
        patches: Tensor | None = None
        zeros: Tensor | None = None
        hidden = self._projection.feature == "hidden"
        if isinstance(given, Tensor):
            features = given[None] if given.ndim == (2 if hidden else 1) else given
            if self.face is not None and not negative:
                self.face.check_length(features)
        elif self.face is not None:
            if not isinstance(given, Faces):
                raise EncoderMismatch(
                    f"adapter '{self.name}' reads a face's embedding, and was given features of whole "
                    "pictures. Give a photo, or what 'imprompt embed' made with this adapter."
                )
            features, patches, zeros = self.face.features(given)
        elif isinstance(given, Faces):
            raise EncoderMismatch(f"adapter '{self.name}' needs {self.needs}, and was given face embeddings.")
        elif hidden:
            # Files of other programs may lack the negative's, as a tensor of width 0.
            features, zeros = given.hidden, given.negative_hidden if given.negative_hidden.numel() else None
        else:
            features = given.pooled
        for each in (features, patches, zeros):
            if each is not None and not bool(torch.isfinite(each).all()):
                raise InputError("image features contain NaN or infinite values.")
        return features.detach(), patches, zeros

    def _given_tokens(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, self._projection.cross_dim, self.name)
        return tokens.detach().reshape(-1, *tokens.shape[-2:])

    def _check_fields(self, prompt: ImagePrompt) -> None:
        """Raises :class:`UsageError` for fields that have no effect on this adapter."""
        if prompt.adapter is not None:
            raise UsageError(
                f"adapter: {prompt.adapter!r} chooses among a request's adapters; this is '{self.name}'."
            )
        if self.face is not None:
            self.face.check_fields(prompt)
            return
        for field, usual in (("face", ("largest", "0")), ("s_scale", (None,))):
            if getattr(prompt, field) not in usual:
                raise UsageError(
                    f"{field}: {getattr(prompt, field)!r} has no effect on adapter '{self.name}', which "
                    "reads whole pictures, not faces."
                )


def check_tokens(tokens: Tensor, width: int, name: str) -> None:
    """Raises :class:`AdapterMismatch` for tokens of another shape than ``(N, T, width)`` or ``(T, width)``,
    :class:`InputError` for NaN."""
    if tokens.ndim not in (2, 3) or tokens.shape[-1] != width:
        raise AdapterMismatch(
            f"adapter '{name}' reads tokens of width {width}, got shape {tuple(tokens.shape)}."
        )
    if not bool(torch.isfinite(tokens).all()):
        raise InputError("image tokens contain NaN or infinite values.")


def _joined(parts: Sequence[Encoded]) -> Encoded:
    faces = [part for part in parts if isinstance(part, Faces)]
    pictures = [part for part in parts if isinstance(part, Features)]
    if len(parts) == 1:
        return parts[0]
    return join_faces(faces) if faces else saved.joined(pictures)


def _count(part: Encoded) -> int:
    return len(part.embedding if isinstance(part, Faces) else part.pooled)


def _bytes(part: Encoded) -> int:
    return sum(value.nbytes for value in vars(part).values() if isinstance(value, Tensor))
