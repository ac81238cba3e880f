"""Decoupled cross-attention: every text cross-attention of a UNet also reads the image prompts' tokens.

``out = SDPA(q, K_text, V_text) + Σ_g gate_g · mask_g · SDPA(q, K_g, s_g·V_g)``, then the layer's own output
projection (Ye et al. 2023, eq. 5). :class:`Injection` puts one processor on each cross-attention and one
forward pre-hook on the UNet; the hook reads what the UNet is called with and keeps the processors' groups
right. Keys and values depend on no step, so they are computed once, and again only when the prompt or the
call's layout changes. Knows no pipeline class: of a pipeline only the guidance flags and the schedule's
length are read.

Dimensions: B rows of the UNet's batch (parts × samples × images each), F frames, H heads, L queries, T
tokens, D head width, C token width, M samples with prompts of their own.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapter.backbones.unet import CrossLayer, UNet, cross_attentions, text_projection
from imprompt.adapter.batch import MaskGrids, PaddedTokens
from imprompt.adapter.guidance import WIDENED, Branch, merged, widened
from imprompt.adapter.lora import FaceLora
from imprompt.adapter.prompt import CompiledPrompt
from imprompt.adapter.regions import Regional, Regions, encode_text, project_text
from imprompt.adapter.scaling import strengthened
from imprompt.adapter.schedule import Gate, When
from imprompt.errors import AdapterMismatch, ImpromptError, UsageError

# All compute the same attention, so the text beside the image may be read by one as well as by another.
_EQUIVALENT = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
_SCHEDULE = 1000  # training timesteps, when no scheduler says otherwise


@dataclass(frozen=True, eq=False, slots=True)
class ImageKV:
    """One softmax over image tokens at one layer, for every row of the batch; the strength is inside
    ``value``."""

    key: Float[Tensor, "B H T D"]
    value: Float[Tensor, "B H T D"]
    bias: Float[Tensor, "B 1 1 T"] | None = None
    """Added to the logits: -inf where a row with fewer tokens has none, else the log of a picture's share."""
    mask: Float[Tensor, "_ 1 L 1"] | None = None
    gate: Float[Tensor, "B 1 1 1"] | None = None
    """Each row's factor at this time, 0 outside its window; written anew by the hook at every step."""
    prompt: int = 0
    """Which of the prompts it is, counted over all adapters."""

    def read(self, query: Float[Tensor, "B H L D"]) -> Float[Tensor, "B H L D"]:
        """What the image prompt contributes to each query."""
        image = F.scaled_dot_product_attention(query, self.key, self.value, attn_mask=self.bias)
        if self.mask is not None:
            image = image * self.mask
        if self.gate is not None:
            image = image * self.gate
        return image


class DecoupledAttention:
    """A cross-attention's processor: text as ever, plus what this layer's :class:`ImageKV` s contribute.

    Without groups it is the previous processor itself, so that an empty prompt changes not one bit.
    """

    def __init__(self, previous: Any, injection: "Injection", layer: CrossLayer) -> None:
        self.previous = previous
        self.injection = injection
        self.layer = layer
        self.groups: tuple[ImageKV, ...] = ()
        self.regional: Regional | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not self.groups and self.regional is None:
            if temb is not None:  # not every processor takes it
                kwargs["temb"] = temb
            return self.previous(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        if attention_mask is not None:
            rows, length = text.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, length, rows)
            attention_mask = attention_mask.view(rows, attn.heads, -1, attention_mask.shape[-1])

        query = _split(attn.to_q(hidden_states), attn.heads)
        key, value = _split(attn.to_k(text), attn.heads), _split(attn.to_v(text), attn.heads)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        if self.regional is not None:
            out = self.regional.read(attn, query, out)
        recorder = self.injection.recorder
        if recorder is None:
            for group in self.groups:
                out = out + group.read(query)
        else:
            out = recorder.read(self.layer, attn, self.groups, query, out)

        out = out.transpose(1, 2).flatten(2).to(query.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


@dataclass(frozen=True, eq=False)
class TrainingTokens:
    """Tokens in training: one set for each row of the UNet's batch, with the graph kept."""

    tokens: Float[Tensor, "B T C"]
    scale: Float[Tensor, "B"] | float = 1.0


@runtime_checkable
class PromptSource(Protocol):
    """What an injection reads of an adapter."""

    samples: tuple[tuple[CompiledPrompt, ...], ...]
    """For each sample its prompts; one sample stands for all; none means nothing is set."""
    training: TrainingTokens | None
    branches: tuple[Branch, ...] | None
    """The layout of the batch, when the user stated it."""
    guidance: tuple[float, float | None] | None
    """Guidance for the image and the text's (``None``: the pipeline's), when the image has one of its own."""
    lora: FaceLora | None
    """What it adds to the UNet's own attention while it shows something."""

    @property
    def uses_text_projection(self) -> bool:
        """Whether its tokens go through the UNet's own projection of the text (Kolors' FaceID-Plus)."""

    def key_value(self, index: int) -> tuple[nn.Linear, nn.Linear]:
        """``to_k_ip`` and ``to_v_ip`` of published layer ``index``."""


@dataclass(frozen=True)
class Call:
    """What the UNet is called with, as far as the prompts care; while it stays the same, so do the groups."""

    batch: int
    frames: int
    height: int
    width: int
    device: torch.device
    dtype: torch.dtype
    branches: tuple[Branch, ...]
    schedule: int

    @property
    def samples(self) -> int:
        """Pictures that are drawn at once, each guided one counted once."""
        return self.batch // len(self.branches)


@runtime_checkable
class Watch(Protocol):
    """Who looks on while groups are read, see :mod:`imprompt.adapter.recorder`."""

    def read(
        self,
        layer: CrossLayer,
        attention: Attention,
        groups: Sequence[ImageKV],
        query: Float[Tensor, "B H L D"],
        text: Float[Tensor, "B H L D"],
    ) -> Float[Tensor, "B H L D"]:
        """``text`` plus what the groups contribute, exactly as without a recorder."""

    def step(self, timestep: Tensor, call: Call, layers: Sequence[CrossLayer]) -> None:
        """The UNet is about to run."""


@dataclass(eq=False)
class Injection:
    """The image prompts' place in one UNet: shared by all adapters attached to it, gone with the last.

    References run from the UNet to here and never back, so that dropping a pipeline frees everything.
    """

    layers: tuple[CrossLayer, ...]
    sources: list[PromptSource] = field(default_factory=list)
    recorder: Watch | None = None
    _unet: "weakref.ref[UNet]" = field(init=False)
    _pipe: "weakref.ref[object] | None" = None
    _hook: Any = None
    _after_hook: Any = None
    _built: Call | None = None
    _gates: list[Gate] = field(default_factory=list)
    _merge: tuple[int, float] | None = None
    """The number of parts a widened batch has, and the ratio to merge it with; ``None``: as it was called."""

    @classmethod
    def into(cls, unet: UNet, pipe: object | None) -> "Injection":
        """The UNet's injection: the one that is there, or a new one. ``pipe`` is who will call the UNet.

        Raises :class:`AdapterMismatch`, with nothing changed, when a layer's processor cannot be combined.
        """
        layers = cross_attentions(unet)
        attentions = {layer.name: unet.get_submodule(layer.name) for layer in layers}
        found = {p.injection for a in attentions.values() if isinstance(p := a.processor, DecoupledAttention)}
        if found:
            injection = found.pop()
        else:
            for name, attention in attentions.items():
                if not isinstance(attention.processor, _EQUIVALENT):
                    raise AdapterMismatch(
                        f"layer {name} has a {type(attention.processor).__name__}, beside which an image "
                        "prompt cannot be read. Remove what installed it first (pipe.unload_ip_adapter() for "
                        "diffusers' own)."
                    )
            injection = cls(layers)
            injection._unet = weakref.ref(unet)
            for layer in layers:
                attention = attentions[layer.name]
                attention.set_processor(DecoupledAttention(attention.processor, injection, layer))
            # Building is Python over lists, nothing for a compiler; the UNet behind it stays one graph.
            hook = torch.compiler.disable(injection._before)
            injection._hook = unet.register_forward_pre_hook(hook, with_kwargs=True)
            after = torch.compiler.disable(injection._after)
            injection._after_hook = unet.register_forward_hook(after)
        injection._pipe = None if pipe is None else weakref.ref(pipe)
        injection.invalidate()
        return injection

    @property
    def pipe(self) -> object | None:
        """The pipeline that calls the UNet, if there is one."""
        return None if self._pipe is None else self._pipe()

    @property
    def text_projection(self) -> Any | None:
        """What the UNet brings its text to its own width with, see
        :func:`imprompt.adapter.backbones.unet.text_projection`."""
        unet = self._unet()
        return None if unet is None else text_projection(unet)

    def encode_text(self, text: str | Tensor) -> Float[Tensor, "T C"]:
        """A text as the cross-attentions read the prompt, see
        :func:`imprompt.adapter.regions.encode_text`."""
        projection = self.text_projection
        width = self.layers[0].cross_dim if projection is None else projection.in_features
        return project_text(projection, encode_text(self.pipe, text, width))

    def serves(self, unet: UNet) -> bool:
        """Whether it is ``unet`` that this injection sits in."""
        return self._unet() is unet

    def remove(self, source: PromptSource) -> None:
        """Take one adapter away; with the last, put back the very processors that were found."""
        self.sources = [other for other in self.sources if other is not source]
        self.invalidate()
        if self.sources:
            return
        self._hook.remove()
        self._after_hook.remove()
        for attention, processor in self._processors():
            attention.set_processor(processor.previous)

    def invalidate(self) -> None:
        """Forget the groups: something they were made from has changed."""
        self._built = None
        self._gates = []
        for source in self.sources:
            if source.lora is not None:
                source.lora.rest()
        for _, processor in self._processors():
            processor.groups, processor.regional = (), None

    def _processors(self) -> list[tuple[Attention, DecoupledAttention]]:
        unet = self._unet()
        attentions = [] if unet is None else [unet.get_submodule(layer.name) for layer in self.layers]
        return [
            (attention, attention.processor)
            for attention in attentions
            if isinstance(attention.processor, DecoupledAttention)
        ]

    def _before(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The forward pre-hook: see that the groups fit this call, and open or close the windows."""
        self._merge = None
        live = any(source.training is not None for source in self.sources)
        if not live and not any(source.samples for source in self.sources):
            return None
        call = self._read(args[0] if args else kwargs["sample"])
        ratio = None if live else self._guidance(call)
        if ratio is not None:
            rows, parts = {call.batch, call.batch * call.frames}, len(call.branches)
            args, kwargs = widened(args, rows, parts), widened(kwargs, rows, parts)
            self._merge = parts + 1, ratio
            call = replace(call, batch=call.batch + call.samples, branches=WIDENED[call.branches])
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if live or call != self._built:
            self._build(call)
        if self._gates or self.recorder is not None:
            timestep = torch.as_tensor(timestep, device=call.device, dtype=torch.float32)
            for gate in self._gates:
                gate.update(timestep)
            if self.recorder is not None:
                self.recorder.step(timestep, call, self.layers)
        return None if ratio is None else (args, kwargs)

    def _after(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The forward hook: of a widened batch give back what was called for."""
        return output if self._merge is None else merged(output, *self._merge)

    def _guidance(self, call: Call) -> float | None:
        """The image's guidance over the text's; ``None`` where both are one."""
        stated = {source.guidance for source in self.sources if source.guidance is not None}
        if not stated:
            return None
        if len(stated) > 1:
            raise UsageError(
                f"adapters on one UNet share their guidance; set are {', '.join(map(str, stated))}."
            )
        if call.branches not in WIDENED:
            raise UsageError(
                f"guidance for the image needs a batch of a negative and a positive part, or of the positive "
                f"alone; this pipeline's is {', '.join(call.branches)}."
            )
        ((image, text),) = stated
        if text is None and "uncond" in call.branches:
            text = getattr(self.pipe, "guidance_scale", None)
            if text is None:
                raise UsageError("guidance for the image: the text's cannot be read here; pass text= too.")
        return image / (1.0 if text is None else float(text))

    def _read(self, sample: Tensor) -> Call:
        device = sample.device
        autocast = torch.is_autocast_enabled(device.type)
        pipe = self.pipe
        scheduler = getattr(pipe, "scheduler", None)
        call = Call(
            batch=sample.shape[0],
            frames=sample.shape[2] if sample.ndim == 5 else 1,
            height=sample.shape[-2],
            width=sample.shape[-1],
            device=device,
            dtype=torch.get_autocast_dtype(device.type) if autocast else sample.dtype,
            branches=self._branches(pipe),
            schedule=_SCHEDULE if scheduler is None else scheduler.config.num_train_timesteps,
        )
        if call.batch % len(call.branches):
            raise UsageError(
                f"the UNet is called with a batch of {call.batch}, which {len(call.branches)} parts "
                f"({', '.join(call.branches)}) cannot share; state the layout with adapter.batch(guidance=…)."
            )
        return call

    def _branches(self, pipe: object | None) -> tuple[Branch, ...]:
        """The layout of the batch: as stated, else as the pipeline's guidance flags say, else no guidance."""
        for source in self.sources:
            if source.branches is not None:
                return source.branches
        if self._pipe is None:
            return ("cond",)
        if pipe is None:
            raise UsageError(
                "the pipeline that the adapter was attached to is gone, but its UNet is still called; "
                "attach the adapter to the pipeline that calls it."
            )
        try:
            guided = bool(pipe.do_classifier_free_guidance)  # type: ignore[attr-defined]
        except AttributeError:
            raise UsageError(
                f"{type(pipe).__name__} does not say whether guidance is on: it was never called itself, or "
                "has no such flag. Attach to the pipeline you call, or state adapter.batch(guidance=…)."
            ) from None
        if guided and hasattr(type(pipe), "image_guidance_scale"):  # InstructPix2Pix: text+image, image, none
            return ("cond", "uncond", "uncond")
        positive: tuple[Branch, ...] = ("cond",)
        if getattr(pipe, "do_perturbed_attention_guidance", False):
            positive *= 2
        return ("uncond", *positive) if guided else positive

    def _build(self, call: Call) -> None:
        """Compute every layer's groups for ``call``."""
        found = self._processors()
        if len(found) != len(self.layers):
            raise ImpromptError(
                "other attention processors were installed after the adapter was attached, which silences "
                "it; detach() and attach() again."
            )
        processors = {layer.name: pair for layer, pair in zip(self.layers, found, strict=True)}
        self._gates, regions = [], Regions()
        groups: dict[str, list[ImageKV]] = {layer.name: [] for layer in self.layers}
        heads = {name: attention.heads for name, (attention, _) in processors.items()}
        prompt = 0
        for source in self.sources:
            if source.lora is not None:
                source.lora.show(None if source.training is not None else source.samples, call)
            if source.training is not None:
                live = replace(source.training, tokens=self._projected(source, source.training.tokens))
                for layer in self.layers:
                    groups[layer.name].append(_training_kv(source, live, layer, heads[layer.name], call))
                continue
            # No autograd graph and no inference tensors: the groups outlive the call that makes them.
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(call.device.type, enabled=False),
            ):
                for rows in _prompt_slots(source.samples):
                    self._add_prompt_slot(groups, regions, source, rows, heads, call, prompt)
                    prompt += 1
        with torch.inference_mode(False), torch.no_grad():
            regional = {x.name: regions.at(x.size(call.height, call.width)) for x in self.layers}
        for name, (_, processor) in processors.items():
            processor.groups, processor.regional = tuple(groups[name]), regional[name]
        self._built = call

    def _add_prompt_slot(
        self,
        groups: dict[str, list[ImageKV]],
        regions: Regions,
        source: PromptSource,
        rows: Sequence[CompiledPrompt | None],
        heads: Mapping[str, int],
        call: Call,
        prompt: int,
    ) -> None:
        """One softmax's groups: ``rows`` holds, for each sample, the prompt that takes part in it."""
        if call.samples % len(rows):
            raise UsageError(
                f"prompts are set for {len(rows)} samples, but {call.samples} are drawn; "
                "the pipeline's batch must be a multiple of the number of samples that have prompts."
            )
        parts: list[Branch] = ["uncond" if part == "text" else part for part in call.branches]
        kinds = tuple(dict.fromkeys(parts))
        if "uncond" in kinds and any(row is not None and row.negative is None for row in rows):
            raise UsageError(
                "guidance needs the image prompt's negative tokens, which bare features of this variant "
                "cannot give: pass negative= (the encoder's features of an all-zero input), or a picture."
            )
        each = call.samples // len(rows)
        times = [When() if row is None else row.when for row in rows for _ in range(each)]
        gate = Gate.of(times * len(parts), call.schedule, call.frames, call.device, call.dtype)
        if any(row is not None and row.track is not None for row in rows):
            starts = range(0, len(rows) * call.frames, call.frames)
            sample_of = [m + f for m in starts for _ in range(each) for f in range(call.frames)]
            rows = [
                of_frame
                for row in rows
                for of_frame in ([None] * call.frames if row is None else row.over_frames(call.frames))
            ]
        else:
            sample_of = [m for m in range(len(rows)) for _ in range(each * call.frames)]
        spread = [None if row is None else row.layer_weights(self.layers) for row in rows]
        modes = ["v-only" if row is None else row.scaling for row in rows] * len(kinds)
        masks = MaskGrids(rows, sample_of * len(parts), call.device, call.dtype)
        order = torch.tensor(
            [kinds.index(part) * len(rows) + m for part in parts for m in sample_of], device=call.device
        )
        says = [part != "uncond" for part in call.branches for _ in sample_of]
        regions.add(rows, sample_of * len(parts), says, masks)
        stacks: dict[tuple[bool, ...], PaddedTokens] = {}
        for i, layer in enumerate(self.layers):
            weights = [0.0 if s is None else s.weights[i] for s in spread]
            negated = tuple(s is not None and s.negated[i] for s in spread)
            strengths = [
                0.0 if kind == "cond" and not_ else weight
                for kind in kinds
                for weight, not_ in zip(weights, negated, strict=True)
            ]
            if not any(strengths):
                continue  # structurally no prompt here: the layer keeps its own processor, bit for bit
            if negated not in stacks:
                made = PaddedTokens.of(rows, kinds, negated, call.device)
                stacks[negated] = replace(made, tokens=self._projected(source, made.tokens))
            stack = stacks[negated]
            key, value = _key_value(source, layer, stack.tokens, heads[layer.name], call)
            key, value = strengthened(key, value, strengths, modes, stack.present)
            groups[layer.name].append(
                ImageKV(
                    key=key[order].to(call.dtype),
                    value=value[order].to(call.dtype),
                    bias=None if stack.bias is None else stack.bias[order].to(call.dtype),
                    mask=masks.at(layer.size(call.height, call.width)),
                    gate=None if gate is None else gate.factor,
                    prompt=prompt,
                )
            )
        if gate is not None:
            self._gates.append(gate)

    def _projected(self, source: PromptSource, tokens: Float[Tensor, "S T E"]) -> Float[Tensor, "S T C"]:
        return project_text(self.text_projection if source.uses_text_projection else None, tokens)


def _prompt_slots(samples: Sequence[Sequence[CompiledPrompt]]) -> list[tuple[CompiledPrompt | None, ...]]:
    """The g-th prompt of every sample, for each g; samples with fewer have none there."""
    depth = max((len(rows) for rows in samples), default=0)
    return [tuple(rows[g] if g < len(rows) else None for rows in samples) for g in range(depth)]


def _key_value(
    source: PromptSource, layer: CrossLayer, tokens: Float[Tensor, "S T C"], heads: int, call: Call
) -> tuple[Float[Tensor, "S H T D"], Float[Tensor, "S H T D"]]:
    """Keys and values of the tokens, in the finer of the weights' and the UNet's number format."""
    to_k, to_v = source.key_value(layer.index)
    dtype = torch.promote_types(to_k.weight.dtype, call.dtype)
    tokens = tokens.to(call.device, dtype)
    key, value = (F.linear(tokens, part.weight.to(call.device, dtype)) for part in (to_k, to_v))
    return _split(key, heads), _split(value, heads)


def _training_kv(
    source: PromptSource, live: TrainingTokens, layer: CrossLayer, heads: int, call: Call
) -> ImageKV:
    if live.tokens.shape[0] != call.batch:
        raise UsageError(
            f"training tokens are for {live.tokens.shape[0]} rows, the UNet is called with {call.batch}."
        )
    key, value = _key_value(source, layer, live.tokens, heads, call)
    scale = torch.as_tensor(live.scale, device=call.device, dtype=value.dtype)
    value = value * scale.reshape(-1, 1, 1, 1)
    return ImageKV(key.to(call.dtype), value.to(call.dtype))


def _split(x: Float[Tensor, "B T HD"], heads: int) -> Float[Tensor, "B H T D"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
