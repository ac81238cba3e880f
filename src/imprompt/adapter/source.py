"""Base class of adapters and text regions, as a denoiser's injection uses them."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapter.backbones.base import Branch, Site
from imprompt.adapter.key_value import KeyValue
from imprompt.adapter.lora import FaceLora
from imprompt.adapter.prompt import CompiledPrompt
from imprompt.adapter.threads import Prompter

if TYPE_CHECKING:
    from imprompt.adapter.injection import Injection


@dataclass(frozen=True, eq=False)
class TrainingTokens:
    """Tokens in training: one set for each row of the batch, with the graph kept."""

    tokens: Float[Tensor, "B T C"]
    scale: Float[Tensor, " B"] | float = 1.0


class PromptSource:
    """Something that adds image tokens or texts to a denoiser: an adapter, or text regions."""

    training: TrainingTokens | None = None
    branches: tuple[Branch, ...] | None = None
    """The layout of the batch, if the user stated it."""
    guidance: tuple[float, float | None] | None = None
    """Guidance scales of image and text, if the image has its own; text ``None``: the pipeline's."""
    lora: FaceLora | None = None
    prompter: Prompter | None = None
    """Which thread set the prompt, where that matters."""
    after_block: bool = False
    """See :attr:`imprompt.adapter.attention.ImageKV.after_block`."""
    timed: bool = False
    """Whether tokens are made anew at every timestep; ``CompiledPrompt.tokens`` are features then."""
    token_count: int = 0
    """Timed sources: number of tokens that the features of one picture become."""
    shows_uncond: bool = True
    """Whether the uncond branch has image tokens at all (FLUX InstantX was published without)."""
    beside_text: bool = False
    """Whether the base reads its tokens among the text's; it has no sites then."""
    uses_text_projection: bool = False
    """Whether its tokens go through the UNet's own text projection (Kolors' FaceID-Plus)."""
    _samples: tuple[tuple[CompiledPrompt, ...], ...] = ()
    _injection: "weakref.ref[Injection] | None" = None

    _target: "weakref.ref[object] | None" = None

    @property
    def pipeline(self) -> object | None:
        """The pipeline that it was attached to; ``None`` if that is gone, or was a bare denoiser."""
        target = None if self._target is None else self._target()
        return None if isinstance(target, nn.Module) else target

    @property
    def injection(self) -> "Injection | None":
        """The injection of the denoiser it is attached to, if that still exists."""
        return None if self._injection is None else self._injection()

    def _undisturbed(self) -> AbstractContextManager[None]:
        """Keep other threads from drawing. Raises :class:`UsageError` while one draws with this source."""
        injection = self.injection
        return nullcontext() if injection is None else injection.drawing.undisturbed()

    def _enter(self, injection: "Injection") -> None:
        if not any(source is self for source in injection.sources):
            injection.sources.append(self)
        self._injection = weakref.ref(injection)

    def _leave(self) -> None:
        injection, self._injection = self.injection, None
        if injection is not None:
            injection.remove(self)

    @property
    def samples(self) -> tuple[tuple[CompiledPrompt, ...], ...]:
        """The prompts of each sample; one sample stands for all, none means that nothing is set."""
        return self._samples

    def begin_run(self, encode_text: Callable[[str], Tensor]) -> None:
        """Encode texts that were given as words again, as the pipeline has just encoded its prompt."""
        if not any(prompt.words for sample in self.samples for prompt in sample):
            return
        with torch.inference_mode(False), torch.no_grad():
            self._samples = tuple(
                tuple(replace(p, text=encode_text(p.words)) if p.words else p for p in sample)
                for sample in self.samples
            )
        self._invalidate()

    def _invalidate(self) -> None:
        injection = self.injection
        if injection is not None:
            injection.invalidate()

    def has_site(self, index: int) -> bool:
        """Whether it has keys and values for the site with published number ``index``."""
        return True

    def sites_of(self, sites: Sequence[Site]) -> list[Site]:
        """The sites that it has keys and values for."""
        return [site for site in sites if self.has_site(site.index)]

    def key_value(self, index: int) -> KeyValue:
        """The keys and values of the site with published number ``index``."""
        raise NotImplementedError

    def tokens_at(self, features: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timed sources: features ``(S, P, W)`` to tokens ``(S, T, C)`` and the time embedding ``(1, E)``."""
        raise NotImplementedError
