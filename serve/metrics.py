"""Counters of one ingress replica, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_SECONDS: Final = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """What happened in this process, and how the queue stands."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "unicuco_http_requests",
            "Answers of this ingress replica.",
            ["route", "method", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "unicuco_http_request_seconds",
            "From the head of a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "unicuco_http_in_flight", "Requests being answered.", registry=self._registry
        )
        self._jobs = Gauge(
            "unicuco_jobs", "Jobs of the service by status.", ["status"], registry=self._registry
        )
        self._variants = Gauge(
            "unicuco_variants", "Variants that are there.", registry=self._registry
        )

    def begin(self) -> None:
        """Note that a request has come."""
        self._in_flight.inc()

    def end(self, *, route: str, method: str, status: int, seconds: float) -> None:
        """Note that a request was answered."""
        self._in_flight.dec()
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def exposition(self, *, jobs: Mapping[str, int], num_variants: int) -> bytes:
        """Return everything as text, with the queue as it stands now."""
        for status, count in jobs.items():
            self._jobs.labels(status).set(count)
        self._variants.set(num_variants)
        return generate_latest(self._registry)
