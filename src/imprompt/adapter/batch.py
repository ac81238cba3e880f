"""Tensors that the attention reads: keys, values, masks and factors of all prompts for one batch layout.

A :class:`Batch` is made once per :class:`~imprompt.adapter.backbones.base.Call` and then written in place: a
new prompt of the same length, or a new strength, mask or window, changes no tensor object. Keys and values
are computed again only if tokens or weights change. Strength, window and curve are one small table,
multiplied once per step for all sites.

Dimensions: S token sequences, T tokens of the longest, C token width, R batch rows (branches × samples ×
images × frames), H heads, D head width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from imprompt.adapter.attention import ImageKV, JointKV
from imprompt.adapter.backbones.base import Call, Site
from imprompt.adapter.beside_text import BesideText
from imprompt.adapter.gathered import GatheredKV, Places
from imprompt.adapter.joint import JointKeys, form_of, group_of, joint_mask, parties, same_objects, written
from imprompt.adapter.prompt import CompiledPrompt
from imprompt.adapter.regional import Regional, Regions, project_text
from imprompt.adapter.scaling import split_strength
from imprompt.adapter.schedule import Clock, Gate, When
from imprompt.adapter.slots import Slot, SlotSite, padded, prompt_slots
from imprompt.adapter.source import PromptSource, TrainingTokens
from imprompt.errors import UsageError
from imprompt.weights import moved


@dataclass(eq=False)
class _Keys:
    """Keys, values and biases of one slot at all its sites, and what they were made of."""

    at: dict[str, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)
    parts: tuple[object, ...] = ()
    settings: tuple[object, ...] = ()

    def made_of(self, parts: tuple[object, ...], settings: tuple[object, ...]) -> bool:
        """Whether they were made of the same objects (never compared by value) and equal settings."""
        return same_objects(self.parts, parts) and self.settings == settings


class _Added(NamedTuple):
    """The contribution of one slot at one site."""

    at: SlotSite
    kv: ImageKV
    strengths: list[float]
    """Strength of each row, outside the softmax."""

    @property
    def group(self) -> tuple[object, ...]:
        """The same for contributions that may be read together."""
        return self.at.site.name, *group_of(self.kv)


class _Timed(NamedTuple):
    """A slot whose keys and values are made anew at each timestep."""

    source: PromptSource
    slot: Slot
    added: list[_Added]
    features: Float[Tensor, "N P W"]
    """Of the pictures of all sequences, on the device of the call."""
    pictures: list[int]
    """Number of pictures of each sequence."""

    @classmethod
    def of(cls, source: PromptSource, slot: Slot, added: list[_Added]) -> "_Timed":
        """Bring the features to the device, once for all steps."""
        features = [
            _tokens(prompt, negative=branch == "uncond").unflatten(0, (prompt.pictures, -1))
            for prompt, branch in slot.sequences
        ]
        whole = torch.cat([each.to(slot.call.device) for each in features])
        return cls(source, slot, added, whole, [len(each) for each in features])

    def write(self, timestep: Float[Tensor, "1"], heads: dict[str, int]) -> None:
        """Write tokens, keys and values for ``timestep`` into the same tensors."""
        slot, call = self.slot, self.slot.call
        tokens, temb = self.source.tokens_at(self.features, timestep)
        sets = tokens.split(self.pictures)
        stack = pad_sequence([each.flatten(0, 1) for each in sets], batch_first=True)
        for at, kv, _ in self.added:
            module = self.source.key_value(at.site.index)
            made = module(stack, heads[at.site.name], call.dtype, temb[:1])
            key, value = map(slot.of_sequences, made)
            key, value = slot.scaled(key, value, kv.bias, at)
            kv.key.copy_(key)
            kv.value.copy_(value)


class _Factors:
    """The strength of each row for every (site, prompt) pair at the present step, written in place."""

    def __init__(self) -> None:
        self._strengths: Tensor | None = None
        self._factors: Tensor | None = None
        self.gate: Gate | None = None

    def set(
        self, strengths: list[list[float]], prompts: list[int], whens: list[When], call: Call
    ) -> Float[Tensor, "P R"]:
        """The factors of each pair: its strengths, at all times if no prompt has a window or curve.

        ``prompts`` is the number of each pair's prompt, ``whens`` has the rows of all prompts in turn.
        """
        self.gate = None
        table = moved(torch.tensor(strengths, dtype=torch.float32).to(call.dtype), call.device)
        self._strengths = written(self._strengths, table)
        self._factors = written(self._factors, table.clone())
        if not all(when.always for when in whens):
            self._prompts = moved(torch.tensor(prompts), call.device)
            self.gate = Gate(whens, call.device, call.dtype, len(whens) // table.shape[1])
        return self._factors

    def step(self, clock: Clock, timestep: Float[Tensor, "*B"]) -> None:
        """Multiply the strengths with windows and curves at ``timestep``."""
        if self.gate is not None and self._strengths is not None:
            self.gate.update(clock, timestep)
            rows = self.gate.factor.unflatten(0, (-1, self._strengths.shape[1]))
            torch.mul(self._strengths, rows[self._prompts], out=self._factors)


class Batch:
    """Everything the sites read, for one layout of the denoiser's batch."""

    def __init__(self, call: Call, sites: Sequence[Site], heads: dict[str, int]) -> None:
        self.key, self.sites, self.heads = call, tuple(sites), heads
        self.call = call
        """The layout, with the tokens that stand among the text's; ``key`` is without them."""
        self.beside_text: BesideText | None = None
        self.image_kvs: dict[str, tuple[ImageKV | JointKV, ...]] = {}
        self.regional: dict[str, Regional | None] = {}
        self._keys: list[_Keys] = []
        self._timed: list[_Timed] = []
        self._factors = _Factors()
        self._gains: dict[tuple[str, int], Tensor] = {}
        """Masks times factors, by site and (first) prompt."""
        self._places: dict[tuple[int, ...], tuple[Tensor | None, Places | None]] = {}
        """What sites of one size have in common during an update: masks side by side, and where they act."""
        self._joint: dict[tuple[str, int], JointKeys] = {}
        """Keys and values of several prompts, by site and first prompt."""

    def update(self, sources: Sequence[PromptSource], text_projection: nn.Module | None) -> None:
        """Read the sources' prompts, in place if shapes allow. While one is trained, only its tokens are
        used."""
        self._projection = text_projection
        training = [(source, source.training) for source in sources if source.training is not None]
        self.beside_text = None if training else BesideText.of(sources, self.key)
        self.call = _lengthened(self.key, self.beside_text)
        slots = [] if training else _slots(sources, self.call)
        made: dict[str, list[ImageKV | JointKV]] = {site.name: [] for site in self.sites}
        for site, kv in (*self._training_kvs(training), *self._prompt_kvs(slots)):
            made[site.name].append(kv)
        self.image_kvs = {name: tuple(kvs) for name, kvs in made.items()}
        regions, grid = Regions([slot for _, slot in slots]), self.call.grid
        self.regional = {x.name: regions.at(x.size(grid.height, grid.width)) for x in self.sites}

    @property
    def gated(self) -> bool:
        """Whether :meth:`step` has anything to do."""
        beside = self.beside_text is not None and self.beside_text.gated
        return self._factors.gate is not None or bool(self._timed) or beside

    def step(self, clock: Clock, timestep: Float[Tensor, "*B"]) -> None:
        """Set the factors for ``timestep``, and make a timed adapter's keys and values for it."""
        self._factors.step(clock, timestep)
        if self.beside_text is not None:
            self.beside_text.step(clock, timestep)
        for timed in self._timed:
            timed.write(timestep.reshape(-1)[:1], self.heads)

    def _prompt_kvs(self, slots: list[tuple[PromptSource, Slot]]) -> Iterator[tuple[Site, ImageKV | JointKV]]:
        """The contributions of all slots, with their factors."""
        added = self._all_added(slots)
        if not added:
            self._factors.gate = None
            return
        added.sort(key=lambda each: each.group)  # the factors of a group are rows side by side
        groups = [list(group) for _, group in groupby(added, lambda each: each.group)]
        factors = self._factors.set(
            [each.strengths for each in added],
            [each.kv.prompt for each in added],
            [slot.prompts[row].when for _, slot in slots for row in slot.rows],
            self.call,
        )
        earlier, self._joint = self._joint, {}
        for group, of_group in zip(groups, factors.split([len(group) for group in groups]), strict=True):
            site, kvs = group[0].at.site, [each.kv for each in group]
            for party in parties(kvs):
                yield site, self._read_together(site, kvs[party], of_group[party], earlier)
        self._places.clear()

    def _all_added(self, slots: list[tuple[PromptSource, Slot]]) -> list[_Added]:
        """The contributions of all slots, without their factors."""
        self._keys = [*self._keys[: len(slots)], *(_Keys() for _ in slots[len(self._keys) :])]
        self._timed = []
        added = list[_Added]()
        for number, (source, slot) in enumerate(slots):
            _check_negatives(source, slot)
            of_slot = self._added(source, slot, number)
            if source.timed and of_slot:
                self._timed.append(_Timed.of(source, slot, of_slot))
            added += of_slot
        return added

    def _read_together(
        self,
        site: Site,
        kvs: list[ImageKV],
        factors: Float[Tensor, "P R"],
        earlier: dict[tuple[str, int], JointKeys],
    ) -> ImageKV | JointKV:
        """One contribution of one or several prompts, with their factors."""
        kvs = [replace(kv, factor=row[:, None, None, None]) for kv, row in zip(kvs, factors, strict=True)]
        form = form_of(kvs)
        if form is None:
            (kv,) = kvs
            mask, factor = self._gain(site, kv.prompt, kv.mask, factors[0, :, None, None, None])
            return replace(kv, mask=mask, factor=factor)
        mask, places = self._masks_and_places([kv.mask for kv in kvs])
        if form is not JointKV:
            places = None
        if places is not None:
            form, mask = GatheredKV, places.mask
        place, made_of = (site.name, kvs[0].prompt), [self._keys[kv.prompt].parts for kv in kvs]
        keys = self._joint[place] = JointKeys.of(form, kvs, made_of, earlier.get(place))
        gain = self._gain(site, kvs[0].prompt, mask, factors.t()[:, None, :, None, None])
        read = keys.key, keys.value, tuple(kvs), *gain
        return form(*read) if places is None else GatheredKV(*read, places)

    def _masks_and_places(self, masks: list[Tensor | None]) -> tuple[Tensor | None, Places | None]:
        """The masks side by side and their places, made once for all sites that have the same ones."""
        same = tuple(map(id, masks))  # they live as long as the contributions of this update
        if same not in self._places:
            joint = joint_mask(masks)
            places = None if self.call.steady else Places.of(joint, self.call.batch)
            self._places[same] = joint, places
        return self._places[same]

    def _gain(
        self, site: Site, prompt: int, mask: Tensor | None, factor: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Mask and factor; where neither changes at any step, only a factor that has the mask in it."""
        if mask is None or self._factors.gate is not None or self.call.steady:
            return mask, factor
        place = site.name, prompt
        self._gains[place] = written(self._gains.get(place), mask * factor)
        return None, self._gains[place]

    def _added(self, source: PromptSource, slot: Slot, number: int) -> list[_Added]:
        """The contribution of one slot at each site where it acts."""
        sites, keys = list(slot.acting(source, source.sites_of(self.sites))), self._keys[number]
        self._make_keys(source, slot, sites, keys)
        modes = [prompt.scaling for prompt, _ in slot.sequences]
        added = []
        for at in sites:
            site, pairs = at.site, zip(modes, at.strengths, strict=True)
            outside = [split_strength(mode, strength, site.width)[2] for mode, strength in pairs]
            norms = source.key_value(site.index).joint_norms
            kv = ImageKV(*keys.at[site.name], slot.site_mask(site), None, number, source.after_block, norms)
            added.append(_Added(at, kv, [outside[i] for i in slot.order]))
        return added

    def _make_keys(self, source: PromptSource, slot: Slot, sites: list[SlotSite], keys: _Keys) -> None:
        """Make the keys and values of a slot at its sites, unless nothing they depend on has changed."""
        parts, settings = _ingredients(source, slot, sites)
        if keys.made_of(parts, settings):
            return
        stacks: dict[tuple[bool, ...], tuple[Tensor, Tensor | None]] = {}
        made: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        for at in sites:
            if at.negated not in stacks:
                stacks[at.negated] = self._stack(source, slot, at.negated)
            tokens, bias = stacks[at.negated]
            bias = None if bias is None else slot.of_sequences(bias).to(self.call.dtype)
            key, value = map(slot.of_sequences, self._key_value(source, at.site, tokens))
            key, value = slot.scaled(key, value, bias, at)
            old = keys.at.get(at.site.name, (None, None, None))
            made[at.site.name] = (
                written(old[0], key.to(self.call.dtype)),
                written(old[1], value.to(self.call.dtype)),
                None if bias is None else written(old[2], bias),
            )
        keys.at, keys.parts, keys.settings = made, parts, settings

    def _stack(
        self, source: PromptSource, slot: Slot, negated: Sequence[bool]
    ) -> tuple[Float[Tensor, "S T C"], Float[Tensor, "S 1 1 T"] | None]:
        """A slot's token sequences, padded, and the bias of their logits."""
        sequences, biases = [], []
        for (prompt, branch), not_ in zip(slot.sequences, negated, strict=True):
            negative = branch == "uncond" and not not_
            tokens = _tokens(prompt, negative=negative)
            if source.timed:  # only their number is known before the timestep is
                tokens = tokens.new_zeros(prompt.pictures * source.token_count, 1)
            sequences.append(tokens.to(self.call.device))
            biases.append(None if negative else prompt.log_weight_bias)
        tokens, bias = padded(sequences, biases)
        return self._projected(source, tokens), bias

    def _key_value(self, source: PromptSource, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.heads[site.name]
        if source.timed:  # written at each step; only the shape matters here
            shape = (len(tokens), heads, tokens.shape[1], site.width // heads)
            empty = torch.zeros(shape, device=self.call.device, dtype=self.call.dtype)
            return empty, empty
        key, value = source.key_value(site.index)(tokens, heads, self.call.dtype)
        return key, value

    def _training_kvs(
        self, training: list[tuple[PromptSource, TrainingTokens]]
    ) -> Iterator[tuple[Site, ImageKV]]:
        """The contributions of tokens in training, of which each row of the batch has its own."""
        device, dtype, rows = self.call.device, self.call.dtype, self.call.batch
        for source, live in training:
            if live.tokens.shape[0] != rows:
                given = live.tokens.shape[0]
                raise UsageError(f"training tokens are for {given} rows, the denoiser is called with {rows}.")
            tokens, scale = self._projected(source, live.tokens).to(device), live.scale
            if not isinstance(scale, Tensor):  # written on the device: no CUDA graph could hold a copy to it
                scale = torch.full((1,), scale, device=device, dtype=dtype)
            factor = scale.to(device, dtype).reshape(-1).expand(rows)[:, None, None, None]
            for site in source.sites_of(self.sites):
                module = source.key_value(site.index)
                key, value = (x.to(dtype) for x in module(tokens, self.heads[site.name], dtype))
                yield (
                    site,
                    ImageKV(
                        key, value, factor=factor, after_block=source.after_block, norms=module.joint_norms
                    ),
                )

    def _projected(self, source: PromptSource, tokens: Float[Tensor, "S T E"]) -> Float[Tensor, "S T C"]:
        return project_text(self._projection if source.uses_text_projection else None, tokens)


def _slots(sources: Sequence[PromptSource], call: Call) -> list[tuple[PromptSource, Slot]]:
    """The slots of all sources that act at sites."""
    return [
        (source, Slot(prompts, call))
        for source in sources
        if not source.beside_text
        for prompts in prompt_slots(source.samples)
    ]


def _lengthened(call: Call, beside: BesideText | None) -> Call:
    """The call with more text tokens."""
    if beside is None:
        return call
    return replace(call, grid=replace(call.grid, text_tokens=call.grid.text_tokens + beside.count))


def _ingredients(
    source: PromptSource, slot: Slot, sites: list[SlotSite]
) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Everything that keys depend on: the source and its prompts' tensors, and settings compared by value."""
    modes = [prompt.scaling for prompt in slot.prompts]
    inside = any(mode != "v-only" for mode in modes)
    acting = [(at.site.name, at.negated, at.strengths if inside else None) for at in sites]
    tensors = (x for p in slot.prompts for x in (p.tokens, p.negative, p.log_weight_bias))
    return (source, *tensors), (modes if inside else None, slot.order, acting)


def _tokens(prompt: CompiledPrompt, *, negative: bool) -> Tensor:
    """A prompt's tokens or its negative's; its own where a negative that no row reads is unknown."""
    return prompt.negative if negative and prompt.negative is not None else prompt.tokens


def _check_negatives(source: PromptSource, slot: Slot) -> None:
    if not source.shows_uncond or "uncond" not in slot.branches:
        return
    if any(prompt.negative is None for prompt in slot.prompts):
        raise UsageError(
            "guidance needs the image prompt's negative tokens, which bare features of this variant cannot "
            "give: pass negative= (the encoder's features of an all-zero input), or a picture."
        )
