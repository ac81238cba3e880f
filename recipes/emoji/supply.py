"""Stages 4 to 6 read drawn pictures as rows of arrays on the training device: latents, what the image
encoder sees, tokens of captions. Rows are added while more pictures are drawn; a batch is chosen by vector
operations.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import DEVICE, half, to_float
from diffusers import AutoencoderKL
from draw import GROUP, PLAIN_SEED
from labels import ABSENT, ALONE, ANY, CAPTIONS, LENGTH, MORE, PARTS
from pool import CHUNK, Pool, labels_of
from torch import Tensor

PLAIN_SHARE = 0.2
"""Part of the draws without an adapter that are of plain pictures. It is too little to make "a cat" alone a
plain drawing: the draws with a picture say the thing alone as well."""
PARTNERS = ((1, 3), (0, 2, 3), (1, 3), (0, 1, 2))
"""Of each member of a group, those that show another thing in its manner."""
LOOK_AT = 250
"""Pictures that are encoded at once."""

Look = Callable[[Tensor], Tensor]
"""uint8 pictures (N, 128, 128, 3) to features (N, …)."""


@dataclass
class Draws:
    """Rows of the supply for a batch: the first ``bare`` are text alone, without an adapter."""

    references: Tensor
    shown: Tensor
    """Whether the reference is shown or hidden, as guidance hides it (bool)."""
    targets: Tensor
    captions: Tensor
    """Number of the caption, or -1: none."""


class Supply:
    """``latents`` (N, 4, 16, 16), ``tokens`` (N, 8, 32), ``classes`` (N, 5) and, where ``look`` is given,
    ``features``; the plain pictures come first. At most ``most`` pictures of seed 1."""

    def __init__(self, vae: AutoencoderKL, most: int, look: Look | None = None) -> None:
        self.vae, self.look, self.most = vae, look, most
        plain = Pool(PLAIN_SEED, most)
        self.plain, size = len(plain), len(plain) + most
        self.latents = torch.empty(size, 4, 16, 16, dtype=torch.float16, device=DEVICE)
        self.tokens = torch.empty(size, CAPTIONS, LENGTH, dtype=torch.int16, device=DEVICE)
        self.classes = torch.empty(size, 5, dtype=torch.int32, device=DEVICE)
        self.features: Tensor | None = None
        self.chunks, self.size = 0, 0
        for number in range(len(plain.chunks)):
            self._add(plain, number)
        self.refresh()

    def refresh(self) -> None:
        """Take what has been drawn of seed 1 since."""
        pool = Pool(1, self.most)
        for number in range(self.chunks, len(pool.chunks)):
            self._add(pool, number)
        self.chunks = len(pool.chunks)
        known = torch.nonzero(self.classes[: self.size, 0] >= 0).flatten()
        self.known = known[known >= self.plain]

    @torch.no_grad()
    def _add(self, pool: Pool, number: int) -> None:
        start = self.size
        labels = labels_of(pool.paths[number])
        self.tokens[start : start + CHUNK] = torch.from_numpy(labels["tokens"]).to(DEVICE)
        self.classes[start : start + CHUNK] = torch.from_numpy(labels["classes"]).to(DEVICE)
        for i in range(0, CHUNK, LOOK_AT):
            pictures = torch.from_numpy(pool.chunks[number][i : i + LOOK_AT].copy()).to(DEVICE)
            rows = slice(start + i, start + i + len(pictures))
            x = to_float(pictures).contiguous(memory_format=torch.channels_last)
            self.latents[rows] = (
                self.vae.encode(x).latent_dist.mode() * self.vae.config.scaling_factor
            ).half()
            if self.look is None:
                continue
            with half():
                seen = self.look(pictures)
            if self.features is None:
                self.features = torch.empty(
                    len(self.latents), *seen.shape[1:], dtype=torch.float16, device=DEVICE
                )
            self.features[rows] = seen.half()
        self.size += CHUNK

    def batch(self, bare: int, paired: int, generator: torch.Generator) -> Draws:
        """Rows for ``bare`` draws of text alone and ``paired`` draws with a picture."""
        count = bare + paired

        def chance() -> Tensor:
            return torch.rand(count, generator=generator, device=DEVICE)

        def below(limit: int) -> Tensor:
            return torch.randint(limit, (count,), generator=generator, device=DEVICE)

        is_bare = torch.arange(count, device=DEVICE) < bare
        any_row = self.plain + below(self.size - self.plain)
        known = self.known[below(len(self.known))]
        plain = below(max(self.plain, 1))
        # Text alone: a plain picture, or one of a thing with a name, or any.
        alone = torch.where(chance() < 0.85, known, any_row)
        alone = torch.where((chance() < PLAIN_SHARE) & (self.plain > 0), plain, alone)
        # A picture: another thing in its manner (half), else itself or the same icon placed anew.
        share, other = chance(), torch.tensor([[m[i % len(m)] for i in range(6)] for m in PARTNERS])
        member, group = known % GROUP, known - known % GROUP
        partner = group + other.to(DEVICE)[member, below(6)]
        same = any_row - any_row % GROUP + torch.tensor((2, 1, 0, 3), device=DEVICE)[any_row % GROUP]
        itself = torch.where(chance() < 0.4, same, any_row)
        another = share < 0.5
        hidden = share > 0.92
        target = torch.where(is_bare, alone, torch.where(another, known, any_row))
        reference = torch.where(another, partner, itself)
        some = ANY + below(4)
        text = torch.where(chance() < 0.8, ALONE, MORE)
        quiet = torch.where(chance() < 0.75, -1, PARTS)
        absent = torch.where(chance() < 0.4, -1, ABSENT)
        said = torch.where(is_bare, some, torch.where(another, text, torch.where(hidden, absent, quiet)))
        return Draws(reference[bare:], ~hidden[bare:], target, said)

    def captions(self, draws: Draws, empty: Tensor) -> Tensor:
        """Token ids (N, 32) of the draws' captions; ``empty`` are those of no caption (32,)."""
        ids = self.tokens[draws.targets, draws.captions.clamp_min(0)].long()
        return torch.where((draws.captions < 0)[:, None], empty, ids)
