"""IPAdapter: owns a projection and each layer's key and value weights, and lends them to a model.

``attach`` puts it on a diffusers pipeline (or a bare UNet), ``set_prompt`` says what it shows, ``detach``
takes it off again without a trace. Weights come from published files, state dicts, or new for training, and
are saved in the published layout. It draws nothing itself and knows no pipeline class.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapter.backbones.base import Backbone, Branch, Site
from imprompt.adapter.batch import PromptSource, TrainingTokens
from imprompt.adapter.combine import combine, log_weight_bias
from imprompt.adapter.faces import FaceInput, FaceReaderLike, refuse_face_fields
from imprompt.adapter.frames import track_of
from imprompt.adapter.injection import Injection, find_denoiser, placement
from imprompt.adapter.key_value import KeyValue, key_value_of, linear_of, precise
from imprompt.adapter.lora import PARTS, FaceLora, LowRank
from imprompt.adapter.prompt import (
    CompiledPrompt,
    EncodedFaces,
    EncodedPictures,
    FaceReader,
    ImagePrompt,
    Picture,
    PictureEncoder,
    PromptFields,
    PromptLike,
    as_prompts,
    read_masks,
)
from imprompt.adapter.recorder import Recorder
from imprompt.adapter.regional import encode_text
from imprompt.catalog import families, licences
from imprompt.checkpoints.checkpoint import Checkpoint, StateDict, read, write
from imprompt.checkpoints.locate import EncoderPlace, locate, published_encoders
from imprompt.errors import AdapterMismatch, EncoderMismatch, InputError, UsageError
from imprompt.projections import build_projection, new_linear, new_resampler
from imprompt.projections.modules import ImageProjection
from imprompt.projections.resamplers import TimedResamplerProjection
from imprompt.schema import options

EncoderLike: TypeAlias = PictureEncoder | str | Path | None
_HALVES = ("down", "up")


class IPAdapter(PromptSource):
    """An image prompt adapter (Ye et al. 2023) for diffusers UNets.

    ``projection`` turns an image encoder's features into tokens; ``module`` holds all weights, under their
    published names; ``checkpoint`` says what they are (its tensors live in ``module``).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        image_encoder: EncoderLike = None,
        face_embedder: FaceReaderLike = None,
    ) -> None:
        self.projection: ImageProjection = build_projection(
            checkpoint.variant, checkpoint.state["image_proj"]
        )
        normed = checkpoint.layout == "instantx-flux"
        self._layers = {n: key_value_of(checkpoint.site(n), normed=normed) for n in checkpoint.layers}
        numbered = nn.ModuleDict({str(n): layer for n, layer in self._layers.items()})
        self.lora: FaceLora | None = _face_lora(checkpoint.lora, numbered)
        """A FaceID file's additions to the UNet's own attention, with their ``scale``; else ``None``."""
        self.module = nn.ModuleDict({"image_proj": self.projection, "ip_adapter": numbered})
        self.module.requires_grad_(False).eval()
        self.checkpoint = replace(checkpoint, state={"image_proj": {}, "ip_adapter": {}}, lora={})
        self._injection: weakref.ref[Injection] | None = None
        self._places: tuple[EncoderPlace, ...] = ()
        self._encoder: PictureEncoder | None = None
        self._borrowed: PictureEncoder | None = None
        self._face = None if checkpoint.variant.embedding is None else FaceInput(checkpoint)
        if face_embedder is not None:
            self.face_embedder = face_embedder
        if isinstance(image_encoder, str | Path):
            self._places = (EncoderPlace.named(image_encoder),)
            self._check_widths(*self._places[0].widths(), str(image_encoder))
        elif image_encoder is not None:
            self._check_widths(image_encoder.pooled_width, image_encoder.hidden_width, image_encoder.name)
            self._encoder = image_encoder

    # ---- where weights come from and go to

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder_or_file: str | Path,
        *,
        subfolder: str | None = None,
        weight_name: str | None = None,
        image_encoder: EncoderLike = None,
        face_embedder: FaceReaderLike = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> "IPAdapter":
        """An adapter from a local file, a local folder or a hub repository (``owner/name``).

        Without ``weight_name`` a folder must hold exactly one ``.safetensors`` beside a training run's
        checkpoints. Of a ``.bin`` its
        ``.safetensors`` twin is read. The image encoder that fits is looked for next to the file when a
        picture is first shown, or is ``image_encoder``: an encoder, a folder, or ``repo:subfolder``. A face
        adapter's ``face_embedder`` is one of :mod:`imprompt.encoders.face`, or a folder of its models. The
        hub is asked only for these files and not at all under ``HF_HUB_OFFLINE``. ``variant`` says what the
        file is where its weights leave that open. ``torch_dtype`` ``None`` keeps the stored number format.
        Raises :class:`ModelError` for what is missing, damaged or (see ``catalog.licences``) not for
        commercial use, :class:`EncoderMismatch` for a wrong encoder.
        """
        path, places = locate(str(repo_or_folder_or_file), subfolder, weight_name)
        checkpoint = read(path, variant=variant)
        licences.check(f"adapter '{checkpoint.name}'", checkpoint.licence)
        adapter = cls(checkpoint, image_encoder=image_encoder, face_embedder=face_embedder)
        if image_encoder is None:
            adapter._places = places
        return adapter if torch_dtype is None else adapter.to(dtype=torch_dtype)

    @classmethod
    def from_state_dict(
        cls, state_dict: StateDict, *, image_encoder: EncoderLike = None, variant: str | None = None
    ) -> "IPAdapter":
        """An adapter from copies of weights in the form ``{"image_proj": {...}, "ip_adapter": {...}}``."""
        checkpoint = read(state_dict, variant=variant)
        copies = {
            part: {name: tensor.detach().clone() for name, tensor in tensors.items()}
            for part, tensors in checkpoint.state.items()
        }
        lora = {name: tensor.detach().clone() for name, tensor in checkpoint.lora.items()}
        return cls(replace(checkpoint, state=copies, lora=lora), image_encoder=image_encoder)

    @classmethod
    def new(
        cls,
        unet: nn.Module,
        *,
        kind: Literal["linear", "resampler"] = "linear",
        image_encoder: EncoderLike = None,
        feature_width: int | None = None,
        tokens: int | None = None,
        depth: int = 4,
        width: int | None = None,
    ) -> "IPAdapter":
        """A trainable adapter for ``unet``: random projection, keys and values copied from the text's.

        ``kind`` ``linear`` makes 4 tokens of the pooled embedding, ``resampler`` 16 of the hidden states,
        with ``depth`` blocks of ``width`` (a multiple of 64; default the UNet's text width rounded up).
        ``feature_width`` may be left out when an encoder object is given. All parameters require gradients.
        Raises :class:`UsageError` where a width cannot be known or does not fit.
        """
        found = find_denoiser(unet)
        if found is None:
            raise UsageError(f"a {type(unet).__name__} is no denoiser that an adapter can be made for.")
        layers = found[0].sites(unet)
        cross_dim = layers[0].cross_dim
        if feature_width is None:
            if image_encoder is None or isinstance(image_encoder, str | Path):
                raise UsageError(
                    "a new adapter needs feature_width= or an image encoder object to read it from."
                )
            feature_width = image_encoder.pooled_width if kind == "linear" else image_encoder.hidden_width
        if kind == "linear":
            fresh = new_linear(feature_width, tokens or 4, cross_dim)
        else:
            width = width or -(-cross_dim // 64) * 64
            fresh = new_resampler(feature_width, tokens or 16, cross_dim, width, depth)
        ip_adapter = {}
        for layer in layers:
            attention: Any = unet.get_submodule(layer.name)
            for mine, text in (("to_k_ip", attention.to_k), ("to_v_ip", attention.to_v)):
                weight = text.weight.detach().to("cpu", torch.float32, copy=True)
                ip_adapter[f"{layer.index}.{mine}.weight"] = weight
        adapter = cls.from_state_dict(
            {"image_proj": fresh, "ip_adapter": ip_adapter}, image_encoder=image_encoder
        )
        adapter.module.requires_grad_(True).train()
        return adapter

    def state_dict(self) -> StateDict:
        """The weights in the published nested form (the live tensors, not copies)."""
        nested: StateDict = {"image_proj": {}, "ip_adapter": {}}
        for name, tensor in self.module.state_dict().items():
            part, key = name.split(".", 1)
            nested[part][key] = tensor
        return nested

    def save_pretrained(self, folder: str | Path, weight_name: str = "ip-adapter.safetensors") -> Path:
        """Write the published layout into ``folder``; returns the file's path."""
        path = Path(folder) / weight_name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(replace(self.checkpoint, state=self.state_dict()), path)
        return path

    # ---- weights

    @property
    def after_block(self) -> bool:
        """Whether its contribution is added after the transformer block (XLabs)."""
        return self.checkpoint.layout == "xlabs"

    @property
    def timed(self) -> bool:
        """Whether tokens depend on the timestep (SD3.5)."""
        return self.projection.variant.timed

    @property
    def token_count(self) -> int:
        """Tokens of one picture."""
        return self.projection.tokens

    @property
    def shows_uncond(self) -> bool:
        """Whether the uncond branch has image tokens, by the variant's rule."""
        return self.projection.variant.negative != "none"

    def tokens_at(self, features: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timed adapters: features ``(N, P, W)`` to tokens ``(N, T, C)``, and the embedded timestep."""
        assert isinstance(self.projection, TimedResamplerProjection)
        timestep = timestep.to(features.dtype)
        return self.projection(features, timestep=timestep), self.projection.embed_time(timestep)

    def has_site(self, index: int) -> bool:
        """Whether it has keys and values for the site with published number ``index``."""
        return index in self._layers

    def key_value(self, index: int) -> KeyValue:
        """The keys and values of the site with published number ``index``."""
        return self._layers[index]

    def parameters(self) -> Iterator[nn.Parameter]:
        """All trainable weights."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All weights with their published flat names."""
        return self.module.named_parameters()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "IPAdapter":
        """Move or cast the weights; an image encoder of its own moves along, in its own number format."""
        self.module.to(device=device, dtype=dtype)
        if self._encoder is not None and device is not None:
            self._encoder.to(device, None)
        self._invalidate()
        return self

    @property
    def device(self) -> torch.device:
        """Where the adapter's weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapter's weights."""
        return next(self.module.parameters()).dtype

    # ---- on a model

    @property
    def uses_text_projection(self) -> bool:
        """Whether its tokens go through the UNet's own projection of the text (Kolors' FaceID-Plus)."""
        return self.projection.variant.uses_text_projection

    @property
    def attached(self) -> bool:
        """Whether it is on a UNet that still exists."""
        return self._injected() is not None

    def attach(self, target: object) -> "IPAdapter":
        """Put the adapter on a diffusers pipeline, or a bare UNet; several adapters may share one, and add
        up.

        Attach to the pipeline that will be called: its guidance flag says which rows of the batch are
        negative. Attaching again, to another pipeline around the same UNet, changes that. For a bare UNet see
        :meth:`batch`. All is checked first: :class:`AdapterMismatch` (naming both sides),
        :class:`EncoderMismatch` or :class:`UsageError` leave everything as it was. A FaceID file's LoRA acts
        while a face is shown (:attr:`lora`); the user's own LoRAs stay as they are. Weights of a lower
        precision than the UNet's are raised to it and moved to its device, unless they are being trained.
        """
        found = find_denoiser(target)
        if found is None:
            raise AdapterMismatch(
                f"adapter '{self.checkpoint.name}' needs a diffusers UNet; {type(target).__name__} has none."
            )
        backbone, model = found
        injection = self._injected()
        if injection is not None and not injection.serves(model):
            raise UsageError(
                f"adapter '{self.checkpoint.name}' is attached to another {backbone.noun}; detach() it first."
            )
        self._check_fits(backbone, model, type(target).__name__)
        borrowed = self._encoder_of(target)
        device, dtype = placement(model)
        injection = Injection.into(model, None if isinstance(target, nn.Module) else target)
        if not any(source is self for source in injection.sources):
            injection.sources.append(self)
        if self.lora is not None:
            self.lora.into(model, injection.sites)
        self._injection = weakref.ref(injection)
        self._borrowed = borrowed
        if not any(parameter.requires_grad for parameter in self.parameters()):
            self.to(device, None if dtype is None else precise(self.dtype, dtype))
        return self

    def detach(self) -> None:
        """Take the adapter off; with the last one the UNet has its own processors back, the very same
        objects."""
        injection = self._injected()
        self._injection = None
        self._borrowed = None
        if self.lora is not None:
            self.lora.remove()
        if injection is not None:
            injection.remove(self)

    def batch(self, *, guidance: bool | Sequence[Branch] | None) -> None:
        """State how the UNet's batch is laid out, where no pipeline tells: with ``guidance`` the negative
        samples come first. A sequence names each equal part; ``None`` goes back to asking the pipeline (a
        bare UNet: no guidance). Raises :class:`UsageError` for other parts."""
        if isinstance(guidance, bool):
            self.branches = ("uncond", "cond") if guidance else ("cond",)
        elif guidance is not None and (not guidance or not set(guidance) <= {"uncond", "cond"}):
            raise UsageError(f"parts of a batch are 'uncond' and 'positive'; got {guidance!r}.")
        else:
            self.branches = None if guidance is None else tuple(guidance)
        self._invalidate()

    def set_guidance(self, image: float | None, *, text: float | None = None) -> None:
        """Guide towards the pictures with a scale of their own (``None``: as towards the text).

        ``image`` is to them what the pipeline's guidance scale is to the text: 0 adds nothing of them, and at
        the same number the picture is that of ordinary guidance. The UNet then runs on one part more, half
        again the work, and also where the pipeline's own guidance is off. ``text`` is the text's scale where
        no pipeline tells. Works with every pipeline whose batch is a negative and a positive part. Raises
        :class:`UsageError` for other than finite numbers from 0.
        """
        for name, value in (("image", image), ("text", text)):
            if value is not None and not (math.isfinite(value) and value >= (0 if name == "image" else 1)):
                raise UsageError(
                    f"guidance: {name} is {value}; a finite number from 0 (text: 1) is expected."
                )
        self.guidance = None if image is None else (float(image), text)
        self._invalidate()

    # ---- what it shows

    def set_prompt(self, prompt: PromptLike, **fields: Unpack[PromptFields]) -> None:
        """Show pictures to every sample that is drawn, until something else is set.

        ``prompt`` is a path, a PIL image, a features tensor, an :class:`ImagePrompt` or a list. A list of
        pictures is one prompt (their tokens share a softmax, as in diffusers); a list of :class:`ImagePrompt`
        is several, each with a softmax, scale, window and mask of its own, whose contributions add up.
        ``fields`` are :class:`ImagePrompt`'s. Pictures are encoded now; raises and keeps the previous prompt
        when one is bad.
        """
        self._show((as_prompts(prompt, fields),))

    def set_batch(self, samples: Sequence[PromptLike | None], **fields: Unpack[PromptFields]) -> None:
        """Show each sample of a batch pictures of its own; ``None`` shows that sample nothing.

        Sample ``i`` is drawn as it would be alone, with prompts, masks, windows, texts and scales of its own
        (within 1e-4 of it in float32: sums run in another order in a batch). The pipeline's batch must be a
        multiple of ``len(samples)``: with ``num_images_per_prompt=n`` the first sample's prompts serve the
        first ``n`` pictures, and so on. Raises as :meth:`set_prompt`.
        """
        if not samples:
            raise UsageError("set_batch needs at least one sample; clear_prompt() removes what was set.")
        self._show(tuple(() if sample is None else as_prompts(sample, fields) for sample in samples))

    def clear_prompt(self) -> None:
        """Show nothing: the model draws exactly as without the adapter."""
        self._samples = ()
        self._invalidate()

    @contextmanager
    def training_tokens(
        self, tokens: Float[Tensor, "B T C"], scale: Float[Tensor, "B"] | float = 1.0
    ) -> Iterator[None]:
        """While open, row ``b`` of the UNet's batch sees ``tokens[b]``, with gradients into tokens and
        weights.

        Prompts that are set rest meanwhile. A UNet with gradient checkpointing runs again in the backward
        pass: keep this open around it.
        """
        if tokens.shape[-1] != self.projection.cross_dim:
            raise self._token_mismatch(tokens)
        self.training = TrainingTokens(tokens, scale)
        try:
            yield
        finally:
            self.training = None
            self._invalidate()

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """While open, it is measured where the prompts of all adapters on this UNet act: draw inside, then
        ask the recorder for its ``result()``. Raises :class:`UsageError` when the adapter is not attached."""
        injection = self._injected()
        if injection is None:
            raise UsageError("attach() the adapter before what it does can be recording.")
        before, injection.recorder = injection.recorder, Recorder()
        try:
            yield injection.recorder
        finally:
            injection.recorder = before

    @property
    def image_encoder(self) -> PictureEncoder | None:
        """The encoder pictures go through: the given one, else the pipeline's if it fits, else the one found
        next to the weights or in the hub's cache (loaded now; adapters on one UNet share it)."""
        if self._encoder is None and self._borrowed is None and self.projection.feature != "face":
            self._encoder = self._load_encoder()
        return self._encoder or self._borrowed

    @image_encoder.setter
    def image_encoder(self, encoder: PictureEncoder | None) -> None:
        if encoder is not None:
            self._check_widths(encoder.pooled_width, encoder.hidden_width, encoder.name)
        self._encoder = encoder

    @property
    def published_encoder(self) -> EncoderPlace | None:
        """Where an image encoder is published that gives what this adapter reads; the hub is not asked."""
        return next((place for place, widths in published_encoders().items() if self._fits(*widths)), None)

    # ---- private

    def _show(self, samples: Sequence[Sequence[ImagePrompt]]) -> None:
        injection = self._injected()
        with torch.inference_mode(False), torch.no_grad():
            rows = tuple(tuple(self._row(prompt) for prompt in prompts) for prompts in samples)
        if injection is not None:
            for row in (row for sample in rows for row in sample):
                row.layer_weights(
                    self._sites(injection.sites)
                )  # a profile that does not fit this UNet is said now
        self._samples = rows if any(rows) else ()
        self._invalidate()

    def _row(self, prompt: ImagePrompt) -> CompiledPrompt:
        mask, masks = read_masks(prompt.mask, prompt.feather)
        if self._face is None:
            refuse_face_fields(prompt, self.checkpoint.name)
        else:
            self._face.check_fields(prompt)
        rule = options.canonical("combine", prompt.combine, options.COMBINES)
        zeros, stated = None, None
        if prompt.tokens is not None:
            sets = self._tokens_given(prompt.tokens)
            weights = options.read_weights(rule, len(sets), prompt.weights)
            sets = combine(sets, rule, weights)
            if isinstance(prompt.negative, Tensor):
                stated = self._tokens_given(prompt.negative).flatten(0, 1)
        else:
            shown = prompt.features if prompt.features is not None else prompt.pictures
            features, patches, zeros = self._features(shown, prompt)
            weights = options.read_weights(rule, len(features), prompt.weights)
            features = combine(features, rule, weights)
            if rule != "concat" and self._face is not None:
                features = self._face.normed(features)  # as each face's own embedding was
            sets = self._project(
                features, None if patches is None else combine(patches, rule, weights), prompt
            )
        negative = self._negative(prompt, zeros) if stated is None else stated
        if prompt.select is not None:
            chosen = list(options.read_selection(prompt.select, sets.shape[1]))
            if negative is not None and stated is None:
                negative = negative.unflatten(0, (-1, sets.shape[1]))[:, chosen].flatten(0, 1)
            sets = sets[:, chosen]
        tokens = sets.flatten(0, 1)
        if negative is not None and len(tokens) % len(negative) == 0:
            # The same tokens repeated give the same attention; equal lengths need no padding.
            negative = negative.repeat(len(tokens) // len(negative), 1)
        return CompiledPrompt(
            tokens,
            negative,
            float(prompt.scale),
            prompt.profile,
            prompt.start,
            prompt.end,
            mask,
            curve=options.read_curve(prompt.curve),
            scaling=options.canonical("scaling", prompt.scaling, options.SCALINGS),
            log_weight_bias=log_weight_bias(weights, sets.shape[1]) if rule == "concat" else None,
            text=None if prompt.text is None else self._text(prompt.text),
            track=track_of(
                prompt.at,
                options.read_curve(prompt.frame_curve),
                masks,
                pictures=len(sets),
                plain=rule == "concat" and len(set(weights)) == 1,
            ),
        )

    def _text(self, text: str | Tensor) -> Tensor:
        injection = self._injected()
        if injection is None:
            return encode_text(None, text, self.checkpoint.cross_dim)
        return injection.encode_text(text)

    def _project(self, features: Tensor, patches: Tensor | None, prompt: ImagePrompt) -> Tensor:
        """Tokens of the features, with the prompt's ``s_scale``."""
        if prompt.s_scale is None:
            return self.projection(features, patches)
        usual, self.projection.s_scale = self.projection.s_scale, prompt.s_scale
        try:
            return self.projection(features, patches)
        finally:
            self.projection.s_scale = usual

    def _negative(self, prompt: ImagePrompt, zeros: Tensor | None) -> Tensor | None:
        """Negative tokens ``(T, C)``: of what the user gave, else by the variant's rule; ``None`` if
        unknown."""
        negative = prompt.negative
        if negative is not None:
            if isinstance(negative, Tensor | EncodedFaces):
                shown: Tensor | EncodedPictures | EncodedFaces = negative
            else:
                shown = self.encode([negative], prompt.framing, face=prompt.face)
            features, patches, _ = self._features(shown, prompt, negative=True)
            return self._project(features, patches, prompt).flatten(0, 1)
        faced = self.projection.feature == "face+hidden"
        if self.projection.variant.negative == "zero_features" and not faced:
            return self.projection.negative()[0]
        if zeros is None:
            return None
        nobody = zeros.new_zeros(1, self.projection.feature_width)
        return self._project(nobody if faced else zeros, zeros if faced else None, prompt)[0]

    def _features(
        self,
        shown: Tensor | EncodedPictures | EncodedFaces | Sequence[Picture],
        prompt: ImagePrompt,
        *,
        negative: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Features, a face crop's patches and those of a zero picture, as far as the projection reads them,
        in its place and number format."""
        patches: Tensor | None = None
        zeros: Tensor | None = None
        if isinstance(shown, Sequence):
            shown = self.encode(
                shown, prompt.framing, sharpen=0.0 if negative else prompt.sharpen, face=prompt.face
            )
        if isinstance(shown, Tensor):
            features = shown[None] if shown.ndim == (2 if self._reads_hidden else 1) else shown
            if self._face is not None and not negative:
                self._face.check_length(features)
        elif self._face is not None:
            if not isinstance(shown, EncodedFaces):
                raise EncoderMismatch(
                    f"adapter '{self.checkpoint.name}' reads a face's embedding, and was given features of "
                    "whole pictures. Give a photo, or what 'imprompt embed' made with this adapter."
                )
            features, patches, zeros = self._face.features(shown)
        elif isinstance(shown, EncodedFaces):
            raise EncoderMismatch(
                f"adapter '{self.checkpoint.name}' needs {self._needs()}, and was given face embeddings."
            )
        elif self._reads_hidden:
            # Files of other programs may lack the negative's, as a tensor of width 0.
            features, zeros = shown.hidden, shown.negative_hidden if shown.negative_hidden.numel() else None
        else:
            features = shown.pooled
        for each in (features, patches, zeros):
            if each is not None and not bool(torch.isfinite(each).all()):
                raise InputError("image features contain NaN or infinite values.")
        return self._placed(features), _maybe(self._placed, patches), _maybe(self._placed, zeros)

    def _placed(self, features: Tensor) -> Tensor:
        return features.detach().to(self.device, self.dtype)

    @property
    def _reads_hidden(self) -> bool:
        return self.projection.feature == "hidden"

    def encode(
        self,
        pictures: Sequence[Picture],
        framing: str = "crop",
        *,
        sharpen: float = 0.0,
        face: str | int = "largest",
    ) -> EncodedPictures | EncodedFaces:
        """What this adapter reads in ``pictures``: their features, or the face in each of them.

        Raises :class:`EncoderMismatch` without the encoder or face model for it, :class:`InputError` for
        pictures that cannot be read, or have no such face.
        """
        if self._face is None:
            return self._encode(pictures, framing, sharpen)
        look = self._encoder_needed if self.projection.patch_width is not None else None
        return self._face.encode(pictures, face, look)

    @property
    def face_embedder(self) -> FaceReader | None:
        """What finds and embeds faces in pictures: the given one, else the pack this adapter was trained
        with, where InsightFace keeps it on this machine. Set it to an embedder of
        :mod:`imprompt.encoders.face`, or to a folder of its models."""
        return None if self._face is None else self._face.reader

    @face_embedder.setter
    def face_embedder(self, reader: FaceReaderLike) -> None:
        if self._face is None:
            raise UsageError(
                f"adapter '{self.checkpoint.name}' reads whole pictures ({self._needs()}), not faces; leave "
                "the face model out."
            )
        self._face.reader = reader

    def _encoder_needed(self) -> PictureEncoder:
        if (encoder := self.image_encoder) is None:
            raise EncoderMismatch(
                f"adapter '{self.checkpoint.name}' needs an image encoder with {self._needs()} and has none: "
                "pass image_encoder= (an encoder, a folder, or repo:subfolder), or features for a picture."
            )
        return encoder

    def _encode(self, pictures: Sequence[Picture], framing: str, sharpen: float) -> EncodedPictures:
        from imprompt.encoders import features as saved
        from imprompt.encoders.framing import encode
        from imprompt.encoders.images import load_image

        parts: list[EncodedPictures] = []
        for stored, some in groupby(pictures, saved.is_saved):
            if stored:
                parts += [self.load_features(str(path)) for path in some]  # type: ignore[misc]
                continue
            encoder = self._encoder_needed()
            # A PIL image is known here by its shape only, and an encoder by its protocol.
            decoded = [load_image(picture) for picture in some]  # type: ignore[arg-type]
            parts.append(encode(encoder, decoded, framing, sharpen=sharpen))  # type: ignore[arg-type]
        return parts[0] if len(parts) == 1 else saved.joined(parts)

    def load_features(self, path: str | Path) -> EncodedPictures | EncodedFaces:
        """Features that ``imprompt embed`` saved. Raises :class:`EncoderMismatch` when another kind of
        encoder made them, :class:`InputError` when the file is none of those."""
        from imprompt.encoders.features import load

        if self._face is not None:
            return self._face.encode([path], "largest", None)
        found = load(path)
        pooled, hidden = found.features.pooled.shape[-1], found.features.hidden.shape[-1]
        if not self._fits(pooled, hidden):
            raise EncoderMismatch(
                f"'{path}' holds features of encoder '{found.encoder}' (pooled width {pooled}, hidden width "
                f"{hidden}); adapter '{self.checkpoint.name}' needs {self._needs()}. Embed the picture with "
                "this adapter."
            )
        return found.features

    def _tokens_given(self, tokens: Tensor) -> Tensor:
        if tokens.ndim not in (2, 3) or tokens.shape[-1] != self.projection.cross_dim:
            raise self._token_mismatch(tokens)
        if not bool(torch.isfinite(tokens).all()):
            raise InputError("image tokens contain NaN or infinite values.")
        return tokens.detach().reshape(-1, *tokens.shape[-2:]).to(self.device, self.dtype)

    def _token_mismatch(self, tokens: Tensor) -> AdapterMismatch:
        return AdapterMismatch(
            f"adapter '{self.checkpoint.name}' reads tokens of width {self.projection.cross_dim}, "
            f"got shape {tuple(tokens.shape)}."
        )

    def _sites(self, sites: Sequence[Site]) -> list[Site]:
        """Those of a denoiser's sites that it has keys and values for."""
        return [site for site in sites if site.index in self._layers]

    def _check_fits(self, backbone: Backbone, model: nn.Module, name: str) -> None:
        if self.checkpoint.backbone != backbone.name:
            made_for = self.checkpoint.base_title or self.checkpoint.backbone
            raise AdapterMismatch(
                f"adapter '{self.checkpoint.name}' was made for {made_for}, {name} has a {backbone.noun}. "
                "Use an adapter trained for this base."
            )
        sites = backbone.sites(model)
        mine = {n: tuple(layer.to_k_ip.weight.shape) for n, layer in self._layers.items()}
        theirs = {site.index: (site.width, site.cross_dim) for site in sites}
        fits = mine == theirs if backbone.name == "unet" else mine.items() <= theirs.items()
        if not fits:
            where = next((n for n in sorted(mine.keys() & theirs.keys()) if mine[n] != theirs[n]), None)
            detail = f"; first differing layer {where}: {mine[where]}, not {theirs[where]}" if where else ""
            raise AdapterMismatch(
                f"adapter '{self.checkpoint.name}' was made for a {backbone.noun} with "
                f"{backbone.describe(len(mine), self.checkpoint.cross_dim)}, {name} has "
                f"{backbone.describe(len(theirs), sites[0].cross_dim if sites else 0)}{detail}. "
                "Use an adapter trained for this base."
            )
        text: Any = backbone.text_projection(model)
        family = "kolors" if text is not None else "sdxl"
        if self.checkpoint.base in ("kolors", "sdxl") and self.checkpoint.base != family:
            title = families()[family].title
            raise AdapterMismatch(
                f"adapter '{self.checkpoint.name}' was made for a UNet of {self.checkpoint.base_title}, "
                f"{name} has one of {title}: layers of the same shapes that mean other things. Use an "
                "adapter trained for this base."
            )
        if self.uses_text_projection and (text is None or text.in_features != self.projection.cross_dim):
            raise AdapterMismatch(
                f"adapter '{self.checkpoint.name}' makes tokens of width {self.projection.cross_dim} that go "
                f"through a Kolors UNet's projection of its text; {name} has none of that width."
            )
        if self.lora is not None:
            self.lora.check(model, sites, self.checkpoint.name)
        for row in (row for sample in self.samples for row in sample):
            row.layer_weights(self._sites(sites))

    def _encoder_of(self, pipe: object) -> PictureEncoder | None:
        """The pipeline's own image encoder, when it has one of the right widths."""
        model, processor = getattr(pipe, "image_encoder", None), getattr(pipe, "feature_extractor", None)
        if model is None or processor is None:
            return None
        from imprompt.encoders.clip import ImageEncoder

        encoder = ImageEncoder(model, processor)
        return encoder if self._fits(encoder.pooled_width, encoder.hidden_width) else None

    def _load_encoder(self) -> PictureEncoder | None:
        from imprompt.encoders.clip import ImageEncoder

        shared = tuple(place for place in published_encoders() if place.cached)
        for place in (*self._places, *shared):
            if self._fits(*place.widths()):
                if (loaded := self._loaded_beside(str(place))) is not None:
                    return loaded
                dtype = self.dtype if self.device.type != "cpu" else torch.float32
                return ImageEncoder.from_pretrained(
                    place.source, subfolder=place.subfolder, torch_dtype=dtype, device=self.device
                )
        found = "; ".join(f"{place}: {place.widths()}" for place in self._places if any(place.widths()))
        if found:
            raise EncoderMismatch(
                f"adapter '{self.checkpoint.name}' needs an image encoder with {self._needs()}; next to it "
                f"there are only others (pooled, hidden width): {found}. Pass image_encoder=."
            )
        return None

    def _loaded_beside(self, name: str) -> PictureEncoder | None:
        """The encoder of that name, where another adapter on the UNet has it already."""
        injection = self._injected()
        others = (
            [] if injection is None else [each for each in injection.sources if isinstance(each, IPAdapter)]
        )
        return next((each._encoder for each in others if getattr(each._encoder, "name", "") == name), None)

    def _needs(self) -> str:
        if self.projection.patch_width is not None:
            return f"hidden features of width {self.projection.patch_width}"
        return f"{self.projection.feature} features of width {self.projection.feature_width}"

    def _fits(self, pooled: int, hidden: int) -> bool:
        if self.projection.patch_width is not None:
            return self.projection.patch_width == hidden
        width = {"pooled": pooled, "hidden": hidden}.get(self.projection.feature)
        return self.projection.feature_width == width

    def _check_widths(self, pooled: int, hidden: int, name: str) -> None:
        if self.projection.feature == "face":
            raise EncoderMismatch(
                f"adapter '{self.checkpoint.name}' reads face embeddings alone and no image encoder's "
                f"features; leave out '{name}'."
            )
        if not self._fits(pooled, hidden):
            raise EncoderMismatch(
                f"adapter '{self.checkpoint.name}' needs {self._needs()}, image encoder '{name}' gives "
                f"pooled width {pooled} and hidden width {hidden}. Pass the encoder it was trained with."
            )

    def _injected(self) -> Injection | None:
        return None if self._injection is None else self._injection()

    def _invalidate(self) -> None:
        injection = self._injected()
        if injection is not None:
            injection.invalidate()


def _maybe(function: Callable[[Tensor], Tensor], value: Tensor | None) -> Tensor | None:
    return None if value is None else function(value)


def _face_lora(weights: dict[str, Tensor], numbered: nn.ModuleDict) -> FaceLora | None:
    """The additions of a checkpoint, put among ``numbered`` under their published names."""
    if not weights:
        return None
    layers: dict[int, dict[str, LowRank]] = {}
    for number in sorted({int(key.partition(".")[0]) for key in weights}):
        if str(number) not in numbered:
            numbered[str(number)] = nn.Module()
        layers[number] = {
            part: LowRank(*(linear_of(weights, f"{number}.to_{part}_lora.{half}") for half in _HALVES))
            for part in PARTS
        }
        for part, low in layers[number].items():
            numbered[str(number)].add_module(f"to_{part}_lora", low)
    return FaceLora(layers)
