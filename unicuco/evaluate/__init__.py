"""Strategy -> Evaluation: the real model judges a strategy."""

from __future__ import annotations

from unicuco.evaluate.local import EvaluatorConfig, LocalEvaluator, dense_reference

__all__ = ["EvaluatorConfig", "LocalEvaluator", "dense_reference"]
