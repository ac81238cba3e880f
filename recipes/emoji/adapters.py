"""Stage 5: the two adapters on the frozen base, made by ``imprompt.training`` like anyone's own.

``linear`` (4 tokens of the pooled embedding) becomes ``ip-adapter_emoji``, ``resampler`` (16 of the hidden
states) ``ip-adapter-plus_emoji``. The reference is the target itself, cropped, moved, turned and tinted anew
in each of its cached versions; or the same concept in another style, where the caption must say the style;
or another concept in the same style, where the caption must say the concept. So the adapter learns to leave
to the words what the words say. Without words the reference is always the target itself.

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


def rows_of(vocabulary: str) -> str:
    """The rows of a vocabulary, held-out ones included (for validation), as a file that training reads."""
    path = DATA / f"{vocabulary}.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in load_rows(vocabulary, split=None))
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=sorted(NAMES))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--minutes", type=float, default=None, help="end after so long; start again to go on")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--views", type=int, default=8, help="cached versions of each reference")
    parser.add_argument("--sample-every", type=int, default=500)
    parser.add_argument("--vocabulary", default="small")
    parser.add_argument("--name", default=None, help="folder of this run inside runs/")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = TrainConfig.checked({
        "data": rows_of(args.vocabulary), "base": str(MODEL), "kind": args.kind,
        "output": RUNS / (args.name or f"adapter-{args.kind}"), "cache": RUNS / "adapter-cache",
        "resume": True, "steps": args.steps, "minutes": args.minutes, "batch": args.batch,
        "lr": args.lr, "schedule": "cosine", "warmup": min(50, args.steps // 10), "ema": 0.995,
        "betas": (0.9, 0.98), "min_snr": 5.0, "latent": "mean",
        "references": (("self", 0.4), ("concept", 0.2), ("style", 0.4)),
        "captions": {
            "self": ("full", "concept", "style"), "concept": ("style", "full"), "style": ("concept",),
        },
        "drop_text": 0.3, "drop_image": 0.05, "drop_both": 0.05, "views": args.views,
        "log_every": 25, "validate_every": 250, "validation_rows": 48, "checkpoint_every": 100,
        "sample_every": args.sample_every, "device": "cpu",
    })  # fmt: skip
    path = train(config)
    (MODEL / "adapters").mkdir(exist_ok=True)
    shutil.copyfile(path, MODEL / "adapters" / NAMES[args.kind])
    print(f"wrote {MODEL / 'adapters' / NAMES[args.kind]}")


if __name__ == "__main__":
    main()
