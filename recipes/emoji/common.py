"""What the stages share: where state lies, resumable loops, the schedule, the average of the weights.

State (packages, caches, checkpoints, logs, the model as it becomes) lies in ``$EMOJI_STATE``, or in ``runs/``
beside this file; none of it belongs into git. ``START`` is the model a first run continues from.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

HERE = Path(__file__).parent
STATE = Path(os.environ.get("EMOJI_STATE", HERE / "runs"))
START = Path(os.environ.get("EMOJI_START", HERE.parent.parent / "src" / "imprompt" / "assets" / "emoji"))
MODEL = STATE / "model"
CHECKPOINTS = STATE / "checkpoints"
DEVICE = os.environ.get("EMOJI_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
CPU = Path("/proc/cpuinfo")
HALF = DEVICE != "cpu" or (CPU.exists() and "amx_bf16" in CPU.read_text())
"""Whether to train in half precision: on a CPU without AMX a step costs a quarter more than in single."""


if DEVICE != "cpu":
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def half() -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=HALF)


def fingerprint(**settings: Any) -> str:
    """A short hash of what a checkpoint depends on: another one is another run."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


class Ema:
    """Moving average of a module's parameters; the decay warms up so that early steps count less."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        params = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.shadow.values()), [params[n].detach() for n in self.shadow], 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict(self.shadow, strict=False)


class Crew:
    """Processes that train one model together, each on draws of its own, and take the mean of their weights
    every ``EVERY`` steps (local SGD, arXiv 1805.09767): on cores that are shared with others, threads wait
    for each other at every operation, and processes that share gradients at every step. Rank 0 is the process
    that was started; it starts the others with its own arguments."""

    EVERY = 8

    def __init__(self, size: int) -> None:
        self.size, self.rank = size if DEVICE == "cpu" else 1, int(os.environ.get("EMOJI_RANK", 0))
        if self.size == 1:
            return
        if self.rank == 0:
            os.environ["EMOJI_CREW"] = tempfile.mktemp(prefix="emoji-crew-")
            for rank in range(1, size):
                subprocess.Popen([sys.executable, *sys.argv], env=dict(os.environ, EMOJI_RANK=str(rank)))
        dist.init_process_group(
            "gloo", init_method=f"file://{os.environ['EMOJI_CREW']}", rank=self.rank, world_size=size
        )

    def average(self, parameters: list[nn.Parameter], clock: float) -> float:
        """Give every process the mean of the weights, and rank 0's clock, by which all stop together."""
        clocks = torch.tensor([clock if self.rank == 0 else 0.0])
        flat = torch.cat([p.detach().flatten() for p in parameters] + [clocks])
        dist.all_reduce(flat)
        means = (flat[:-1] / self.size).split([p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.copy_(mean.view_as(parameter))
        return float(flat[-1])


@dataclass
class Loop:
    """Steps until the stage has trained ``minutes`` (of a core) in all: warm-up, a plateau, and a linear
    decay over the last fifth. Stopped at any moment, it goes on from ``path``; with more minutes it leaves
    the decayed end behind and goes on from the plateau kept in ``*.plateau.pt``."""

    path: Path
    minutes: float
    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    settings: str = ""
    warmup: int = 200
    decay: float = 0.35
    save_every_s: float = 120
    log: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    spent: float = 0.0
    clock: float = 0.0
    crew: Crew | None = None

    def __post_init__(self) -> None:
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        plateau = self.path.with_suffix(".plateau.pt")
        for path in (self.path, plateau):
            if not path.exists():
                continue
            state = torch.load(path, weights_only=True, map_location=DEVICE)
            if state["settings"] != self.settings:
                raise SystemExit(
                    f"{path} is of another configuration ({state['settings']}, this is {self.settings}): "
                    "move it away or give the settings it was made with"
                )
            decayed = state["spent"] > 60 * state["minutes"] * (1 - self.decay)
            if path == self.path and decayed and state["minutes"] < self.minutes and plateau.exists():
                continue
            self.module.load_state_dict(state["module"])
            fused = self.optimizer.param_groups[0].get("fused")
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:
                group["fused"] = fused
            self.step, self.spent = state["step"], state["spent"]
            self.clock = self.spent
            if self.ema:
                self.ema.shadow, self.ema.updates = state["ema"], state["updates"]
            print(f"resumed {path.name} at step {self.step}", flush=True)
            return

    def part(self) -> float:
        alone = not self.crew or self.crew.size == 1
        return (self.spent if alone else self.clock) / (60 * self.minutes)

    def factor(self) -> float:
        return min(1.0, (self.step + 1) / self.warmup, max(0.02, (1 - self.part()) / self.decay))

    def learn(self, loss: Tensor) -> None:
        """Backward, clipping, a step of the optimizer; now and then the crew's mean."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        if self.crew and self.crew.size > 1 and self.step % Crew.EVERY == Crew.EVERY - 1:
            self.clock = self.crew.average(trained, self.spent)

    def save(self, path: Path | None = None) -> None:
        if self.crew and self.crew.rank:
            return
        path = path or self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "spent": self.spent, "minutes": self.minutes, "settings": self.settings,
        }  # fmt: skip
        if self.ema:
            state |= {"ema": self.ema.shadow, "updates": self.ema.updates}
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def __iter__(self) -> Iterator[int]:
        # On shared cores only the time a process had counts, or a busy machine would end a stage untrained.
        clock = time.process_time if DEVICE == "cpu" else time.monotonic
        saved = began = told = time.monotonic()
        before, first = clock(), self.step
        plateau = self.part() < 1 - self.decay
        while self.part() < 1:
            for group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
                group["lr"] = lr * self.factor()
            torch.manual_seed(self.step * 16 + (self.crew.rank if self.crew else 0))
            yield self.step
            self.step += 1
            if self.ema:
                self.ema.update(self.module)
            now, had = time.monotonic(), clock()
            if not self.crew or self.crew.rank == 0:
                self.spent += had - before
            before = had
            if now - told > 15 and not (self.crew and self.crew.rank):
                told, rate = now, (self.step - first) / (now - began)
                numbers = " ".join(f"{k}={float(v):.4f}" for k, v in self.log.items())
                print(f"{self.step} {100 * self.part():.0f}% {rate:.2f} steps/s {numbers}", flush=True)
            if plateau and self.part() >= 1 - self.decay:
                self.save(self.path.with_suffix(".plateau.pt"))
                plateau = False
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
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def save_half(module: Any, folder: Path) -> None:
    """Write a model in half precision, without the place it was once loaded from, and to be computed with in
    full: otherwise transformers loads its models in half beside a UNet in full."""
    module.half().save_pretrained(folder)
    module.float()
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def stage_parser(
    about: str, *, minutes: float, lr: float, batch: int | None = None
) -> argparse.ArgumentParser:
    """The flags of every stage, with a stage's own defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--lr", type=float, default=lr)
    if batch is not None:
        parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export", action="store_true", help="write the newest average and stop")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags given, with as many threads set as they say."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def progress_mean(log: dict[str, Any], name: str, value: Tensor | float) -> None:
    """Keep a running mean of a noisy number, so that a log line says something. A tensor stays on its device:
    reading it would make every step wait."""
    value = value.detach() if isinstance(value, Tensor) else value
    log[name] = value if name not in log else 0.98 * log[name] + 0.02 * value


def to_float(pictures: Tensor) -> Tensor:
    """uint8 (N, 128, 128, 3) to -1…1 (N, 3, 128, 128)."""
    return pictures.to(DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1
