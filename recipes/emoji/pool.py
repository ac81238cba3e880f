"""Stage 1c: a pool of drawn pictures on disk, uint8, in chunks that training can use while more are made.

python recipes/emoji/pool.py --seed 1 --count 60000      # train
python recipes/emoji/pool.py --seed 2 --count 2000       # validation; 3: test
python recipes/emoji/pool.py --seed 4 --count 4000       # plain pictures for rehearsal
"""

import argparse
import json
from pathlib import Path

import numpy as np
from common import STATE
from draw import GROUP, PLAIN, PLAIN_SEED, Icons, draw

CHUNK = 2000


def chunk_path(seed: int, number: int) -> Path:
    return STATE / "pool" / f"{seed}-{number:03}.npy"


class Pool:
    """What has been drawn of ``seed`` so far: ``pictures(indices)`` and ``facts[index]``."""

    def __init__(self, seed: int, most: int | None = None) -> None:
        self.chunks: list[np.ndarray] = []
        self.facts: list[dict] = []
        while (path := chunk_path(seed, len(self.chunks))).exists() and len(self) < (most or 10**9):
            self.chunks.append(np.load(path, mmap_mode="r"))
            self.facts += json.loads(path.with_suffix(".json").read_text())

    def __len__(self) -> int:
        return len(self.chunks) * CHUNK

    def pictures(self, indices: list[int]) -> np.ndarray:
        return np.stack([self.chunks[i // CHUNK][i % CHUNK] for i in indices])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=60000)
    args = parser.parse_args()
    icons = Icons()
    for number in range(args.count // CHUNK):
        path = chunk_path(args.seed, number)
        if path.exists():
            continue
        indices = range(number * CHUNK, (number + 1) * CHUNK)
        if args.seed == PLAIN_SEED:  # first members alone: the others take their colours from these
            drawn = [draw(icons, args.seed, GROUP * i, style=PLAIN) for i in indices]
        else:
            drawn = [draw(icons, args.seed, i) for i in indices]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps([fact for _, fact in drawn]))
        np.save(part := path.with_suffix(".part.npy"), np.stack([picture for picture, _ in drawn]))
        part.replace(path)
        print(path.name, flush=True)


if __name__ == "__main__":
    main()
