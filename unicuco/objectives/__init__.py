"""What is measured of a strategy: KL to the dense model, perplexity, kept fraction."""

from __future__ import annotations

from unicuco.objectives.kl import DenseReference, top_k_for

__all__ = ["DenseReference", "top_k_for"]
