"""Stage 5: an adapter alone on the finished base, trained by ``imprompt.training`` on drawn pictures.

``base`` (linear, 4 tokens) is made so; ``plus`` (resampler, 16 tokens) comes out of ``unet.py`` and can be
trained on here. Half of the samples have as reference another thing in the target's manner, the text saying
what (sometimes more); in the others the reference is the target itself or the same icon placed anew, and
mostly speaks alone. Keys and values start as those of ``plus``.

    python recipes/emoji/adapters.py base --steps 2500     # goes on from where it stopped
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import CHECKPOINTS, DEVICE, MODEL, START
from diffusers import UNet2DConditionModel
from draw import GROUP
from labels import ALONE, MORE, PARTS, captions
from PIL import Image
from pool import Pool
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from imprompt import IPAdapter
from imprompt.data.rows import Dataset, Row
from imprompt.encoders.images import as_bytes
from imprompt.training import TrainConfig
from imprompt.training.trainer import train

NAMES = {"base": "ip-adapter_emoji.safetensors", "plus": "ip-adapter-plus_emoji.safetensors"}
KINDS = {"base": "linear", "plus": "resampler"}
TOKENS = {"base": 4, "plus": 16}
MANNERS = {0: ("manner",), 1: ("manner", "manner too"), 2: ("manner too",), 3: ("manner", "manner too")}
"""Of each member of a drawn group, the groups of other things in its manner: members 0 and 2 show one icon,
so they are never each other's reference there."""
REFERENCES = (("manner", 0.36), ("manner too", 0.36), ("self", 0.17), ("icon", 0.11))
"""Only a thing with a name is the target of another: with these shares, that is half of the samples."""

CAPTIONS = {"manner": ("named",), "manner too": ("named",), "self": ("quiet",), "icon": ("quiet",)}
"""Of each kind of reference, the kinds of caption (see :func:`drawn`)."""


def features(kind: str, encoder: CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
    """What an adapter of ``kind`` reads of normalised pictures."""
    out = encoder(pixels, output_hidden_states=kind == "plus")
    return out.hidden_states[-2] if kind == "plus" else out.image_embeds


def new_adapter(kind: str, unet: nn.Module, encoder: CLIPVisionModelWithProjection) -> IPAdapter:
    """A new adapter; its keys and values are those of ``plus``, where there is one."""
    width = encoder.config.hidden_size if kind == "plus" else encoder.config.projection_dim
    adapter = IPAdapter.new(unet, kind=KINDS[kind], feature_width=width, tokens=TOKENS[kind])
    for folder in (MODEL, START):
        if (folder / "adapters" / NAMES["plus"]).exists():
            known = IPAdapter.from_pretrained(folder / "adapters" / NAMES["plus"]).module.state_dict()
            known = {name: value for name, value in known.items() if name.startswith("ip_adapter.")}
            adapter.module.load_state_dict(known, strict=False)
            break
    return adapter


def export(adapter: IPAdapter, kind: str) -> Path:
    """Write the adapter into the model, in half precision; what it says of itself is its kind alone."""
    made = adapter.save_pretrained(CHECKPOINTS, f"{kind}.safetensors")
    path = MODEL / "adapters" / NAMES[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    with safe_open(made, "pt") as file:
        weights = {name: file.get_tensor(name).half().contiguous() for name in file.keys()}  # noqa: SIM118, not a dict
        about = {name: file.metadata()[name] for name in ("format", "imprompt.variant")}
        save_file(weights, path, metadata=about)
    return path


def drawn(seed: int, most: int) -> list[Row]:
    """What has been drawn of a seed as rows, at most ``most``; those of other seeds than 1 are held out."""
    pool, rows = Pool(seed, most), []
    for index, fact in enumerate(pool.facts[:most]):
        said, (group, member) = captions(fact, seed, index), divmod(index, GROUP)
        named = (said[ALONE],) * 4 + (said[MORE],) if fact["concept"] else ()
        texts = {"full": (said[ALONE] or said[PARTS],), "named": named, "quiet": ("", "", "", said[PARTS])}
        kinds = (*MANNERS[member], *(("icon",) if member in (0, 2) else ()))
        groups = {kind: str(group) for kind in kinds}
        split, read = "train" if seed == 1 else "validation", partial(picture, pool, index)
        rows.append(Row(Path(f"{seed}/{index}"), texts, groups, split, content=read))
    return rows


def picture(pool: Pool, index: int) -> bytes:
    return as_bytes(Image.fromarray(pool.pictures([index])[0]), "BMP")


def configuration(kind: str, steps: int, **more: Any) -> TrainConfig:
    return TrainConfig(
        data="drawn pictures", base=str(MODEL), output=CHECKPOINTS / f"adapter-{kind}", steps=steps,
        warmup=min(200, steps // 10), schedule="cosine", betas=(0.9, 0.98), latent="mean",
        references=REFERENCES, captions=CAPTIONS, drop_text=0, drop_both=0.03, sample_every=0, trackers=(),
        device=DEVICE, **more,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=sorted(NAMES))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--most", type=int, default=40000, help="pictures to learn from")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="for a GPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = CHECKPOINTS / f"{args.kind}-start.safetensors"
    begun = (CHECKPOINTS / f"adapter-{args.kind}" / "run.json").exists()
    if not begun and args.kind == "plus":
        IPAdapter.from_pretrained(MODEL / "adapters" / NAMES["plus"]).save_pretrained(CHECKPOINTS, start.name)
    elif not begun:
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_pretrained(MODEL / "unet")
        encoder = CLIPVisionModelWithProjection.from_pretrained(MODEL / "image_encoder")
        new_adapter(args.kind, unet, encoder).save_pretrained(CHECKPOINTS, start.name)
    config = configuration(
        args.kind, args.steps, init=str(start), resume=begun, batch=args.batch, lr=args.lr,
        compile=args.compile, workers=max(2, args.threads),
    )  # fmt: skip
    made = train(config, data=Dataset(drawn(1, args.most) + drawn(2, config.validation_rows)))
    print(f"wrote {export(IPAdapter.from_pretrained(made), args.kind)}")


if __name__ == "__main__":
    main()
