"""What the metrics endpoint of a node says, as Prometheus would read it."""

from __future__ import annotations

import urllib.request

import ray
from prometheus_client.parser import text_string_to_metric_families


def node_endpoint() -> str:
    """Return the URL of the metrics of the node that this process is connected to."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def read_metrics(url: str) -> dict[str, float]:
    """Return every sample of ours by its name without Ray's prefix, summed over processes."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("ray_")
            if name.startswith("unicuco_") and "le" not in sample.labels:
                found[name] = found.get(name, 0.0) + sample.value
    return found
