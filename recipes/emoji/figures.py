"""The figures of the model as it is: a table with n and 95 % intervals, and the same as JSON.

Choices are made on ``--split validation``; ``test`` is looked at once. ``chain.py`` ships a model only when
``score`` (the mean of the shares) is above the bundled one's.

    python recipes/emoji/figures.py --split validation -n 48 --out figures.json
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import judge
import numpy as np
import torch
from adapters import NAMES
from common import DEVICE, MODEL, half, to_float
from diffusers import ControlNetModel
from draw import LOOKS, PLAIN, PLAIN_SEED, caption
from draw import draw as draw_icon
from labels import WORDS
from motion import FRAMES, MOTIONS, pose
from PIL import Image
from pool import Pool, icons
from sample import Model, draw, load
from vae import quality

from imprompt import Engine, Request, catalog
from imprompt.generation.favor import weighed

SEEDS = {"validation": 2, "test": 3}
FAVOR = catalog.controls()["emoji-canny"].favor
"""What the ControlNet favours by default in stills from a text."""
NEAR = 12.0
"""ΔE below which a background is the one that was asked for."""


def interval(values: list[float]) -> dict[str, float]:
    """Mean, n and the 95 % bootstrap interval (2,000 draws)."""
    v = np.asarray(values, float)
    means = v[np.random.default_rng(0).integers(len(v), size=(2000, len(v)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return {"value": float(v.mean()), "low": float(low), "high": float(high), "n": len(v)}


def chosen(pool: Pool, n: int, member: int, fits: Callable[[dict], bool]) -> list[int]:
    """The first ``n`` pictures that are ``member`` of their group and fit."""
    found = [i for i in range(member, len(pool), 4) if fits(pool.facts[i])]
    return found[:n]


def same_ground(drawn: np.ndarray, truth: np.ndarray) -> list[float]:
    return [
        float(np.linalg.norm(judge.border(d) - judge.border(t)) < NEAR)
        for d, t in zip(drawn, truth, strict=True)
    ]


def text_alone(model: Model, pool: Pool, network: judge.Network, n: int) -> dict:
    picked = chosen(
        pool,
        n,
        0,
        lambda f: bool(f["concept"]) and f["ground"] in ("white", "plain") and bool(f["ground_words"]),
    )
    facts = [pool.facts[i] for i in picked]
    rng = np.random.default_rng(0)
    drawn = draw(
        model, [caption(f, rng, (True,) * 4) for f in facts], seeds=[1000 + i for i in range(len(facts))]
    )
    concept, look = judge.verdicts(network, drawn)
    return {
        "text alone: concept": interval(
            [WORDS[c[0]] == f["concept"] for c, f in zip(concept, facts, strict=True)]
        ),
        "text alone: look": interval([LOOKS[k] == f["look"] for k, f in zip(look, facts, strict=True)]),
        "text alone: background": interval(same_ground(drawn, pool.pictures(picked))),
    }


def picture_alone(model: Model, pool: Pool, network: judge.Network, n: int, likeness: judge.Likeness) -> dict:
    out = {}
    for known in (True, False):
        picked = chosen(pool, n, 0, lambda f: bool(f["concept"]) == known and f["count"] == 1)  # noqa: B023
        facts, shown = [pool.facts[i] for i in picked], pool.pictures(picked)
        drawn = draw(model, [""] * len(picked), shown, [2000 + i for i in range(len(picked))])
        who = "known" if known else "unseen"
        concept, look = judge.verdicts(network, drawn)
        if known:
            out["picture alone: concept"] = interval(
                [WORDS[c[0]] == f["concept"] for c, f in zip(concept, facts, strict=True)]
            )
            out["picture alone: look"] = interval(
                [LOOKS[k] == f["look"] for k, f in zip(look, facts, strict=True)]
            )
            plain = [f["ground"] in ("white", "plain") for f in facts]
            out["picture alone: background"] = interval(
                [s for s, p in zip(same_ground(drawn, shown), plain, strict=True) if p]
            )
        near = likeness(drawn) @ likeness(shown).T
        found = []
        for i in range(len(picked)):
            others = np.random.default_rng([1, i]).permutation(np.delete(np.arange(len(picked)), i))[:19]
            found.append(float(near[i, i] > near[i, others].max()))
        out[f"picture alone, {who}: own reference among 20"] = interval(found)
    return out


def both(model: Model, pool: Pool, network: judge.Network, n: int) -> dict:
    """Look and palette from the picture, concept from the text; and how far the palette follows."""
    picked = chosen(pool, n, 0, lambda f: f["count"] == 1)
    facts, shown = [pool.facts[i] for i in picked], pool.pictures(picked)
    rng = np.random.default_rng(3)
    words = [str(rng.choice([w for w in WORDS if w != f["concept"]])) for f in facts]
    prompts, seeds = [f"a {w}" for w in words], [3000 + i for i in range(len(picked))]
    drawn, without = draw(model, prompts, shown, seeds), draw(model, prompts, seeds=seeds)
    concept, look = judge.verdicts(network, drawn)
    right = [WORDS[c[0]] == w for c, w in zip(concept, words, strict=True)]
    kept = [LOOKS[k] == f["look"] for k, f in zip(look, facts, strict=True)]
    mine = [judge.palette_distance(a, b) for a, b in zip(drawn, shown, strict=True)]
    theirs = [judge.palette_distance(a, b) for a, b in zip(without, shown, strict=True)]
    ratio = interval([a / max(np.mean(theirs), 1e-6) for a in mine])
    return {
        "picture + text: concept": interval(right), "picture + text: look": interval(kept),
        "picture + text: both": interval([a and b for a, b in zip(right, kept, strict=True)]),
        "palette distance, with picture / without": ratio,
    }  # fmt: skip


@torch.no_grad()
def control(model: Model, pool: Pool, folder: Path, n: int, steps: int = 20) -> dict:
    """F1 (within a pixel) of the drawing's edges and the condition's, the concept named."""
    net = ControlNetModel.from_pretrained(folder / "controlnet-canny").float().eval().to(DEVICE)
    picked = chosen(pool, n, 1, lambda f: bool(f["concept"]))
    truth = pool.pictures(picked)
    maps = np.stack([cv2.Canny(np.ascontiguousarray(p), 100, 200) for p in truth])
    condition = torch.from_numpy(maps)[:, None].float().to(DEVICE).div(255).expand(-1, 3, -1, -1)
    scores = []
    for i in range(0, len(picked), 16):
        part = slice(i, i + 16)
        prompts = [f"a {pool.facts[j]['concept']}" for j in picked[part]]
        x = torch.stack(
            [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(j)) for j in picked[part]]
        )
        x = x.to(DEVICE)
        hidden = torch.cat([model.texts([""] * len(prompts)), model.texts(prompts)])
        seen = torch.cat([condition[part]] * 2)
        model.scheduler.set_timesteps(steps)
        for t in model.scheduler.timesteps:
            double = torch.cat([x, x])
            with half():
                down, mid = net(double, t, hidden, seen, return_dict=False)
                *down, mid = weighed((*down, mid), FAVOR, len(x))
                v = model.unet(
                    double, t, hidden, down_block_additional_residuals=down, mid_block_additional_residual=mid
                ).sample
            none, some = v.float().chunk(2)
            x = model.scheduler.step(none + 4 * (some - none), t, x).prev_sample
        y = model.vae.decode(x / model.vae.config.scaling_factor).sample.clamp(-1, 1)
        drawn = ((y + 1) * 127.5).byte().permute(0, 2, 3, 1).cpu().numpy()
        for mine, real in zip(drawn, maps[part], strict=True):
            found = cv2.Canny(np.ascontiguousarray(mine), 60, 120) > 0
            wanted, grow = real > 0, np.ones((3, 3), np.uint8)
            precision = (found & (cv2.dilate(real, grow) > 0)).sum() / max(1, found.sum())
            recall = (wanted & (cv2.dilate(found.astype(np.uint8), grow) > 0)).sum() / max(1, wanted.sum())
            scores.append(2 * precision * recall / max(1e-6, precision + recall))
    return {"canny: F1 within a pixel": interval(scores)}


def masks(folder: Path, pool: Pool, n: int) -> dict:
    """Two pictures with masks, left and right: halves that are nearer their own picture's palette."""
    picked = chosen(pool, 2 * n, 0, lambda f: f["count"] == 1)
    shown, rng = pool.pictures(picked), np.random.default_rng(4)
    halves = {}
    for side, x in (("left", 0), ("right", 64)):
        halves[side] = Image.new("L", (128, 128), 0)
        halves[side].paste(255, (x, 0, x + 64, 128))
    pictures = {f"{i}": Image.fromarray(picture) for i, picture in enumerate(shown)} | halves
    adapter = str(folder / "adapters" / NAMES["plus"])
    requests = []
    for i in range(n):
        images = [{"image": f"{2 * i + k}", "mask": side} for k, side in enumerate(("left", "right"))]
        fields = {"prompt": f"a {rng.choice(WORDS)}", "seed": 4000 + i, "steps": 20, "images": images}
        requests.append(Request.from_mapping({"base": str(folder), "adapter": adapter, **fields}))
    nearer = []
    for i, result in enumerate(Engine().run_batch(requests, pictures=pictures)):
        drawn = np.asarray(result.images[0])
        for half_of, own, other in ((drawn[:, :64], 2 * i, 2 * i + 1), (drawn[:, 64:], 2 * i + 1, 2 * i)):
            part = np.ascontiguousarray(half_of)
            mine, theirs = (judge.palette_distance(part, shown[k]) for k in (own, other))
            nearer.append(mine < theirs)
    return {"masks left and right: half nearer its own picture": interval(nearer)}


def edges_beside_picture(folder: Path, pool: Pool, network: judge.Network, n: int) -> dict:
    """Edges of a plain icon, its name as text, and a picture of something else: whether its look is drawn."""
    picked = chosen(pool, n, 0, lambda f: f["count"] == 1)
    facts, shown, rng = [pool.facts[i] for i in picked], pool.pictures(picked), np.random.default_rng(6)
    words = [str(rng.choice([w for w in WORDS if w != f["concept"]])) for f in facts]
    pictures = {f"shown {i}": Image.fromarray(picture) for i, picture in enumerate(shown)}
    requests = []
    for i, word in enumerate(words):
        icon = int(rng.choice(icons().of_word[word]))
        pictures[f"plain {i}"] = Image.fromarray(draw_icon(icons(), PLAIN_SEED, i, PLAIN, icon)[0])
        structure = {"kind": "canny", "path": f"plain {i}", "model": str(folder / "controlnet-canny"),
                     "favor": FAVOR}  # fmt: skip
        fields = {"prompt": f"a {word}", "seed": 6000 + i, "images": [f"shown {i}"], "controls": [structure]}
        parts = {"base": str(folder), "adapter": str(folder / "adapters" / NAMES["plus"])}
        requests.append(Request.from_mapping(fields | parts | {"steps": 20}))
    results = Engine().run_batch(requests, pictures=pictures)
    concept, look = judge.verdicts(network, np.stack([np.asarray(r.images[0]) for r in results]))
    right = [WORDS[c[0]] == word for c, word in zip(concept, words, strict=True)]
    kept = [LOOKS[k] == f["look"] for k, f in zip(look, facts, strict=True)]
    return {
        "edges + picture + text: concept": interval(right),
        "edges + picture + text: look": interval(kept),
    }


def path_of(frames: np.ndarray) -> np.ndarray:
    """Where what stands before the background is in each frame, and how large (3, F), about its mean."""
    rows = []
    for frame in frames:
        far = np.linalg.norm(judge.to_lab(frame) - judge.border(frame), axis=-1).clip(max=40)
        weights, across = far / max(far.sum(), 1e-6), np.arange(128) / 128
        rows.append((weights.sum(0) @ across, weights.sum(1) @ across, np.sqrt(far.mean() / 40)))
    path = np.array(rows).T
    return path - path.mean(1, keepdims=True)


def clips(folder: Path, n: int) -> dict:
    """Of texts with a motion word: whether the path is that word's; how alike neighbouring frames are."""
    phases = np.arange(FRAMES) / FRAMES
    expected = {}
    for motion in MOTIONS:
        path = np.array([pose(motion, phase, 1.0)[:3] for phase in phases]).T * [[1], [1], [0.4]]
        if np.ptp(path, 1).any():  # what spins stays where it is
            expected[motion] = path - path.mean(1, keepdims=True)
    rng, obeyed, alike = np.random.default_rng(5), [], []
    engine = Engine()
    for i in range(n):
        motion = list(expected)[i % len(expected)]
        words = f"a {rng.choice(WORDS)} {motion} on a white background"
        request = Request(task="animate", base=str(folder), prompt=words, seed=5000 + i, steps=16,
                          motion=str(folder / "motion"))  # fmt: skip
        frames = np.stack([np.asarray(frame) for frame in engine.run(request).images])
        path = path_of(frames)
        near = {
            name: (path * wanted).sum() / (np.linalg.norm(path) * np.linalg.norm(wanted) + 1e-6)
            for name, wanted in expected.items()
        }
        obeyed.append(max(near, key=near.__getitem__) == motion)
        flat = frames.reshape(FRAMES, -1).astype(float)
        alike += [float(np.corrcoef(a, b)[0, 1]) for a, b in itertools.pairwise(flat)]
    return {"clips: motion named": interval(obeyed), "clips: neighbouring frames agree": interval(alike)}


def table(figures: dict) -> str:
    lines = [f"| {'figure':44} | value | 95 % interval | n |", "|---|---|---|---|"]
    for name, f in figures.items():
        lines.append(f"| {name:44} | {f['value']:.2f} | {f['low']:.2f}…{f['high']:.2f} | {f['n']} |")
    return "\n".join(lines)


def score(figures: dict) -> float:
    """One number to compare two models by: the mean of all shares, palette distance as 1 - ratio."""
    values = []
    for name, f in figures.items():
        if name.startswith("palette"):
            values.append(1 - f["value"])
        elif not name.startswith("autoencoder"):
            values.append(f["value"])
    return float(np.mean(values))


def measure(folder: Path, split: str, n: int, kind: str = "plus", extras: bool = True) -> dict:
    network, likeness, pool = judge.load(), judge.Likeness(), Pool(SEEDS[split])
    model = load(folder, kind)
    some = to_float(torch.from_numpy(pool.pictures(list(range(0, 4 * n, 4)))))
    psnr, edges = quality(model.vae, some)
    figures = {
        "autoencoder: PSNR, dB": {"value": psnr, "low": psnr, "high": psnr, "n": n},
        "autoencoder: gradients kept": {"value": edges, "low": edges, "high": edges, "n": n},
    }
    figures |= text_alone(model, pool, network, n)
    figures |= picture_alone(model, pool, network, n, likeness)
    figures |= both(model, pool, network, n)
    if extras:
        figures |= masks(folder, pool, n)
        figures |= control(model, pool, folder, min(n, 32))
        figures |= edges_beside_picture(folder, pool, network, n)
        figures |= clips(folder, min(n, 20))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=sorted(SEEDS), default="validation")
    parser.add_argument("-n", type=int, default=48)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--adapter", default="plus")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("figures.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = measure(args.model, args.split, args.n, args.adapter)
    print(table(figures))
    print(f"score {score(figures):.4f}; motions: {', '.join(MOTIONS)}")
    args.out.write_text(
        json.dumps({"split": args.split, "score": score(figures), "figures": figures}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
