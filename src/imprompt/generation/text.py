"""Long prompts, weights and breaks: texts encoded in chunks.

A CLIP text encoder reads a fixed number of tokens. A longer prompt is cut into chunks of that length, which
are encoded one by one and joined, as stable-diffusion-webui and ComfyUI do. ``(a word:1.3)`` multiplies the
states of its tokens and keeps the chunk's mean, as webui does; ``BREAK`` begins a new chunk. The pipeline
itself encodes a prompt that fits and has neither.

Dimensions: B prompts, K chunks, L tokens of a chunk, C token width.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from inspect import signature
from itertools import repeat
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.adapter.regional import call_encode_prompt, execution_device
from imprompt.schema.request import Request

_WEIGHTED = re.compile(r"\(([^()]+):([+-]?\d*\.?\d+)\)")
_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]+>", re.IGNORECASE)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")

Piece = tuple[int, float]
"""A token and its weight."""


class TextStates:
    """States of the last texts of one base, so that none is encoded twice."""

    def __init__(self, limit: int = 32) -> None:
        self._limit = limit
        self._kept: OrderedDict[tuple[str, str | None], dict[str, Tensor]] = OrderedDict()

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def arguments(
        self, pipe: Any, prompts: Sequence[str], negatives: Sequence[str] | None
    ) -> dict[str, Tensor] | None:
        """The pipeline's arguments that hold the states of texts, one of each kind for each picture; ``None``
        if the pipeline's text encoder is not CLIP's. ``negatives`` are ``None`` without guidance."""
        if not in_chunks(pipe):
            return None
        pairs = list(zip(prompts, negatives or repeat(None), strict=False))
        found = {pair: self._states(pipe, *pair) for pair in dict.fromkeys(pairs)}
        names = found[pairs[0]]
        return {name: torch.cat([found[pair][name] for pair in pairs]) for name in names}

    def _states(self, pipe: Any, prompt: str, negative: str | None) -> dict[str, Tensor]:
        if (prompt, negative) not in self._kept:
            self._kept[prompt, negative] = _pair_states(pipe, prompt, negative)
            if len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        self._kept.move_to_end((prompt, negative))
        return self._kept[prompt, negative]


def _pair_states(pipe: Any, prompt: str, negative: str | None) -> dict[str, Tensor]:
    """States of a prompt and its negative: the pipeline's own, or of what is too long, weighted or broken
    those of its chunks."""
    texts = [prompt] if negative is None else [prompt, negative]
    if any(_is_special(pipe, text) for text in texts):
        states, pooled = _encode(pipe, texts)
        parts = [*states.split(1), *([] if pooled is None else pooled.split(1))]
        names = ["prompt_embeds", "negative_prompt_embeds"][: len(texts)]
        if pooled is not None:
            names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"][: len(texts)]
    else:
        guided = negative is not None
        parts = call_encode_prompt(
            pipe, prompt=prompt, negative_prompt=negative, do_classifier_free_guidance=guided
        )
        names = ["prompt_embeds", "negative_prompt_embeds"]
        names += [f"{kind}pooled_prompt_embeds" for kind in ("", "negative_")]
    return {name: part for name, part in zip(names, parts, strict=False) if part is not None}


def chunk_count(pipe: Any, *texts: str) -> int:
    """Number of chunks that the longest of some texts needs; 0 if the pipeline can read them itself."""
    if not in_chunks(pipe) or not any(_is_special(pipe, text) for text in texts):
        return 0
    return max(
        len(_chunks(pipe, tokenizer, text, int(tokenizer.model_max_length) - 2))
        for tokenizer in _tokenizers(pipe)
        for text in texts
    )


def cut_words(pipe: Any, text: str) -> str:
    """The end of ``text`` that the pipeline's own encoder would not read; empty if it reads all.

    Where T5 reads a text beside CLIP (FLUX, SD3), T5 alone counts: of CLIP a summary is taken there.
    """
    lost = ""
    tokenizers = _tokenizers(pipe)
    most = signature(pipe.__call__).parameters.get("max_sequence_length")
    for tokenizer in [each for each in tokenizers if not _is_clip(each)] or tokenizers:
        limit = int(tokenizer.model_max_length)
        if most is not None and not _is_clip(tokenizer):
            limit = min(limit, most.default)
        tokens = _tokens(pipe, tokenizer, text)
        if limit < 100_000 and len(tokens) > limit:
            lost = max(lost, tokenizer.decode(tokens[limit - 1 : -1]).strip(), key=len)
    return lost


def has_marks(text: str) -> bool:
    """Whether words of a text are weighted, or it is broken into chunks."""
    return bool(_WEIGHTED.search(text) or _BREAK.search(text))


def text_notes(request: Request, pipe: Any) -> Iterator[str]:
    """A note for each text with webui's ``<lora:NAME:0.8>``, which nothing here reads, with weights that are
    read as words, or of which the encoder does not read the end."""
    regional = {
        f"{field}.{number}.text": str(each.text)
        for field in ("images", "regions")
        for number, each in enumerate(getattr(request, field))
        if each.text
    }
    own, weighed = {"prompt": request.prompt, "negative": request.negative}, in_chunks(pipe)
    for name, text in (own | regional).items():
        if tag := _TAG.search(text):
            yield f"{name}: '{tag[0]}' is read as words; a LoRA is given by loras (--lora)"
        if weighed and name in own:
            continue
        if has_marks(text):
            whose = "regional text" if weighed else "this base's text"
            yield f"{name}: (word:1.3) and BREAK are read as they are written; {whose} has no weights"
        if text and (words := cut_words(pipe, text)):
            yield f"{name}: the text encoder does not read its end: '{words}'"


def in_chunks(pipe: Any) -> bool:
    """Whether long texts are encoded in chunks: with CLIP's text encoders alone."""
    tokenizers = _tokenizers(pipe)
    return bool(tokenizers) and all(map(_is_clip, tokenizers)) and hasattr(pipe, "unet")


def _tokenizers(pipe: Any) -> list[Any]:
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    return [part for name in names if (part := getattr(pipe, name, None)) is not None]


def _is_clip(tokenizer: Any) -> bool:
    return "CLIP" in type(tokenizer).__name__


def _is_special(pipe: Any, text: str) -> bool:
    return has_marks(text) or bool(cut_words(pipe, text))


def _pieces(pipe: Any, tokenizer: Any, text: str) -> list[Piece]:
    """The tokens of a text without breaks, each with its weight."""
    pieces: list[Piece] = []
    place = 0
    parts: list[tuple[str, float]] = []
    for found in _WEIGHTED.finditer(text):
        parts += [(text[place : found.start()], 1.0), (found[1], float(found[2]))]
        place = found.end()
    for part, weight in [*parts, (text[place:], 1.0)]:
        pieces += [(token, weight) for token in _tokens(pipe, tokenizer, part, add_special_tokens=False)]
    return pieces


def _tokens(pipe: Any, tokenizer: Any, text: str, **options: Any) -> list[int]:
    """All tokens of a text, those of textual inversion's words as well, which may have several each."""
    # Other texts need no second reading, which would warn of a long one.
    if hasattr(pipe, "maybe_convert_prompt") and any(word in text for word in tokenizer.get_added_vocab()):
        text = pipe.maybe_convert_prompt(text, tokenizer)
    found: list[int] = tokenizer(text, truncation=False, verbose=False, **options).input_ids
    return found


def _chunks(pipe: Any, tokenizer: Any, text: str, length: int) -> list[list[Piece]]:
    """At most ``length`` tokens each; a break ends a chunk."""
    chunks: list[list[Piece]] = []
    for section in _BREAK.split(text):
        pieces = _pieces(pipe, tokenizer, section)
        chunks += [pieces[start : start + length] for start in range(0, len(pieces), length)]
    return chunks or [[]]


@torch.no_grad()
def _encode(pipe: Any, texts: Sequence[str]) -> tuple[Float[Tensor, "B KL C"], Float[Tensor, "B E"] | None]:
    """States of all texts, filled up with empty chunks to the same length, and SDXL's pooled states."""
    device = execution_device(pipe)
    encoders = [pipe.text_encoder]
    if getattr(pipe, "text_encoder_2", None) is not None:
        encoders.append(pipe.text_encoder_2)
    tokenizers = _tokenizers(pipe)
    limits = [int(tokenizer.model_max_length) for tokenizer in tokenizers]
    cut = [
        [_chunks(pipe, tokenizer, text, limit - 2) for text in texts]
        for tokenizer, limit in zip(tokenizers, limits, strict=True)
    ]
    count = max(len(chunks) for of_encoder in cut for chunks in of_encoder)
    wide: list[Tensor] = []
    pooled: Tensor | None = None
    for encoder, tokenizer, limit, of_encoder in zip(encoders, tokenizers, limits, cut, strict=True):
        filled = [chunks + [[]] * (count - len(chunks)) for chunks in of_encoder]
        ids, weights = _tables(tokenizer, limit, [chunk for chunks in filled for chunk in chunks])
        output = encoder(ids.to(device), output_hidden_states=len(encoders) > 1)
        if len(encoders) > 1:  # SDXL reads the last but one, and the pooled state of the first chunk
            states, pooled = output.hidden_states[-2], output[0].unflatten(0, (len(texts), count))[:, 0]
        else:
            states = output[0]
        wide.append(_weighted(states, weights.to(states)).unflatten(0, (len(texts), count)).flatten(1, 2))
    return torch.cat(wide, -1), pooled


def _tables(tokenizer: Any, limit: int, chunks: Sequence[Sequence[Piece]]) -> tuple[Tensor, Tensor]:
    """Token numbers and weights of chunks, between begin and end and filled up as the tokenizer does."""
    ids = torch.full((len(chunks), limit), int(tokenizer.pad_token_id))
    weights = torch.ones(len(chunks), limit)
    for row, chunk in enumerate(chunks):
        tokens = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, 1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
    return ids, weights


def _weighted(states: Float[Tensor, "K L C"], weights: Float[Tensor, "K L"]) -> Float[Tensor, "K L C"]:
    """States times their weights, with each chunk's mean as it was; untouched where all weigh 1."""
    scaled = states * weights[..., None]
    mean, new = states.mean((1, 2), keepdim=True), scaled.mean((1, 2), keepdim=True)
    changed = (weights != 1).any(1)[:, None, None]
    return torch.where(
        changed & (new.abs() > 1e-8), scaled * (mean / new), torch.where(changed, scaled, states)
    )
