"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        prefix = "turbosparse_"
        self.requests = Counter(
            f"{prefix}requests", "Requests, by how they ended.", ["end"], registry=registry
        )
        self.prompt_tokens = Counter(
            f"{prefix}prompt_tokens", "Tokens of prompts, read or cached.", registry=registry
        )
        self.cached_tokens = Counter(
            f"{prefix}cached_tokens", "Tokens of prompts that were not read again.",
            registry=registry,
        )  # fmt: skip
        self.generated_tokens = Counter(
            f"{prefix}generated_tokens", "Tokens generated.", registry=registry
        )
        self.preempted = Counter(
            f"{prefix}preempted", "Texts put aside because memory was short.", registry=registry
        )
        self.running = Gauge(f"{prefix}running", "Texts in the batch.", registry=registry)
        self.waiting = Gauge(f"{prefix}waiting", "Texts in the queue.", registry=registry)
        self.kept = Gauge(f"{prefix}kept_bytes", "Bytes of kept beginnings.", registry=registry)
        self.active = Gauge(
            f"{prefix}active_share", "Share of active neurons in the last pass.", registry=registry
        )
        self.first_token = Histogram(
            f"{prefix}first_token_seconds", "From a request to its first token.",
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120), registry=registry,
        )  # fmt: skip
