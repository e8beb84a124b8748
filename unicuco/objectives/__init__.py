"""What is measured of a strategy: KL to the dense model; and what is predicted: latency."""

from __future__ import annotations

from unicuco.objectives.kl import DenseReference, top_k_for
from unicuco.objectives.latency import (
    LatencyModel,
    dense_features,
    latency_features,
    leave_one_out,
)

__all__ = [
    "DenseReference",
    "LatencyModel",
    "dense_features",
    "latency_features",
    "leave_one_out",
    "top_k_for",
]
