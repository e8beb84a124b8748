"""Learning on Ray: evaluator replicas, the learner, and the backend that drives them."""

from __future__ import annotations
