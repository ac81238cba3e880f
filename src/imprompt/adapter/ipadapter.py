"""IPAdapter: an image prompt adapter for diffusers pipelines.

``from_pretrained`` loads one, ``attach`` adds it to a pipeline (or a bare UNet), ``set_prompt`` sets the
image prompt, ``detach`` restores the pipeline.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapter.backbones.base import Backbone, Branch, Site
from imprompt.adapter.encoding import EncodedPrompt, EncoderLike, PromptEncoder, check_tokens
from imprompt.adapter.faces import FaceReaderLike
from imprompt.adapter.fit import check_fits
from imprompt.adapter.init import initial_weights
from imprompt.adapter.injection import Injection, denoiser_of, find_denoiser
from imprompt.adapter.kept import Kept
from imprompt.adapter.key_value import placement, precise
from imprompt.adapter.masks import together
from imprompt.adapter.prompt import CompiledPrompt, PromptLike, PromptTokens, as_prompts, compile_prompt
from imprompt.adapter.recorder import Recorder
from imprompt.adapter.regional import encode_text
from imprompt.adapter.source import TrainingTokens
from imprompt.adapter.threads import Prompter
from imprompt.adapter.weights import AdapterWeights
from imprompt.catalog import licences
from imprompt.checkpoints.checkpoint import Checkpoint, StateDict, read
from imprompt.checkpoints.locate import locate, noted_encoder
from imprompt.encoders.clip import Features, ImageEncoder
from imprompt.encoders.face import FaceEmbedder, Faces
from imprompt.errors import UsageError
from imprompt.schema.options import is_finite
from imprompt.schema.prompt import ImagePrompt
from imprompt.schema.values import Picture

_Encoded: TypeAlias = tuple[tuple[EncodedPrompt, ...], ...]


class IPAdapter(AdapterWeights):
    """An image prompt adapter (Ye et al. 2023) for diffusers pipelines."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        image_encoder: EncoderLike = None,
        face_embedder: FaceReaderLike = None,
    ) -> None:
        super().__init__(checkpoint)
        self._prompter = self.prompter = Prompter()
        self._encoded: _Encoded = ()
        self._compiled_with: tuple[object, ...] = ()
        self._kept = Kept[PromptTokens]()
        self.prompt_encoder = PromptEncoder(self.checkpoint, self.projection, image_encoder)
        """Encodes prompts with the image encoder or face model, and caches features."""
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
        checkpoints. Of a ``.bin`` the ``.safetensors`` beside it is read. ``image_encoder`` is an encoder, a
        folder, or ``repo:subfolder``; ``None`` looks next to the file when a picture is first encoded. A face
        adapter's ``face_embedder`` is one of :mod:`imprompt.encoders.face`, or a folder of its models. The
        hub is asked only for these files and not at all under ``HF_HUB_OFFLINE``. ``variant`` says what the
        file is where its weights leave that open. ``torch_dtype`` ``None`` keeps the stored dtype.
        Raises :class:`ModelError` for what is missing, damaged or (see ``catalog.licences``) not for
        commercial use, :class:`EncoderMismatch` for a wrong encoder.
        """
        path, places = locate(str(repo_or_folder_or_file), subfolder, weight_name)
        checkpoint = read(path, variant=variant)
        licences.check(f"adapter '{checkpoint.name}'", checkpoint.licence)
        adapter = cls(checkpoint, image_encoder=image_encoder, face_embedder=face_embedder)
        if image_encoder is None:
            adapter.prompt_encoder.places = places + noted_encoder(checkpoint.metadata)
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
        """A new adapter to train for ``unet``: random projection; keys and values copied from the text's.

        ``kind`` ``linear`` makes 4 tokens of the pooled embedding, ``resampler`` 16 of the hidden states,
        with ``depth`` blocks of ``width`` (a multiple of 64; default the UNet's text width rounded up).
        ``feature_width`` may be left out if ``image_encoder`` is an encoder. All parameters require
        gradients. Raises :class:`UsageError` where a width cannot be known or does not fit.
        """
        encoder = image_encoder if isinstance(image_encoder, ImageEncoder) else None
        weights = initial_weights(unet, kind, feature_width or encoder, tokens, depth, width)
        adapter = cls.from_state_dict(weights, image_encoder=image_encoder)
        adapter.module.requires_grad_(True).train()
        return adapter

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "IPAdapter":
        """Move or cast the weights; a dtype may stand first, as in torch.

        Its image encoder is moved too, in its own dtype. Ends :meth:`enable_cpu_offload`.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        with self._undisturbed():
            self.module.to(device=device, dtype=dtype)
            if device is not None:
                self.prompt_encoder.execution_device = self.projection.execution_device = None
                if self.prompt_encoder.encoder is not None:
                    self.prompt_encoder.encoder.to(device, None)
            self._invalidate()
        return self

    @property
    def execution_device(self) -> torch.device | None:
        """Where it computes while its weights wait in main memory; ``None``: where they are."""
        return self.prompt_encoder.execution_device

    def enable_cpu_offload(self, device: torch.device | str = "cuda") -> "IPAdapter":
        """Let the weights and the image encoder wait in main memory, and compute on ``device``.

        A picture is encoded and projected, and its keys and values are made, with copies of the weights that
        are given up at once: while the model draws, the keys and values alone are on the device (11 MB
        with SDXL's plus adapter). A picture that was shown just before needs no copy. Weights
        that each step reads (a FaceID file's LoRA, SD3.5's layers) stay on the device. May be called before
        or after :meth:`attach`; :meth:`to` ends it. The pipeline's own image encoder is the pipeline's.
        Raises PyTorch's :class:`RuntimeError` for a device that is not there.
        """
        device = torch.device(device)
        self.to("cpu")
        with self._undisturbed():
            for part in self._read_each_step():
                part.to(device)
            self.projection.execution_device = None if self.timed else device
            self.prompt_encoder.execution_device = device
            if self.prompt_encoder.encoder is not None:
                self.prompt_encoder.encoder.execution_device = device
            self._invalidate()
        return self

    # ---- on a model

    @property
    def attached(self) -> bool:
        """Whether it is attached to a model that still exists."""
        return self.injection is not None

    def attach(self, target: object) -> "IPAdapter":
        """Attach the adapter to a diffusers pipeline, or a bare UNet. Several adapters on one add up.

        Attach it to the pipeline that you will call: its guidance flag says which rows of the batch are
        negative. To use another pipeline with the same UNet, attach to that one. For a bare UNet see
        :meth:`batch`. Everything is checked first: :class:`AdapterMismatch`, :class:`EncoderMismatch` or
        :class:`UsageError` leave the pipeline unchanged. A FaceID file's LoRA (:attr:`lora`) is active while
        a face prompt is set; the user's own LoRAs are not changed. The weights are moved to the UNet's
        device, and cast to its dtype if that is finer, unless they are being trained; the layers of keys and
        values, which are read once a prompt, are cast when they are read.
        """
        backbone, model = denoiser_of(target, f"adapter '{self.checkpoint.name}'")
        if self.injection is not None and not self.injection.serves(model):
            raise UsageError(
                f"adapter '{self.checkpoint.name}' is attached to another {backbone.noun}; detach() it first."
            )
        self._check_fits(backbone, model, type(target).__name__)
        borrowed = self.prompt_encoder.borrow_from(target)
        device, dtype = placement(model)
        injection = Injection.into(model, None if isinstance(target, nn.Module) else target)
        self._enter(injection)
        if self.lora is not None:
            self.lora.into(model, injection.sites, self.checkpoint.name)
        self._target = weakref.ref(target)
        self.prompt_encoder.borrowed = borrowed
        self.prompt_encoder.share_with(
            source.prompt_encoder for source in injection.sources if isinstance(source, IPAdapter)
        )
        if not any(parameter.requires_grad for parameter in self.parameters()):
            if self.prompt_encoder.execution_device is None:
                self.to(device)
            if dtype is not None:
                self._refine(precise(self.dtype, dtype))
        return self

    def detach(self) -> None:
        """Detach the adapter. With the last one, the UNet gets back the same processor objects as before."""
        with self._undisturbed():
            self._target = None
            self.prompt_encoder.borrowed = None
            self.prompt_encoder.share_with(())
            if self.lora is not None:
                self.lora.remove()
            self._leave()

    def batch(self, *, guidance: bool | Sequence[Branch] | None) -> None:
        """State the layout of the UNet's batch, if no pipeline calls it: ``True`` for uncond rows before cond
        rows, ``False`` for cond rows only, or the branch of each equal part. ``None``: ask the pipeline (a
        bare UNet: no guidance). Raises :class:`UsageError` for other values."""
        stated: Sequence[Branch] | None
        if isinstance(guidance, bool):
            stated = ("uncond", "cond") if guidance else ("cond",)
        elif guidance is not None and (
            not isinstance(guidance, list | tuple) or not guidance or not {*guidance} <= {"uncond", "cond"}
        ):
            raise UsageError(
                f"guidance: {guidance!r}; True, False or a sequence of 'uncond' and 'cond' is expected."
            )
        else:
            stated = guidance
        with self._undisturbed():
            self.branches = None if stated is None else tuple(stated)
            self._invalidate()

    def set_guidance(self, image: float | None, *, text: float | None = None) -> None:
        """Set a guidance scale for the image prompts; ``None``: the pipeline's scale for both.

        At the pipeline's own guidance scale the result is that of ordinary guidance; at 0 all rows read the
        prompts' negatives, as with no picture. The batch gets one more part, which takes half as long again,
        also if the pipeline's guidance is off. ``text`` is the text's guidance scale, needed only if no
        pipeline calls the UNet. The batch must consist of uncond and cond rows, or of cond rows. Raises
        :class:`UsageError` for numbers that are not finite or below 0 (``text``: below 1).
        """
        for name, value in (("image", image), ("text", text)):
            if value is not None and not (is_finite(value) and value >= (0 if name == "image" else 1)):
                raise UsageError(
                    f"guidance: {name} is {value!r}; a finite number from 0 (text: 1) is expected."
                )
        with self._undisturbed():
            self.guidance = None if image is None else (float(image), text)
            self._invalidate()

    # ---- what it is prompted with

    def set_prompt(self, prompt: PromptLike, **fields: Any) -> None:
        """Set the image prompt for all samples, until another is set.

        ``prompt`` is a path, a PIL image, a features tensor, an :class:`ImagePrompt` or a list. A list of
        pictures is one prompt (their tokens share a softmax, as in diffusers); a list of :class:`ImagePrompt`
        is several, each with its own softmax, scale, window and mask, whose contributions add up. ``fields``
        are those of :class:`ImagePrompt`. Pictures are encoded now, ``text`` again at the start of each run.
        A picture that was set just before is not projected again unless a weight has changed; call
        :meth:`clear_prompt` after writing to weights through ``.data``, which PyTorch does not count.
        Raises an :class:`ImpromptError` for a prompt that cannot be used, and keeps the previous one;
        :class:`UsageError` while another thread draws with the adapter.
        """
        self._set((as_prompts(prompt, fields),))

    def set_batch(self, samples: Sequence[PromptLike | None], **fields: Any) -> None:
        """Set the image prompts of each sample of a batch; ``None``: none.

        Sample ``i`` is drawn as if it were alone, with its own prompts, masks, windows, texts and scales
        (within 1e-4 in float32, since sums have another order in a batch). The pipeline's batch must be a
        multiple of ``len(samples)``: with ``num_images_per_prompt=n`` the first sample's prompts are used for
        the first ``n`` pictures, and so on. Raises as :meth:`set_prompt`.
        """
        if isinstance(samples, str | bytes) or not isinstance(samples, Sequence):
            raise UsageError(
                f"set_batch: a list with the prompt of each sample is expected, not a "
                f"{type(samples).__name__}; set_prompt() shows one to all samples."
            )
        if not samples:
            raise UsageError("set_batch needs at least one sample; clear_prompt() removes what was set.")
        self._set(tuple(() if sample is None else as_prompts(sample, fields) for sample in samples))

    def clear_prompt(self) -> None:
        """Remove the image prompt: the model then draws exactly as without the adapter."""
        with self._undisturbed():
            self._encoded, self._samples = (), ()
            self._kept.clear()
            self._prompter.clear()
            self._invalidate()

    @contextmanager
    def training_tokens(
        self, tokens: Float[Tensor, "B T C"], scale: Float[Tensor, " B"] | float = 1.0
    ) -> Iterator[None]:
        """Use ``tokens[b]`` for row ``b`` of the UNet's batch inside this block, with gradients for tokens
        and weights.

        Prompts that are set are not used meanwhile. With gradient checkpointing the UNet runs again in the
        backward pass, which must be inside the block as well.
        """
        if tokens.shape[-1] != self.projection.cross_dim:
            check_tokens(tokens, self.projection.cross_dim, self.checkpoint.name)
        if any(parameter.requires_grad for parameter in self.parameters()):
            self.module.to(dtype=self.dtype)  # attach() leaves some as they are stored
        self.training = TrainingTokens(tokens, scale)
        try:
            yield
        finally:
            self.training = None
            self._invalidate()

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Measure inside this block where the prompts of all adapters on this UNet act; the recorder's
        ``result()`` has the measurements. Raises :class:`UsageError` if the adapter is not attached."""
        injection = self.injection
        if injection is None:
            raise UsageError("attach() the adapter before recording what it does.")
        before, injection.recorder = injection.recorder, Recorder()
        try:
            yield injection.recorder
        finally:
            injection.recorder = before

    @property
    def image_encoder(self) -> ImageEncoder | None:
        """The image encoder: the one that was given, else the pipeline's if it fits, else the one beside the
        weights or in the hub's cache (loaded now; adapters on one UNet share it)."""
        return self.prompt_encoder.image_encoder

    @image_encoder.setter
    def image_encoder(self, encoder: ImageEncoder | None) -> None:
        self.prompt_encoder.use(encoder)

    @property
    def face_embedder(self) -> FaceEmbedder | None:
        """The face model: the one that was given, else the installed InsightFace pack that the adapter was
        trained with. May be set to one of :mod:`imprompt.encoders.face`, or a folder of ONNX files."""
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
        """Encode pictures, or the face in each of them, as this adapter reads them.

        Raises :class:`EncoderMismatch` without the encoder or face model for it, :class:`InputError` for
        pictures that cannot be read, or have no such face, :class:`UsageError` for anything but a list.
        """
        if not isinstance(pictures, list | tuple):
            raise UsageError(f"encode: a list of pictures is expected, not a {type(pictures).__name__}.")
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
        """The compiled prompts of each sample; one sample stands for all; empty if none are set.

        Compiled again if a weight has changed or was replaced.
        """
        if self._encoded and self._compiled_with != self.versions():
            self._compile(self._encoded)
        return self._samples

    def begin_run(self, encode_text: Callable[[str], Tensor]) -> None:
        """Encode regional words again, and keep their embeddings with the encoded prompts."""
        super().begin_run(encode_text)
        self._encoded = tuple(
            tuple(replace(prompt, text=made.text) for prompt, made in zip(prompts, sample, strict=True))
            for prompts, sample in zip(self._encoded, self._samples, strict=False)
        )

    def _check_target(self) -> None:
        """Raise :class:`UsageError` if the pipeline has got another denoiser since it was attached to."""
        target, injection = None if self._target is None else self._target(), self.injection
        if injection is not None and injection.serves(getattr(target, injection.backbone.component, None)):
            return
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
                tuple(replace(self.prompt_encoder.encode(p), text=self._text(p.text)) for p in prompts)
                for prompts in samples
            )
        with self._undisturbed():
            self._kept.next()
            self._compile(encoded)
            self._prompter.set()

    def _compile(self, encoded: _Encoded) -> None:
        weights, injection = self.versions(), self.injection
        if weights != self._compiled_with:
            self._kept.clear()
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            samples = tuple(
                tuple(compile_prompt(prompt, self.projection, self._kept) for prompt in prompts)
                for prompts in encoded
            )
        masks = iter(together([prompt.mask for prompts in samples for prompt in prompts], self.device))
        samples = tuple(tuple(replace(p, mask=next(masks)) for p in prompts) for prompts in samples)
        if injection is not None:
            self._check_profiles(samples, injection.sites)
        self._encoded, self._compiled_with = encoded, weights
        self._samples = samples if any(samples) else ()
        self._invalidate()

    def _text(self, text: str | Tensor | None) -> Tensor | None:
        if text is None:
            return None
        injection = self.injection
        if injection is None:
            return encode_text(None, text, self.checkpoint.cross_dim)
        return injection.encode_text(text)

    def _check_fits(self, backbone: Backbone, model: nn.Module, name: str) -> None:
        """Raises :class:`AdapterMismatch` when the adapter was made for another model than ``model``."""
        shapes = {n: tuple(layer.to_k_ip.weight.shape) for n, layer in self._layers.items()}
        check_fits(self.checkpoint, shapes, self.projection.cross_dim, backbone, model, name)
        sites = backbone.sites(model)
        if self.lora is not None:
            self.lora.check(model, sites, self.checkpoint.name)
        self._check_profiles(self._samples, sites)

    def _check_profiles(self, samples: Sequence[Sequence[CompiledPrompt]], sites: Sequence[Site]) -> None:
        """Raise :class:`UsageError` now for a profile that does not fit the sites."""
        for prompt in (prompt for sample in samples for prompt in sample):
            prompt.layer_weights(self.sites_of(sites))
