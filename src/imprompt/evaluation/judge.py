"""The judge: a small network that says which concept and which style a picture shows.

It is trained on true pictures only, apart from every model it judges, and never sees a generated picture.
Concepts it was trained on are read from a classifier head; concepts held out of training are judged by
retrieval: the picture's embedding against real pictures of the same concept *in other styles*
(:meth:`Judge.retrieve`). What the judge itself reaches on held-out real pictures is stored with it, since no
generated picture can be expected to score above that.

``python -m imprompt.evaluation.judge --data FOLDER --out FOLDER`` trains one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from imprompt.encoders.images import load_image
from imprompt.errors import ImpromptError, InputError, ModelError
from imprompt.evaluation.metrics import topk_hits
from imprompt.evaluation.rows import Rejected, Row, read_rows

SIZE = 64
"""Side in pixels of what the network looks at."""

WIDTHS = (32, 64, 128, 192)
EMBEDDING = 128


@dataclass(frozen=True)
class Gallery:
    """Embeddings of real pictures that retrieval compares with: ``N E`` unit rows with their labels."""

    embeddings: Tensor
    concepts: tuple[str, ...]
    styles: tuple[str, ...]


class Judge:
    """A trained judge: concept, style and embedding of pictures.

    Pictures are PIL images or a float tensor ``B 3 H W`` with values in ``[0, 1]``, of any size.
    ``ceiling`` holds its own accuracy on real held-out pictures, each between 0 and 1.
    """

    def __init__(
        self,
        network: JudgeNetwork,
        concepts: Sequence[str],
        styles: Sequence[str],
        *,
        gallery: Gallery | None = None,
        ceiling: dict[str, float] | None = None,
    ) -> None:
        self.network = network.eval()
        self.concepts = tuple(concepts)
        self.styles = tuple(styles)
        self.gallery = gallery
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

    def concept_topk(self, images: Sequence[Image.Image] | Tensor, k: int = 5) -> list[list[str]]:
        """The ``k`` likeliest trained concepts of each picture, best first."""
        best = self.concept_scores(images).topk(min(k, len(self.concepts)), dim=1).indices
        return [[self.concepts[index] for index in row] for row in best.tolist()]

    def style(self, images: Sequence[Image.Image] | Tensor) -> list[str]:
        """The likeliest style of each picture."""
        return [self.styles[index] for index in self.style_scores(images).argmax(1).tolist()]

    def retrieve(
        self,
        images: Sequence[Image.Image] | Tensor,
        concepts: Sequence[str],
        *,
        exclude_styles: Sequence[str | None],
        k: int = 5,
    ) -> Tensor:
        """Whether each picture's nearest ``k`` concepts contain the one it should show: bool ``B``.

        A concept's score is the mean of the two best cosines to its real pictures; pictures in
        ``exclude_styles`` (the reference's own style, per picture) do not count, so that a copy of the
        reference cannot win by its style. All concepts compete, trained and held out alike.
        Raises :class:`ModelError` when the judge has no gallery, :class:`InputError` for a concept that has
        no real picture left to compare with.
        """
        if self.gallery is None:
            raise ModelError(
                "this judge has no gallery of real pictures; train it again to judge held-out concepts"
            )
        cosines = self.embed(images) @ self.gallery.embeddings.T.float()
        names = sorted(set(self.gallery.concepts))
        position = {name: index for index, name in enumerate(names)}
        owner = torch.tensor([position[name] for name in self.gallery.concepts])
        hits = []
        for row, concept, excluded in zip(cosines, concepts, exclude_styles, strict=True):
            allowed = torch.tensor([style != excluded for style in self.gallery.styles])
            scores = _best_two(row[allowed], owner[allowed], len(names))
            index = position.get(concept)
            if index is None or scores[index] == -math.inf:
                raise InputError(
                    f"no real picture of '{concept}' outside the style '{excluded}' to compare with"
                )
            hits.append(topk_hits(scores[None], torch.tensor([index]), k))
        return torch.cat(hits)

    def save(self, path: str | Path) -> None:
        """Write weights (fp16), names, gallery and ceilings as one safetensors file, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"network.{key}": value.half() if value.is_floating_point() else value
            for key, value in self.network.state_dict().items()
        }
        about: dict[str, object] = {"concepts": self.concepts, "styles": self.styles, "ceiling": self.ceiling}
        if self.gallery is not None:
            tensors["gallery"] = self.gallery.embeddings.half()
            about["gallery"] = {"concepts": self.gallery.concepts, "styles": self.gallery.styles}
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
                f"no judge at '{path}'; train one with python -m imprompt.evaluation.judge"
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
        gallery = None
        if "gallery" in tensors:
            labels = about["gallery"]
            gallery = Gallery(tensors["gallery"].float(), tuple(labels["concepts"]), tuple(labels["styles"]))
        return cls(network, about["concepts"], about["styles"], gallery=gallery, ceiling=about["ceiling"])

    @torch.inference_mode()
    def _run(self, images: Sequence[Image.Image] | Tensor, batch: int = 64) -> tuple[Tensor, Tensor, Tensor]:
        pixels = images if isinstance(images, Tensor) else to_pixels(images).float() / 255
        if pixels.shape[-2:] != (SIZE, SIZE):
            pixels = functional.interpolate(pixels.float(), (SIZE, SIZE), mode="bilinear", antialias=True)
        parts = [self.network(part) for part in pixels.split(batch)]
        embedding, concept, style = (torch.cat(column) for column in zip(*parts, strict=True))
        return embedding, concept, style


class JudgeNetwork(nn.Module):
    """A residual network of about one million parameters on 64×64 pixels with two heads.

    The concept head compares unit vectors, so the embedding it trains serves retrieval as it is. The style
    head also reads the pixels themselves, by colour (a style's palette) and by small neighbourhood (line,
    shading), and an early stage: what tells two sets of emoji apart is lost further up.
    """

    def __init__(self, concepts: int, styles: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        )
        inner = (WIDTHS[0], *WIDTHS[:-1])
        self.stages = nn.ModuleList(
            _Block(width_in, width, stride=1 if index == 0 else 2)
            for index, (width_in, width) in enumerate(zip(inner, WIDTHS, strict=True))
        )
        self.embedding = nn.Linear(WIDTHS[-1] * 4, EMBEDDING)  # 2×2 pooled: where things are tells a face
        self.concept = nn.Parameter(torch.randn(concepts, EMBEDDING))
        self.temperature = nn.Parameter(torch.tensor(math.log(16.0)))
        self.palette = nn.Sequential(nn.Conv2d(3, 24, 1), nn.BatchNorm2d(24), nn.Hardsigmoid())
        self.texture = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.style = nn.Sequential(
            nn.Linear(24 + 2 * 24 + 2 * WIDTHS[1] + WIDTHS[-1], 128), nn.ReLU(), nn.Linear(128, styles)
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels ``B 3 64 64`` in ``[0, 1]`` to unit embedding ``B E``, concept and style logits."""
        pixels = (pixels * 2 - 1).contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        hidden = self.stem(pixels)
        outputs = []
        for stage in self.stages:
            hidden = stage(hidden)
            outputs.append(hidden)
        pooled = functional.adaptive_avg_pool2d(hidden, 2).flatten(1)
        embedding = functional.normalize(self.embedding(pooled), dim=1)
        concept = (
            embedding @ functional.normalize(self.concept, dim=1).T * self.temperature.exp().clamp(max=64)
        )
        fine = outputs[1].flatten(2)
        texture = self.texture(pixels).flatten(2)
        seen = [
            self.palette(pixels[..., ::2, ::2]).mean((2, 3)),
            texture.mean(2),
            texture.amax(2),
            fine.mean(2),
            fine.amax(2),
        ]
        style = self.style(torch.cat([*seen, hidden.mean((2, 3))], 1))
        return embedding, concept, style


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
    epochs: int = 60,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    seconds: float | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Judge, list[Rejected]]:
    """Train a judge on the rows of the ``train`` split; the others only measure it.

    Every row needs the groups ``concept`` and ``style``. ``seconds`` bounds the time: the learning rate
    follows the clock instead of the epochs, so a short budget still ends with a finished schedule.
    Returns the judge and the pictures that could not be read.
    Raises :class:`InputError` when no training row remains.
    """
    usable, pixels, rejected = _load(rows)
    training = [index for index, row in enumerate(usable) if row.trainable]
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
        network = JudgeNetwork(len(concepts), len(styles)).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=5e-2)
    own = pixels[training]
    per_epoch = math.ceil(len(training) / batch)
    started = time.monotonic()
    log(
        f"judge: {len(training)} pictures, {len(concepts)} concepts, {len(styles)} styles, "
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"
    )
    network.train()
    for epoch in range(epochs):
        totals, order = [0.0, 0.0, 0.0], torch.randperm(len(training), generator=generator)
        for number, picked in enumerate(_batches(order, batch)):
            done = (epoch * per_epoch + number) / (epochs * per_epoch)
            if seconds is not None:
                done = max(done, (time.monotonic() - started) / seconds)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, done * 20 + 0.02) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
            images, style_kept = _augment(own[picked], generator)
            _, concept_logits, style_logits = network(images)
            concept_loss = functional.cross_entropy(concept_logits, concept_of[picked], label_smoothing=0.1)
            per_row = functional.cross_entropy(style_logits, style_of[picked], reduction="none")
            style_loss = (per_row * style_kept).sum() / style_kept.sum().clamp(min=1)
            optimizer.zero_grad(set_to_none=True)
            (concept_loss + 0.5 * style_loss).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            hits = (concept_logits.argmax(1) == concept_of[picked]).float().sum()
            sums = (concept_loss.detach() * len(picked), style_loss.detach() * len(picked), hits)
            totals = [total + float(value) for total, value in zip(totals, sums, strict=True)]
        elapsed = time.monotonic() - started
        loss, style_mean, right = (total / len(training) for total in totals)
        log(
            f"judge epoch {epoch + 1}/{epochs} {elapsed:.0f}s concept loss {loss:.3f} "
            f"style loss {style_mean:.3f} concept accuracy (augmented) {right:.3f}"
        )
        if seconds is not None and elapsed > seconds:
            break

    judge = Judge(network, concepts, styles)
    judge.gallery = Gallery(
        judge.embed(pixels.float() / 255),
        tuple(row.groups["concept"] for row in usable),
        tuple(row.groups["style"] for row in usable),
    )
    judge.ceiling = _measure(judge, usable, pixels)
    return judge, rejected


def _load(rows: Sequence[Row]) -> tuple[list[Row], Tensor, list[Rejected]]:
    usable: list[Row] = []
    pixels: list[Tensor] = []
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
        pixels.append(to_pixels([picture]))
    if not usable:
        raise InputError("no picture with the groups 'concept' and 'style' could be read")
    return usable, torch.cat(pixels), rejected


def _batches(order: Tensor, batch: int) -> Iterator[Tensor]:
    for part in order.split(batch):
        if len(part) > 1:  # batch normalisation cannot see a single picture
            yield part


def _augment(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Move, scale, turn, mirror, tint, blur; white outside. Returns pictures and which keep their style.

    Blur and noise stand for what a small autoencoder does to a picture, so that the judge does not take
    softness for another style. A style is told by its very colours, so only a few pictures are tinted or made
    grey, and those teach concepts only.
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
    ink = functional.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    changed = uniform(0, 1, count) < 0.25
    grey = changed & (uniform(0, 1, count) < 0.4)
    strength = torch.where(changed, 0.12, 0.01)[:, None, None]
    mix = torch.eye(3) + uniform(-1, 1, count, 3, 3) * strength
    ink = torch.einsum("nij,njhw->nihw", mix, ink)
    ink = torch.where(grey[:, None, None, None], ink.mean(1, keepdim=True).expand_as(ink), ink)
    soft = functional.avg_pool2d(functional.pad(ink, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.where(uniform(0, 1, count) < 0.5, uniform(0, 1, count), 0.0)[:, None, None, None]
    ink = ink + (soft - ink) * amount
    noise = torch.randn(ink.shape, generator=generator) * uniform(0, 0.03, count, 1, 1, 1)
    return (1 - ink + noise).clamp(0, 1), (~changed).float()


def _best_two(cosines: Tensor, owner: Tensor, concepts: int) -> Tensor:
    """Mean of each concept's two highest cosines (of its one, if it has only one); -inf without any."""
    first = torch.full((concepts,), -math.inf).scatter_reduce(0, owner, cosines, "amax")
    is_first = cosines == first[owner]
    rest = torch.where(is_first, torch.tensor(-math.inf), cosines)
    second = torch.full((concepts,), -math.inf).scatter_reduce(0, owner, rest, "amax")
    return torch.where(second.isfinite(), (first + second) / 2, first)


def _measure(judge: Judge, rows: Sequence[Row], pixels: Tensor) -> dict[str, float]:
    """What the judge reaches on real pictures it was not trained on: the ceiling for generated ones."""
    result: dict[str, float] = {}
    for split in sorted({row.split for row in rows if not row.trainable}):
        picked = [index for index, row in enumerate(rows) if row.split == split]
        images = pixels[picked].float() / 255
        concepts = [rows[index].groups["concept"] for index in picked]
        styles = [rows[index].groups["style"] for index in picked]
        told = judge.style(images)
        result[f"{split}/style"] = sum(a == b for a, b in zip(told, styles, strict=True)) / len(picked)
        known = [place for place, name in enumerate(concepts) if name in judge.concepts]
        if known:
            scores = judge.concept_scores(images[known])
            truth = torch.tensor([judge.concepts.index(concepts[place]) for place in known])
            for k in (1, 5):
                result[f"{split}/concept_top{k}"] = float(topk_hits(scores, truth, k).float().mean())
        comparable = [place for place, index in enumerate(picked) if _has_other_style(rows, rows[index])]
        if comparable:
            hits = judge.retrieve(
                images[comparable],
                [concepts[place] for place in comparable],
                exclude_styles=[styles[place] for place in comparable],
            )
            result[f"{split}/retrieval_top5"] = float(hits.float().mean())
    return result


def _has_other_style(rows: Sequence[Row], row: Row) -> bool:
    return any(
        other.groups["concept"] == row.groups["concept"] and other.groups["style"] != row.groups["style"]
        for other in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the judge's training; prints its ceilings and writes ``judge.safetensors``."""
    parser = argparse.ArgumentParser(prog="python -m imprompt.evaluation.judge", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with metadata.jsonl")
    parser.add_argument("--only", help="use the rows with this tag, such as core")
    parser.add_argument("--out", type=Path, required=True, help="folder for judge.safetensors and judge.json")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=None, help="finish the schedule within this time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        rows, unread = read_rows(options.data, only=options.only)
        judge, unusable = train_judge(
            rows,
            epochs=options.epochs,
            batch=options.batch,
            lr=options.lr,
            seed=options.seed,
            seconds=None if options.minutes is None else options.minutes * 60,
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


if __name__ == "__main__":
    sys.exit(main())
