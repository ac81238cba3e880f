"""The judge: a small network that says which concept and which style a picture shows.

It is trained on true pictures only, apart from every model it judges: nothing of it reaches the text encoder,
the image encoder, the UNet or an adapter. So it may, and must, know the pictures those models never saw: an
adapter shown a held-out picture is right when the judge recognises that picture's concept, which only a judge
that knows the concept can do. It therefore learns from *all* pictures, held out or not, each moved, bent,
blurred, tinted and (with ``--vae``) sent through the autoencoder, so that it reads drawings that are soft and
wrong in detail. Two kinds of figures are kept with it in ``ceiling``:

- ``degraded/…``: what it says of the same pictures once degraded afresh. No drawing can be expected to score
  above that.
- ``unseen/…``: what a second judge, trained the same way *without* the held-out pictures, says of them: how
  far such a judge reads pictures it has not seen, and so how little of its verdict is known by heart.

``python recipes/emoji/lab/bundled_judge.py --data FOLDER --out FOLDER`` trains one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from imprompt.data.rows import Rejected, Row, read_dataset
from imprompt.encoders.images import load_image
from imprompt.errors import ImpromptError, InputError, ModelError
from imprompt.evaluation.metrics import topk_hits

SIZE = 64
"""Side in pixels of what the network looks at."""

WIDTHS = (32, 64, 128, 192)
STYLE_WIDTHS = (16, 32, 64, 96)
EMBEDDING = 128

LATENT_NOISE = (0.0, 0.15, 0.3)
"""Noise on the autoencoder's latents, as a share of their spread: how a generator's small errors look."""


class Judge:
    """A trained judge: concept, style and embedding of pictures.

    Pictures are PIL images or a float tensor ``B 3 H W`` with values in ``[0, 1]``, of any size.
    ``ceiling`` holds its own accuracies, each between 0 and 1 (see the module's text).
    """

    def __init__(
        self,
        network: JudgeNetwork,
        concepts: Sequence[str],
        styles: Sequence[str],
        *,
        ceiling: dict[str, float] | None = None,
    ) -> None:
        self.network = network.eval()
        self.concepts = tuple(concepts)
        self.styles = tuple(styles)
        self.ceiling = dict(ceiling or {})

    def embed(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Unit embeddings ``B E``: near for the same concept, whatever the style."""
        return self._run(images)[0]

    def concept_scores(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Scores ``B K`` over the concepts the judge was trained on, in the order of ``concepts``."""
        return self._run(images)[1]

    def style_scores(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Scores ``B S`` over ``styles``."""
        return self._run(images)[2]

    def style(self, images: Sequence[Image.Image] | Tensor) -> list[str]:
        """The likeliest style of each picture."""
        return [self.styles[index] for index in self.style_scores(images).argmax(1).tolist()]

    def save(self, path: str | Path) -> None:
        """Write weights (fp16), names and ceilings as one safetensors file, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"network.{key}": value.half() if value.is_floating_point() else value
            for key, value in self.network.state_dict().items()
        }
        about: dict[str, object] = {"concepts": self.concepts, "styles": self.styles, "ceiling": self.ceiling}
        part = path.with_name(path.name + ".part")
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, part, {"judge": json.dumps(about)}
        )
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Judge:
        """Read what :meth:`save` wrote. Raises :class:`ModelError` for anything else."""
        path = Path(path)
        if path.is_dir():
            path = path / "judge.safetensors"
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["judge"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise ModelError(
                f"no judge at '{path}'; train one with python recipes/emoji/lab/bundled_judge.py"
            ) from error
        except (SafetensorError, KeyError, ValueError) as error:
            raise ModelError(f"'{path}' is not a judge written by imprompt: {error}") from error
        network = JudgeNetwork(len(about["concepts"]), len(about["styles"]))
        weights = {key[8:]: value for key, value in tensors.items() if key.startswith("network.")}
        try:
            network.load_state_dict(
                {
                    key: value.float() if value.dtype == torch.float16 else value
                    for key, value in weights.items()
                }
            )
        except RuntimeError as error:
            raise ModelError(f"the weights in '{path}' do not fit the judge's network: {error}") from error
        return cls(network, about["concepts"], about["styles"], ceiling=about["ceiling"])

    @torch.inference_mode()
    def _run(self, images: Sequence[Image.Image] | Tensor, batch: int = 64) -> tuple[Tensor, Tensor, Tensor]:
        pixels = images if isinstance(images, Tensor) else to_pixels(images).float() / 255
        if pixels.shape[-2:] != (SIZE, SIZE):
            pixels = functional.interpolate(pixels.float(), (SIZE, SIZE), mode="bilinear", antialias=True)
        parts = [self.network(part) for part in pixels.split(batch)]
        embedding, concept, style = (torch.cat(column) for column in zip(*parts, strict=True))
        return embedding, concept, style


class JudgeNetwork(nn.Module):
    """Two residual eyes on 64×64 pixels, about one million parameters: one tells the concept, one the style.

    The concept's compares unit vectors, so the embedding it trains measures likeness as it is. The style's
    has weights of its own and reads statistics of every stage and of the pixels' colours: what tells two sets
    of emoji apart (palette, line, shading) is just what the other eye learns to overlook.
    """

    def __init__(self, concepts: int, styles: int) -> None:
        super().__init__()
        self.stem = _convolution(3, WIDTHS[0], stride=2, kernel=5)
        inner = (WIDTHS[0], *WIDTHS[:-1])
        self.stages = nn.Sequential(
            *(
                _Block(width_in, width, stride=1 if index == 0 else 2)
                for index, (width_in, width) in enumerate(zip(inner, WIDTHS, strict=True))
            )
        )
        self.embedding = nn.Linear(WIDTHS[-1] * 4, EMBEDDING)  # 2×2 pooled: where things are tells a face
        self.concept = nn.Parameter(torch.randn(concepts, EMBEDDING))
        self.temperature = nn.Parameter(torch.tensor(math.log(16.0)))
        self.palette = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.Hardsigmoid())
        inner = (3, *STYLE_WIDTHS[:-1])
        self.texture = nn.ModuleList(
            _convolution(width_in, width, stride=1 if index == 0 else 2)
            for index, (width_in, width) in enumerate(zip(inner, STYLE_WIDTHS, strict=True))
        )
        statistics = 32 + 2 * sum(STYLE_WIDTHS)
        self.style = nn.Sequential(
            nn.BatchNorm1d(statistics), nn.Linear(statistics, 128), nn.ReLU(), nn.Linear(128, styles)
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels ``B 3 64 64`` in ``[0, 1]`` to unit embedding ``B E``, concept and style logits."""
        pixels = (pixels * 2 - 1).contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        pooled = functional.adaptive_avg_pool2d(self.stages(self.stem(pixels)), 2).flatten(1)
        embedding = functional.normalize(self.embedding(pooled), dim=1)
        alike = embedding @ functional.normalize(self.concept, dim=1).T
        statistics = [self.palette(pixels[..., ::2, ::2]).mean((2, 3))]
        seen = pixels
        for stage in self.texture:
            seen = stage(seen)
            statistics += [seen.mean((2, 3)), seen.amax((2, 3))]
        return embedding, alike * self.temperature.exp().clamp(max=64), self.style(torch.cat(statistics, 1))


def _convolution(width_in: int, width: int, *, stride: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and width_in == width
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width)
            )
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.relu(self.body(hidden) + self.skip(hidden))


def to_pixels(images: Sequence[Image.Image], size: int = SIZE) -> Tensor:
    """PIL pictures to uint8 ``B 3 size size``, resized with an antialiasing filter."""
    import numpy as np

    arrays = [
        np.asarray(
            image.convert("RGB").resize(
                (size, size), Image.Resampling.BOX if image.width % size == 0 else Image.Resampling.BICUBIC
            )
        )
        for image in images
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def train_judge(
    rows: Sequence[Row],
    *,
    vae: Any = None,
    epochs: int = 60,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    seconds: float | None = None,
    check: bool = False,
    log: Callable[[str], None] = print,
) -> tuple[Judge, list[Rejected]]:
    """Train a judge on all rows, whatever their split, and measure it.

    Every row needs the groups ``concept`` and ``style``. ``vae`` (an ``AutoencoderKL``) adds each picture as
    that autoencoder gives it back, from exact and from noisy latents. ``seconds`` bounds the training: the
    learning rate follows the clock instead of the epochs, so a short budget still ends with a finished
    schedule. ``check`` trains another, half as long, on the ``train`` split alone, for the figures
    ``unseen/…``.
    Returns the judge and the pictures that could not be read.
    Raises :class:`InputError` when fewer than two training pictures remain.
    """
    usable, pixels, rejected = _load(rows, vae, seed)
    everything = list(range(len(usable)))
    judge = _fit(usable, pixels, everything, epochs, batch, lr, seed, seconds, log)
    trained = [index for index in everything if usable[index].trainable]
    if check and len(trained) < len(everything):
        log("the same without held-out pictures, to be measured on them")
        shorter = None if seconds is None else seconds / 2
        other = _fit(usable, pixels, trained, math.ceil(epochs / 2), batch, lr, seed, shorter, log)
        judge.ceiling |= {name: value for name, value in other.ceiling.items() if name.startswith("unseen/")}
    return judge, rejected


def _fit(
    usable: Sequence[Row], pixels: Tensor, training: Sequence[int], epochs: int, batch: int, lr: float,
    seed: int, seconds: float | None, log: Callable[[str], None],
) -> Judge:  # fmt: skip
    if len(training) < 2:
        raise InputError(
            "the judge needs at least two training pictures with the groups 'concept' and 'style'"
        )
    concepts = sorted({usable[index].groups["concept"] for index in training})
    styles = sorted({usable[index].groups["style"] for index in training})
    concept_of = torch.tensor([concepts.index(usable[index].groups["concept"]) for index in training])
    style_of = torch.tensor([styles.index(usable[index].groups["style"]) for index in training])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = JudgeNetwork(len(concepts), len(styles))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stub
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=5e-2)
    own = pixels[:, training]
    per_epoch = math.ceil(len(training) / batch)
    started = time.monotonic()
    log(
        f"judge: {len(training)} pictures in {len(pixels)} versions, {len(concepts)} concepts, {len(styles)} "
        f"styles, {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"
    )
    network.train()
    for epoch in range(epochs):
        totals, order = [0.0, 0.0, 0.0, 0.0], torch.randperm(len(training), generator=generator)
        for number, picked in enumerate(_batches(order, batch)):
            done = (epoch * per_epoch + number) / (epochs * per_epoch)
            if seconds is not None:
                done = max(done, (time.monotonic() - started) / seconds)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, done * 20 + 0.02) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
            version = torch.randint(len(own), (len(picked),), generator=generator)
            images, style_kept = augment_for_judge(own[version, picked], generator)
            _, concept_logits, style_logits = network(images)
            concept_loss = functional.cross_entropy(concept_logits, concept_of[picked], label_smoothing=0.1)
            per_row = functional.cross_entropy(style_logits, style_of[picked], reduction="none")
            style_loss = (per_row * style_kept).sum() / style_kept.sum().clamp(min=1)
            optimizer.zero_grad(set_to_none=True)
            (concept_loss + style_loss).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            hits = (concept_logits.argmax(1) == concept_of[picked]).float().sum()
            style_hits = (style_logits.argmax(1) == style_of[picked]).float().sum()
            sums = (concept_loss.detach() * len(picked), style_loss.detach() * len(picked), hits, style_hits)
            totals = [total + float(value) for total, value in zip(totals, sums, strict=True)]
        elapsed = time.monotonic() - started
        loss, style_mean, right, style_right = (total / len(training) for total in totals)
        log(
            f"judge epoch {epoch + 1}/{epochs} {elapsed:.0f}s concept loss {loss:.3f} style loss "
            f"{style_mean:.3f} right on augmented pictures: concept {right:.3f}, style {style_right:.3f}"
        )
        if seconds is not None and elapsed > seconds:
            break

    judge = Judge(network, concepts, styles)
    judge.ceiling = _measure(judge, usable, pixels, set(training), generator)
    return judge


def _load(rows: Sequence[Row], vae: Any, seed: int) -> tuple[list[Row], Tensor, list[Rejected]]:
    """The rows that can be used and their pictures, uint8 ``V N 3 64 64``: as they are, then by the VAE."""
    usable: list[Row] = []
    pictures: list[Image.Image] = []
    rejected: list[Rejected] = []
    for row in rows:
        if "concept" not in row.groups or "style" not in row.groups:
            rejected.append(Rejected(row.name, "no groups 'concept' and 'style'"))
            continue
        try:
            picture = load_image(row.file)
        except ImpromptError as error:
            rejected.append(Rejected(row.name, str(error)))
            continue
        usable.append(row)
        pictures.append(picture)
    if not usable:
        raise InputError("no picture with the groups 'concept' and 'style' could be read")
    versions = to_pixels(pictures)[None]
    if vae is not None:
        versions = torch.cat([versions, _through(vae, pictures, torch.Generator().manual_seed(seed))])
    return usable, versions, rejected


@torch.inference_mode()
def _through(vae: Any, pictures: Sequence[Image.Image], generator: torch.Generator) -> Tensor:
    """Pictures as the autoencoder gives them back, at each level of :data:`LATENT_NOISE`: ``V N 3 64 64``."""
    parts = []
    for start in range(0, len(pictures), 32):
        pixels = to_pixels(pictures[start : start + 32], vae.config.sample_size or 128).float() / 127.5 - 1
        latents = vae.encode(pixels).latent_dist.mean
        versions = []
        for level in LATENT_NOISE:
            spread = level / vae.config.scaling_factor
            noisy = latents + spread * torch.randn(latents.shape, generator=generator)
            decoded = functional.interpolate(vae.decode(noisy).sample, (SIZE, SIZE), mode="area")
            versions.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        parts.append(torch.stack(versions))
    return torch.cat(parts, 1)


def _batches(order: Tensor, batch: int) -> Iterator[Tensor]:
    for part in order.split(batch):
        if len(part) > 1:  # batch normalisation cannot see a single picture
            yield part


def augment_for_judge(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Move, scale, turn, mirror, bend, tint, coarsen, blur; white outside. Also marks who keep style.

    ``pixels`` is uint8 ``B 3 64 64``; the pictures returned are float in ``[0, 1]``, the mark is ``B``.
    Coarse pixels, blur and noise stand for what a small autoencoder and a hasty generator do, so that the
    judge does not take softness for another style; bent outlines stand for clumsy drawing. A style is told by
    its very colours, so only a few pictures are tinted or made grey, and those teach concepts only.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    count = len(pixels)
    ink = 1 - pixels.float() / 255  # inverted: zeros that move in from outside are white
    angle, scale = uniform(-0.2, 0.2, count), uniform(0.8, 1.25, count)
    mirror = torch.where(uniform(0, 1, count) < 0.5, -1.0, 1.0)
    stretch = uniform(0.9, 1.1, count)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * scale * mirror * stretch, -angle.sin() * scale
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * scale * mirror, angle.cos() * scale / stretch
    theta[:, :, 2] = uniform(-0.15, 0.15, count, 2)
    grid = functional.affine_grid(theta, [count, 3, SIZE, SIZE], align_corners=False)
    bend = torch.randn(count, 2, 5, 5, generator=generator) * uniform(0, 0.06, count, 1, 1, 1)
    grid = grid + functional.interpolate(bend, (SIZE, SIZE), mode="bilinear", align_corners=True).movedim(
        1, -1
    )
    ink = functional.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    changed = uniform(0, 1, count) < 0.25
    grey = changed & (uniform(0, 1, count) < 0.4)
    strength = torch.where(changed, 0.12, 0.02)[:, None, None]
    mix = torch.eye(3) + uniform(-1, 1, count, 3, 3) * strength
    ink = torch.einsum("nij,njhw->nihw", mix, ink)
    ink = torch.where(grey[:, None, None, None], ink.mean(1, keepdim=True).expand_as(ink), ink)
    ink = _coarsen(ink, uniform(0, 1, count))
    soft = functional.avg_pool2d(functional.pad(ink, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.where(uniform(0, 1, count) < 0.5, uniform(0, 1, count), 0.0)[:, None, None, None]
    ink = ink + (soft - ink) * amount
    noise = torch.randn(ink.shape, generator=generator) * uniform(0, 0.04, count, 1, 1, 1)
    return (1 - ink + noise).clamp(0, 1), (~changed).float()


def _coarsen(ink: Tensor, chance: Tensor) -> Tensor:
    """A tenth of the pictures at half, and another at a third of the resolution, smoothly enlarged again."""
    for low, side in ((0.0, SIZE // 2), (0.1, SIZE // 3)):
        picked = (chance >= low) & (chance < low + 0.1)
        if picked.any():
            small = functional.interpolate(ink[picked], (side, side), mode="area")
            ink[picked] = functional.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return ink


def _measure(
    judge: Judge, rows: Sequence[Row], pixels: Tensor, training: set[int], generator: torch.Generator
) -> dict[str, float]:
    """Shares that are right: of the pictures trained on, degraded afresh; of those never seen, as they are.

    Pictures whose colours the degradation changed do not count for style.
    """
    result: dict[str, float] = {}

    def add(name: str, picked: Sequence[int], images: Tensor, kept: Tensor) -> None:
        truth = [rows[index].groups for index in picked]
        told = judge.style(images)
        right = torch.tensor([a == b["style"] for a, b in zip(told, truth, strict=True)])
        result[f"{name}/style"] = float(right[kept].float().mean())
        known = [place for place, groups in enumerate(truth) if groups["concept"] in judge.concepts]
        if known:
            scores = judge.concept_scores(images[known])
            wanted = torch.tensor([judge.concepts.index(truth[place]["concept"]) for place in known])
            for k in (1, 5):
                result[f"{name}/concept_top{k}"] = float(topk_hits(scores, wanted, k).float().mean())

    seen = sorted(training)
    version = torch.randint(len(pixels), (len(seen),), generator=generator)
    images, kept = augment_for_judge(pixels[version, seen], generator)
    if kept.any():
        add("degraded", seen, images, kept.bool())
    if len(pixels) > 1:
        add("autoencoder", seen, pixels[1, seen].float() / 255, torch.ones(len(seen), dtype=torch.bool))
    unseen = [index for index in range(len(rows)) if index not in training]
    for split in sorted({rows[index].split for index in unseen}):
        picked = [index for index in unseen if rows[index].split == split]
        images = pixels[0, picked].float() / 255
        add(f"unseen/{split}", picked, images, torch.ones(len(picked), dtype=torch.bool))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the judge's training; prints its ceilings and writes ``judge.safetensors``."""
    parser = argparse.ArgumentParser(prog="python recipes/emoji/lab/bundled_judge.py", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with metadata.jsonl")
    parser.add_argument("--only", help="use the rows with this tag, such as core")
    parser.add_argument("--concepts", type=Path, help="use the concepts named in this file, one a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for judge.safetensors and judge.json")
    parser.add_argument("--vae", type=Path, help="folder of the autoencoder whose softness it must bear")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=None, help="finish the schedule within this time")
    parser.add_argument(
        "--check", action="store_true",
        help="then train another, half as long, without held-out pictures and measure it on them",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    try:
        data = read_dataset(options.data, only=options.only, captions="optional")
        rows, unread = data.rows, data.rejected
        if options.concepts is not None:
            wanted = set(options.concepts.read_text(encoding="utf-8").split())
            rows = [row for row in rows if row.groups.get("concept") in wanted]
        vae = None if options.vae is None else _load_vae(options.vae)
        judge, unusable = train_judge(
            rows,
            vae=vae,
            epochs=options.epochs,
            batch=options.batch,
            lr=options.lr,
            seed=options.seed,
            seconds=None if options.minutes is None else options.minutes * 60,
            check=options.check,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except ImpromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for left_out in (*unread, *unusable):
        print(f"left out {left_out}", file=sys.stderr)
    judge.save(options.out / "judge.safetensors")
    (options.out / "judge.json").write_text(json.dumps(judge.ceiling, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(judge.ceiling, indent=2))
    return 0


def _load_vae(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(str(folder), torch_dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise ModelError(f"'{folder}' holds no autoencoder that can be loaded: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
