"""IPAdapter: owns a projection and each layer's key and value weights, and lends them to a model.

``attach`` puts it on a diffusers pipeline (or a bare UNet), ``set_prompt`` says what it shows, ``detach``
takes it off again without a trace. Weights come from published files, state dicts, or new for training, and
are saved in the published layout. It draws nothing itself and knows no pipeline class.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapter.backbones.base import Backbone, Branch, Site
from imprompt.adapter.batch import PromptSource, TrainingTokens
from imprompt.adapter.encoding import EncodedPrompt, EncoderLike, PromptEncoder, check_tokens
from imprompt.adapter.faces import FaceReaderLike
from imprompt.adapter.fit import check_family, check_sites
from imprompt.adapter.injection import Injection, find_denoiser, placement
from imprompt.adapter.key_value import KeyValue, key_value_of, linear_of, precise
from imprompt.adapter.lora import PARTS, FaceLora, LowRank
from imprompt.adapter.prompt import CompiledPrompt, PromptLike, as_prompts, compile_prompt
from imprompt.adapter.recorder import Recorder
from imprompt.adapter.regional import encode_text
from imprompt.adapter.threads import Prompter
from imprompt.catalog import licences
from imprompt.checkpoints.checkpoint import Checkpoint, StateDict, read, write
from imprompt.checkpoints.locate import EncoderPlace, locate
from imprompt.encoders.clip import Features, ImageEncoder
from imprompt.encoders.face import FaceEmbedder, Faces
from imprompt.errors import AdapterMismatch, UsageError
from imprompt.projections import build_projection, new_linear, new_resampler
from imprompt.projections.modules import ImageProjection
from imprompt.projections.resamplers import TimedResamplerProjection
from imprompt.schema.prompt import ImagePrompt, Picture

_Encoded: TypeAlias = tuple[tuple[tuple[EncodedPrompt, Tensor | None], ...], ...]
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
        self._target: Callable[[], object] = _nothing
        self._prompter = self.prompter = Prompter()
        self._slots = [
            (part._parameters, name) for part in self.module.modules() for name in part._parameters
        ]
        self._encoded: _Encoded = ()
        self._compiled_with: tuple[object, ...] = ()
        self.prompt_encoder = PromptEncoder(self.checkpoint, self.projection, image_encoder)
        """Encodes its prompts: finds and keeps the image encoder or face model, and remembers features."""
        if face_embedder is not None:
            self.face_embedder = face_embedder

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
            adapter.prompt_encoder.places = places + EncoderPlace.noted(checkpoint.metadata)
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
        with self._undisturbed():
            self.module.to(device=device, dtype=dtype)
            if self.prompt_encoder.encoder is not None and device is not None:
                self.prompt_encoder.encoder.to(device, None)
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
        borrowed = self.prompt_encoder.borrow_from(target)
        device, dtype = placement(model)
        injection = Injection.into(model, None if isinstance(target, nn.Module) else target)
        if not any(source is self for source in injection.sources):
            injection.sources.append(self)
        if self.lora is not None:
            self.lora.into(model, injection.sites)
        self._injection = weakref.ref(injection)
        self._target = weakref.ref(target)
        self.prompt_encoder.borrowed = borrowed
        for other in injection.sources:
            if isinstance(other, IPAdapter) and other is not self:
                self.prompt_encoder.beside.add(other.prompt_encoder)
                other.prompt_encoder.beside.add(self.prompt_encoder)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            self.to(device, None if dtype is None else precise(self.dtype, dtype))
        return self

    def detach(self) -> None:
        """Take the adapter off; with the last one the UNet has its own processors back, the very same
        objects."""
        injection = self._injected()
        with self._undisturbed():
            self._injection, self._target = None, _nothing
            self.prompt_encoder.borrowed = None
            self.prompt_encoder.beside.clear()
            if self.lora is not None:
                self.lora.remove()
            if injection is not None:
                injection.remove(self)

    def batch(self, *, guidance: bool | Sequence[Branch] | None) -> None:
        """State how the UNet's batch is laid out, where no pipeline tells: with ``guidance`` the negative
        samples come first. A sequence names each equal part; ``None`` goes back to asking the pipeline (a
        bare UNet: no guidance). Raises :class:`UsageError` for other parts."""
        stated: Sequence[Branch] | None
        if isinstance(guidance, bool):
            stated = ("uncond", "cond") if guidance else ("cond",)
        elif guidance is not None and (not guidance or not set(guidance) <= {"uncond", "cond"}):
            raise UsageError(f"parts of a batch are 'uncond' and 'cond'; got {guidance!r}.")
        else:
            stated = guidance
        with self._undisturbed():
            self.branches = None if stated is None else tuple(stated)
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
        with self._undisturbed():
            self.guidance = None if image is None else (float(image), text)
            self._invalidate()

    # ---- what it is prompted with

    def set_prompt(self, prompt: PromptLike, **fields: Any) -> None:
        """Prompt every sample that is drawn with pictures, until another prompt is set.

        ``prompt`` is a path, a PIL image, a features tensor, an :class:`ImagePrompt` or a list. A list of
        pictures is one prompt (their tokens share a softmax, as in diffusers); a list of :class:`ImagePrompt`
        is several, each with a softmax, scale, window and mask of its own, whose contributions add up.
        ``fields`` are :class:`ImagePrompt`'s. Pictures are encoded now, words of ``text`` again whenever a
        drawing begins. Raises an :class:`ImpromptError`, and keeps the previous prompt, when one cannot be
        used, and :class:`UsageError` while another thread draws with the adapter.
        """
        self._set((as_prompts(prompt, fields),))

    def set_batch(self, samples: Sequence[PromptLike | None], **fields: Any) -> None:
        """Prompt each sample of a batch with pictures of its own; ``None``: with nothing.

        Sample ``i`` is drawn as it would be alone, with prompts, masks, windows, texts and scales of its own
        (within 1e-4 of it in float32: sums run in another order in a batch). The pipeline's batch must be a
        multiple of ``len(samples)``: with ``num_images_per_prompt=n`` the first sample's prompts serve the
        first ``n`` pictures, and so on. Raises as :meth:`set_prompt`.
        """
        if not samples:
            raise UsageError("set_batch needs at least one sample; clear_prompt() removes what was set.")
        self._set(tuple(() if sample is None else as_prompts(sample, fields) for sample in samples))

    def clear_prompt(self) -> None:
        """Remove what was set: the model draws exactly as without the adapter."""
        with self._undisturbed():
            self._encoded, self._samples = (), ()
            self._prompter.clear()
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
            check_tokens(tokens, self.projection.cross_dim, self.checkpoint.name)
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
            raise UsageError("attach() the adapter before recording what it does.")
        before, injection.recorder = injection.recorder, Recorder()
        try:
            yield injection.recorder
        finally:
            injection.recorder = before

    @property
    def image_encoder(self) -> ImageEncoder | None:
        """The encoder of its pictures: the given one, else the pipeline's if it fits, else the one beside the
        weights or in the hub's cache (loaded now; adapters on one UNet share it)."""
        return self.prompt_encoder.image_encoder

    @image_encoder.setter
    def image_encoder(self, encoder: ImageEncoder | None) -> None:
        self.prompt_encoder.use(encoder)

    @property
    def published_encoder(self) -> EncoderPlace | None:
        """Where an image encoder that fits is published; the hub is not asked."""
        return self.prompt_encoder.published

    @property
    def face_embedder(self) -> FaceEmbedder | None:
        """What finds and embeds faces: the given one, else the pack that the adapter was trained with, if
        InsightFace keeps it on this machine. Set it to an embedder of :mod:`imprompt.encoders.face` or to a
        folder of its models."""
        return None if self.prompt_encoder.face is None else self.prompt_encoder.face.reader

    @face_embedder.setter
    def face_embedder(self, reader: FaceReaderLike) -> None:
        if self.prompt_encoder.face is None:
            raise UsageError(
                f"adapter '{self.checkpoint.name}' reads whole pictures ({self.prompt_encoder.needs}), not "
                "faces; leave the face model out."
            )
        self.prompt_encoder.face.reader = reader

    def encode(
        self,
        pictures: Sequence[Picture],
        framing: str = "crop",
        *,
        sharpen: float = 0.0,
        face: str | int = "largest",
    ) -> Features | Faces:
        """The features of ``pictures``, or the face in each of them, as this adapter reads them.

        Raises :class:`EncoderMismatch` without the encoder or face model for it, :class:`InputError` for
        pictures that cannot be read, or have no such face.
        """
        prompt = ImagePrompt(tuple(pictures), framing=framing, sharpen=sharpen, face=face)
        return self.prompt_encoder.read(prompt.pictures, prompt)[0]

    def load_features(self, path: str | Path) -> Features | Faces:
        """Features that ``imprompt embed`` saved.

        Raises :class:`EncoderMismatch` when another kind of encoder made them, :class:`InputError` when the
        file holds none.
        """
        return self.prompt_encoder.load(path)

    @property
    def samples(self) -> tuple[tuple[CompiledPrompt, ...], ...]:
        """For each sample its compiled prompts; one sample stands for all; none means nothing is set.

        Compiled anew when a weight has changed, in place or by another, since they were.
        """
        if self._encoded and self._compiled_with != self._weights_now():
            self._compile(self._encoded)
        return self._samples

    # ---- private

    def _undisturbed(self) -> AbstractContextManager[None]:
        """Keeps other threads from drawing. Raises :class:`UsageError` while one draws with this adapter."""
        injection = self._injected()
        return nullcontext() if injection is None else injection.drawing.undisturbed()

    def begin_run(self, encode_text: Callable[[str], Tensor]) -> None:
        """Encode the words of regional texts anew, as the pipeline has just encoded its prompt."""
        if not any(isinstance(prompt.prompt.text, str) for sample in self._encoded for prompt, _ in sample):
            return
        with torch.inference_mode(False), torch.no_grad():
            encoded = tuple(
                tuple(
                    (prompt, encode_text(words) if isinstance(words := prompt.prompt.text, str) else text)
                    for prompt, text in sample
                )
                for sample in self._encoded
            )
        self._samples = tuple(
            tuple(replace(made, text=text) for made, (_, text) in zip(sample, given, strict=True))
            for sample, given in zip(self.samples, encoded, strict=True)
        )
        self._encoded = encoded
        self._invalidate()

    def _check_target(self) -> None:
        """Raises :class:`UsageError` when the pipeline has another denoiser than when it was attached."""
        target, injection = self._target(), self._injected()
        found = None if isinstance(target, nn.Module) else find_denoiser(target)
        if found is not None and (injection is None or not injection.serves(found[1])):
            raise UsageError(
                f"the {found[0].noun} of the {type(target).__name__} was replaced after adapter "
                f"'{self.checkpoint.name}' was attached; detach() the adapter and attach it again."
            )

    def _set(self, samples: Sequence[Sequence[ImagePrompt]]) -> None:
        self._check_target()
        with torch.inference_mode(False), torch.no_grad():
            encoded = tuple(
                tuple((self.prompt_encoder.encode(prompt), self._text(prompt.text)) for prompt in prompts)
                for prompts in samples
            )
        with self._undisturbed():
            self._compile(encoded)
            self._prompter.set()

    def _compile(self, encoded: _Encoded) -> None:
        weights, injection = self._weights_now(), self._injected()
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            samples = tuple(
                tuple(compile_prompt(prompt, self.projection, text) for prompt, text in prompts)
                for prompts in encoded
            )
        if injection is not None:
            for prompt in (prompt for sample in samples for prompt in sample):
                prompt.layer_weights(self._sites(injection.sites))  # a profile that does not fit is said now
        self._encoded, self._compiled_with = encoded, weights
        self._samples = samples if any(samples) else ()
        self._invalidate()

    def _weights_now(self) -> tuple[object, ...]:
        """What differs when a weight or the LoRA's scale has changed."""
        found = [
            (id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version)
            for table, name in self._slots
            if (weight := table[name]) is not None
        ]
        return (None if self.lora is None else self.lora.scale, *found)

    def _text(self, text: str | Tensor | None) -> Tensor | None:
        if text is None:
            return None
        injection = self._injected()
        if injection is None:
            return encode_text(None, text, self.checkpoint.cross_dim)
        return injection.encode_text(text)

    def _sites(self, sites: Sequence[Site]) -> list[Site]:
        """Those of a denoiser's sites that it has keys and values for."""
        return [site for site in sites if site.index in self._layers]

    def _check_fits(self, backbone: Backbone, model: nn.Module, name: str) -> None:
        """Raises :class:`AdapterMismatch` when the adapter was made for another model than ``model``."""
        shapes = {n: tuple(layer.to_k_ip.weight.shape) for n, layer in self._layers.items()}
        check_sites(self.checkpoint, shapes, backbone, model, name)
        check_family(self.checkpoint, self.projection.cross_dim, backbone, model, name)
        sites = backbone.sites(model)
        if self.lora is not None:
            self.lora.check(model, sites, self.checkpoint.name)
        for prompt in (prompt for sample in self._samples for prompt in sample):
            prompt.layer_weights(self._sites(sites))

    def _injected(self) -> Injection | None:
        return None if self._injection is None else self._injection()

    def _invalidate(self) -> None:
        injection = self._injected()
        if injection is not None:
            injection.invalidate()


def _nothing() -> None:
    return None


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
