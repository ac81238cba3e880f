"""What the recipe's stages share: rows to train on, pictures as tensors, resumable loops, schedules."""

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).parent
DATA = HERE / "data"
RUNS = HERE / "runs"
MODEL = HERE.parent.parent / "src" / "imprompt" / "assets" / "emoji"

Row = dict[str, Any]


def load_rows(vocabulary: str = "small", split: str | None = "train") -> list[Row]:
    """Rows of ``data/metadata.jsonl``. ``vocabulary``: ``small`` (vocabulary.txt), ``wide``, ``core``
    or ``all``."""
    rows: list[Row] = [json.loads(line) for line in (DATA / "metadata.jsonl").read_text().splitlines()]
    if vocabulary in ("small", "wide"):
        name = "vocabulary.txt" if vocabulary == "small" else "vocabulary-wide.txt"
        words = set((HERE / name).read_text().split())
        rows = [row for row in rows if row["groups"]["concept"] in words]
    elif vocabulary == "core":
        rows = [row for row in rows if row["core"]]
    return [row for row in rows if split is None or row["split"] == split]


def load_pictures(rows: list[Row]) -> Tensor:
    """All pictures of ``rows`` as one uint8 tensor (N, 3, 128, 128)."""
    pictures = torch.empty(len(rows), 3, 128, 128, dtype=torch.uint8)
    for i, row in enumerate(tqdm(rows, "pictures", leave=False, disable=None)):
        array = np.asarray(Image.open(DATA / row["file_name"]).convert("RGB"))
        pictures[i] = torch.from_numpy(array.copy()).permute(2, 0, 1)
    return pictures


def cosine(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (
        1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))
    )


class Ema:
    """Moving average of a module's parameters; the decay warms up so that early steps count less."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        params = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.shadow.values()), [params[n].detach() for n in self.shadow], 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict(self.shadow, strict=False)


@dataclass
class Loop:
    """Steps with a schedule by step count, or by the clock (``minutes``), resumed from ``path``."""

    path: Path
    steps: int
    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    warmup: int = 200
    save_every_s: float = 120
    log: dict[str, float] = field(default_factory=dict)
    step: int = 0
    minutes: float | None = None

    def __post_init__(self) -> None:
        self.base_lr = self.optimizer.param_groups[0]["lr"]
        self.spent = 0.0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent = state["step"], state.get("spent", 0.0)
            if self.ema:
                self.ema.shadow, self.ema.updates = state["ema"], state["updates"]
            print(f"resumed {self.path.name} at step {self.step}", flush=True)

    def part(self) -> float:
        """What part of the schedule is done."""
        return self.spent / (60 * self.minutes) if self.minutes else self.step / self.steps

    def factor(self) -> float:
        if self.minutes is None:
            return cosine(self.step, self.steps, self.warmup)
        return min(1.0, (self.step + 1) / self.warmup) * cosine(round(1e6 * self.part()), 10**6, 0)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent": self.spent,
        }
        if self.ema:
            state |= {"ema": self.ema.shadow, "updates": self.ema.updates}
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def __iter__(self) -> Iterator[int]:
        saved = started = time.monotonic()
        first, before = self.step, self.spent
        while self.part() < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = self.base_lr * self.factor()
            torch.manual_seed(self.step)
            yield self.step
            self.step += 1
            if self.ema:
                self.ema.update(self.module)
            now = time.monotonic()
            self.spent = before + now - started
            if self.step % 100 == 0:
                rate = (self.step - first) / (now - started)
                numbers = " ".join(f"{k}={v:.4f}" for k, v in self.log.items())
                print(f"{self.step}/{self.steps} {rate:.2f} steps/s {numbers}", flush=True)
            if now - saved > self.save_every_s:
                self.save()
                saved = now
        self.save()


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW that decays weights only, neither biases nor norms."""
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def save_half(module: Any, folder: Path) -> None:
    """Write a model in half precision, without the place it was once loaded from, and to be computed with in
    full: otherwise transformers loads its models in half beside a UNet in full."""
    module.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def progress_mean(log: dict[str, float], name: str, value: float) -> None:
    """Keep a running mean of a noisy number, so that a log line says something."""
    log[name] = value if name not in log else 0.98 * log[name] + 0.02 * value
