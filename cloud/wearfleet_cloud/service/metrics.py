"""What the service tells Prometheus. No metric has a label for a single device."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_INFERENCE_SECONDS: Final = (0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)


class Metrics:
    """All metrics of one service, in a registry of their own so that several services fit into one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.messages = self._counter("ingest_messages", "MQTT messages stored, by kind", "kind")
        self.duplicates = self._counter("ingest_duplicates", "MQTT messages that had been stored before")
        self.rejected = self._counter("ingest_rejected", "MQTT messages refused, by reason", "reason")
        self.commit_seconds = self._histogram(
            "ingest_commit_seconds", "time of one ingest transaction", _SECONDS
        )
        self.broker_connected = self._gauge(
            "broker_connected", "1 while the service is connected to the broker"
        )
        self.inference_seconds = self._histogram(
            "inference_seconds", "time of one inference on a device", _INFERENCE_SECONDS
        )
        self.windows_ood = self._counter("ood_windows", "windows that a model called out of distribution")
        self.windows_predicted = self._counter("predicted_windows", "windows that a model recognised")
        self.outbox_depth = self._gauge("outbox_depth", "messages waiting on devices, sum of last reports")
        self.devices = self._gauge("devices", "enrolled devices that are not revoked")
        self.calls = self._counter("rpc_calls", "gRPC calls, by method and status", "method", "status")
        self.call_seconds = self._histogram(
            "rpc_seconds", "time of a gRPC call, by method", _SECONDS, "method"
        )
        self.update_bytes = self._counter(
            "update_bytes", "bytes of federated tensors, by direction", "direction"
        )
        self.submissions = self._counter("submissions", "federated submissions, by receipt", "status")
        self.round_seconds = self._histogram("round_seconds", "time of a federated round", _SECONDS)
        self.rounds = self._counter("rounds", "federated rounds that ended, by state", "state")

    def expose(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"wearfleet_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"wearfleet_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"wearfleet_{name}", text, labels, registry=self.registry, buckets=buckets)
