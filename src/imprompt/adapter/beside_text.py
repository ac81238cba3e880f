"""Image tokens among the text's: FLUX Redux, whose tokens the base reads as it reads text.

They are appended to the text that a transformer with joint attention is called with. All of the base reads
them: a prompt has no strength at a single layer. Its strength is a bias of its tokens' logits,
``log(scale)``, as in ComfyUI's StyleModelApply: scale 1 is FLUX Redux as published, 0 no picture. A mask is
a bias as well: the picture's tokens read a masked prompt inside the mask, and the text as much as where it
is darkest, so that it does not carry the prompt elsewhere.

Dimensions: R batch rows, T image tokens, P tokens of the drawn picture, X all of a call, C token width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.backbones.base import Call
from imprompt.adapter.schedule import Clock, Gate
from imprompt.adapter.slots import Slot, padded, prompt_slots, surrounded
from imprompt.adapter.source import PromptSource


@dataclass(frozen=True, eq=False)
class _Part:
    """The tokens of one prompt of every sample."""

    tokens: Float[Tensor, "R T C"]
    bias: Float[Tensor, "R 1 1 T"]
    """Of their logits, without windows, curves and masks."""
    gate: Gate | None
    """Windows and curves."""
    queries: Float[Tensor, "R 1 Y 1"] | None
    """Masks: a factor for the text's queries, and one for each of the image's."""

    @classmethod
    def of(cls, slot: Slot) -> "_Part":
        """The tokens of a slot and what steers them."""
        call = slot.call
        tokens, bias = _stacked(slot)
        whens = [slot.prompts[row].when for row in slot.rows]
        always = all(when.always for when in whens)
        gate = None if always else Gate(whens, call.device, call.dtype)
        mask = slot.mask((call.grid.height, call.grid.width))
        if mask is not None:  # first the text's factor, then the image's
            mask = surrounded(mask.expand(call.batch, -1, -1, -1), 1, call.grid.reference_tokens)
        return cls(tokens, bias, gate, mask)

    @property
    def plain(self) -> bool:
        """Whether its logits have no bias."""
        return self.gate is None and self.queries is None and not bool(self.bias.any())

    def at(self, text: int, count: int) -> Float[Tensor, "R 1 _ T"]:
        """The bias for one query or for all: of a text of that length, ``count`` tokens, and the image."""
        bias = self.bias
        if self.gate is not None:
            bias = bias + self.gate.factor.log()[:, None, None, None]
        if self.queries is None:
            return bias
        of_text, of_image = self.queries[:, :, :1], self.queries[:, :, 1:]
        own = torch.ones_like(of_text).expand(-1, -1, count, -1)
        return bias + torch.cat([of_text.expand(-1, -1, text, -1), own, of_image], dim=2).log()


class BesideText:
    """The tokens of all prompts of one batch layout, and how each row reads them."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = tuple(parts)
        self._tokens = torch.cat([part.tokens for part in parts], dim=1)
        self._plain = all(part.plain for part in parts)
        self._bias: Tensor | None = None

    @classmethod
    def of(cls, sources: Sequence[PromptSource], call: Call) -> "BesideText | None":
        """The tokens of all sources that stand among the text's; ``None`` if no row reads any."""
        slots = (
            Slot(prompts, call)
            for source in sources
            if source.beside_text
            for prompts in prompt_slots(source.samples)
        )
        parts = [part for part in map(_Part.of, slots) if part.tokens.shape[1]]
        return cls(parts) if parts else None

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self._tokens.shape[1]

    @property
    def gated(self) -> bool:
        """Whether :meth:`step` has anything to do."""
        return any(part.gate is not None for part in self._parts)

    def step(self, clock: Clock, timestep: Float[Tensor, "*B"]) -> None:
        """Set the windows' and curves' factors for ``timestep``."""
        for part in self._parts:
            if part.gate is not None:
                part.gate.update(clock, timestep)

    def into(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the denoiser's call, by name, with the tokens behind the text's."""
        call = dict(given)
        text, latents, ids = call["encoder_hidden_states"], call["hidden_states"], call["txt_ids"]
        call["encoder_hidden_states"] = torch.cat([text, self._tokens.to(text)], dim=1)
        call["txt_ids"] = F.pad(ids, (0, 0, 0, self.count))  # the text's are zeros as well
        if not self._plain:
            if self._bias is None or self.gated:
                self._bias = self._whole_bias(text.shape[1], latents.shape[1]).to(text.dtype)
            given = call.get("joint_attention_kwargs") or {}
            call["joint_attention_kwargs"] = {**given, "attention_mask": self._bias}
        return call

    def _whole_bias(self, text: int, image: int) -> Float[Tensor, "R 1 _ X"]:
        """The bias of all logits, for a text of that length and so many tokens of the image."""
        biases = [part.at(text, self.count) for part in self._parts]
        queries = max(bias.shape[2] for bias in biases)
        joined = torch.cat([bias.expand(-1, -1, queries, -1) for bias in biases], dim=-1)
        return F.pad(joined, (text, image))


def _stacked(slot: Slot) -> tuple[Float[Tensor, "R T C"], Float[Tensor, "R 1 1 T"]]:
    """Each row's tokens and the bias of their logits; uncond rows, and prompts that never act, have none."""
    shown = [(prompt, branch == "cond" and prompt.acts) for prompt, branch in slot.sequences]
    device = slot.call.device
    tokens, shares = padded(
        [(prompt.tokens if acts else prompt.tokens[:0]).to(device) for prompt, acts in shown],
        [prompt.log_weight_bias if acts else None for prompt, acts in shown],
    )
    scales = torch.tensor([prompt.scale if acts else 0.0 for prompt, acts in shown], device=device)
    bias = scales.log()[:, None, None, None].expand(-1, 1, 1, tokens.shape[1])
    bias = bias if shares is None else bias + shares
    return slot.of_sequences(tokens).to(slot.call.dtype), slot.of_sequences(bias).to(slot.call.dtype)
