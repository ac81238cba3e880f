"""How the sections of gpu.py time, count and report: interleaved rounds by the device's own clock."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], Any]
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Run:
    """One section's settings, and where its figures go."""

    name: str
    out: Path
    device: str
    seconds: float
    quick: bool
    found: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, figures: Any) -> None:
        """Print figures, and write them beside those of the sections before."""
        self.found[what] = figures
        print(f"{self.name} | {what}: {json.dumps(figures)}", flush=True)
        file = self.out / "gpu.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept |= {"device": device_name(self.device), "torch": torch.__version__, self.name: self.found}
        file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")

    def attempt(self, what: str, measure: Callable[[], Any]) -> None:
        """Add the figures, or why there are none: a profiler or a graph that fails costs its own figures
        alone."""
        try:
            found = measure()
        except Exception as error:
            found = f"failed: {error}".splitlines()[0]
        self.add(what, found)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, on a CPU float32."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def randn(self, *shape: int) -> Tensor:
        """Random numbers in :attr:`dtype` on the device."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """Random weights that keep the size of what they multiply."""
        return self.randn(*shape) / shape[-1] ** 0.5

    def model(self, make: Callable[[], nn.Module]) -> Any:
        """A model made on the device in :attr:`dtype`, with random weights."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                return make().to(self.dtype).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def ratios(self, kinds: Mapping[str, Work], base: str = "plain") -> dict[str, float]:
        """The median time of each kind over that of ``base`` in the same round, and that one's milliseconds;
        at least three rounds, and then until the time is up."""
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for work in kinds.values():
            milliseconds(work, self.device)
        end, number = time.monotonic() + self.seconds, 0
        while number < 3 or (time.monotonic() < end and not self.quick):
            for kind in kinds if number % 2 else reversed(kinds):
                times[kind].append(milliseconds(kinds[kind], self.device))
            number += 1
        found = {
            kind: round(median(a / b for a, b in zip(taken, times[base], strict=True)), 4)
            for kind, taken in times.items()
            if kind != base
        }
        return found | {f"{base}, ms": round(median(times[base]), 3), "rounds": number}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def milliseconds(work: Work, device: str) -> float:
    """From an idle device until it is idle again."""
    if device == "cpu":
        before = time.process_time()
        work()
        return 1000 * (time.process_time() - before)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def graphed(work: Work, pool: Any) -> Work:
    """The same kernels as one CUDA graph: the device's time without gaps between launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay


def launches(work: Work) -> dict[str, int]:
    """Kernels, copies between host and device, and waits for the device, of one call on a GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
    events = profiler.events()
    on_device = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [name for name in on_device if name.startswith(("Memcpy HtoD", "Memcpy DtoH"))]
    kernels = [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]
    # The profiler itself waits once, at the end.
    waits = sum(e.name in _WAITS for e in events if e.device_type == torch.autograd.DeviceType.CPU)
    return {"kernels": len(kernels), "host copies": len(copies), "waits": waits}


def difference(one: Tensor, two: Tensor) -> float:
    """‖one − two‖ / ‖two‖. Raises :class:`ValueError` where either is not finite."""
    one, two = one.double(), two.double()
    if not bool(one.isfinite().all() and two.isfinite().all()):
        raise ValueError("an output is not finite")
    return round(float((one - two).norm() / two.norm()), 6)
