"""What Prometheus reads at `/metrics`; nothing in it tells of a single user."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        """Register them."""
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "recllm_requests", "requests answered", ["route", "method", "status"], registry=registry
        )
        self.seconds = Histogram(
            "recllm_request_seconds",
            "seconds from a request's first byte to its answer",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.at_work = Gauge("recllm_requests_at_work", "requests being answered", registry=registry)
        self.waiting = Gauge("recllm_waiting", "users or pairs that wait for the model", registry=registry)
        self.batch_size = Histogram(
            "recllm_batch_size",
            "users or pairs that went through the model together",
            ["kind"],
            buckets=SIZES,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "recllm_batch_seconds",
            "seconds of the model for a batch",
            ["kind"],
            buckets=SECONDS,
            registry=registry,
        )
        self.dropped = Counter(
            "recllm_dropped",
            "users or pairs taken out of the queue: their client had gone, or their deadline had passed",
            registry=registry,
        )
        self.lists = Counter(
            "recllm_lists", "lists recommended, by what made them", ["source"], registry=registry
        )
        self.events = Counter(
            "recllm_events", "events sent, by what became of them", ["result"], registry=registry
        )
        self.impressions = Counter(
            "recllm_impressions",
            "places of lists noted in the event store, or lost",
            ["result"],
            registry=registry,
        )
        self.reloads = Counter("recllm_reloads", "bundles loaded or refused", ["result"], registry=registry)
        self.ready = Gauge("recllm_ready", "1 where a model has answered", registry=registry)
        self.bundle = Gauge("recllm_bundle", "the bundle that answers: 1", ["bundle"], registry=registry)
