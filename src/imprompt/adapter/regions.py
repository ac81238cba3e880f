"""Regional prompts without a picture: several texts in one drawing, each inside its own mask.

:class:`TextRegions` sits on a UNet beside image prompt adapters, or alone where there is none, and hands its
texts to the same attention (:mod:`imprompt.adapter.regional`). A region that has a picture too is an
``ImagePrompt`` with ``mask`` and ``text``; both kinds share overlaps.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from imprompt.adapter.batch import PromptSource
from imprompt.adapter.frames import track_of
from imprompt.adapter.injection import Injection, find_denoiser
from imprompt.adapter.masks import read_masks
from imprompt.adapter.prompt import CompiledPrompt
from imprompt.errors import AdapterMismatch, UsageError
from imprompt.schema.prompt import TextRegion


class TextRegions(PromptSource):
    """Regional texts on a diffusers pipeline (or a bare UNet, which takes embeddings only).

    At every query ``text = (1 − Σ sᵢ) · A(q, prompt) + Σ sᵢ · A(q, textᵢ)``: outside all masks the prompt is
    read bit for bit as without, and the uncond rows always are.
    """

    def __init__(self) -> None:
        self._injection: weakref.ref[Injection] | None = None
        self._words: tuple[str | Tensor, ...] = ()

    def attach(self, target: object) -> "TextRegions":
        """Sit on the UNet of the pipeline that will be called. Raises :class:`AdapterMismatch` for what has
        none, :class:`UsageError` while on another."""
        found = find_denoiser(target)
        if found is None or found[0].name != "unet":
            raise AdapterMismatch(f"regional texts need a diffusers UNet; {type(target).__name__} has none.")
        unet = found[1]
        before = None if self._injection is None else self._injection()
        if before is not None and not before.serves(unet):
            raise UsageError("these regions are attached to another UNet; detach() them first.")
        injection = Injection.into(unet, None if isinstance(target, nn.Module) else target)
        if not any(source is self for source in injection.sources):
            injection.sources.append(self)
        self._injection = weakref.ref(injection)
        return self

    def set(self, regions: Sequence[TextRegion]) -> None:
        """Say these in every sample that is drawn, until something else is set; none: the prompt alone.

        Raises :class:`UsageError` before :meth:`attach`, :class:`InputError` for what is no mask or covers
        nothing, and keeps the previous ones then.
        """
        self.set_batch([regions])

    def set_batch(self, samples: Sequence[Sequence[TextRegion]]) -> None:
        """Say in each sample of a batch what is its own; the pipeline's batch is a multiple of them.
        Raises as :meth:`set`."""
        injection = None if self._injection is None else self._injection()
        if injection is None:
            raise UsageError("attach() the regions to a pipeline first, which encodes their words.")
        with torch.inference_mode(False), torch.no_grad():
            rows = tuple(
                tuple(_row(region, injection.encode_text(region.text)) for region in regions)
                for regions in samples
            )
        with injection.drawing.undisturbed():
            self._samples = rows if any(rows) else ()
            self._words = tuple(region.text for regions in samples for region in regions)
            injection.invalidate()

    def begin_run(self, encode_text: Callable[[str], Tensor]) -> None:
        """Encode the words anew, as the pipeline has just encoded its prompt."""
        injection = None if self._injection is None else self._injection()
        if injection is None or not any(isinstance(text, str) for text in self._words):
            return
        words = iter(self._words)
        with torch.inference_mode(False), torch.no_grad():
            self._samples = tuple(
                tuple(
                    replace(row, text=encode_text(text)) if isinstance(text := next(words), str) else row
                    for row in sample
                )
                for sample in self._samples
            )
        injection.invalidate()

    def detach(self) -> None:
        """Leave the UNet as it was found."""
        injection = None if self._injection is None else self._injection()
        with nullcontext() if injection is None else injection.drawing.undisturbed():
            self._injection, self._samples, self._words = None, (), ()
            if injection is not None:
                injection.remove(self)


def _row(region: TextRegion, text: Tensor) -> CompiledPrompt:
    mask, masks = read_masks(region.mask, region.feather)
    silent = text.new_zeros(1, text.shape[-1])  # of strength 0, so that no layer gets a group for it
    return CompiledPrompt(
        tokens=silent,
        negative=silent,
        scale=0.0,
        profile="linear",
        start=0.0,
        end=1.0,
        mask=mask,
        text=text,
        track=track_of(None, ((0.0, 1.0),), masks, pictures=1, plain=True),
    )
