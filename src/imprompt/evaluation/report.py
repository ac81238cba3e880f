"""What a base and its adapters reach on held-out pictures: a table with uncertainty, and the same as JSON.

``evaluate`` draws with the plain diffusers pipeline and the adapters, and lets the judge look. Pictures held
out of every training of the model serve as references; the judge, which knows them, was trained apart, on
true pictures only. Beside each figure stands what the judge says of the *real* pictures it concerns: no
drawing can be expected to beat that. Seeds are fixed, so the same weights give the same table.

An evaluation set is a folder of two files, made by :func:`export_eval_set`: ``sheet.webp``, the held-out
pictures as one lossless sheet of square cells, row by row, and ``eval.json``: ``cell`` (pixels), ``columns``,
``pictures`` (in the sheet's order: concept, style, split, captions by kind) and ``prompts`` (captions of
*trained* pictures by kind with concept and style, without their pictures).

``python -m imprompt.evaluation.report`` evaluates the bundled model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.adapter.prompt import ImagePrompt
from imprompt.encoders.images import load_image
from imprompt.errors import ImpromptError, InputError, ModelError
from imprompt.evaluation.judge import Judge
from imprompt.evaluation.metrics import Interval, bootstrap, cosine, psnr, topk_hits
from imprompt.evaluation.rows import Row, read_rows

EMOJI = Path(__file__).parents[1] / "assets" / "emoji"
GRID = tuple(
    (profile, scale)
    for profile in ("linear", "ease-out", "style", "style-transfer", "weak-input")
    for scale in (0.4, 0.7, 1.0)
)
"""Profiles and scales among which the best for "image gives style, text gives concept" is sought."""
TRAINED = "train"
SWEPT = 24  # references on which profile and scale are chosen

FLOORS_AND_AIMS: dict[str, tuple[float, float]] = {
    "vae_psnr_db": (26, 30),
    "base_style": (0.90, 0.98),
    "base_concept_top5": (0.50, 0.85),
    "image_only_concept_top5": (0.50, 0.85),
    "image_only_style": (0.80, 0.97),
    "style_from_image_concept_from_text": (0.35, 0.75),
    "control_style_kept": (0.90, 1.0),
    "bundle_mb": (90, 60),
}
"""Project's figures to reach: name to (floor, aim). For sizes less is better."""


@dataclass(frozen=True)
class Shown:
    """One picture of an evaluation set, or (without ``image``) one prompt, and its captions."""

    concept: str
    style: str
    split: str
    captions: Mapping[str, Sequence[str]]
    image: Image.Image | None = None

    def caption(self, kind: str) -> str:
        """The first caption of a kind. Raises :class:`InputError` when there is none."""
        texts = self.captions.get(kind)
        if not texts:
            raise InputError(f"'{self.concept}' in style '{self.style}' has no caption of the kind '{kind}'")
        return texts[0]


@dataclass(frozen=True)
class EvalSet:
    """Held-out pictures, and captions of trained ones."""

    pictures: tuple[Shown, ...]
    prompts: tuple[Shown, ...]


@dataclass(frozen=True)
class Figure:
    """One measured value. ``judge_on_real`` is what the judge says of the real pictures concerned.

    ``split`` names the pictures it rests on: ``train`` or a held-out split, ``held_out`` for all of those.
    """

    name: str
    value: Interval
    adapter: str | None = None
    split: str = ""
    judge_on_real: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Compared with :data:`FLOORS_AND_AIMS`: ``aim``, ``floor``, ``below``, or nothing to compare.

        The project's figures are those of all held-out pictures (for the base alone: of trained captions);
        those of one kind of hold-out stand beside them without a verdict.
        """
        if self.name not in FLOORS_AND_AIMS or self.split not in ("", TRAINED, "held_out"):
            return ""
        floor, aim = FLOORS_AND_AIMS[self.name]
        sign = 1 if aim >= floor else -1
        reached = [sign * self.value.mean >= sign * limit for limit in (aim, floor)]
        return "aim" if reached[0] else "floor" if reached[1] else "below"


@dataclass(frozen=True)
class Report:
    """All figures, the settings they hold for, and the pictures drawn (by figure) for looking at."""

    figures: tuple[Figure, ...]
    settings: dict[str, Any]
    drawn: dict[str, list[Image.Image]] = field(default_factory=dict, repr=False, compare=False)

    def table(self) -> str:
        """The figures as aligned text, then the notes."""
        lines = [
            (
                "figure",
                "adapter",
                "pictures",
                "value",
                "95 % interval",
                "n",
                "floor",
                "aim",
                "reached",
                "on real",
            )
        ]
        for figure in self.figures:
            floor, aim = FLOORS_AND_AIMS.get(figure.name, ("", "")) if figure.verdict else ("", "")
            value = figure.value
            spread = "" if math.isnan(value.low) else f"{value.low:.3f} … {value.high:.3f}"
            real = "" if figure.judge_on_real is None else f"{figure.judge_on_real:.3f}"
            lines.append(
                (figure.name, figure.adapter or "", figure.split, f"{value.mean:.3f}", spread, f"{value.n}",
                 f"{floor}", f"{aim}", figure.verdict, real)
            )  # fmt: skip
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        ]
        notes = [
            f"{figure.name} ({figure.adapter or 'base'}): {figure.note}"
            for figure in self.figures
            if figure.note
        ]
        return "\n".join(row.rstrip() for row in [*rows, "", *notes]) + "\n"

    def to_json(self) -> str:
        """The figures and settings as JSON."""
        figures = [asdict(figure) | {"reached": figure.verdict} for figure in self.figures]
        return (
            json.dumps({"figures": figures, "settings": self.settings}, indent=2, ensure_ascii=False) + "\n"
        )


def export_eval_set(
    data: str | Path,
    out: str | Path,
    *,
    only: str | None = None,
    concepts: Collection[str] | None = None,
    cell: int = 128,
    pictures: int = 400,
    prompts: int = 400,
) -> Path:
    """Write the evaluation set of a data folder into ``out``; returns ``out``.

    ``only`` takes the rows with this tag, ``concepts`` those of these concepts.

    Takes at most ``pictures`` held-out pictures (each kind of hold-out alike, in the order
    of a hash of their names) and the captions of at most ``prompts`` trained ones.
    Raises :class:`InputError` when nothing is held out.
    """
    rows, _ = read_rows(data, only=only)
    rows = [row for row in rows if concepts is None or row.groups.get("concept") in concepts]
    held_out = _by_hash(
        [row for row in rows if not row.trainable and {"concept", "style"} <= row.groups.keys()]
    )
    if not held_out:
        raise InputError(f"'{data}' holds out no picture: give rows a split such as 'held_out_concept'")
    splits = sorted({row.split for row in held_out})
    share = math.ceil(pictures / len(splits))
    chosen = [row for split in splits for row in [row for row in held_out if row.split == split][:share]]
    trained = _by_hash([row for row in rows if row.trainable and {"concept", "style"} <= row.groups.keys()])
    columns = math.ceil(math.sqrt(len(chosen)))
    sheet = Image.new("RGB", (columns * cell, math.ceil(len(chosen) / columns) * cell), "white")
    for place, row in enumerate(chosen):
        picture = load_image(row.file)
        if picture.size != (cell, cell):
            picture = picture.resize((cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(picture, (place % columns * cell, place // columns * cell))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "sheet.webp", lossless=True, method=6)
    about = {
        "cell": cell,
        "columns": columns,
        "pictures": [_record(row) for row in chosen],
        "prompts": [_record(row) for row in trained[:prompts]],
    }
    (out / "eval.json").write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")
    return out


def read_eval_set(folder: str | Path) -> EvalSet:
    """Read what :func:`export_eval_set` wrote. Raises :class:`InputError` when it is missing or damaged."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
        cell, columns = int(about["cell"]), int(about["columns"])
        records, prompts = about["pictures"], about["prompts"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"no evaluation set at '{folder}': {error}; make one with export_eval_set"
        ) from error
    sheet = load_image(folder / "sheet.webp")
    if sheet.width < columns * cell or sheet.height < math.ceil(len(records) / columns) * cell:
        raise InputError(
            f"'{folder / 'sheet.webp'}' is too small for the {len(records)} pictures of eval.json"
        )
    pictures = []
    for place, record in enumerate(records):
        left, top = place % columns * cell, place // columns * cell
        pictures.append(Shown(**record, image=sheet.crop((left, top, left + cell, top + cell))))
    return EvalSet(tuple(pictures), tuple(Shown(**record) for record in prompts))


def evaluate(
    base: str | Path = EMOJI,
    *,
    eval_set: EvalSet | None = None,
    judge: Judge | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    n: int = 48,
    steps: int = 20,
    guidance: float = 5.0,
    batch: int = 8,
    seed: int = 0,
    grid: Sequence[tuple[str, float]] = GRID,
    device: str = "cpu",
    quiet: bool = False,
) -> Report:
    """Measure a base and its adapters; everything defaults to the bundled model.

    ``n`` pictures are drawn for each figure. "Image gives style, text gives concept" chooses profile and
    scale of ``grid`` on one half of the references and is measured on the other half, so the choice does not
    flatter the figure. Every picture has its own seed, so the figures do not depend on ``batch``.
    Raises :class:`ModelError` when base, judge or an adapter cannot be loaded, :class:`InputError` without an
    evaluation set.
    """
    base = EMOJI if str(base) == "emoji" else Path(base)
    eval_set = eval_set or read_eval_set(base / "eval")
    judge = judge or Judge.load(base / "judge.safetensors")
    if adapters is None:
        adapters = {path.stem: path for path in sorted((base / "adapters").glob("*.safetensors"))}
    pipe = _load(base, device)
    run = _Run(
        pipe, judge, eval_set, n=n, steps=steps, guidance=guidance, batch=batch, seed=seed, quiet=quiet
    )
    started = time.monotonic()
    figures = [run.autoencoder(), *run.text_only()]
    for name, path in adapters.items():
        adapter = IPAdapter.from_pretrained(path)
        adapter.attach(pipe)
        try:
            figures += run.image_only(name, adapter)
            figures += run.style_from_image(name, adapter, grid)
            figures += run.similarity(name, adapter)
        finally:
            adapter.detach()
    if (base / "controlnet-canny").is_dir():
        from imprompt.evaluation.control import control_figures  # which reads this module

        named = next(((name, IPAdapter.from_pretrained(path)) for name, path in adapters.items()), None)
        shown = EvalSet(tuple(run.references), eval_set.prompts)
        found, drawn = control_figures(
            pipe, base / "controlnet-canny", judge, shown, named,
            n=min(n, 24), steps=steps, guidance=guidance, batch=batch, seed=seed,
        )  # fmt: skip
        figures += found
        run.drawn |= drawn
    if (base / "motion").is_dir() and (base / "eval" / "clips").is_dir():
        from imprompt.evaluation.motion import evaluate_motion  # which reads this module

        moving = evaluate_motion(
            base, motion=None if base == EMOJI else str(base / "motion"), eval_set=eval_set, judge=judge,
            n=min(n, 6), steps=steps, guidance=guidance, seed=seed, device=device,
        )  # fmt: skip
        figures += moving.figures
        run.drawn |= moving.drawn
    size = sum(file.stat().st_size for file in base.rglob("*") if file.is_file()) / 1e6
    figures.append(
        Figure("bundle_mb", Interval(size, math.nan, math.nan, 1), note="everything in the base's folder")
    )
    settings = {
        "base": base.name, "n": n, "steps": steps, "guidance": guidance, "seed": seed,
        "scheduler": type(pipe.scheduler).__name__, "judge": judge.ceiling,
        "sweeps": run.sweeps, "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    return Report(tuple(figures), settings, run.drawn)


class _Run:
    """One evaluation: pipeline, judge and set, and how pictures are drawn and looked at."""

    def __init__(
        self, pipe: Any, judge: Judge, eval_set: EvalSet, *, n: int, steps: int, guidance: float, batch: int,
        seed: int, quiet: bool,
    ) -> None:  # fmt: skip
        self.pipe, self.judge, self.set = pipe, judge, eval_set
        self.n, self.steps, self.guidance, self.batch, self.seed = n, steps, guidance, batch, seed
        self.quiet = quiet
        self.drawn: dict[str, list[Image.Image]] = {}
        self.sweeps: dict[str, list[dict[str, object]]] = {}
        known = set(judge.concepts)
        self.trained = {prompt.concept for prompt in eval_set.prompts}
        self.prompts = [prompt for prompt in eval_set.prompts if prompt.concept in known][:n]
        self.references = [shown for shown in _alternate(eval_set.pictures) if shown.concept in known][:n]
        if not self.prompts or not self.references:
            raise InputError("the evaluation set has no prompt or no picture of a concept the judge knows")

    @torch.inference_mode()
    def autoencoder(self) -> Figure:
        """What the VAE alone loses on held-out pictures."""
        vae, values = self.pipe.vae, []
        for part in _chunks(self.set.pictures, self.batch):
            pixels = _pixels([shown.image for shown in part if shown.image is not None])
            latent = vae.encode((pixels * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mean
            decoded = (vae.decode(latent).sample.float().cpu() / 2 + 0.5).clamp(0, 1)
            values.append(psnr(decoded, pixels).clamp(max=100))
        return Figure(
            "vae_psnr_db", bootstrap(torch.cat(values)), split="held_out", note="posterior mean, all pictures"
        )

    def text_only(self) -> list[Figure]:
        """The base without any adapter, on full captions: of trained pictures, and of pairs held out."""
        pairs = [shown for shown in self.references if shown.concept in self.trained]
        figures = []
        for split, shown in ((TRAINED, self.prompts), ("held_out_pair", pairs)):
            if not shown:
                continue
            images = self._draw(f"base {split}", [one.caption("full") for one in shown])
            styles = [one.style for one in shown]
            figures += [
                Figure("base_style", bootstrap(self._style_hits(images, styles)), split=split),
                Figure("base_concept_top5", bootstrap(self._concept_hits(images, shown)), split=split),
                Figure("base_concept_top1", bootstrap(self._concept_hits(images, shown, 1)), split=split),
            ]
        return figures

    def image_only(self, name: str, adapter: IPAdapter) -> list[Figure]:
        """A held-out picture as the only prompt, at scale 1: all of them, then each kind of hold-out."""
        references = self.references
        images = self._draw(f"{name} image only", [""] * len(references), adapter, references)
        real = [reference.image for reference in references if reference.image is not None]
        styles = [reference.style for reference in references]
        measured = (
            (
                "image_only_concept_top5",
                self._concept_hits(images, references),
                self._concept_hits(real, references),
            ),
            ("image_only_style", self._style_hits(images, styles), self._style_hits(real, styles)),
        )
        figures = []
        for figure, hits, on_real in measured:
            for split in ("held_out", *sorted({reference.split for reference in references})):
                of_split = torch.tensor([split in ("held_out", shown.split) for shown in references])
                value = bootstrap(hits[of_split])
                figures.append(Figure(figure, value, name, split, float(on_real[of_split].mean())))
        return figures

    def style_from_image(
        self, name: str, adapter: IPAdapter, grid: Sequence[tuple[str, float]]
    ) -> list[Figure]:
        """Reference of one style, text of another, trained concept: both must be right.

        Profile and scale are chosen on every second reference, at most :data:`SWEPT` of them, and measured on
        the others, so that the choice does not flatter the figure.
        """
        choosing = self._pairs(self.references[1::2][:SWEPT] or self.references)
        measuring = self._pairs(self.references[::2])
        found = {
            (profile, scale): self._both(f"{name} {profile} {scale:g}", adapter, choosing, profile, scale)
            for profile, scale in grid
        }
        best = max(found, key=lambda setting: float(found[setting][0].mean()))
        both, concept, style = self._both(f"{name} style from image", adapter, measuring, *best)
        self.sweeps[name] = [
            {"profile": profile, "scale": scale}
            | dict(zip(("both", "concept", "style"), (float(hits.mean()) for hits in three), strict=True))
            for (profile, scale), three in found.items()
        ]
        tried = ", ".join(
            f"{profile} {scale:g}: {float(hits[0].mean()):.2f}" for (profile, scale), hits in found.items()
        )
        chosen = f"profile {best[0]}, scale {best[1]:g} (chosen on {len(choosing)} other references: {tried})"
        return [
            Figure("style_from_image_concept_from_text", bootstrap(both), name, "held_out", note=chosen),
            Figure("  concept from text, top 5", bootstrap(concept), name, "held_out"),
            Figure("  style from image", bootstrap(style), name, "held_out"),
        ]

    def similarity(self, name: str, adapter: IPAdapter) -> list[Figure]:
        """The same text and seed with and without the adapter: how much nearer the reference it comes.

        The text names the reference's own concept where that was trained, else nothing; so what rises is what
        words do not say.
        """
        references = self.references
        texts = [shown.caption("concept") if shown.concept in self.trained else "" for shown in references]
        without = self._draw(f"{name} same text without", texts)
        with_image = self._draw(f"{name} same text with", texts, adapter, references)
        target = self.judge.embed([shown.image for shown in references if shown.image is not None])
        rise = cosine(self.judge.embed(with_image), target) - cosine(self.judge.embed(without), target)
        styles = [shown.style for shown in references]
        style_rise = self._style_hits(with_image, styles) - self._style_hits(without, styles)
        likeness, share = "cosine of the judge's embeddings, paired", "share in the reference's style, paired"
        return [
            Figure("similarity_rise", bootstrap(rise), name, "held_out", note=likeness),
            Figure("style_match_rise", bootstrap(style_rise), name, "held_out", note=share),
        ]

    def _both(
        self, name: str, adapter: IPAdapter, pairs: Sequence[tuple[Shown, Shown]], profile: str, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        references = [reference for reference, _ in pairs]
        texts = [prompt.caption("concept") for _, prompt in pairs]
        images = self._draw(name, texts, adapter, references, scale=scale, profile=profile)
        concept = self._concept_hits(images, [prompt for _, prompt in pairs])
        style = self._style_hits(images, [reference.style for reference in references])
        return concept * style, concept, style

    def _pairs(self, references: Sequence[Shown]) -> list[tuple[Shown, Shown]]:
        """Each reference with a prompt of another concept, the same in every run."""
        pairs = []
        for place, reference in enumerate(references):
            others = [prompt for prompt in self.prompts if prompt.concept != reference.concept]
            if not others:
                raise InputError("the evaluation set has prompts of one concept only")
            pairs.append((reference, others[place * 7 % len(others)]))
        return pairs

    def _concept_hits(self, images: Sequence[Image.Image], wanted: Sequence[Shown], k: int = 5) -> Tensor:
        """1 where the judge names the wanted concept among its first ``k`` of all it knows, else 0."""
        truth = torch.tensor([self.judge.concepts.index(shown.concept) for shown in wanted])
        return topk_hits(self.judge.concept_scores(images), truth, k).float()

    def _style_hits(self, images: Sequence[Image.Image], styles: Sequence[str]) -> Tensor:
        told = self.judge.style(images)
        return torch.tensor([float(a == b) for a, b in zip(told, styles, strict=True)])

    def _draw(
        self,
        name: str,
        texts: Sequence[str],
        adapter: IPAdapter | None = None,
        references: Sequence[Shown] = (),
        *,
        scale: float = 1.0,
        profile: str = "linear",
    ) -> list[Image.Image]:
        images: list[Image.Image] = []
        with tqdm(total=len(texts), desc=name, unit="picture", disable=self.quiet, leave=False) as bar:
            for start in range(0, len(texts), self.batch):
                part = list(texts[start : start + self.batch])
                if adapter is not None:
                    shown = references[start : start + self.batch]
                    adapter.set_batch([ImagePrompt(one.image, scale=scale, profile=profile) for one in shown])
                generators = [_generator(self.seed, start + place) for place in range(len(part))]
                images += self.pipe(
                    part, num_inference_steps=self.steps, guidance_scale=self.guidance, generator=generators
                ).images
                bar.update(len(part))
        if adapter is not None:
            adapter.clear_prompt()
        self.drawn[name] = images
        return images


def _load(base: Path, device: str) -> Any:
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(str(base), torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ModelError(f"base '{base}' is no diffusers folder that can be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _alternate(pictures: Sequence[Shown]) -> list[Shown]:
    """Pictures of the kinds of hold-out in turn, so that any first ``n`` hold as many of each."""
    splits = sorted({shown.split for shown in pictures})
    columns = [[shown for shown in pictures if shown.split == split] for split in splits]
    longest = max((len(column) for column in columns), default=0)
    return [column[place] for place in range(longest) for column in columns if place < len(column)]


def _record(row: Row) -> dict[str, Any]:
    captions = {kind: list(texts) for kind, texts in row.captions.items()}
    groups = row.groups
    return {"concept": groups["concept"], "style": groups["style"], "split": row.split, "captions": captions}


def _by_hash(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: hashlib.blake2b(row.name.encode()).hexdigest())


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    import numpy as np

    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _chunks(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def main(arguments: Sequence[str] | None = None, *, show: Callable[[str], None] = print) -> int:
    """Command line: evaluate a base, print the table, and write the JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m imprompt.evaluation.report")
    parser.add_argument(
        "--base", type=Path, default=EMOJI, help="diffusers folder with eval/ and judge.safetensors"
    )
    parser.add_argument("--judge", type=Path, help="another judge")
    parser.add_argument("--eval-set", type=Path, help="another evaluation set")
    parser.add_argument(
        "--adapter", type=Path, action="append", help="adapter file (repeatable); default: the base's"
    )
    parser.add_argument("-n", type=int, default=48, help="pictures a figure")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write figures and settings here")
    options = parser.parse_args(arguments)
    try:
        report = evaluate(
            options.base,
            eval_set=None if options.eval_set is None else read_eval_set(options.eval_set),
            judge=None if options.judge is None else Judge.load(options.judge),
            adapters=None if options.adapter is None else {path.stem: path for path in options.adapter},
            n=options.n,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed,
            device=options.device,
        )
    except ImpromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    show(report.table())
    if options.json is not None:
        options.json.write_text(report.to_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
