"""Stage 3: the image encoder, CLIP's vision layout, taught what a picture shows.

Captions are exact functions of what was drawn, so the tower is taught that directly, by linear heads that
are thrown away: concept, look, kind and colours of the background, palette and placement from the pooled
embedding (what the 4-token adapter reads), each patch's colours from the last layer but one (what the
resampler reads). A contrast between two drawings of one icon, placed anew, among the icons of the batch
teaches it to tell things it has no word for; and it is taught to say, patch by patch and in all, what an
ImageNet network sees (EfficientNet-Lite0, see ``judge.py``), since three hundred icons teach few shapes.

    python recipes/emoji/encoder.py --minutes 20
"""

import json
import shutil

import numpy as np
import torch
from common import (
    CHECKPOINTS,
    DEVICE,
    HALF,
    MODEL,
    START,
    STATE,
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
from icons import HERE, split_of
from pool import Pool
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
WORDS = sorted(json.loads((HERE / "concepts.json").read_text()))
HELD_OUT = torch.tensor([[split_of(f"{word}|{look}") != "train" for word in WORDS] for look in LOOKS])
"""Of each look, the concepts that are never drawn in it for training (bool, looks × concepts). A classifier
that is not told learns that they do not exist there: with them masked, the judge names 72 % of the validation
pictures, without 59 %."""


def in_its_look(logits: Tensor, looks: Tensor) -> Tensor:
    """Concept logits (N, concepts) with -1e4 for what training never shows in each picture's look (N,)."""
    return logits.float().masked_fill(HELD_OUT.to(looks.device)[looks], -1e4)


def normalise(pictures: np.ndarray) -> Tensor:
    """uint8 (N, 128, 128, 3) to the encoder's input."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return ((x - MEAN) / STD).to(DEVICE)


def targets(facts: list[dict]) -> dict[str, Tensor]:
    numbers, found = [], []
    for fact in facts:
        place = np.mean(fact["places"], 0)
        ground = np.float32(fact["ground_colours"])[[0, -1]]
        ramp = np.float32(fact["ramp"])
        numbers.append(np.concatenate([ground.ravel() / 128 - 1, ramp.ravel() / 128 - 1, place[:3] * 2 - 1]))
        found.append(
            [
                WORDS.index(fact["concept"]) if fact["concept"] else -100, LOOKS.index(fact["look"]),
                BACKGROUNDS.index(fact["ground"]), fact["count"] - 1,
            ]
        )  # fmt: skip
    classes = torch.tensor(found, device=DEVICE)
    return {"numbers": torch.tensor(np.float32(np.stack(numbers)), device=DEVICE), "classes": classes}


class Teacher:
    """What the ImageNet network sees in the pool's pictures; each is looked at once and kept on disk."""

    def __init__(self, seed: int, size: int) -> None:
        from judge import Likeness  # which needs WORDS

        self.network, self.fine, self.coarse = (
            Likeness(),
            *(
                np.memmap(path, np.float16, "r+" if path.exists() else "w+", shape=(size, *shape))
                for path, shape in (
                    (STATE / "pool" / f"{seed}-{size}-fine.bin", (64, 112)),
                    (STATE / "pool" / f"{seed}-{size}-coarse.bin", (1280,)),
                )
            ),
        )

    def __call__(self, picked: list[int], pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        new = [k for k, i in enumerate(picked) if not self.coarse[i].any()]
        if new:
            fine, coarse = self.network.features(pictures[new])
            for j, k in enumerate(new):
                self.fine[picked[k]] = (fine[j] / 8).half().cpu().numpy()
                self.coarse[picked[k]] = coarse[j].half().cpu().numpy()
        return tuple(torch.from_numpy(a[picked]).float().to(DEVICE) for a in (self.fine, self.coarse))  # type: ignore[return-value]


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
        self, x: Tensor, facts: list[dict], seen: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        want = targets(facts)
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
        classes = want["classes"]
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
        losses.append(4 * F.mse_loss(numbers.float(), want["numbers"]))
        pixels = F.pixel_unshuffle(F.avg_pool2d(x, 4), 4).flatten(2).mT
        losses.append(2 * F.mse_loss(patches.float(), pixels))
        z = F.normalize(instance.float(), dim=-1).unflatten(0, (-1, GROUP))
        same = 12 * z[:, 0] @ z[:, 2].T
        codes = [fact["code"] for fact in facts[::GROUP]]
        twins = torch.tensor([[a == b and i != j for j, b in enumerate(codes)] for i, a in enumerate(codes)])
        same = same.masked_fill(twins.to(DEVICE), -1e4)
        order = torch.arange(len(same), device=DEVICE)
        losses.append(0.5 * (F.cross_entropy(same, order) + F.cross_entropy(same.T, order)))
        known = classes[:, 0] >= 0
        log = {
            "concept": float((logits[0].argmax(1) == classes[:, 0])[known].float().mean()),
            "look": float((logits[1].argmax(1) == classes[:, 1]).float().mean()),
            "ground": float((logits[2].argmax(1) == classes[:, 2]).float().mean()),
            "numbers": float(losses[-3].detach() / 4), "patches": float(losses[-2].detach() / 2),
            "same": float((same.argmax(1) == order).float().mean()),
            "fine": float(fine_left.detach()), "alike": float(alike.detach()),
        }  # fmt: skip
        return sum(losses), log


def main() -> None:
    parser = stage_parser(__doc__, minutes=20, lr=6e-4)
    parser.add_argument("--groups", type=int, default=16, help="of four pictures, in a batch")
    args = parsed(parser)
    tower = CLIPVisionModelWithProjection.from_pretrained(
        START / "image_encoder",
        attn_implementation="eager" if HALF and DEVICE == "cpu" else "sdpa",  # each a fifth faster there
    ).float()
    eye = Eye(tower).train().to(DEVICE)
    optimizer = torch.optim.AdamW(eye.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    loop = Loop(
        CHECKPOINTS / "encoder.pt", args.minutes, eye, optimizer, Ema(eye, 0.997),
        fingerprint(stage="encoder", teacher="lite0", words=WORDS, looks=LOOKS), warmup=40,
    )  # fmt: skip
    pool = Pool(1)
    teacher = Teacher(1, len(pool))
    if not args.export:
        for step in loop:
            eye.tower.requires_grad_(step >= 150)  # new heads first
            if step % 100 == 0:
                pool = Pool(1)
                if len(pool) != len(teacher.coarse):
                    teacher = Teacher(1, len(pool))
            rng = np.random.default_rng([5, step])
            groups = rng.choice(len(pool) // GROUP, args.groups, replace=False)
            picked = [int(g) * GROUP + k for g in groups for k in range(GROUP)]
            pictures = pool.pictures(picked)
            loss, log = eye.loss(
                normalise(pictures), [pool.facts[i] for i in picked], teacher(picked, pictures)
            )
            loop.learn(loss)
            for name, value in log.items():
                progress_mean(loop.log, name, value)
    assert loop.ema
    loop.ema.copy_to(eye)
    eye.eval()
    held_out = Pool(2)
    logs, teacher = [], Teacher(2, len(held_out))
    with torch.no_grad():
        for i in range(0, 1280, 64):
            picked = list(range(i, i + 64))
            pictures = held_out.pictures(picked)
            facts = [held_out.facts[j] for j in picked]
            logs.append(eye.loss(normalise(pictures), facts, teacher(picked, pictures))[1])
    print(
        "validation", {k: round(float(np.nanmean([log[k] for log in logs])), 3) for k in logs[0]}, flush=True
    )
    torch.save(
        {k: v for k, v in eye.state_dict().items() if not k.startswith("tower.")}, CHECKPOINTS / "heads.pt"
    )
    save_half(eye.tower, MODEL / "image_encoder")
    shutil.copytree(START / "feature_extractor", MODEL / "feature_extractor", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
