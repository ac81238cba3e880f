"""Stage 3: the image encoder, CLIP's vision layout, taught what a picture shows.

Captions are exact functions of what was drawn, so the tower is taught that directly, by linear heads that
are thrown away: concept, look, kind and colours of the background, palette and placement from the pooled
embedding (what the 4-token adapter reads), each patch's colours from the last layer but one (what the
resampler reads). A contrast between two drawings of one icon, placed anew, among the icons of the batch
teaches it to tell things it has no word for; and it is taught to say, patch by patch and in all, what an
ImageNet network sees (EfficientNet-Lite0, see ``judge.py``), since three hundred icons teach few shapes.

    python recipes/emoji/encoder.py --minutes 20
"""

import copy
import shutil

import numpy as np
import torch
from common import (
    CHECKPOINTS,
    DEVICE,
    MODEL,
    START,
    Ema,
    Loop,
    fingerprint,
    half,
    parsed,
    progress_mean,
    save_half,
    stage_parser,
)
from draw import BACKGROUNDS, GROUP, LOOKS
from judge import Likeness
from labels import HELD_OUT, WORDS
from pool import CHUNK, Pool, labels_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
NEVER = torch.from_numpy(HELD_OUT)


def in_its_look(logits: Tensor, looks: Tensor) -> Tensor:
    """Concept logits (N, concepts) with -1e4 for what training never shows in each picture's look (N,)."""
    return logits.float().masked_fill(NEVER.to(looks.device)[looks], -1e4)


def normalise(pictures: np.ndarray | Tensor) -> Tensor:
    """uint8 (N, 128, 128, 3) to the encoder's input."""
    x = torch.as_tensor(pictures).to(DEVICE).permute(0, 3, 1, 2).float() / 255
    return (x - MEAN.to(DEVICE)) / STD.to(DEVICE)


class Eye(nn.Module):
    """The tower with the heads that teach it."""

    def __init__(self, tower: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.tower = tower
        width, seen = tower.config.projection_dim, tower.config.hidden_size
        self.heads = nn.ModuleList(
            [nn.Linear(width, n) for n in (len(WORDS), len(LOOKS), len(BACKGROUNDS), 3)]
        )
        self.numbers = nn.Linear(width, 21)
        self.instance = nn.Linear(width, 128)
        self.patches = nn.Linear(seen, 48)
        self.fine, self.coarse = nn.Linear(seen, 112), nn.Linear(width, 1280)
        self.look_of_patches = nn.Linear(seen, len(LOOKS) + len(WORDS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.tower(x, output_hidden_states=True)
        return out.image_embeds, out.hidden_states[-2]

    def loss(
        self, x: Tensor, numbers_: Tensor, classes: Tensor, seen: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of what is taught, and figures. In: normalised pictures (N, 3, 128, 128), ``labels.py``'s
        numbers (N, 21) and classes (N, 5), the ImageNet network's maps and pooled features."""
        with half():
            embeds, hidden = self(x)
            logits = [head(embeds) for head in self.heads]
            numbers, instance, patches = (
                self.numbers(embeds),
                self.instance(embeds),
                self.patches(hidden[:, 1:]),
            )
            pooled = self.look_of_patches(hidden.mean(1))
            fine, coarse = self.fine(hidden[:, 1:]), self.coarse(embeds)
        concepts = in_its_look(logits[0], classes[:, 1]) if self.training else logits[0]
        losses = [F.cross_entropy(p.float(), classes[:, i]) for i, p in enumerate([concepts, *logits[1:]])]
        losses[0] = 2 * losses[0]
        fine_left = F.mse_loss(fine.float(), seen[0]) / seen[0].var()
        alike = F.cosine_similarity(coarse.float(), seen[1] - seen[1].mean(0)).mean()
        losses += [2 * fine_left, 3 * (1 - alike)]
        pooled = pooled.float()
        losses.append(0.6 * F.cross_entropy(pooled[:, : len(LOOKS)], classes[:, 1]))
        said = pooled[:, len(LOOKS) :]
        said = in_its_look(said, classes[:, 1]) if self.training else said
        losses.append(F.cross_entropy(said, classes[:, 0]))
        losses.append(4 * F.mse_loss(numbers.float(), numbers_))
        pixels = F.pixel_unshuffle(F.avg_pool2d(x, 4), 4).flatten(2).mT
        losses.append(2 * F.mse_loss(patches.float(), pixels))
        z = F.normalize(instance.float(), dim=-1).unflatten(0, (-1, GROUP))
        same = 12 * z[:, 0] @ z[:, 2].T
        codes = classes[::GROUP, 4]
        twins = (codes[:, None] == codes) & ~torch.eye(len(codes), dtype=torch.bool, device=x.device)
        same = same.masked_fill(twins, -1e4)
        order = torch.arange(len(same), device=DEVICE)
        losses.append(0.5 * (F.cross_entropy(same, order) + F.cross_entropy(same.T, order)))
        known = classes[:, 0] >= 0
        hit = (logits[0].argmax(1) == classes[:, 0]) & known
        log = {
            "concept": hit.sum() / known.sum(), "look": (logits[1].argmax(1) == classes[:, 1]).float().mean(),
            "ground": (logits[2].argmax(1) == classes[:, 2]).float().mean(),
            "numbers": losses[-3].detach() / 4, "patches": losses[-2].detach() / 2,
            "same": (same.argmax(1) == order).float().mean(), "fine": fine_left.detach(),
            "alike": alike.detach(),
        }  # fmt: skip
        return sum(losses), log


class Shown:
    """Pictures and labels of a seed on the training device."""

    def __init__(self, seed: int, most: int) -> None:
        self.seed, self.most = seed, most
        self.pictures = torch.empty(most, 128, 128, 3, dtype=torch.uint8, device=DEVICE)
        self.numbers = torch.empty(most, 21, device=DEVICE)
        self.classes = torch.empty(most, 5, dtype=torch.long, device=DEVICE)
        self.size = 0
        self.refresh()

    def refresh(self) -> None:
        """Take what has been drawn since."""
        pool = Pool(self.seed, self.most)
        for number in range(self.size // CHUNK, len(pool.chunks)):
            rows, labels = slice(self.size, self.size + CHUNK), labels_of(pool.paths[number])
            self.pictures[rows] = torch.from_numpy(pool.chunks[number].copy()).to(DEVICE)
            self.numbers[rows] = torch.from_numpy(labels["numbers"]).to(DEVICE)
            self.classes[rows] = torch.from_numpy(labels["classes"]).long().to(DEVICE)
            self.size += CHUNK


def new_tower(layers: int) -> CLIPVisionModelWithProjection:
    """START's tower with its last layer repeated where ``layers`` are more than it has."""
    old = CLIPVisionModelWithProjection.from_pretrained(START / "image_encoder").float()
    if layers == old.config.num_hidden_layers:
        return old
    config = copy.deepcopy(old.config)
    config.num_hidden_layers = layers
    new = CLIPVisionModelWithProjection(config).float()
    new.load_state_dict(old.state_dict(), strict=False)
    return new


def main() -> None:
    parser = stage_parser(__doc__, minutes=20, lr=6e-4)
    parser.add_argument("--groups", type=int, default=16, help="of four pictures, in a batch")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--most", type=int, default=60000, help="pictures to learn from")
    args = parsed(parser)
    eye = Eye(new_tower(args.layers)).train().to(DEVICE)
    optimizer = torch.optim.AdamW(eye.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    loop = Loop(
        CHECKPOINTS / "encoder.pt", args.minutes, eye, optimizer, Ema(eye, 0.998),
        fingerprint(stage="encoder", teacher="lite0", words=WORDS, looks=LOOKS, layers=args.layers), 200,
    )  # fmt: skip
    teacher = Likeness()
    held_out = Shown(2, CHUNK)
    if not args.export:
        shown = Shown(1, args.most)
        for step in loop:
            if step % 200 == 0:
                shown.refresh()
            groups = torch.randint(shown.size // GROUP, (args.groups, 1), device=DEVICE) * GROUP
            picked = (groups + torch.arange(GROUP, device=DEVICE)).flatten()
            pictures = shown.pictures[picked]
            with half():
                seen = tuple(a.float() for a in teacher.features(pictures))
            loss, log = eye.loss(
                normalise(pictures), shown.numbers[picked], shown.classes[picked], (seen[0] / 8, seen[1])
            )
            loop.learn(loss)
            for name, value in log.items():
                progress_mean(loop.log, name, value)
    assert loop.ema
    loop.ema.copy_to(eye)
    eye.eval()
    logs = []
    with torch.no_grad():
        for i in range(0, 1280, 64):
            rows = slice(i, i + 64)
            fine, coarse = teacher.features(held_out.pictures[rows])
            x = normalise(held_out.pictures[rows])
            logs.append(eye.loss(x, held_out.numbers[rows], held_out.classes[rows], (fine / 8, coarse))[1])
    means = {k: round(float(np.nanmean([float(log[k]) for log in logs])), 3) for k in logs[0]}
    print("validation", means, flush=True)
    torch.save(
        {k: v for k, v in eye.state_dict().items() if not k.startswith("tower.")}, CHECKPOINTS / "heads.pt"
    )
    save_half(eye.tower, MODEL / "image_encoder")
    shutil.copytree(START / "feature_extractor", MODEL / "feature_extractor", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
