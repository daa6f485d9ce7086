"""Counts and durations of calls, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST


class CallMetrics:
    """What `GET /metrics` says about calls; one for all transports.

    Args:
        registry: Where other parts of the process register theirs; a new one if not given.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._calls = Counter(
            "tunesmith_calls", "Calls, by RPC and canonical code.", ["rpc", "code"], registry=self.registry
        )
        self._seconds = Histogram(
            "tunesmith_call_seconds",
            "Seconds from the request's head to the response's end.",
            ["rpc"],
            registry=self.registry,
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
        )

    def observe(self, rpc: str, code: str, seconds: float) -> None:
        """Record one call that has ended.

        Args:
            rpc: The RPC's full name; "unknown" for a request that means none.
            code: The canonical code, such as OK or NOT_FOUND.
            seconds: How long the call took.
        """
        self._calls.labels(rpc, code).inc()
        self._seconds.labels(rpc).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics of the registry in Prometheus' text format."""
        return generate_latest(self.registry)
