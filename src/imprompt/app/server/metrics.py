"""What Prometheus is told: queue, latency, steps, batch size, cache hits, memory. No prompts, no clients."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from imprompt.app.server.queue import Queue

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter, histogram = self._counter, self._histogram
        self.finished = counter("imprompt_jobs_total", "Jobs that are over, by state.", ["state"])
        self.rejected = counter("imprompt_rejected_total", "Jobs refused because the queue was full.")
        self.deaths = counter("imprompt_worker_deaths_total", "Worker processes that died.")
        self.steps = counter("imprompt_steps_total", "Denoising steps drawn.")
        self.latency = histogram("imprompt_job_seconds", "Seconds from acceptance to the end.", _SECONDS)
        self.waited = histogram("imprompt_queue_seconds", "Seconds from acceptance to the start.", _SECONDS)
        self.late = histogram(
            "imprompt_loop_delay_seconds", "How late the server's event loop woke up.", (0.01, 0.05, 0.25, 1)
        )
        self.batch_size = histogram("imprompt_batch_size", "Jobs drawn together.", (1, 2, 4, 8, 16, 32))

    def watch(self, queue: "Queue") -> None:
        """Also tell what can be seen of the queue and its workers at the moment of asking."""
        self.registry.register(_Gauges(queue))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, labels: list[str] | None = None) -> Counter:
        return Counter(name, about, labels or [], registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, about, buckets=buckets, registry=self.registry)


class _Gauges:
    def __init__(self, queue: "Queue") -> None:
        self._queue = queue

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client at every scrape."""
        queue = self._queue
        yield GaugeMetricFamily("imprompt_queue_length", "Jobs that wait.", queue.waiting)
        rows = (
            (GaugeMetricFamily, "worker_ready", "Whether the worker has loaded its base.", "ready"),
            (GaugeMetricFamily, "worker_memory_bytes", "Resident memory of the worker.", "memory"),
            (CounterMetricFamily, "feature_cache_hits", "Pictures whose features were known.", "cache_hits"),
            (CounterMetricFamily, "feature_cache_misses", "Pictures that were encoded.", "cache_misses"),
        )
        for kind, name, about, attribute in rows:
            family = kind(f"imprompt_{name}", about, labels=["device"])
            for worker in queue.workers:
                family.add_metric([worker.setup.device], float(getattr(worker, attribute)))
            yield family
