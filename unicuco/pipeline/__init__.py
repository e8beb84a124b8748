"""The whole path: learn a run, plan, prune, compress, evaluate.

This is what command line, cluster and service call.
"""

from __future__ import annotations

from unicuco.pipeline.backend import Backend, LocalBackend
from unicuco.pipeline.compare import CompareOptions, CompareReport, Comparison, compare
from unicuco.pipeline.compress import CompressReport, compress, prune
from unicuco.pipeline.evaluation import EvaluationReport, evaluate_variant
from unicuco.pipeline.learning import learn
from unicuco.pipeline.options import LearnOptions, ProgressSink
from unicuco.pipeline.pictures import draw_front, draw_strategies
from unicuco.pipeline.planner import FrontPoint, Planner
from unicuco.pipeline.run import Run
from unicuco.search.drive import Progress

__all__ = [
    "Backend",
    "CompareOptions",
    "CompareReport",
    "Comparison",
    "CompressReport",
    "EvaluationReport",
    "FrontPoint",
    "LearnOptions",
    "LocalBackend",
    "Planner",
    "Progress",
    "ProgressSink",
    "Run",
    "compare",
    "compress",
    "draw_front",
    "draw_strategies",
    "evaluate_variant",
    "learn",
    "prune",
]
