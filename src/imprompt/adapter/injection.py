"""Install image prompts in one denoiser: processors at its attention sites, and hooks around its calls.

All adapters on a denoiser share an :class:`Injection`; it is removed with the last of them. Before each call
its hook reads the layout of the batch (:mod:`imprompt.adapter.backbones`), checks that the processors are
still installed, updates their tensors (:mod:`imprompt.adapter.batch`) and sets the factors of the step.
"""

import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from types import MethodType
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapter.attention import SiteProcessor
from imprompt.adapter.backbones.base import (
    Backbone,
    Branch,
    Call,
    Caller,
    Inputs,
    LastCall,
    Site,
    by_name,
    find_caller,
    refuse_diffusers_images,
)
from imprompt.adapter.backbones.table import BACKBONES
from imprompt.adapter.batch import Batch
from imprompt.adapter.guidance import WIDENED, merged, widened
from imprompt.adapter.kept_text import KeptText, stays_the_same
from imprompt.adapter.recorder import Recorder
from imprompt.adapter.regional import encode_text, project_text, text_options
from imprompt.adapter.schedule import Clock
from imprompt.adapter.source import PromptSource
from imprompt.adapter.threads import Drawing
from imprompt.errors import AdapterMismatch, UsageError

_INSTALLED: "weakref.WeakKeyDictionary[nn.Module, Injection]" = weakref.WeakKeyDictionary()
"""Of each denoiser. Its processors do not tell: others may have replaced them all."""
_LAYOUTS_KEPT = 4  # of batch layouts that alternate within a run: CFG branches called one by one, SAG, …


def find_denoiser(target: object) -> tuple[Backbone, nn.Module] | None:
    """The backbone row and the denoiser of a pipeline, or of a bare denoiser; ``None`` where there is
    none."""
    for backbone in BACKBONES:
        for model in (getattr(target, backbone.component, None), target):
            model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
            if isinstance(model, nn.Module) and backbone.recognises(model):
                return backbone, model
    return None


def denoiser_of(target: object, wanted_by: str) -> tuple[Backbone, nn.Module]:
    """:func:`find_denoiser`. Raises :class:`AdapterMismatch` where there is none."""
    if (found := find_denoiser(target)) is None:
        raise AdapterMismatch(
            f"{wanted_by} needs a diffusers UNet with cross-attention, or a FLUX, Chroma or SD3 transformer; "
            f"{type(target).__name__} has none."
        )
    return found


class Injection:
    """The processors and hooks of one denoiser, and the prompt sources that share them.

    It holds only weak references to the denoiser, so that dropping a pipeline frees everything.
    """

    def __init__(self, backbone: Backbone, model: nn.Module, sites: tuple[Site, ...]) -> None:
        self.backbone, self.sites = backbone, sites
        self.sources: list[PromptSource] = []
        self.recorder: Recorder | None = None
        self.kept_text: KeptText | None = None
        """Keys and values of the text that this call reads; ``None`` where they are not kept."""
        self._kept_texts: dict[tuple[Branch, ...], KeptText] = {}
        """The same by CFG branches, which may alternate within a run."""
        self.branches: tuple[Branch, ...] | None = None
        """The CFG branches in the batch, where the pipeline's flags do not tell."""
        self.drawing = Drawing()
        self._model = weakref.ref(model)
        self._pipe: weakref.ref[object] | None = None
        self._attentions = [weakref.ref(model.get_submodule(site.name)) for site in sites]
        self._batches: dict[Call, Batch] = {}
        self._stale: set[Call] = set()
        self._shown: Batch | None = None
        self._merge: tuple[int, float] | None = None
        """Number of branches of a widened batch and the ratio to merge it with; ``None`` if not widened."""
        self._last: LastCall = None
        self._grid: tuple[Any, Any] | None = None
        self._run: tuple[Any, Any] | None = None
        """Scheduler and timesteps of the run; a new run has new ones."""
        self._clock: Clock | None = None
        """The clock of the run."""
        self._compiled = False
        self._call_count = 0
        """Calls with windows or curves whose blocks a backward pass will run again."""
        self._hooks: list[Any] = []

    @classmethod
    def into(cls, model: nn.Module, pipe: object | None) -> "Injection":
        """The injection of a denoiser, installed if there is none. ``pipe`` is the pipeline that will call
        it.

        Raises :class:`AdapterMismatch`, with nothing changed, for attention processors that it cannot wrap.
        """
        backbone, model = denoiser_of(model, "an image prompt")
        sites = backbone.sites(model)
        injection = cls.of(model) or cls(backbone, model, sites)
        with injection.drawing.undisturbed():
            if not injection._hooks:
                for site, attention in zip(sites, injection._live_attentions(), strict=True):
                    _refuse_foreign(backbone, site.name, _own(attention.processor))
                injection._install(model)
            injection._pipe = None if pipe is None else weakref.ref(pipe)
            injection._last = injection._run = None
            injection.invalidate()
        return injection

    @classmethod
    def of(cls, model: nn.Module) -> "Injection | None":
        """The injection of a denoiser, if there is one."""
        found = _INSTALLED.get(getattr(model, "_orig_mod", model))
        return found if found is not None and found.attached else None

    def __deepcopy__(self, _: object) -> "Injection":
        return self._not_twice("copied", "copy")

    def __reduce__(self) -> NoReturn:
        self._not_twice("pickled", "pickle")

    def _not_twice(self, done: str, do: str) -> NoReturn:
        raise UsageError(
            f"a {self.backbone.noun} cannot be {done} while an adapter is attached; detach() it, {do} it, "
            "and attach it again."
        )

    @property
    def attached(self) -> bool:
        """Whether its hooks are on the denoiser."""
        return bool(self._hooks)

    @property
    def pipe(self) -> object | None:
        """The pipeline that the adapter was attached to, if it still exists."""
        return None if self._pipe is None else self._pipe()

    @property
    def text_projection(self) -> nn.Module | None:
        """The layer that projects text states to the cross-attention width, if any (Kolors)."""
        model = self._model()
        return None if model is None else self.backbone.text_projection(model)

    def encode_text(self, text: str | Tensor, caller: Caller | None = None) -> Float[Tensor, "T C"]:
        """Encode a text for the cross-attentions, with the options of the pipeline that is running, if any.
        Raises :class:`UsageError` on transformers."""
        if self.backbone.name != "unet":
            raise UsageError(
                f"regional text is not supported on a {self.backbone.noun}: its text stream reads the image "
                "as well. Leave text out, or use a UNet base."
            )
        projection: Any = self.text_projection
        width = self.sites[0].cross_dim if projection is None else projection.in_features
        pipe = self.pipe if caller is None else caller.pipe
        options = {} if caller is None else text_options(caller)
        return project_text(projection, encode_text(pipe, text, width, **options))

    def serves(self, model: object) -> bool:
        """Whether it is installed in ``model``."""
        return model is not None and self._model() is getattr(model, "_orig_mod", model)

    def remove(self, source: PromptSource) -> None:
        """Remove one source; with the last, restore the processors that were found."""
        self.sources = [other for other in self.sources if other is not source]
        self.invalidate()
        self._batches.clear()
        self._kept_texts, self.kept_text = {}, None
        if self.sources:
            pipes = (other.pipeline for other in reversed(self.sources))
            pipe = next((pipe for pipe in pipes if pipe is not None), None)
            self._pipe = None if pipe is None else weakref.ref(pipe)
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for attention in self._live_attentions():
            if isinstance(attention.processor, SiteProcessor):
                attention.set_processor(attention.processor.previous)

    def invalidate(self) -> None:
        """Mark prompts as changed: the next call updates the tensors, in place if shapes allow."""
        self._stale = set(self._batches)
        self._shown = None
        for source in self.sources:
            if source.lora is not None:
                source.lora.rest()
        for attention in self._live_attentions():
            if isinstance(processor := attention.processor, SiteProcessor):
                processor.image_kvs, processor.regional = (), None

    # ---- private

    def _install(self, model: nn.Module) -> None:
        for site, attention in zip(self.sites, self._live_attentions(), strict=True):
            attention.set_processor(self.backbone.processor(_own(attention.processor), self, site))
        # Compiling is Python over lists, nothing for torch.compile; the model behind it stays one graph.
        hooks = Injection._before, Injection._after
        before, after = (MethodType(torch.compiler.disable(hook), self) for hook in hooks)
        self._hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
        ]
        _INSTALLED[model] = self

    def _live_attentions(self) -> list[Any]:
        return [attention for ref in self._attentions if (attention := ref()) is not None]

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The forward pre-hook: update tensors for this call, and set the factors of this step."""
        self._merge = None
        caller = find_caller()
        if not self._enter(model if caller is None else caller.pipe):
            return None
        self._keep_processors()
        given = by_name(model, args, kwargs)
        self._begin_run(model, caller, given)
        inputs = self.backbone.inputs(given)
        call = self._read(model, inputs, given, caller)
        training = any(source.training is not None for source in self.sources)
        ratio = None if training else self._guidance(call, caller)
        if ratio is not None:
            given, call = self._widen(given, call, ratio)
        batch = self._batch(call, training)
        self._keep_text(inputs.text, call, caller)
        if batch.gated or self.recorder is not None:
            clock = self._clock = self._clock or Clock.of(self._scheduler(caller), call.device)
            timestep = self.backbone.inputs(given).timestep.to(call.device, torch.float32)
            batch.step(clock, timestep)
            if self.recorder is not None:
                self.recorder.step(clock.fraction(timestep).mean(), batch.call, self.sites)
        if batch.beside_text is not None:
            given = batch.beside_text.into(given)
        elif ratio is None:
            return None
        return (), given

    def _enter(self, owner: object) -> bool:
        """Note that this thread calls the denoiser in a method of ``owner``; returns whether there is a
        prompt. Raises :class:`UsageError` if another thread is drawing, or has replaced this one's prompt."""
        if not any(source.training is not None or source.samples for source in self.sources):
            self.drawing.note(owner)
            return False
        with self.drawing.undisturbed():
            self.drawing.note(owner)
            for source in self.sources:
                if source.prompter is not None:
                    source.prompter.drawn()
        return True

    def _begin_run(self, model: nn.Module, caller: Caller | None, given: Mapping[str, Any]) -> None:
        """At the first call of a run, let the sources encode their texts again, as the pipeline encodes its
        prompt now: its text encoder may have changed since they were set."""
        scheduler = self._scheduler(caller)
        run = scheduler, getattr(scheduler, "timesteps", None)
        if self._run is None or any(a is not b for a, b in zip(run, self._run, strict=True)):
            refuse_diffusers_images(model, given)
            self._run, self._clock, self._compiled = run, None, self._is_compiled(model)
            self._kept_texts, self.kept_text, self._last = {}, None, None
            encode_text = cache(partial(self.encode_text, caller=caller))
            for source in self.sources:
                source.begin_run(encode_text)

    def _keep_text(self, text: Tensor | None, call: Call, caller: Caller | None) -> None:
        """Keep the text's keys and values over the run's steps, where nothing can change them unseen."""
        # A compiled graph has its own constants; what is kept would be one more thing that it depends on.
        if text is None or self._compiled or not stays_the_same(caller):
            self.kept_text = None
            return
        self.kept_text = self._kept_texts.setdefault(call.branches, KeptText())
        self.kept_text.show(text, call)

    def _is_compiled(self, model: nn.Module) -> bool:
        """Whether torch.compile runs the denoiser, or parts of it."""
        wrapped = hasattr(getattr(self.pipe, self.backbone.component, None), "_orig_mod")
        return wrapped or any(part._compiled_call_impl is not None for part in model.modules())

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The forward hook: merge the output of a widened batch."""
        output = output if self._merge is None else merged(output, *self._merge)
        gated = self._shown is not None and self._shown.gated
        if gated and output[0].requires_grad and getattr(model, "is_gradient_checkpointing", False):
            self._call_count += 1
            output[0].register_hook(partial(self._refuse_earlier, self._call_count))
        return output

    def _refuse_earlier(self, number: int, _: Tensor) -> None:
        """Raise :class:`UsageError` in the backward pass of a call before the last one."""
        if number < self._call_count:
            raise UsageError(
                "gradient checkpointing runs blocks again with the last step's factors, but an image prompt "
                "has a window or curve; call backward() before the next step, or disable checkpointing."
            )

    def _keep_processors(self) -> None:
        """Reinstall our processors where others have replaced them: attention slicing, xFormers, fused
        projections, ``set_attn_processor``. Raises :class:`AdapterMismatch` for those that cannot be
        wrapped."""
        for site, attention in zip(self.sites, self._live_attentions(), strict=True):
            processor = attention.processor
            if isinstance(processor, SiteProcessor) and processor.injection is self:
                continue
            previous = _own(processor)
            _refuse_foreign(self.backbone, site.name, previous)
            attention.set_processor(self.backbone.processor(previous, self, site))
            self._shown = None

    def _read(self, model: nn.Module, inputs: Inputs, given: dict[str, Any], caller: Caller | None) -> Call:
        latents = inputs.latents
        kind = latents.device.type
        autocast = torch.is_autocast_enabled(kind)
        branches = self._branches(inputs, caller)
        if branches[-1] == "cond" and inputs.text is not None:
            self._last = weakref.ref(latents), weakref.ref(inputs.text)
        if len(latents) % len(branches):
            raise UsageError(
                f"the {self.backbone.noun} is called with a batch of {len(latents)}, which {len(branches)} "
                f"branches ({', '.join(branches)}) cannot share; state the layout with "
                "adapter.batch(guidance=…)."
            )
        return Call(
            batch=len(latents),
            grid=self._grid_of(model, inputs, given),
            device=latents.device,
            dtype=torch.get_autocast_dtype(kind) if autocast else latents.dtype,
            branches=branches,
            steady=self._compiled,
        )

    def _grid_of(self, model: nn.Module, inputs: Inputs, given: dict[str, Any]) -> Any:
        """The grid of the call; FLUX's is cached by its position ids, one object per run, and the text's
        length, in which negatives may differ."""
        ids = given.get("img_ids")
        if ids is None:
            return self.backbone.grid(model, inputs, given)
        length = 0 if inputs.text is None else inputs.text.shape[1]
        if self._grid is None or self._grid[0] is not ids or self._grid[1].text_tokens != length:
            self._grid = ids, self.backbone.grid(model, inputs, given)
        return self._grid[1]

    def _branches(self, inputs: Inputs, caller: Caller | None) -> tuple[Branch, ...]:
        """The CFG branches of this call: as the user stated, else as the calling pipeline has them."""
        for stated in (self.branches, *(source.branches for source in self.sources)):
            if stated is not None:
                return stated
        if caller is None:
            caller = self._absent_caller()
        if caller is None:
            return ("cond",)
        return self.backbone.branches(inputs, caller, self._last)

    def _absent_caller(self) -> Caller | None:
        """The object attached to, if it is the user's own and no diffusers pipeline is calling. A pipeline's
        flags would be those of its last run."""
        if self._pipe is None:
            return None
        pipe = self._pipe()
        if pipe is None:
            raise UsageError(
                f"the pipeline that the adapter was attached to is gone, but its {self.backbone.noun} is "
                "still called; attach the adapter to the pipeline that calls it."
            )
        if hasattr(type(pipe), "register_modules"):
            raise UsageError(
                f"the {self.backbone.noun} of a {type(pipe).__name__} is called from outside of it, so that "
                "its guidance says nothing of this call; state the layout with adapter.batch(guidance=…)."
            )
        return Caller(pipe, {})

    def _guidance(self, call: Call, caller: Caller | None) -> float | None:
        """Image guidance scale over text guidance scale; ``None`` without a separate image scale."""
        stated = {source.guidance for source in self.sources if source.guidance is not None}
        if not stated or call.branches == ("uncond",):
            return None
        if len(stated) > 1:
            raise UsageError(
                f"adapters on one {self.backbone.noun} share their guidance; set are "
                f"{', '.join(map(str, stated))}."
            )
        if call.branches not in WIDENED:
            raise UsageError(
                "guidance for the image needs a batch of uncond and cond branches (or cond alone), not "
                f"{', '.join(call.branches)}."
            )
        if caller is not None and caller.variables.get("do_self_attention_guidance"):
            raise UsageError(
                "guidance for the image: self-attention guidance takes two branches, and this is a third; "
                "call with sag_scale=0, or set_guidance(None)."
            )
        ((image, text),) = stated
        if text is None:
            text = self._text_guidance(call, caller)
        return image / text

    def _text_guidance(self, call: Call, caller: Caller | None) -> float:
        """The pipeline's guidance scale; 1 without guidance."""
        pipe = Caller(self.pipe, {}) if caller is None and self.pipe is not None else caller
        if "uncond" not in call.branches:  # there is none, or it is a call of its own
            if caller is not None and caller.variables.get("do_true_cfg"):
                return float(caller.value("true_cfg_scale"))
            if caller is None or not caller.value("do_classifier_free_guidance"):
                return 1.0
        # The property first: a callback may change it, while the argument of the call stays what it was.
        scale = None if pipe is None else getattr(pipe.pipe, "guidance_scale", None)
        if scale is None and pipe is not None:
            scale = pipe.value("guidance_scale")
        if scale is None:
            raise UsageError("guidance for the image: the text's cannot be read here; pass text= too.")
        return float(scale)

    def _widen(self, given: dict[str, Any], call: Call, ratio: float) -> tuple[dict[str, Any], Call]:
        rows, branches = {call.batch, call.batch * call.frames}, len(call.branches)
        kept = {name: value for name, value in given.items() if name in self.backbone.unbatched}
        given = widened(given, rows, branches) | kept
        self._merge = branches + 1, ratio
        return given, replace(call, batch=call.batch + call.samples, branches=WIDENED[call.branches])

    def _batch(self, call: Call, training: bool) -> Batch:
        """The tensors for ``call``, updated and handed to the processors."""
        batch = self._batches.get(call)
        if batch is None:
            heads = {s.name: a.heads for s, a in zip(self.sites, self._live_attentions(), strict=True)}
            if len(self._batches) >= _LAYOUTS_KEPT:
                self._batches.pop(next(iter(self._batches)))
            batch = self._batches[call] = Batch(call, self.sites, heads)
            self._stale.add(call)
        if training or call in self._stale:
            self._update(batch, training)
        if batch is not self._shown or training:
            for site, attention in zip(self.sites, self._live_attentions(), strict=True):
                processor = attention.processor
                processor.image_kvs = batch.image_kvs[site.name]
                processor.regional = batch.regional[site.name]
            for source in self.sources:
                if source.lora is not None:
                    source.lora.show(None if source.training is not None else source.samples, call)
                    source.lora.check_unfused(self._model(), self.sites)
            self._shown = batch
        return batch

    def _update(self, batch: Batch, training: bool) -> None:
        if training:
            batch.update(self.sources, self.text_projection)
            return
        # No autograd graph and no inference tensors: these tensors outlive the call that makes them.
        device = batch.call.device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            batch.update(self.sources, self.text_projection)
        self._stale.discard(batch.key)

    def _scheduler(self, caller: Caller | None) -> Any:
        return getattr(self.pipe if caller is None else caller.pipe, "scheduler", None)


def _own(processor: Any) -> Any:
    """The base's own processor, unwrapped from those of removed injections."""
    while isinstance(processor, SiteProcessor):
        processor = processor.previous
    return processor


def _refuse_foreign(backbone: Backbone, name: str, processor: Any) -> None:
    if not isinstance(processor, backbone.wraps):
        raise AdapterMismatch(
            f"layer {name} has a {type(processor).__name__}, beside which an image prompt cannot be read. "
            "Remove what installed it first (pipe.unload_ip_adapter() for diffusers' own)."
        )
