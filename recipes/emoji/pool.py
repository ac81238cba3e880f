"""Stage 1c: a pool of drawn pictures on disk in chunks that training can use while more are made.

A chunk is pictures (uint8), facts (JSON), and what training reads of them (``labels.py``): numbers, classes,
and the tokens of eight captions of each.

    python recipes/emoji/pool.py --seed 1 --count 60000      # train
    python recipes/emoji/pool.py --seed 2 --count 2000       # validation; 3: test
    python recipes/emoji/pool.py --seed 4 --count 4000       # plain pictures for rehearsal
    python recipes/emoji/pool.py --seed 5 --count 20000      # every (concept, look) pair, for the judge alone
"""

import argparse
import json
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from common import MODEL, STATE
from draw import GROUP, PLAIN, PLAIN_SEED, Icons, draw
from labels import LENGTH, captions, classes, numbers
from transformers import CLIPTokenizer

CHUNK = 2000


def chunk_path(seed: int, number: int) -> Path:
    return STATE / "pool" / f"{seed}-{number:03}.npy"


class Pool:
    """What has been drawn of ``seed`` so far: ``pictures(indices)``, ``facts[index]``."""

    def __init__(self, seed: int, most: int | None = None) -> None:
        self.chunks: list[np.ndarray] = []
        self.paths: list[Path] = []
        while (path := chunk_path(seed, len(self.chunks))).exists() and len(self) < (most or 10**9):
            self.chunks.append(np.load(path, mmap_mode="r"))
            self.paths.append(path)
        self._facts: list[dict] = []

    def __len__(self) -> int:
        return len(self.chunks) * CHUNK

    @property
    def facts(self) -> list[dict]:
        while len(self._facts) < len(self):
            path = self.paths[len(self._facts) // CHUNK].with_suffix(".json")
            self._facts += json.loads(path.read_text())
        return self._facts

    def pictures(self, indices: list[int]) -> np.ndarray:
        return np.stack([self.chunks[i // CHUNK][i % CHUNK] for i in indices])


def labels_of(path: Path) -> dict[str, np.ndarray]:
    """``numbers`` (2000, 21), ``classes`` (2000, 5) and ``tokens`` (2000, 8, 32) of a chunk."""
    with np.load(path.with_suffix(".npz")) as file:
        return dict(file)


def make(chunk: tuple[int, int]) -> str | None:
    """Draw chunk (seed, number) unless it is there; the name of the file that was written."""
    seed, number = chunk
    path = chunk_path(seed, number)
    if path.exists():
        return None
    indices = range(number * CHUNK, (number + 1) * CHUNK)
    if seed == PLAIN_SEED:  # first members alone: the others take their colours from these
        drawn = [draw(icons(), seed, GROUP * i, style=PLAIN) for i in indices]
    else:
        drawn = [draw(icons(), seed, i) for i in indices]
    facts = [fact for _, fact in drawn]
    texts = [text for i, fact in zip(indices, facts, strict=True) for text in captions(fact, seed, i)]
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
    np.savez(
        path.with_suffix(".npz"),
        numbers=np.stack([numbers(fact) for fact in facts]),
        classes=np.array([classes(fact) for fact in facts], np.int32),
        tokens=np.array(ids, np.int16).reshape(CHUNK, -1, LENGTH),
    )
    path.with_suffix(".json").write_text(json.dumps(facts))
    np.save(part := path.with_suffix(".part.npy"), np.stack([picture for picture, _ in drawn]))
    part.replace(path)
    return path.name


@cache
def icons() -> Icons:
    """The icons, opened once in a process."""
    return Icons()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=60000)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    (STATE / "pool").mkdir(parents=True, exist_ok=True)
    chunks = [(args.seed, number) for number in range(args.count // CHUNK)]
    with get_context("spawn").Pool(args.processes) as workers:
        for name in workers.imap(make, chunks):
            if name:
                print(name, flush=True)


if __name__ == "__main__":
    main()
