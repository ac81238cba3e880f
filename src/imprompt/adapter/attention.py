"""Decoupled cross-attention (Ye et al. 2023, eq. 5): the formula, and what the backbones' processors share.

``out = SDPA(q, K_text, V_text) + Σ_p factor_p · mask_p · SDPA(q, K_p, V_p)``, before or after the site's
output projection as the backbone says. ``factor`` is strength × window × curve of each batch row; it lives
outside the softmax, so that a new strength needs no new keys. :class:`ImageKV` is one term of the sum and the
readable form, :class:`JointKV` several terms at once. Tensors are made by
:mod:`imprompt.adapter.batch` and stay the same objects while their shapes do, so that compiled models see no
change.

Dimensions: B batch rows (branches × samples × frames), H heads, L queries, T tokens, D head width, C token
width, P prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.backbones.base import Site
from imprompt.errors import UsageError

Projection: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class ImageKV:
    """Keys and values of one image prompt at one site, for every row of the batch."""

    key: Float[Tensor, "B H T D"]
    value: Float[Tensor, "B H T D"]
    bias: Float[Tensor, "B 1 1 T"] | None = None
    """Added to the logits: -inf for padding, else the log of a picture's weight."""
    mask: Float[Tensor, "_ 1 L 1"] | None = None
    factor: Float[Tensor, "B 1 _ 1"] | None = None
    """Strength of each row at the present step, written in place before every call; ``None`` is 1. Where it
    is the same at all steps, the mask is in it."""
    prompt: int = 0
    """Number of the prompt, counted over all adapters."""
    after_block: bool = False
    """Added to the image stream after the transformer block instead of inside its attention (FLUX, XLabs)."""
    norms: "JointNorms | None" = None
    """SD3.5: the adapter's own norms of raw queries and image keys, which its attention reads as well."""

    @property
    def parts(self) -> tuple["ImageKV", ...]:
        """The prompts one by one, as a :class:`JointKV` has several."""
        return (self,)

    @property
    def gain(self) -> Float[Tensor, "_ 1 _ 1"] | None:
        """What the attention over the image tokens is multiplied by, mask and factor; ``None`` is 1."""
        if self.mask is None or self.factor is None:
            return self.factor if self.mask is None else self.mask
        return self.mask * self.factor  # small: without heads and their width

    def attend(self, query: Float[Tensor, "B H L D"]) -> Float[Tensor, "B H L D"]:
        """Attention over the image tokens alone, without :attr:`gain`."""
        return F.scaled_dot_product_attention(query, self.key, self.value, attn_mask=self.bias)

    def add_to(
        self, out: Float[Tensor, "B H L D"], image: Float[Tensor, "B H L D"]
    ) -> Float[Tensor, "B H L D"]:
        """``out + gain · image``, in place unless gradients are recorded."""
        gain = self.gain
        if torch.is_grad_enabled():  # SDPA's backward needs its output unchanged
            return out + (image if gain is None else image * gain.clone())  # the next step overwrites it
        return out.add_(image) if gain is None else out.addcmul_(image, gain)


@dataclass(frozen=True, eq=False, slots=True)
class JointKV:
    """Several image prompts of equally many tokens at one site, read in two products for all of them.

    Keys come first in the scores, so that each prompt's softmax over its few tokens runs along the queries.
    """

    key: Tensor
    """Of all prompts in turn, divided by √D: ``B H (P·T) D``."""
    value: Tensor
    """Likewise, not divided."""
    parts: tuple[ImageKV, ...]
    mask: Float[Tensor, "_ 1 P 1 L"] | None
    factor: Float[Tensor, "B 1 P 1 _"]
    """As those of :class:`ImageKV`."""

    @property
    def after_block(self) -> bool:
        """See :attr:`ImageKV.after_block`; the same for all prompts."""
        return self.parts[0].after_block

    def attend(self, query: Float[Tensor, "B H L D"]) -> Tensor:
        """What :meth:`add_to` adds: the sum of all prompts' attention, each times its mask and factor."""
        scores = self.key @ query.transpose(-1, -2)
        shares = shares_of(scores.unflatten(2, (len(self.parts), -1)), self.gain)
        return shares.flatten(2, 3).transpose(-1, -2) @ self.value

    def add_to(self, out: Float[Tensor, "B H L D"], image: Tensor) -> Float[Tensor, "B H L D"]:
        """``out`` plus the sum, in place unless gradients are recorded."""
        return out + image if torch.is_grad_enabled() else out.add_(image)

    @property
    def gain(self) -> Float[Tensor, "B 1 P 1 _"]:
        """What the shares are multiplied by, mask and factor."""
        return self.factor if self.mask is None else self.mask * self.factor


def shares_of(scores: Float[Tensor, "... T L"], gain: Tensor) -> Float[Tensor, "... T L"]:
    """Softmax over each prompt's tokens, times ``gain``."""
    shares = scores.softmax(-2)
    return shares * gain.clone() if torch.is_grad_enabled() else shares.mul_(gain)


class FoldedKV(JointKV):
    """The same with all heads in one matrix, ``B (H·P·T) (H·D)``: keys and values of a head stand in its own
    columns and are 0 elsewhere. H times the work, but as one large product, which a CPU does faster where
    tokens are few.
    """

    __slots__ = ()

    def attend(self, query: Float[Tensor, "B H L D"]) -> Tensor:
        """What :meth:`add_to` adds: the shares of all tokens, ``B (H·P·T) L``."""
        scores = self.key @ query.transpose(1, 2).flatten(2).transpose(1, 2)
        scores = scores.unflatten(1, (query.shape[1], len(self.parts), -1))
        return shares_of(scores, self.gain).flatten(1, 3)

    def add_to(self, out: Float[Tensor, "B H L D"], image: Tensor) -> Float[Tensor, "B H L D"]:
        """``out`` plus the shares' values, in place unless gradients are recorded."""
        flat, shares = out.transpose(1, 2).flatten(2), image.transpose(1, 2)
        if torch.is_grad_enabled():
            flat = torch.baddbmm(flat, shares, self.value)
        else:
            flat.baddbmm_(shares, self.value)
        return flat.unflatten(2, (out.shape[1], -1)).transpose(1, 2)


@dataclass(frozen=True, eq=False, slots=True)
class JointNorms:
    """RMS norms over the head width that an SD3.5 adapter brings for a site."""

    query: Float[Tensor, " D"]
    key: Float[Tensor, " D"]


class SiteProcessor:
    """Base of the processors: knows the one it replaces, and the image prompts of its site.

    Without image prompts it calls the previous processor, so that an empty prompt changes nothing.
    """

    def __init__(self, previous: Any = None, injection: Any = None, site: Site | None = None) -> None:
        if injection is None or site is None:  # diffusers makes processors anew, of the class that it finds
            raise UsageError(
                "load_ip_adapter() and unload_ip_adapter() change diffusers' own adapters, and one of "
                "imprompt is attached: detach() it first."
            )
        self.previous = previous
        self.injection = injection
        self.site = site
        self.image_kvs: tuple[ImageKV | JointKV, ...] = ()
        self.regional: Any = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to add."""
        return len(self.image_kvs) == 0 and self.regional is None  # `not` on a tuple breaks a compiled graph

    def add_images(
        self,
        out: Float[Tensor, "B H L D"],
        attend: Callable[[Any], Tensor],
        project: Projection | None = None,
        beside: Float[Tensor, "B L C"] | None = None,
        kvs: tuple[ImageKV | JointKV, ...] | None = None,
    ) -> Float[Tensor, "B H L D"]:
        """``out`` plus the attention of every image prompt (or of ``kvs``) as ``attend`` computes it.

        ``project`` brings a contribution to the residual stream and ``beside`` is the base's own attention
        there, by default the projected ``out``; both are read by a recorder only.
        """
        kvs = self.image_kvs if kvs is None else kvs
        recorder = self.injection.recorder
        if recorder is not None:
            recorder.note(self.site, kvs, attend, out, project, beside)
        for kv in kvs:
            out = kv.add_to(out, attend(kv))
        return out


def split_heads(x: Float[Tensor, "B T HD"], heads: int) -> Float[Tensor, "B H T D"]:
    """Heads apart: ``(B, T, H·D)`` to ``(B, H, T, D)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T HD"]:
    """The inverse of :func:`split_heads`."""
    return x.transpose(1, 2).flatten(2)


def normed_key_value(attn: Any, states: Float[Tensor, "B T C"]) -> tuple[Tensor, Tensor]:
    """A UNet attention's key and value of ``states``, ``(B, H, T, D)``, by its own modules, so that LoRAs and
    offloading apply."""
    key, value = split_heads(attn.to_k(states), attn.heads), split_heads(attn.to_v(states), attn.heads)
    return key if attn.norm_k is None else attn.norm_k(key), value


def cross_key_value(attn: Any, text: Float[Tensor, "B T C"]) -> tuple[Tensor, Tensor]:
    """The same of a text, under the norm that the attention has for texts, if any."""
    return normed_key_value(attn, attn.norm_encoder_hidden_states(text) if attn.norm_cross else text)


def query_key_value(attn: Any, states: Float[Tensor, "B L C"]) -> tuple[Tensor, Tensor, Tensor]:
    """The base's query, key and value of its image stream, before norms, ``(B, L, H·D)``."""
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(states).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(states), attn.to_k(states), attn.to_v(states)


def text_query_key_value(attn: Any, text: Float[Tensor, "B T C"]) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a joint attention's text stream, ``(B, T, H·D)``."""
    if getattr(attn, "fused_projections", False) and hasattr(attn, "to_added_qkv"):
        query, key, value = attn.to_added_qkv(text).chunk(3, dim=-1)
        return query, key, value
    return attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
