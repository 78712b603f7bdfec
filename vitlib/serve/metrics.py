"""Metrics of a server, in Prometheus' text format."""

from __future__ import annotations

import os
from typing import Any

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's variable, set for several processes
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class ServerMetrics:
    """Counters of requests, images and errors; histograms of latencies; gauges of the queue.

    Attributes:
        requests: Answers by route and status.
        images: Images by result.
        errors: Errors by code.
        seconds: Latency of requests by route.
        batches: Images of a batch.
        batch_seconds: Time of a batch in the model.
        queue: Images in the queue.
        backlog: Images that are accepted and not answered.
    """

    def __init__(self) -> None:
        """Register the metrics."""
        import prometheus_client as prom

        self._prom = prom
        self.registry = prom.CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = prom.Counter(
            "vitlib_requests", "Requests answered.", ["route", "status"], **own
        )
        self.images = prom.Counter("vitlib_images", "Images answered.", ["kind"], **own)
        self.errors = prom.Counter(
            "vitlib_errors", "Requests and images refused, by code.", ["code"], **own
        )
        self.seconds = prom.Histogram(
            "vitlib_request_seconds", "From a request's last byte to its answer.", ["route"],
            buckets=_SECONDS, **own,
        )  # fmt: skip
        self.batches = prom.Histogram(
            "vitlib_batch_images", "Images computed together.", buckets=_SIZES, **own
        )
        self.batch_seconds = prom.Histogram(
            "vitlib_batch_seconds", "Of a batch in the model.", buckets=_SECONDS, **own
        )
        # The queue of a server is the sum of its live processes' queues.
        several: Any = {"multiprocess_mode": "livesum"} if os.environ.get(DIRECTORY) else {}
        self.queue = prom.Gauge(
            "vitlib_queue_images", "Images that wait for the model.", **own, **several
        )
        self.backlog = prom.Gauge(
            "vitlib_backlog_images", "Images accepted and not answered.", **own, **several
        )

    def text(self) -> tuple[bytes, str]:
        """Return the metrics of all processes.

        Returns:
            The text, and its content type.
        """
        registry = self.registry
        if os.environ.get(DIRECTORY):
            from prometheus_client import multiprocess

            registry = self._prom.CollectorRegistry()
            collector: Any = multiprocess.MultiProcessCollector
            collector(registry)
        return self._prom.generate_latest(registry), self._prom.CONTENT_TYPE_LATEST
