"""How well the bundled canny ControlNet is followed, and what that costs the style: figures for the report.

Each of some held-out pictures lends its edges; the text names its concept. Its style comes from another
held-out picture of another style and concept: told in words, or shown as an image prompt beside the concept
alone. At control scale 0, 0.5 and 1, with the same seeds, the drawing's own edges are compared with the
condition (:func:`edge_f1`), and the judge says whether the style is the wanted one.

``python -m imprompt.evaluation.control`` measures the bundled model alone by this.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from imprompt.adapter.ipadapter import IPAdapter
from imprompt.adapter.prompt import ImagePrompt
from imprompt.errors import ImpromptError, InputError
from imprompt.evaluation.judge import Judge
from imprompt.evaluation.metrics import Interval, bootstrap
from imprompt.evaluation.report import (
    EMOJI,
    EvalSet,
    Figure,
    Report,
    Shown,
    _alternate,
    _generator,
    _load,
    read_eval_set,
)
from imprompt.generation.annotate import edges
from imprompt.generation.control import Control, control_call, controlled, find_controls, load_net
from imprompt.generation.families import Base
from imprompt.schema.request import ControlRef, Request

FOLDER = "controlnet-canny"
"""Where a base keeps its canny ControlNet."""
SCALES = (0.0, 0.5, 1.0)
IMAGE_SCALE = 0.6  # as a request's default beside a text
_NEAR = 1  # pixels by which an edge may be off


def edge_f1(picture: Image.Image, condition: Image.Image, near: int = _NEAR) -> float:
    """Agreement of a picture's canny edges with an edge map of its size: 1 when each edge of either has one
    of the other within ``near`` pixels (in both axes), 0 when none has, or just one of them has edges.

    The harmonic mean of precision and recall of boundaries (Martin et al. 2004), with a square neighbourhood.
    """
    drawn, wanted = (
        torch.from_numpy(np.asarray(image.convert("L")) > 127).float()[None, None]
        for image in (edges(picture), condition)
    )
    if not drawn.any() or not wanted.any():
        return float(drawn.any() == wanted.any())

    def found(some: Tensor, among: Tensor) -> float:
        around = functional.max_pool2d(among, 2 * near + 1, stride=1, padding=near)
        return float((some * around).sum() / some.sum())

    precision, recall = found(drawn, wanted), found(wanted, drawn)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@torch.inference_mode()
def control_figures(
    pipe: Any,
    net: Path,
    judge: Judge,
    eval_set: EvalSet,
    adapter: tuple[str, IPAdapter] | None = None,
    *,
    n: int = 24,
    steps: int = 20,
    guidance: float = 3.0,
    batch: int = 8,
    seed: int = 0,
) -> tuple[list[Figure], dict[str, list[Image.Image]]]:
    """Figures of the ControlNet in folder ``net`` around ``pipe``, without and (if given) with an image
    prompt through the named adapter, on ``n`` pairs; and what was drawn, by figure. Nothing stays attached.

    Raises :class:`InputError` for an evaluation set without two styles, :class:`ModelError` for a ControlNet
    that does not fit.
    """
    request = Request(prompt="x", controls=(ControlRef(kind="canny", path="map", model=str(net)),))
    (found,) = find_controls(request, Base("base", str(net.parent)))
    model = load_net(found, pipe.unet.dtype).to(pipe.device)
    drawing = controlled(pipe, "generate", [found], {found.source: model})
    pairs = _pairs([shown for shown in eval_set.pictures if shown.image is not None], n)
    figures: list[Figure] = []
    drawn: dict[str, list[Image.Image]] = {}
    for name, shown in ((None, None), *([adapter] if adapter else [])):
        hits, f1 = {}, {}
        for scale in SCALES:
            images = _draw(drawing, found, pairs, scale, shown, request, steps, guidance, batch, seed)
            drawn[f"{name or 'base'} control {scale:g}"] = images
            both = list(zip(images, pairs, strict=True))
            f1[scale] = torch.tensor([edge_f1(image, _map(lent)) for image, (lent, _) in both])
            told = judge.style(images)
            hits[scale] = torch.tensor([float(a == b.style) for a, (_, b) in zip(told, pairs, strict=True)])
            figures.append(Figure(f"edge_f1_control_{scale:g}", bootstrap(f1[scale]), name, "held_out"))
        off, on = SCALES[0], SCALES[-1]
        without, with_control = float(hits[off].mean()), float(hits[on].mean())
        kept = with_control / without if without else math.nan
        figures += [
            Figure("edge_f1_rise", bootstrap(f1[on] - f1[off]), name, "held_out", note="paired"),
            Figure(
                "control_style_kept", Interval(kept, math.nan, math.nan, len(pairs)), name, "held_out",
                note=f"style right {with_control:.3f} with control at {on:g}, {without:.3f} without",
            ),
        ]  # fmt: skip
    return figures, drawn


# ---- private


def _draw(
    pipe: Any, control: Control, pairs: Sequence[tuple[Shown, Shown]], scale: float,
    adapter: IPAdapter | None, request: Request, steps: int, guidance: float, batch: int, seed: int,
) -> list[Image.Image]:  # fmt: skip
    images: list[Image.Image] = []
    if adapter is not None:
        adapter.attach(pipe)
    try:
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            texts = [lent.caption("concept") for lent, _ in part]
            if adapter is None:
                styles = [style.caption("style") for _, style in part]
                texts = [f"{text}, {style}" for text, style in zip(texts, styles, strict=True)]
            else:
                adapter.set_batch([ImagePrompt(style.image, scale=IMAGE_SCALE) for _, style in part])
            maps = [_map(lent) for lent, _ in part]
            call = control_call([control], maps[:1], request)
            images += pipe(
                texts,
                **call | {"image": maps, "controlnet_conditioning_scale": scale},
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[_generator(seed, start + place) for place in range(len(part))],
            ).images
    finally:
        if adapter is not None:
            adapter.clear_prompt()
            adapter.detach()
    return images


def _map(lent: Shown) -> Image.Image:
    assert lent.image is not None
    return edges(lent.image)


def _pairs(pictures: Sequence[Shown], n: int) -> list[tuple[Shown, Shown]]:
    """Pictures that lend their edges, each with one of another style and concept; the same in every run."""
    pairs = []
    for place, lent in enumerate(pictures[:n]):
        others = [shown for shown in pictures if shown.style != lent.style and shown.concept != lent.concept]
        if not others:
            raise InputError("the evaluation set has no two pictures of different styles and concepts")
        pairs.append((lent, others[place * 7 % len(others)]))
    return pairs


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a base's canny ControlNet by itself and print the table."""
    parser = argparse.ArgumentParser(prog="python -m imprompt.evaluation.control")
    parser.add_argument("--base", type=Path, default=EMOJI, help=f"diffusers folder with eval/ and {FOLDER}/")
    parser.add_argument("--judge", type=Path, help="another judge than the base's")
    parser.add_argument("--adapter", type=Path, help="adapter file; default: the base's first by name")
    parser.add_argument("-n", type=int, default=24, help="pictures a figure")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write figures and settings here")
    parser.add_argument(
        "--sheet", type=Path, help="write what was drawn here, a row a setting, the edges on top"
    )
    options = parser.parse_args(arguments)
    try:
        given = [options.adapter] if options.adapter else (options.base / "adapters").glob("*.safetensors")
        files = sorted(given)
        shown = read_eval_set(options.base / "eval")
        shown = EvalSet(tuple(_alternate(shown.pictures)), shown.prompts)
        figures, drawn = control_figures(
            _load(options.base, options.device),
            options.base / FOLDER,
            Judge.load(options.judge or options.base / "judge.safetensors"),
            shown,
            (files[0].stem, IPAdapter.from_pretrained(files[0])) if files else None,
            n=options.n,
            steps=options.steps,
            guidance=options.guidance,
        )
    except ImpromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    settings = {name: getattr(options, name) for name in ("n", "steps", "guidance")}
    report = Report(tuple(figures), settings | {"base": options.base.name}, drawn)
    print(report.table())
    if options.json is not None:
        options.json.write_text(report.to_json(), encoding="utf-8")
    if options.sheet is not None:
        _sheet(_pairs(shown.pictures, options.n), drawn).save(options.sheet)
    return 0


def _sheet(pairs: Sequence[tuple[Shown, Shown]], drawn: dict[str, list[Image.Image]]) -> Image.Image:
    styles = [style.image for _, style in pairs if style.image is not None]
    rows = [[_map(lent) for lent, _ in pairs], styles, *drawn.values()]
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(pairs), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
