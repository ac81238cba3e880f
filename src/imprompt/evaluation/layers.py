"""What each cross-attention of the bundled UNet does with a picture, measured; and its profiles from that.

Pairs of a held-out reference and the text of another concept are drawn with the image scale at one block
only, and everywhere but there, and looked at by the judge: does the drawing have the reference's *style*, the
text's *concept*, the reference's concept (a *leak*), and its *layout* (correlation of 16×16 grey pixels)? A
block's
effect is the mean of what it brings alone and what is missing without it, as a share of what all bring. From
that the roles of ``adapter.weighting`` follow by :func:`roles_from`; every profile is then measured at three
scales, and two references are shown left and right of one picture, to see on which side each appears.

``python -m imprompt.evaluation.layers --out FOLDER`` writes ``layers.json``, ``layers.png`` and
``masks.png`` and prints the tables; with its defaults (24 pairs) about six minutes on one free core. What is
measured is written when it is there, the blocks first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from imprompt.adapter.backbones.unet import cross_attentions
from imprompt.adapter.ipadapter import IPAdapter
from imprompt.adapter.prompt import EncodedFaces, EncodedPictures, ImagePrompt, PromptFields
from imprompt.errors import ImpromptError, InputError
from imprompt.evaluation.charts import bars, grid
from imprompt.evaluation.judge import Judge
from imprompt.evaluation.metrics import bootstrap, cosine, topk_hits
from imprompt.evaluation.report import EMOJI, EvalSet, Shown, read_eval_set

PROFILES = ("linear", "style", "style-transfer", "composition", "weak-input")
SCALES = (0.4, 0.7, 1.0)
MEASURES = ("style", "concept", "leak", "layout")
"""Shares of the drawings: the reference's style, the text's concept among the judge's first five, the
reference's concept among them; and the mean correlation of the layout."""
_FINE = {"style": "style_p", "leak": "leak_p", "layout": "layout", "likeness": "likeness"}
"""What a block's share is computed from: probabilities, which few pictures tell apart better than hits.
Likeness is the cosine of the judge's embeddings, for which all that a picture says counts; it tells most."""


@dataclass(frozen=True)
class Bench:
    """A pipeline with its adapter and judge, and pairs to draw: (reference, prompt of another concept)."""

    pipe: Any
    adapter: IPAdapter
    judge: Judge
    pairs: Sequence[tuple[Shown, Shown]]
    steps: int = 10
    guidance: float = 5.0
    batch: int = 8
    _seen: dict[int, EncodedPictures | EncodedFaces] = field(default_factory=dict)
    """Each reference's features, encoded once for all settings."""

    @classmethod
    def of(
        cls, pipe: Any, adapter: IPAdapter, judge: Judge, shown: EvalSet, n: int, **settings: Any
    ) -> Bench:
        """The first ``n`` held-out references of concepts that the judge knows, each with the concept caption
        of a trained picture. Raises :class:`InputError` when there are none."""
        known = set(judge.concepts)
        references = [one for one in shown.pictures if one.concept in known and one.style in judge.styles]
        prompts = [one for one in shown.prompts if one.concept in known]
        pairs = []
        for place, reference in enumerate(references[:: max(1, len(references) // n)][:n]):
            others = [one for one in prompts if one.concept != reference.concept]
            if others:
                pairs.append((reference, others[place * 7 % len(others)]))
        if not pairs:
            raise InputError("the evaluation set has no reference and text of concepts that the judge knows.")
        return cls(pipe, adapter, judge, pairs, **settings)

    def measure(self, profile: str | Sequence[float], scale: float) -> dict[str, Tensor]:
        """Per pair :data:`MEASURES`, the judge's probabilities ``style_p`` and ``leak_p``, and ``likeness``,
        drawn with this profile and scale; the same seeds for every setting."""
        images = self.draw(profile, scale)
        references = [reference for reference, _ in self.pairs]
        real = [reference.image for reference in references if reference.image is not None]
        scores = self.judge.concept_scores(images)
        wanted_styles = torch.tensor([self.judge.styles.index(one.style) for one in references])
        of_styles = self.judge.style_scores(images)
        style = of_styles.argmax(1) == wanted_styles
        chance = of_styles.softmax(1).gather(1, wanted_styles[:, None])
        kinds = torch.tensor([self.judge.concepts.index(one.concept) for one in references])
        leaked = scores.softmax(1).gather(1, kinds[:, None])
        concept, leak = (
            topk_hits(scores, torch.tensor([self.judge.concepts.index(one.concept) for one in wanted]), 5)
            for wanted in ([prompt for _, prompt in self.pairs], references)
        )
        layout = cosine(_grey(images), _grey(real))
        likeness = cosine(self.judge.embed(images), self.judge.embed(real))
        values = (style, concept, leak, layout, chance, leaked, likeness)
        names = (*MEASURES, "style_p", "leak_p", "likeness")
        return {name: v.double().flatten() for name, v in zip(names, values, strict=True)}

    def draw(self, profile: str | Sequence[float], scale: float) -> list[Image.Image]:
        """One picture a pair."""
        drawn: list[Image.Image] = []
        for start in range(0, len(self.pairs), self.batch):
            part = self.pairs[start : start + self.batch]
            self.adapter.set_batch([self._shown(one, scale=scale, profile=profile) for one, _ in part])
            drawn += self._call([text.caption("concept") for _, text in part], start)
        self.adapter.clear_prompt()
        return drawn

    def sides(self) -> tuple[dict[str, float], list[Image.Image]]:
        """Two references, one masked to each half of a picture twice as wide: how often each half is nearer
        to the reference shown there than to the other, by the judge's embedding; chance is 0.5."""
        side = int(self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor)
        left = torch.zeros(side, 2 * side)
        left[:, :side] = 1
        drawn: list[Image.Image] = []
        twos = [
            (one, other)
            for (one, _), (other, _) in zip(self.pairs, [*self.pairs[1:], self.pairs[0]], strict=True)
            if one.concept != other.concept
        ]
        for start in range(0, len(twos), self.batch):
            part = twos[start : start + self.batch]
            self.adapter.set_batch(
                [[self._shown(one, mask=left), self._shown(other, mask=1 - left)] for one, other in part]
            )
            drawn += self._call([""] * len(part), start, height=side, width=2 * side)
        self.adapter.clear_prompt()
        halves = [
            self.judge.embed([image.crop((x, 0, x + side, side)) for image in drawn]) for x in (0, side)
        ]
        truth = [
            self.judge.embed([image for pair in twos if (image := pair[i].image) is not None]) for i in (0, 1)
        ]
        right = [(cosine(halves[i], truth[i]) > cosine(halves[i], truth[1 - i])).double() for i in (0, 1)]
        value = bootstrap(torch.stack(right).mean(0))
        found = {
            "nearer": value.mean,
            "low": value.low,
            "high": value.high,
            "pictures": len(twos),
            "chance": 0.5,
        }
        return found, drawn

    def _shown(self, one: Shown, **fields: Unpack[PromptFields]) -> ImagePrompt:
        if id(one) not in self._seen:
            assert one.image is not None
            self._seen[id(one)] = self.adapter.encode([one.image])
        return ImagePrompt(features=self._seen[id(one)], **fields)

    def _call(self, texts: Sequence[str], start: int, **size: int) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(start + place) for place in range(len(texts))]
        drawn: list[Image.Image] = self.pipe(
            list(texts),
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=generators,
            **size,
        ).images
        return drawn


def _say(line: str) -> None:
    print(line, flush=True)


def ablate(bench: Bench, say: Callable[[str], None] = _say) -> dict[str, Any]:
    """Each block alone, and all without it, at scale 1: the figures, and each block's share of the effect."""
    layers = cross_attentions(bench.pipe.unet)
    blocks = list(
        dict.fromkeys((x.block_index, x.block) for x in sorted(layers, key=lambda x: x.block_index))
    )
    count = len(blocks)
    nothing, everything = bench.measure([0.0] * count, 1.0), bench.measure([1.0] * count, 1.0)
    say(f"no image {_row(nothing)}; all blocks {_row(everything)}")
    rows = []
    for t, name in blocks:
        only = bench.measure([float(i == t) for i in range(count)], 1.0)
        without = bench.measure([float(i != t) for i in range(count)], 1.0)
        four = (nothing, everything, only, without)
        shares = {name: _share(*(_mean(each[key]) for each in four)) for name, key in _FINE.items()}
        spans = {name: _span_of_share(*(each[key] for each in four)) for name, key in _FINE.items()}
        said = ", ".join(
            f"{name} {shares[name]:.2f} ({spans[name][0]:.2f} to {spans[name][1]:.2f})" for name in shares
        )
        say(f"{t} {name:<26} only {_row(only)}; without {_row(without)}; shares: {said}")
        rows.append(
            {"t": t, "block": name, "only": _means(only), "without": _means(without)}
            | {"share": shares, "interval": spans}
        )
    return {"none": _means(nothing), "all": _means(everything), "blocks": rows}


def roles_from(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The roles that measured blocks have, in the form of ``adapter.weighting.Roles``.

    Style blocks have a larger share of the style than of what else the picture says (the larger of leak and
    layout), and an interval of style or likeness above 0, where there are intervals; at least the one where
    the difference is largest. Composition is the block where the picture's layout and concept outweigh its
    style most.
    """
    lead = {
        row["t"]: row["share"]["style"] - max(row["share"]["leak"], row["share"]["layout"]) for row in blocks
    }
    best, worst = max(lead, key=lambda t: lead[t]), min(lead, key=lambda t: lead[t])
    sure = {row["t"] for row in blocks if _sure(row)}
    style = sorted({t for t, value in lead.items() if value > 0 and t in sure} | {best})
    rest = [t for t in lead if t not in style]
    return {
        "count": len(lead),
        "composition": {worst: 1.0},
        "style": style,
        "instant_style": [best],
        "layout": rest or [worst],
        "precise": {t: 0.1 for t in lead if t not in style and t != worst},
    }


def _sure(row: Mapping[str, Any]) -> bool:
    """Whether a block is known to bring something of the picture; all are where no interval was measured."""
    spans = row.get("interval")
    return spans is None or any(spans[name][0] > 0 for name in ("style", "likeness"))


def as_code(roles: Mapping[str, Any]) -> str:
    """The roles as the row that goes into ``adapter.weighting``."""
    sets = {name: f"frozenset({set(roles[name])})" for name in ("style", "instant_style", "layout")}
    rest = {name: repr(roles[name]) for name in ("count", "composition", "precise")}
    return f"Roles({', '.join(f'{name}={value}' for name, value in {**rest, **sets}.items())})"


def tabulate(bench: Bench, say: Callable[[str], None] = _say) -> list[dict[str, Any]]:
    """Every profile of :data:`PROFILES` at every scale of :data:`SCALES`."""
    rows = []
    for profile in PROFILES:
        for scale in SCALES:
            found = bench.measure(profile, scale)
            say(f"{profile:<16} {scale:.1f} {_row(found)}")
            rows.append({"profile": profile, "scale": scale, **_means(found)})
    return rows


def chart(found: Mapping[str, Any]) -> Image.Image:
    """The blocks' shares as bars."""
    rows = found["blocks"]
    places = [row["block"].replace("_blocks.", " ").replace("_block.attentions", "") for row in rows]
    labels = [
        f"{row['t']}\n{place.replace('.attentions', '')}" for row, place in zip(rows, places, strict=True)
    ]
    series = {key: [row["share"][key] for row in rows] for key in _FINE}
    named = {
        "likeness": "likeness to the picture",
        "style": "style of the picture",
        "leak": "concept of the picture",
        "layout": "layout of the picture",
    }
    return bars(
        labels,
        {named[key]: values for key, values in series.items()},
        title="Share of what the picture brings, by block (lines: 95 % intervals)",
        spans={named[key]: [row["interval"][key] for row in rows] for key in series},
    )


def _share(nothing: float, everything: float, only: float, without: float) -> float:
    """What a block brings alone and what is missing without it, averaged, of what all bring; 0 when that is
    too little to share."""
    whole = everything - nothing
    return ((only - nothing) + (everything - without)) / 2 / whole if abs(whole) > 0.02 else 0.0


def _span_of_share(*four: Tensor, draws: int = 1000) -> tuple[float, float]:
    """The middle 95 % of :func:`_share` over resampled pairs, the same pairs in all four settings."""
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(four[0]), (draws, len(four[0])), generator=generator)
    shares = torch.tensor(
        [_share(*means) for means in zip(*(each[picked].mean(1).tolist() for each in four), strict=True)]
    )
    low, high = torch.quantile(shares, torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _means(measured: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: _mean(values) for name, values in measured.items()}


def _row(values: Mapping[str, Tensor]) -> str:
    return " ".join(f"{name} {_mean(values[name]):.2f}" for name in MEASURES)


def _grey(images: Sequence[Image.Image]) -> Tensor:
    """16×16 grey pixels around their mean, one row a picture: their cosine is a correlation."""
    import numpy as np

    small = [
        np.asarray(one.convert("L").resize((16, 16), Image.Resampling.BOX), np.float64) for one in images
    ]
    flat = torch.from_numpy(np.stack(small)).flatten(1)
    return flat - flat.mean(1, keepdim=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: measure, write, and print the row of ``adapter.weighting`` that follows."""
    parser = argparse.ArgumentParser(prog="python -m imprompt.evaluation.layers", description=__doc__)
    parser.add_argument("--base", type=Path, default=EMOJI, help="diffusers folder with eval/ and a judge")
    parser.add_argument("--adapter", type=Path, help="adapter file; default: the base's first")
    parser.add_argument("--out", type=Path, required=True, help="folder for layers.json and the pictures")
    parser.add_argument("-n", type=int, default=24, help="pairs")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        from diffusers import DiffusionPipeline

        shown, judge = read_eval_set(options.base / "eval"), Judge.load(options.base / "judge.safetensors")
        files = sorted((options.base / "adapters").glob("*.safetensors"))
        if options.adapter is None and not files:
            raise InputError(f"'{options.base}' has no adapters; name one with --adapter.")
        adapter = IPAdapter.from_pretrained(options.adapter or files[0])
        pipe = DiffusionPipeline.from_pretrained(str(options.base), torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        adapter.attach(pipe)
        bench = Bench.of(pipe, adapter, judge, shown, options.n, steps=options.steps)
        options.out.mkdir(parents=True, exist_ok=True)
        found = ablate(bench)
        found["roles"] = roles_from(found["blocks"])
        found["settings"] = {"adapter": adapter.checkpoint.name, "pairs": len(bench.pairs)}
        found["settings"] |= {"steps": bench.steps, "guidance": bench.guidance}
        _write(found, options.out, started)
        chart(found).save(options.out / "layers.png")
        print(f"row for adapter.weighting: {as_code(found['roles'])}", flush=True)
        found["profiles"] = tabulate(bench)
        _write(found, options.out, started)
        found["masks"], drawn = bench.sides()
        _write(found, options.out, started)
    except ImpromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    few = drawn[:8]
    grid(few, [""] * min(4, len(few)), [""] * -(-len(few) // 4), title="two references, left and right").save(
        options.out / "masks.png"
    )
    print(f"masks: {json.dumps(found['masks'])}")
    return 0


def _write(found: dict[str, Any], folder: Path, started: float) -> None:
    found["settings"]["seconds"] = round(time.monotonic() - started)
    (folder / "layers.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
