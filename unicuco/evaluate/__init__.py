"""Strategy -> Evaluation: the real model judges a strategy."""

from __future__ import annotations

from unicuco.evaluate.local import LocalEvaluator, dense_reference
from unicuco.evaluate.measure import EvaluatorConfig

__all__ = ["EvaluatorConfig", "LocalEvaluator", "dense_reference"]
