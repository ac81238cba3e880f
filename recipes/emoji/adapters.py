"""Stage 5: the two adapters on the frozen base, made by ``imprompt.training`` like anyone's own.

``linear`` (4 tokens of the pooled embedding) becomes ``ip-adapter_emoji``, ``resampler`` (16 of the hidden
states) ``ip-adapter-plus_emoji``. The reference is the target itself, cropped, moved, turned and tinted anew
in each of its cached versions; or the same concept in another style, where the caption must say the style;
or another concept in the same style, where the caption must say the concept. So the adapter learns to leave
to the words what the words say. Without words the reference is always the target itself.

Beside the vocabulary, whose words the base knows, it sees pictures of all everyday concepts: an adapter that
was shown seventy concepts would read every picture as one of them. Of those only the style is said.

    python recipes/emoji/adapters.py linear|resampler [--steps N] [--minutes M]

A run that was interrupted, or whose minutes were over, goes on when it is started again.
"""

import argparse
import json
import shutil

import torch
from common import DATA, MODEL, RUNS, load_rows

from imprompt.training import TrainConfig, train

NAMES = {"linear": "ip-adapter_emoji.safetensors", "resampler": "ip-adapter-plus_emoji.safetensors"}


def rows_of(vocabulary: str, beside: str, often: int) -> str:
    """The rows of a vocabulary, held-out ones included (for validation), ``often`` times each, and trained
    ones of ``beside`` with their style as the only caption, as a file that training reads."""
    known = load_rows(vocabulary, split=None)
    words = {row["groups"]["concept"] for row in known}
    lines = [json.dumps(row) for row in known for _ in range(often if row["split"] == "train" else 1)]
    for row in load_rows(beside):
        if row["groups"]["concept"] not in words:
            lines.append(json.dumps(row | {"captions": {"style": row["captions"]["style"]}}))
    path, text = DATA / f"{vocabulary}-{beside}.jsonl", "".join(line + "\n" for line in lines)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=sorted(NAMES))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=None, help="end after so long; start again to go on")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--views", type=int, default=4, help="cached versions of each reference")
    parser.add_argument("--sample-every", type=int, default=1000)
    parser.add_argument("--vocabulary", default="small")
    parser.add_argument("--beside", default="core", help="where pictures of other concepts are taken from")
    parser.add_argument("--often", type=int, default=5, help="how often the vocabulary comes in an epoch")
    parser.add_argument("--name", default=None, help="folder of this run inside runs/")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = TrainConfig.checked({
        "data": rows_of(args.vocabulary, args.beside, args.often), "base": str(MODEL), "kind": args.kind,
        "output": RUNS / (args.name or f"adapter-{args.kind}"), "cache": RUNS / "adapter-cache",
        "resume": True, "steps": args.steps, "minutes": args.minutes, "batch": args.batch,
        "lr": args.lr, "schedule": "cosine", "warmup": min(50, args.steps // 10), "ema": 0.997,
        "betas": (0.9, 0.98), "latent": "mean",
        "references": (("self", 0.4), ("concept", 0.2), ("style", 0.4)),
        "captions": {
            "self": ("full", "concept", "style"), "concept": ("style", "full"), "style": ("concept",),
        },
        "drop_text": 0.3, "drop_image": 0.05, "drop_both": 0.05, "views": args.views,
        "log_every": 50, "validate_every": 500, "validation_rows": 48, "checkpoint_every": 100,
        "sample_every": args.sample_every, "device": "cpu",
    })  # fmt: skip
    path = train(config)
    (MODEL / "adapters").mkdir(exist_ok=True)
    shutil.copyfile(path, MODEL / "adapters" / NAMES[args.kind])
    print(f"wrote {MODEL / 'adapters' / NAMES[args.kind]}")


if __name__ == "__main__":
    main()
