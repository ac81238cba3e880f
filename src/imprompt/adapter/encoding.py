"""Encode image prompts: pictures to the features that an adapter's projection reads.

Each adapter has a :class:`PromptEncoder`. It knows which features the adapter was trained on, finds the image
encoder or face model that makes them, and caches features by the pictures' content. All prompts, from Python,
the command line or a request, are encoded by :meth:`PromptEncoder.encode`.

Dimensions: N pictures, E pooled width, P patches and class token, W hidden width, T tokens, C token width.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
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
from imprompt.catalog.resolve import Source
from imprompt.checkpoints.checkpoint import Checkpoint
from imprompt.checkpoints.locate import encoder_source, encoder_widths, published_encoders
from imprompt.encoders import features as saved
from imprompt.encoders import framing
from imprompt.encoders.clip import Features, ImageEncoder
from imprompt.encoders.face import Faces
from imprompt.encoders.face import joined as join_faces
from imprompt.encoders.face import load as load_faces
from imprompt.encoders.images import content_hash, load_frames, load_image, name_of, with_numbers
from imprompt.encoders.store import FeatureStore
from imprompt.errors import AdapterMismatch, EncoderMismatch, InputError, UsageError
from imprompt.projections.modules import ImageProjection
from imprompt.schema import options
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.values import Picture, is_saved

EncoderLike: TypeAlias = ImageEncoder | str | Path | None
Encoded: TypeAlias = Features | Faces


class FeatureCache:
    """Least recently used cache of features, by encoder, settings and content of the pictures."""

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
        """The features of ``key``, made by ``make`` if they are not cached; ``lasting`` is their key in the
        store."""
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
        """Empty the cache."""
        with self._lock:
            self._kept.clear()


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """An image prompt and its features, in the shapes that the projection reads."""

    prompt: ImagePrompt
    features: Tensor | None
    """``N …``; ``None`` if tokens are given."""
    patches: Tensor | None
    """``N P W``: the face crops' hidden states, for FaceID-Plus."""
    zeros: Tensor | None
    """Features for the variant's default negative: hidden states ``1 P W`` of an all-zero input, or pooled
    features ``1 E`` of a black picture."""
    tokens: Tensor | None
    """``N T C``, if they are given."""
    negative: tuple[Tensor, Tensor | None] | Tensor | None
    """Features and patches to avoid, or tokens; ``None``: the variant's default."""
    weights: tuple[float, ...]
    """One per picture; a file of saved features may hold several pictures."""
    at: tuple[int, ...] | None
    """The frame of each picture."""
    text: Tensor | None = None
    """Embeddings of its regional text, ``Tt D``."""


class PromptEncoder:
    """Encodes the prompts of one adapter with the image encoder or face model that it needs."""

    def __init__(
        self, checkpoint: Checkpoint, projection: ImageProjection, image_encoder: EncoderLike
    ) -> None:
        self.name = checkpoint.name
        self._projection = projection
        self.face = FaceInput(checkpoint) if checkpoint.variant.reads_faces else None
        """Reads faces, if the adapter does."""
        self.cache = FeatureCache()
        self.places: tuple[Source, ...] = ()
        """Places to look for an image encoder."""
        self.borrowed: ImageEncoder | None = None
        """The pipeline's image encoder, if it fits."""
        self.encoder: ImageEncoder | None = None
        """The image encoder that was given or loaded."""
        self.execution_device: torch.device | None = None
        """Where an image encoder that it loads computes, see :attr:`ImageEncoder.execution_device`."""
        self._beside: WeakSet[PromptEncoder] = WeakSet()
        if isinstance(image_encoder, str | Path):
            self.places = (encoder_source(image_encoder),)
            self._check_widths(*encoder_widths(self.places[0]), str(image_encoder))
        elif image_encoder is not None:
            self.use(image_encoder)

    # ---- image encoders

    def use(self, encoder: ImageEncoder | None) -> None:
        """Encode with ``encoder`` from now on. Raises :class:`EncoderMismatch` when its widths do not fit,
        :class:`UsageError` for anything else than an :class:`ImageEncoder`."""
        if not (encoder is None or isinstance(encoder, ImageEncoder)):
            raise UsageError(
                f"image_encoder cannot be a {type(encoder).__name__}; give a folder, repo:subfolder, or "
                "imprompt.encoders.clip.ImageEncoder(model, processor)."
            )
        if encoder is not None:
            self._check_widths(encoder.pooled_width, encoder.hidden_width, encoder.name)
        self.encoder = encoder

    def share_with(self, encoders: Iterable["PromptEncoder"]) -> None:
        """Share loaded image encoders with the other adapters on the same UNet, and with no others."""
        self._beside = WeakSet(other for other in encoders if other is not self)
        for other in self._beside:
            other._beside.add(self)

    def borrow_from(self, pipe: object) -> ImageEncoder | None:
        """The pipeline's image encoder, or ``None`` if it has none that fits."""
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
        places = (*self.places, *published_encoders(here=True))
        place = next((place for place in places if self.fits(*encoder_widths(place))), None)
        if place is None:
            self._refuse_others()
            return None
        beside = (other.encoder for other in self._beside if other.encoder is not None)
        if shared := next((encoder for encoder in beside if encoder.name == str(place)), None):
            return shared
        weight = next(self._projection.parameters())
        device = self.execution_device or weight.device
        dtype = weight.dtype if device.type != "cpu" else torch.float32
        encoder = ImageEncoder.from_pretrained(place, torch_dtype=dtype, device=weight.device)
        encoder.execution_device = self.execution_device
        return encoder

    def _refuse_others(self) -> None:
        """Raise :class:`EncoderMismatch` when the image encoders beside the weights do not fit."""
        widths = {str(place): encoder_widths(place) for place in self.places}
        found = "; ".join(f"{place}: {width}" for place, width in widths.items() if any(width))
        if found:
            raise EncoderMismatch(
                f"adapter '{self.name}' needs an image encoder with {self.needs}; next to it there are only "
                f"others (pooled, hidden width): {found}. Pass image_encoder=."
            )

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
        width = {"pooled": pooled, "hidden": hidden, "last": hidden}.get(self._projection.feature)
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
            places = (place for place in published_encoders() if self.fits(*encoder_widths(place)))
            fetch = next((f", or: hf download {p.repo} --include '{p.inside}/*'" for p in places), "")
            raise EncoderMismatch(
                f"adapter '{self.name}' needs {self.needs} and has no image encoder: none that fits lies "
                "next to it, comes with the base, or is in the hub's cache. Pass image_encoder= (an encoder, "
                "a folder, or repo:subfolder), give features for a picture, or put an image_encoder folder "
                f"beside the adapter's file{fetch}."
            )
        return encoder

    # ---- pictures to features

    def encode(self, prompt: ImagePrompt) -> EncodedPrompt:
        """Encode a prompt; the result does not depend on the adapter's weights.

        Raises :class:`UsageError` for fields without effect on this adapter, :class:`EncoderMismatch` without
        an encoder or face model, or for features of another kind, :class:`InputError` for pictures that
        cannot be read, or have no such face.
        """
        self._check_fields(prompt)
        given, weights = self._given(prompt)
        tokens = None if prompt.tokens is None else self._given_tokens(prompt.tokens)
        features, patches, zeros = (None, None, None) if given is None else self._split(given)
        shown = tokens if features is None else features
        assert shown is not None
        return EncodedPrompt(
            prompt,
            features,
            patches,
            zeros,
            tokens,
            self._negative(prompt),
            options.read_weights(prompt.combine, len(shown), weights),
            tuple(range(len(shown))) if prompt.at == "each" else prompt.at,
        )

    def _given(self, prompt: ImagePrompt) -> tuple[Tensor | Encoded | None, tuple[float, ...] | None]:
        """The prompt's features, encoded from its pictures if need be, and their weights."""
        if prompt.image is None:
            return prompt.features, prompt.weights
        shown: Sequence[Picture] = prompt.pictures
        if prompt.at == "each":
            shown = with_numbers(load_frames(shown[0])[0], shown[0])
        found, counts = self.read(shown, prompt)
        if prompt.weights is None:
            return found, None
        return found, tuple(w for w, n in zip(prompt.weights, counts, strict=True) for _ in range(n))

    def read(self, pictures: Sequence[Picture], prompt: ImagePrompt) -> tuple[Encoded, list[int]]:
        """Features of ``pictures``, framed and sharpened as ``prompt`` says, and the number of pictures that
        each stands for: a file of saved features may hold several."""
        parts: list[Encoded] = []
        counts: list[int] = []
        for stored, neighbours in groupby(pictures, is_saved):
            some = list(neighbours)
            found = [self.load(path) for path in some] if stored else [self._encoded(some, prompt)]
            counts += map(_count, found) if stored else [1] * len(some)
            parts += found
        return _joined(parts), counts

    def _encoded(self, pictures: Sequence[Picture], prompt: ImagePrompt) -> Encoded:
        names = list(map(name_of, pictures))
        images = [load_image(picture) for picture in pictures]
        hashes = tuple(map(content_hash, images))
        if self.face is not None:
            self.face.check_fields(prompt)
            look = None if self._projection.patch_width is None else self._needed_encoder()
            with_look = look and (look.model, look.preparation)
            key = (self.face.reader, with_look, self.face.crop, prompt.face, hashes)
            return self.cache.get(key, partial(self.face.read, images, names, prompt.face, look))
        encoder = self._needed_encoder()
        dtype = next(encoder.model.parameters()).dtype
        make = partial(framing.encode, encoder, images, prompt.framing, sharpen=prompt.sharpen)
        lasting: dict[str, object] | None = None
        if (about := encoder.about) is not None:
            shown = {"framing": prompt.framing, "sharpen": prompt.sharpen, "pictures": hashes}
            lasting = {**about, **shown}
        seen = encoder.model, encoder.preparation, dtype
        return self.cache.get((*seen, prompt.framing, prompt.sharpen, hashes), make, lasting)

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
        if self.image_encoder is None:
            return None
        black = ImagePrompt(Image.new("RGB", (32, 32)))
        found = self._encoded(black.pictures, black)
        return found.pooled if isinstance(found, Features) else None

    def _negative(self, prompt: ImagePrompt) -> tuple[Tensor, Tensor | None] | Tensor | None:
        """The prompt's negative, encoded like its pictures; ``None`` if it has none."""
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
        return self._split(given, negative=True)[:2]

    def _split(
        self, given: Tensor | Encoded, *, negative: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(features, patches, zeros) as the projection reads them. Raises :class:`EncoderMismatch` for
        features of another kind."""
        parts: tuple[Tensor, Tensor | None, Tensor | None]
        if isinstance(given, Tensor):
            parts = self._bare(given, check_length=not negative), None, None
        elif self.face is not None:
            parts = self.face.features(given)
        elif isinstance(given, Faces):
            raise EncoderMismatch(f"adapter '{self.name}' needs {self.needs}, and was given face embeddings.")
        elif self._projection.feature == "hidden":
            # Files of other programs may lack the negative's, as a tensor of width 0.
            zeros = given.negative_hidden if given.negative_hidden.numel() else None
            parts = given.hidden, None, zeros
        elif self._projection.feature == "last":
            if given.last is None:
                raise EncoderMismatch(
                    f"adapter '{self.name}' needs SigLIP's last hidden state, which other encoders and "
                    "files of other programs do not have."
                )
            parts = given.last, None, None
        else:
            parts = given.pooled, None, None
        features, patches, zeros = parts
        if self._projection.variant.negative == "black_picture":
            zeros = self._black_picture()
        return features.detach(), patches, zeros

    def _bare(self, features: Tensor, *, check_length: bool) -> Tensor:
        """Features given as a tensor, with the picture dimension added if it was left out."""
        one = 2 if self._projection.feature in ("hidden", "last") else 1
        features = features[None] if features.ndim == one else features
        if self.face is not None and check_length:
            self.face.check_length(features)
        return features

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
        if self._projection.variant.beside_text:
            _check_beside_text(prompt, self.name)
        if self._projection.variant.timed and prompt.tokens is not None:
            raise UsageError(
                f"tokens: adapter '{self.name}' makes other tokens at every step; give features or a picture."
            )
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
        raise InputError("image tokens contain NaN or infinite values; finite ones are expected.")


def _check_beside_text(prompt: ImagePrompt, name: str) -> None:
    """Raise :class:`UsageError` for fields that have no effect on tokens among the text's."""
    where = f"has no effect on adapter '{name}', whose tokens all layers read among the text's"
    for field in ("profile", "scaling"):
        if getattr(prompt, field) != (usual := ImagePrompt.model_fields[field].default):
            raise UsageError(f"{field}: {getattr(prompt, field)!r} {where}; leave {usual!r}.")
    factors = [factor for _, factor in options.read_curve(prompt.curve)]
    if min(factors) < 0 or (prompt.scale is not None and prompt.scale < 0):
        raise UsageError(f"scale: a negative strength {where}; 0 is no picture and 1 as trained.")


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
