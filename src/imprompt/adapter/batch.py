"""From compiled prompts to what attention reads: keys, values, masks and factors for one batch layout.

:class:`Batch` is made once for a :class:`~imprompt.adapter.backbones.base.Call` and then written in place: a
new prompt of the same length, a new strength, mask or window changes no tensor object. Keys and values are
computed again only when tokens or weights change; strength, window and curve are one small table, multiplied
once per step for all sites.

Dimensions: S token sequences (first all prompts of one kind, then of the other), T tokens of the longest, C
token width, R batch rows (branches × samples × images × frames), L queries, H heads, D head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from imprompt.adapter.attention import ImageKV
from imprompt.adapter.backbones.base import Branch, Call, Site
from imprompt.adapter.key_value import KeyValue
from imprompt.adapter.lora import FaceLora
from imprompt.adapter.masks import resize_mask
from imprompt.adapter.prompt import CompiledPrompt
from imprompt.adapter.regional import Regional, Regions, project_text
from imprompt.adapter.schedule import Clock, Gate, When
from imprompt.adapter.threads import Prompter
from imprompt.errors import UsageError

Slot: TypeAlias = tuple[CompiledPrompt | None, ...]
"""The g-th prompt of every sample; ``None`` where a sample has fewer."""
_PENALTY_WIDTH = 1280  # of the widest layers of SD1.5 and SDXL: there the penalty modes act in full


@dataclass(frozen=True, eq=False)
class TrainingTokens:
    """Tokens in training: one set for each row of the batch, with the graph kept."""

    tokens: Float[Tensor, "B T C"]
    scale: Float[Tensor, "B"] | float = 1.0


class PromptSource:
    """Base of what sits in a denoiser's injection: adapters and text regions."""

    training: TrainingTokens | None = None
    branches: tuple[Branch, ...] | None = None
    """The layout of the batch, when the user stated it."""
    guidance: tuple[float, float | None] | None = None
    """Guidance scales of image and text, where the image has its own; ``None`` text: the pipeline's."""
    lora: FaceLora | None = None
    prompter: Prompter | None = None
    """Which thread set the prompt, where that matters."""
    _samples: tuple[tuple[CompiledPrompt, ...], ...] = ()

    @property
    def after_block(self) -> bool:
        """See :attr:`imprompt.adapter.attention.ImageKV.after_block`."""
        return False

    @property
    def timed(self) -> bool:
        """Whether tokens are made anew at every timestep; ``CompiledPrompt.tokens`` are features then."""
        return False

    @property
    def token_count(self) -> int:
        """Timed sources: number of tokens that the features of one picture become."""
        return 0

    @property
    def shows_uncond(self) -> bool:
        """Whether the uncond branch has image tokens at all (FLUX InstantX was published without)."""
        return True

    @property
    def uses_text_projection(self) -> bool:
        """Whether its tokens go through the UNet's own text projection (Kolors' FaceID-Plus)."""
        return False

    @property
    def samples(self) -> tuple[tuple[CompiledPrompt, ...], ...]:
        """The prompts of each sample; one sample stands for all, none means that nothing is set."""
        return self._samples

    def begin_run(self, encode_text: Callable[[str], Tensor]) -> None:
        """A drawing begins: encode texts that are words anew."""

    def has_site(self, index: int) -> bool:
        """Whether it has keys and values for the site with published number ``index``."""
        return True

    def key_value(self, index: int) -> KeyValue:
        """The keys and values of the site with published number ``index``."""
        raise NotImplementedError

    def tokens_at(self, features: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timed sources: features ``(S, P, W)`` to tokens ``(S, T, C)`` and the time embedding ``(1, E)``."""
        raise NotImplementedError


def prompt_slots(samples: Sequence[Sequence[CompiledPrompt]]) -> list[Slot]:
    """The g-th prompt of every sample, for each g; samples with fewer have ``None`` there."""
    depth = max((len(prompts) for prompts in samples), default=0)
    return [tuple(prompts[g] if g < len(prompts) else None for prompts in samples) for g in range(depth)]


def split_strength(mode: str, strength: float, width: int) -> tuple[float, float, float]:
    """A strength ``w`` at a site of ``width`` as factors of keys, of the values' mean over tokens, and of the
    output, by a canonical name of ``options.SCALINGS`` (ComfyUI_IPAdapter_plus's "embeds scaling").

    ``v-only``: (K, wV). ``k+v``: (wK, wV). ``k+v-penalty``: the same with w' = w·C/1280.
    ``k+mean-v-penalty``: (w'K, V − V̄ + w'V̄), V̄ the mean over tokens; nothing at w = 0.
    """
    if mode == "v-only":
        return 1.0, 1.0, strength
    if mode == "k+v":
        return strength, 1.0, strength
    less = strength * (width / _PENALTY_WIDTH)
    if mode == "k+v-penalty":
        return less, 1.0, less
    return less, less, float(strength != 0)


@dataclass(frozen=True, eq=False)
class PaddedTokens:
    """Token sequences in one tensor: first all samples of one kind, then of the other."""

    tokens: Float[Tensor, "S T C"]
    bias: Float[Tensor, "S 1 1 T"] | None
    """Added to the logits: -inf where no token is, else the log of a picture's weight."""
    present: Bool[Tensor, "S 1 T 1"] | None
    """Which tokens are there; ``None`` when all are."""

    @classmethod
    def of(
        cls, prompts: Slot, kinds: Sequence[Branch], negated: Sequence[bool], device: torch.device
    ) -> "PaddedTokens":
        """``prompts`` for each of ``kinds``; where ``negated``, cond tokens serve the uncond kind."""
        sequences: list[Tensor | None] = []
        biases: list[Tensor | None] = []
        for kind in kinds:
            for prompt, not_ in zip(prompts, negated, strict=True):
                swapped = kind == "uncond" and not not_
                sequences.append(None if prompt is None else prompt.negative if swapped else prompt.tokens)
                biases.append(None if prompt is None or swapped else prompt.log_weight_bias)
        shown = [sequence for sequence in sequences if sequence is not None]
        lengths = [0 if sequence is None else len(sequence) for sequence in sequences]
        longest = max(lengths)
        padded = [
            shown[0].new_zeros(longest, shown[0].shape[-1])  # an absent prompt has zero tokens and factor 0
            if sequence is None
            else F.pad(sequence.to(device, shown[0].dtype), (0, 0, 0, longest - len(sequence)))
            for sequence in sequences
        ]
        tokens = torch.stack([sequence.to(device) for sequence in padded])
        whole = all(length in (0, longest) for length in lengths)
        if whole and all(bias is None for bias in biases):
            return cls(tokens, None, None)
        bias = torch.zeros(len(sequences), longest)
        for i, (length, logs) in enumerate(zip(lengths, biases, strict=True)):
            if logs is not None:
                bias[i, :length] = logs.cpu()
            if length:
                bias[i, length:] = float("-inf")
        bias = bias[:, None, None, :].to(device)
        return cls(tokens, bias, None if whole else (bias != float("-inf")).transpose(-1, -2))


class MaskGrids:
    """The masks of one slot on each resolution's grid, resized on the device, once for each."""

    def __init__(self, prompts: Slot, picks: Sequence[int], call: Call) -> None:
        self._masks = [None if prompt is None else prompt.mask for prompt in prompts]
        self._picks, self._call = picks, call
        self._made: dict[tuple[int, int], Tensor] = {}

    def at(self, size: tuple[int, int]) -> Float[Tensor, "_ 1 L 1"] | None:
        """The masks on a grid of ``size`` (height, width); ``None`` when there are none."""
        if all(mask is None for mask in self._masks):
            return None
        if size not in self._made:
            device, dtype = self._call.device, self._call.dtype
            whole = torch.ones(1, 1, *size, device=device)
            grids = [whole if m is None else resize_mask(m.to(device), size) for m in self._masks]
            stack = torch.cat(grids).flatten(2)[..., None].to(dtype)
            self._made[size] = stack[list(self._picks)] if len(grids) > 1 else stack
        return self._made[size]

    def at_site(self, site: Site) -> Float[Tensor, "_ 1 L 1"] | None:
        """The masks for a site's queries: where a mask is set, text and reference tokens get none of it."""
        grid = self._call.grid
        mask = self.at(site.size(grid.height, grid.width))
        text = grid.text_tokens if site.kind == "single" else 0
        return mask if mask is None else F.pad(mask, (0, 0, text, grid.reference_tokens))


@dataclass(eq=False)
class _SlotLayout:
    """One slot's prompts, frame by frame, and which of them each batch row sees."""

    prompts: Slot
    picks: list[int]
    """Index into :attr:`prompts` of each row of one branch."""
    whens: list[When]
    """Place in time of each row of one branch."""

    @classmethod
    def of(cls, slot: Slot, call: Call) -> "_SlotLayout":
        if call.samples % len(slot):
            raise UsageError(
                f"prompts are set for {len(slot)} samples, but {call.samples} are drawn; the pipeline's "
                "batch must be a multiple of the number of samples that have prompts."
            )
        each, frames = call.samples // len(slot), call.frames
        if all(prompt is None or prompt.track is None for prompt in slot):
            picks = [m for m in range(len(slot)) for _ in range(each * frames)]
            prompts = slot
        else:
            starts = range(0, len(slot) * frames, frames)
            picks = [m + f for m in starts for _ in range(each) for f in range(frames)]
            prompts = tuple(
                of_frame
                for prompt in slot
                for of_frame in (repeat(None, frames) if prompt is None else prompt.over_frames(frames))
            )
        return cls(prompts, picks, [When() if (p := prompts[i]) is None else p.when for i in picks])


@dataclass(eq=False)
class _Keys:
    """Keys and values of one slot at all its sites, and what they were made of."""

    made_of: tuple[object, ...] = ()
    at: dict[str, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)


class _Acting(NamedTuple):
    """A site where a slot acts."""

    site: Site
    negated: tuple[bool, ...]
    """For each prompt: whether its cond tokens serve the uncond rows here, and the cond rows get none."""
    strengths: tuple[float, ...]
    """For each token sequence."""


class _Timed(NamedTuple):
    """A slot whose keys and values are made anew at each timestep."""

    source: PromptSource
    features: list[Float[Tensor, "N P W"] | None]
    """Of each token sequence: the encoder's features of its N pictures."""
    order: list[int]
    kvs: list[tuple[Site, ImageKV]]

    def write(self, timestep: Float[Tensor, "1"], heads: dict[str, int], dtype: torch.dtype) -> None:
        """Tokens, keys and values for ``timestep``, into the same tensors."""
        given = [features for features in self.features if features is not None]
        tokens, temb = self.source.tokens_at(torch.cat(given), timestep)
        parts = iter(tokens.split([len(features) for features in given]))
        each = [None if features is None else next(parts).flatten(0, 1) for features in self.features]
        longest = max(len(part) for part in each if part is not None)
        padded = torch.stack(
            [
                tokens.new_zeros(longest, tokens.shape[-1])
                if part is None
                else F.pad(part, (0, 0, 0, longest - len(part)))
                for part in each
            ]
        )
        for site, kv in self.kvs:
            key, value = self.source.key_value(site.index)(padded, heads[site.name], dtype, temb[:1])
            kv.key.copy_(key[self.order])
            kv.value.copy_(value[self.order])


class Batch:
    """Everything the sites read, for one layout of the denoiser's batch."""

    def __init__(self, call: Call, sites: Sequence[Site], heads: dict[str, int]) -> None:
        self.call, self.sites, self.heads = call, tuple(sites), heads
        self.image_kvs: dict[str, tuple[ImageKV, ...]] = {}
        self.regional: dict[str, Regional | None] = {}
        self._keys: list[_Keys] = []
        self._timed: list[_Timed] = []
        self._gate: Gate | None = None
        self._strengths: Tensor | None = None
        self._factors: Tensor | None = None

    def update(self, sources: Sequence[PromptSource], text_projection: nn.Module | None) -> None:
        """Take over the sources' prompts, in place where shapes allow."""
        self._projection = text_projection
        training = any(source.training is not None for source in sources)
        made: dict[str, list[ImageKV]] = {site.name: [] for site in self.sites}
        regions, whens, keys = Regions(), list[When](), list[_Keys]()
        found: list[tuple[Site, ImageKV, list[float]]] = []
        self._timed = []
        for source in sources:
            if source.training is not None:
                for site in self._sites_of(source):
                    made[site.name].append(self._training_kv(source, source.training, site))
                continue
            for slot in [] if training else prompt_slots(source.samples):
                layout = _SlotLayout.of(slot, self.call)
                whens += layout.whens * len(self.call.branches)
                keys.append(self._keys[len(keys)] if len(keys) < len(self._keys) else _Keys())
                found += self._slot_kvs(source, layout, regions, keys[-1], len(keys) - 1)
        self._keys = keys
        factors = self._write_factors([row for _, _, row in found], [kv.prompt for _, kv, _ in found], whens)
        for (site, kv, _), factor in zip(found, factors, strict=True):
            made[site.name].append(replace(kv, factor=factor[:, None, None, None]))
        self.image_kvs = {name: tuple(kvs) for name, kvs in made.items()}
        grid = self.call.grid
        self.regional = {x.name: regions.at(x.size(grid.height, grid.width)) for x in self.sites}

    @property
    def gated(self) -> bool:
        """Whether :meth:`step` has anything to do."""
        return self._gate is not None or bool(self._timed)

    def step(self, clock: Clock, timestep: Float[Tensor, "*B"]) -> None:
        """Set the factors for ``timestep``, and make a timed adapter's keys and values for it."""
        if self._gate is not None and self._strengths is not None and self._factors is not None:
            self._gate.update(clock, timestep)
            slots = self._gate.factor.unflatten(0, (len(self._keys), -1))
            torch.mul(self._strengths, slots[self._slot_of], out=self._factors)
        for timed in self._timed:
            timed.write(timestep.reshape(-1)[:1], self.heads, self.call.dtype)

    def _sites_of(self, source: PromptSource) -> list[Site]:
        return [site for site in self.sites if source.has_site(site.index)]

    def _slot_kvs(
        self, source: PromptSource, layout: _SlotLayout, regions: Regions, keys: _Keys, prompt: int
    ) -> list[tuple[Site, ImageKV, list[float]]]:
        """What one slot adds at each site where it acts, with the strength of each row."""
        slot = layout.prompts
        if source.timed:  # of tokens only the number is known before the timestep is
            layout = replace(layout, prompts=tuple(_placeholder(p, source) for p in slot))
        call, prompts = self.call, layout.prompts
        kind_of: list[Branch] = ["uncond" if branch == "text" else branch for branch in call.branches]
        kinds = tuple(dict.fromkeys(kind_of))
        _check_negatives(source, prompts, kinds)
        masks = MaskGrids(prompts, layout.picks * len(kind_of), call)
        speaks = [branch != "uncond" for branch in call.branches for _ in layout.picks]
        regions.add(prompts, layout.picks * len(kind_of), speaks, masks, call.device, call.dtype)
        sites = self._sites_of(source)
        weights = [None if p is None else p.layer_weights(sites) for p in prompts]
        acting: list[_Acting] = []
        for i, site in enumerate(sites):
            negated = tuple(w is not None and w.negated[i] for w in weights)
            strengths = tuple(
                0.0 if w is None or _silent(kind, not_, source) else w.weights[i]
                for kind in kinds
                for w, not_ in zip(weights, negated, strict=True)
            )
            if any(strengths):  # elsewhere the site keeps its own processor, bit for bit
                acting.append(_Acting(site, negated, strengths))
        order = [kinds.index(kind) * len(prompts) + m for kind in kind_of for m in layout.picks]
        self._make_keys(source, layout, kinds, acting, order, keys)
        modes = ["v-only" if p is None else p.scaling for p in prompts] * len(kinds)
        result = []
        for site, _, strengths in acting:
            key, value, bias = keys.at[site.name]
            outside = [split_strength(m, w, site.width)[2] for m, w in zip(modes, strengths, strict=True)]
            norms = source.key_value(site.index).joint_norms
            kv = ImageKV(key, value, bias, masks.at_site(site), None, prompt, source.after_block, norms)
            result.append((site, kv, [outside[i] for i in order]))
        if source.timed and acting:
            features = [_features(p, kind) for kind in kinds for p in slot]
            placed = [None if f is None else f.to(call.device) for f in features]
            self._timed.append(_Timed(source, placed, order, [(site, kv) for site, kv, _ in result]))
        return result

    def _make_keys(
        self,
        source: PromptSource,
        layout: _SlotLayout,
        kinds: tuple[Branch, ...],
        acting: list[_Acting],
        order: list[int],
        keys: _Keys,
    ) -> None:
        """Keys and values of a slot at its sites, unless they were made of the very same already."""
        prompts = layout.prompts
        in_keys = [p.scaling for p in prompts if p is not None and p.scaling != "v-only"]
        made_of = (
            source,
            *(None if p is None else (p.tokens, p.negative, p.log_weight_bias) for p in prompts),
            *(_Same((x.site.name, x.negated, x.strengths if in_keys else None)) for x in acting),
            _Same((tuple(in_keys), kinds, tuple(order))),
        )
        if _identical(made_of, keys.made_of):
            return
        modes = ["v-only" if p is None else p.scaling for p in prompts] * len(kinds)
        padded: dict[tuple[bool, ...], PaddedTokens] = {}
        at: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        for site, negated, strengths in acting:
            if negated not in padded:
                tokens = PaddedTokens.of(prompts, kinds, negated, self.call.device)
                padded[negated] = replace(tokens, tokens=self._projected(source, tokens.tokens))
            stack = padded[negated]
            key, value = self._unscaled(source, site, stack)
            if in_keys:
                key, value = with_strength(key, value, modes, strengths, site.width, stack.present)
            old_key, old_value, old_bias = keys.at.get(site.name, (None, None, None))
            at[site.name] = (
                self._rows(key, order, old_key),
                self._rows(value, order, old_value),
                None if stack.bias is None else self._rows(stack.bias, order, old_bias),
            )
        keys.made_of, keys.at = made_of, at

    def _rows(self, sequences: Tensor, order: list[int], old: Tensor | None) -> Tensor:
        return _written(old, sequences[order].to(self.call.dtype))

    def _unscaled(self, source: PromptSource, site: Site, stack: PaddedTokens) -> tuple[Tensor, Tensor]:
        heads = self.heads[site.name]
        if source.timed:  # written at each step; only the shape matters here
            shape = (len(stack.tokens), heads, stack.tokens.shape[1], site.width // heads)
            empty = torch.zeros(shape, device=self.call.device, dtype=self.call.dtype)
            return empty, empty
        key, value = source.key_value(site.index)(stack.tokens, heads, self.call.dtype)
        return key, value

    def _write_factors(
        self, strengths: list[list[float]], slot_of: list[int], whens: list[When]
    ) -> tuple[Tensor, ...]:
        """One row of factors for every (site, prompt) pair, in one table that is written in place."""
        device, dtype = self.call.device, self.call.dtype
        self._gate = None
        if not strengths:
            return ()
        table = torch.tensor(strengths, dtype=torch.float32).to(device, dtype)
        self._strengths = _written(self._strengths, table)
        self._factors = _written(self._factors, table.clone())
        self._slot_of = torch.tensor(slot_of, device=device)
        if not all(when.always for when in whens):
            self._gate = Gate(whens, device, dtype)
        return self._factors.unbind()

    def _training_kv(self, source: PromptSource, live: TrainingTokens, site: Site) -> ImageKV:
        if live.tokens.shape[0] != self.call.batch:
            raise UsageError(
                f"training tokens are for {live.tokens.shape[0]} rows, the denoiser is called with "
                f"{self.call.batch}."
            )
        tokens = self._projected(source, live.tokens).to(self.call.device)
        key, value = source.key_value(site.index)(tokens, self.heads[site.name], self.call.dtype)
        scale = torch.as_tensor(live.scale, device=self.call.device, dtype=self.call.dtype).reshape(-1)
        return ImageKV(
            key.to(self.call.dtype),
            value.to(self.call.dtype),
            factor=scale.expand(self.call.batch)[:, None, None, None],
            after_block=source.after_block,
            norms=source.key_value(site.index).joint_norms,
        )

    def _projected(self, source: PromptSource, tokens: Float[Tensor, "S T E"]) -> Float[Tensor, "S T C"]:
        return project_text(self._projection if source.uses_text_projection else None, tokens)


@dataclass(frozen=True)
class _Same:
    """A value that :func:`_identical` compares by equality instead of by identity."""

    value: object


def _identical(one: object, other: object) -> bool:
    """Whether two nested tuples hold the same objects (tensors are compared by identity, never by value)."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_identical, one, other))
    if isinstance(one, _Same) and isinstance(other, _Same):
        return one == other
    return one is other


def _written(old: Tensor | None, new: Tensor) -> Tensor:
    """``new``, in the memory of ``old`` where that has its shape: who holds it sees the new values."""
    if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new
    return old.copy_(new)


def _features(prompt: CompiledPrompt | None, kind: Branch) -> Tensor | None:
    """A timed source's features ``(N, P, W)`` of a prompt's pictures, or of its negative."""
    if prompt is None:
        return None
    shown = prompt.negative if kind == "uncond" else prompt.tokens
    return None if shown is None else shown.unflatten(0, (prompt.pictures, -1))


def _placeholder(prompt: CompiledPrompt | None, source: PromptSource) -> CompiledPrompt | None:
    """The prompt with zeros in place of the tokens that its features will become."""
    if prompt is None:
        return None
    tokens = prompt.tokens.new_zeros(prompt.pictures * source.token_count, 1)
    return replace(prompt, tokens=tokens, negative=None if prompt.negative is None else tokens)


def _silent(kind: Branch, negated: bool, source: PromptSource) -> bool:
    """Whether rows of this kind get nothing: cond rows where the image is to be avoided, else the rule's."""
    return negated if kind == "cond" else not source.shows_uncond


def _check_negatives(source: PromptSource, prompts: Slot, kinds: Sequence[Branch]) -> None:
    if (
        "uncond" in kinds
        and source.shows_uncond
        and any(p is not None and p.negative is None for p in prompts)
    ):
        raise UsageError(
            "guidance needs the image prompt's negative tokens, which bare features of this variant cannot "
            "give: pass negative= (the encoder's features of an all-zero input), or a picture."
        )


def with_strength(
    key: Float[Tensor, "S H T D"],
    value: Float[Tensor, "S H T D"],
    modes: Sequence[str],
    strengths: Sequence[float],
    width: int,
    present: Bool[Tensor, "S 1 T 1"] | None,
) -> tuple[Float[Tensor, "S H T D"], Float[Tensor, "S H T D"]]:
    """Keys and values with the part of the strength that acts inside the softmax, each in its own mode."""
    pairs = [split_strength(mode, w, width)[:2] for mode, w in zip(modes, strengths, strict=True)]
    in_key, in_mean = key.new_tensor(pairs).unbind(1)
    there = torch.ones_like(value[:, :1, :, :1]) if present is None else present.to(value.dtype)
    mean = (value * there).sum(-2, keepdim=True) / there.sum(-2, keepdim=True).clamp_min(1)
    return key * in_key[:, None, None, None], value + (in_mean - 1)[:, None, None, None] * mean
