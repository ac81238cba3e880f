"""Drawing with the model as it is now, in batches, without a pipeline: what judge and figures stand on.

python recipes/emoji/sample.py --prompts "a cat" "a red owl, neon style" --out sheet.png
python recipes/emoji/sample.py --adapter plus --references disc.png owl.png --prompts "a cat" ""
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from adapters import KINDS, NAMES, features
from common import DEVICE, MODEL, half
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from encoder import normalise
from PIL import Image
from text import Texts
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from imprompt import IPAdapter


@dataclass
class Model:
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    texts: Texts
    encoder: CLIPVisionModelWithProjection
    scheduler: DDIMScheduler
    adapter: IPAdapter | None
    kind: str


def load(folder: Path = MODEL, kind: str | None = None) -> Model:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float().eval().to(DEVICE)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval().to(DEVICE)
    adapter = None
    if kind:
        adapter = IPAdapter.from_pretrained(folder / "adapters" / NAMES[kind])
        adapter.module.float().to(DEVICE).eval()
    return Model(
        unet,
        AutoencoderKL.from_pretrained(folder / "vae").float().eval().to(DEVICE),
        Texts(CLIPTokenizer.from_pretrained(folder / "tokenizer"), text),
        CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").float().eval().to(DEVICE),
        DDIMScheduler.from_pretrained(folder / "scheduler"),
        adapter,
        kind or "",
    )


@torch.no_grad()
def draw(
    model: Model, prompts: list[str], references: np.ndarray | None = None, seeds: list[int] | None = None,
    scale: float = 1.0, steps: int = 20, guidance: float = 5.0, batch: int = 16,
) -> np.ndarray:  # fmt: skip
    """uint8 (N, 128, 128, 3), one for each prompt (and reference, uint8 of the same shape)."""
    seeds = seeds or list(range(len(prompts)))
    out = []
    for i in range(0, len(prompts), batch):
        part = slice(i, i + batch)
        texts = prompts[part]
        x = torch.stack(
            [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds[part]]
        )
        x = x.to(DEVICE)
        with half():
            hidden = torch.cat([model.texts([""] * len(texts)), model.texts(texts)]).float()
        tokens: Tensor | None = None
        if model.adapter and references is not None:
            with half():
                shown = features(model.kind, model.encoder, normalise(references[part])).float()
                nothing = features(
                    model.kind, model.encoder, torch.zeros(1, 3, 128, 128, device=DEVICE)
                ).float()
            if model.kind == "base":
                nothing = torch.zeros_like(nothing)
            tokens = model.adapter.projection(torch.cat([nothing.expand_as(shown), shown]))
            model.adapter.attach(model.unet)
        model.scheduler.set_timesteps(steps)
        for t in model.scheduler.timesteps:
            with half():
                if tokens is None:
                    v = model.unet(torch.cat([x, x]), t, hidden).sample
                else:
                    assert model.adapter
                    with model.adapter.training_tokens(tokens, scale):
                        v = model.unet(torch.cat([x, x]), t, hidden).sample
            none, some = v.float().chunk(2)
            x = model.scheduler.step(none + guidance * (some - none), t, x).prev_sample
        if tokens is not None:
            assert model.adapter
            model.adapter.detach()
        pixels = model.vae.decode(x / model.vae.config.scaling_factor).sample
        out.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(out)


def sheet(pictures: np.ndarray, columns: int) -> Image.Image:
    rows = [np.concatenate(list(pictures[i : i + columns]), 1) for i in range(0, len(pictures), columns)]
    return Image.fromarray(np.concatenate(rows, 0))


def read(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB").resize((128, 128), Image.Resampling.LANCZOS))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--adapter", choices=sorted(KINDS))
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--references", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load(args.model, args.adapter)
    if not args.references:
        sheet(draw(model, args.prompts, seeds=[args.seed + i for i in range(len(args.prompts))],
                   steps=args.steps, guidance=args.guidance), 8).save(args.out)  # fmt: skip
        return
    shown = np.stack([read(path) for path in args.references])
    rows = []
    for prompt in args.prompts:
        rows.append(
            draw(
                model,
                [prompt] * len(shown),
                shown,
                [args.seed] * len(shown),
                args.scale,
                args.steps,
                args.guidance,
            )
        )
    sheet(np.concatenate([shown, *rows]), len(shown)).save(args.out)


if __name__ == "__main__":
    main()
