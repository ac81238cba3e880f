"""What a motion adapter reaches: are a clip's frames one thing, does it move, does it still show its words?

Three figures, each beside what real clips give (held-out ones of ``eval/clips``) and what frames drawn alone
give (the same prompt, another seed each, no motion adapter):

- ``frame_consistency``: cosine of adjacent frames in the judge's eyes. Between frames drawn alone and 1.
- ``frame_change``: mean absolute difference of adjacent frames, 0 to 1. A still has 0, flicker too much; its
  place among real clips is what counts, so the note says their range.
- ``frame_concept``: share of frames in which the judge names the prompt's concept among its first five.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imprompt.encoders.images import load_frames
from imprompt.errors import ImpromptError, InputError
from imprompt.evaluation.judge import Judge, to_pixels
from imprompt.evaluation.metrics import bootstrap, cosine, topk_hits
from imprompt.evaluation.report import EMOJI, EvalSet, Figure, Report, Shown, read_eval_set
from imprompt.generation.engine import Engine
from imprompt.schema.request import Request


def frame_consistency(judge: Judge, frames: Sequence[Image.Image]) -> Tensor:
    """Cosine of each frame and the next in the judge's embedding, ``F-1`` values."""
    embedded = judge.embed(frames)
    return cosine(embedded[:-1], embedded[1:])


def frame_change(frames: Sequence[Image.Image]) -> Tensor:
    """Mean absolute difference of each frame and the next, ``F-1`` values in 0 to 1."""
    pixels = to_pixels(frames).float() / 255
    return (pixels[1:] - pixels[:-1]).abs().flatten(1).mean(1)


def read_clips(folder: Path) -> list[list[Image.Image]]:
    """The real clips of an evaluation set. Raises :class:`InputError` when there are none."""
    clips = [load_frames(path)[0] for path in sorted(folder.glob("*.webp"))]
    if not clips:
        raise InputError(f"'{folder}' holds no real clips (.webp) to compare with.")
    return clips


def evaluate_motion(
    base: str | Path = EMOJI,
    *,
    motion: str | None = None,
    eval_set: EvalSet | None = None,
    judge: Judge | None = None,
    n: int = 6,
    alone: int = 4,
    steps: int = 20,
    guidance: float = 5.0,
    seed: int = 0,
    device: str = "auto",
    engine: Engine | None = None,
) -> Report:
    """Draw ``n`` clips of trained captions, and ``alone`` frames of each without the motion adapter.

    Raises :class:`ModelError` when something cannot be loaded, :class:`InputError` without an evaluation set
    or its real clips.
    """
    base = EMOJI if str(base) == "emoji" else Path(base)
    eval_set = eval_set or read_eval_set(base / "eval")
    judge = judge or Judge.load(base / "judge.safetensors")
    real = read_clips(base / "eval" / "clips")
    engine = engine or Engine()
    prompts = [prompt for prompt in eval_set.prompts if prompt.concept in judge.concepts][:n]
    if not prompts:
        raise InputError("the evaluation set has no prompt of a concept the judge knows.")
    name = "emoji" if base == EMOJI else str(base)
    common: dict[str, Any] = {"base": name, "steps": steps, "guidance": guidance}
    clips, stills = [], []
    for number, prompt in enumerate(prompts):
        words: dict[str, Any] = {"prompt": prompt.caption("full"), "seed": seed + 1000 * number, **common}
        words["device"] = device
        clips.append(engine.run(Request(task="animate", motion=motion, **words)).images)
        stills.append(engine.run(Request(count=alone, **words)).images)
    figures = [
        _figure("frame_consistency", clips, stills, real, lambda clip: frame_consistency(judge, clip)),
        _figure("frame_change", clips, stills, real, frame_change),
        _concept_figure(judge, prompts, clips, stills),
    ]
    drawn = {f"clip {number + 1}": list(clip) for number, clip in enumerate(clips)}
    return Report(tuple(figures), {"clips": len(clips), "alone": alone, **common, "seed": seed}, drawn)


def _figure(
    name: str,
    clips: Sequence[Sequence[Image.Image]],
    stills: Sequence[Sequence[Image.Image]],
    real: Sequence[Sequence[Image.Image]],
    measure: Callable[[Sequence[Image.Image]], Tensor],
) -> Figure:
    """One value a clip, its mean over frames, beside those of real clips and of frames drawn alone."""
    ours, apart, true = (
        torch.stack([measure(clip).double().mean() for clip in group]) for group in (clips, stills, real)
    )
    note = (
        f"real clips {float(true.mean()):.3f} ({float(true.min()):.3f} to {float(true.max()):.3f}, "
        f"{len(true)}), frames drawn alone {float(apart.mean()):.3f}"
    )
    return Figure(name, bootstrap(ours), split="train", judge_on_real=float(true.mean()), note=note)


def _concept_figure(
    judge: Judge,
    prompts: Sequence[Shown],
    clips: Sequence[Sequence[Image.Image]],
    stills: Sequence[Sequence[Image.Image]],
) -> Figure:
    def hits(group: Sequence[Sequence[Image.Image]]) -> Tensor:
        values = []
        for prompt, frames in zip(prompts, group, strict=True):
            truth = torch.full((len(frames),), judge.concepts.index(prompt.concept))
            values.append(topk_hits(judge.concept_scores(frames), truth, 5).double().mean())
        return torch.stack(values)

    note = f"stills of the same prompts {float(hits(stills).mean()):.3f}"
    return Figure("frame_concept", bootstrap(hits(clips)), split="train", note=note)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: measure a motion adapter, print the table, write the JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m imprompt.evaluation.motion")
    parser.add_argument("--base", type=Path, default=EMOJI)
    parser.add_argument("--motion", help="another motion adapter than the base's default")
    parser.add_argument("-n", type=int, default=6, help="clips to draw")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write figures and settings here")
    options = parser.parse_args(arguments)
    try:
        report = evaluate_motion(options.base, motion=options.motion, n=options.n, steps=options.steps)
    except ImpromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report.table())
    if options.json is not None:
        options.json.write_text(report.to_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
