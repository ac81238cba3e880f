"""Stage 6: embeddings of the motion words that the motion adapter can hear.

No picture shows a motion, so the UNet hardly hears these words: "sliding left" for "sliding right" changed
its output by 0.4 % of its norm, and the temporal layers had nothing to go by. Here the words' embeddings, and
nothing else, learn to be told apart by linear readers of what the UNet's text layers put out at every place,
while the UNet's output stays that of the same caption without the word. The readers see the change that a
word makes forty times as large at first, and as it is in the last third: else they find no start.

    python recipes/emoji/words.py --processes 2 --minutes 5
"""

import numpy as np
import torch
from base import SCHEDULE
from common import (
    CHECKPOINTS,
    DEVICE,
    MODEL,
    Crew,
    Loop,
    fingerprint,
    half,
    parsed,
    progress_mean,
    save_half,
    stage_parser,
)
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from draw import caption
from motion import FRAMES, MOTIONS, clips_of, motion_words, times, with_motion
from text import Texts, frozen_base
from torch import Tensor, nn
from torch.nn import functional as F

LOUD = 40.0
"""How many times as large the readers see a word's change at first."""
SAME = 60.0
"""Weight of the squared change of the UNet's output, beside the readers' cross-entropy."""


class Readers(nn.Module):
    """A linear reader at each of the UNet's text layers, of its output at every place."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        layers = [module for module in unet.modules() if isinstance(module, Transformer2DModel)]
        self.linear = nn.ModuleList(nn.Linear(layer.in_channels, len(MOTIONS)) for layer in layers)
        self.outputs: list[Tensor | None] = [None] * len(layers)
        for i, layer in enumerate(layers):
            layer.register_forward_hook(lambda _, __, out, i=i: self.outputs.__setitem__(i, out[0]))

    def unread(self, plain: list[Tensor], moved: list[Tensor], words: Tensor, louder: float) -> Tensor:
        """Cross-entropy of the words (N) over layers and places, a word's change made ``louder``."""
        losses = []
        for linear, without, with_word in zip(self.linear, plain, moved, strict=True):
            heard = torch.lerp(without.float(), with_word.float(), louder).movedim(1, -1)
            named = linear(F.layer_norm(heard, heard.shape[-1:])).float().movedim(-1, 1)
            losses.append(F.cross_entropy(named, words.view(-1, 1, 1).expand(heard.shape[:3])))
        return torch.stack(losses).mean()


def main() -> None:
    parser = stage_parser(__doc__, minutes=5, lr=1e-2, batch=24)
    parser.add_argument("--count", type=int, default=1200, help="clips to take pictures from")
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    args = parsed(parser)
    crew = Crew(args.processes)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval().to(DEVICE)
    unet, texts = frozen_base()
    readers = Readers(unet).to(DEVICE)
    learners = nn.ModuleDict({"readers": readers, "words": motion_words(texts)})
    optimizer = torch.optim.AdamW(learners.parameters(), lr=args.lr, weight_decay=0.0)
    mark = fingerprint(stage="words", motions=MOTIONS)
    loop = Loop(CHECKPOINTS / "words.pt", args.minutes, learners, optimizer, None, mark, warmup=10, crew=crew)
    if not args.export:
        latents, about = clips_of(vae, args.count, crew.rank)
        learn(unet, texts, readers, latents, [fact for fact, _ in about], loop, args.batch)
    if not crew.rank:
        save_half(texts.encoder, MODEL / "text_encoder")


def learn(
    unet: UNet2DConditionModel, texts: Texts, readers: Readers, latents: Tensor, facts: list[dict],
    loop: Loop, batch: int,
) -> None:  # fmt: skip
    """Train ``readers`` and the motion words' embeddings on frames of ``latents`` (N, 16, 4, 16, 16), of
    which ``facts`` say what they show, until ``loop`` ends."""
    abar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)
    for step in loop:
        rng = np.random.default_rng([13, step, loop.crew.rank if loop.crew else 0])
        picked, words = rng.integers(len(latents), size=batch), rng.integers(len(MOTIONS), size=batch)
        says = [(True, *(bool(rng.uniform() < 0.6) for _ in range(3))) for _ in picked]
        plain = [caption(facts[i], rng, said) for i, said in zip(picked, says, strict=True)]
        moved = [with_motion(text, MOTIONS[word], rng) for text, word in zip(plain, words, strict=True)]
        x = latents[picked, rng.integers(FRAMES, size=batch)].float()
        t = times(batch)
        a = abar[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * x + (1 - a).sqrt() * torch.randn_like(x)
        with half(), torch.no_grad():
            wanted, without = unet(noisy, t, texts(plain)).sample, list(readers.outputs)
        louder = LOUD ** max(0.0, 1 - 1.5 * loop.part())
        with half():
            drawn, with_word = unet(noisy, t, texts(moved)).sample, list(readers.outputs)
            unread = readers.unread(without, with_word, torch.from_numpy(words).to(DEVICE), louder)
        changed = F.mse_loss(drawn.float(), wanted.float())
        loop.learn(unread + SAME * changed)
        progress_mean(loop.log, "unread", unread)
        progress_mean(loop.log, "changed", changed)


if __name__ == "__main__":
    main()
