"""Regional text prompts: several texts in one picture, each inside its own mask.

:class:`TextRegions` is attached like an adapter, beside others or alone; :mod:`imprompt.adapter.regional`
reads the texts. A region with a picture is an ``ImagePrompt`` with ``mask`` and ``text``. Where masks
overlap, both kinds share the place.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imprompt.adapter.frames import track_of
from imprompt.adapter.injection import Injection, find_denoiser
from imprompt.adapter.masks import read_masks
from imprompt.adapter.prompt import CompiledPrompt
from imprompt.adapter.source import PromptSource
from imprompt.errors import AdapterMismatch, UsageError
from imprompt.schema.prompt import TextRegion


class TextRegions(PromptSource):
    """Regional texts on a diffusers pipeline (or a bare UNet, which takes embeddings only).

    At every query ``text = (1 − Σ sᵢ) · A(q, prompt) + Σ sᵢ · A(q, textᵢ)``: outside all masks the prompt is
    read bit for bit as without, and the uncond rows always are.
    """

    def attach(self, target: object) -> "TextRegions":
        """Attach to the pipeline that you will call. Raises :class:`AdapterMismatch` if it has no UNet,
        :class:`UsageError` while attached to another UNet."""
        found = find_denoiser(target)
        if found is None or found[0].name != "unet":
            raise AdapterMismatch(f"regional texts need a diffusers UNet; {type(target).__name__} has none.")
        unet = found[1]
        if self.injection is not None and not self.injection.serves(unet):
            raise UsageError("these regions are attached to another UNet; detach() them first.")
        self._enter(Injection.into(unet, None if isinstance(target, nn.Module) else target))
        self._target = weakref.ref(target)
        return self

    def set(self, regions: Sequence[TextRegion]) -> None:
        """Set the regions for all samples; an empty list removes them.

        Raises :class:`UsageError` before :meth:`attach`, :class:`InputError` for an invalid or empty mask;
        the previous regions are kept then.
        """
        self.set_batch([regions])

    def set_batch(self, samples: Sequence[Sequence[TextRegion]]) -> None:
        """Set the regions of each sample; the pipeline's batch must be a multiple of their number. Raises as
        :meth:`set`."""
        if not all(_is_list_of(part, TextRegion) for part in samples):
            raise UsageError("regions: a list of TextRegion is expected (set_batch: one such list a sample).")
        injection = self.injection
        if injection is None:
            raise UsageError("attach() the regions to a pipeline first, which encodes their words.")
        with torch.inference_mode(False), torch.no_grad():
            rows = tuple(
                tuple(_row(region, injection.encode_text(region.text)) for region in regions)
                for regions in samples
            )
        with self._undisturbed():
            self._samples = rows if any(rows) else ()
            self._invalidate()

    def detach(self) -> None:
        """Detach from the UNet, which is restored."""
        with self._undisturbed():
            self._samples, self._target = (), None
            self._leave()


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(part, kind) for part in value)


def _row(region: TextRegion, text: Tensor) -> CompiledPrompt:
    mask, masks = read_masks(region.mask, region.feather)
    silent = text.new_zeros(1, text.shape[-1])  # of strength 0, so that no layer gets a group for it
    return CompiledPrompt(
        tokens=silent,
        negative=silent,
        scale=0.0,
        mask=mask,
        words=region.text if isinstance(region.text, str) else None,
        text=text,
        track=track_of(None, ((0.0, 1.0),), masks, pictures=1, plain=True),
    )
