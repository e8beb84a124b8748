"""The whole path: learn a run, plan, prune, compress, evaluate.

This is what command line, cluster and service call. Each name is imported when it is first asked
for: a worker that only cuts loads no transformers, a planner nothing of learning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from unicuco.pipeline.backend import Backend, LocalBackend
    from unicuco.pipeline.bits import BitsOptions, BitsRow, study
    from unicuco.pipeline.comparison import CompareOptions, CompareReport, Comparison, compare
    from unicuco.pipeline.compression import CompressReport, compress
    from unicuco.pipeline.evaluation import EvaluationReport, evaluate_variant
    from unicuco.pipeline.latency import (
        LatencyCheck,
        LatencyOptions,
        LatencyReport,
        check_cut,
        measure_run,
    )
    from unicuco.pipeline.learning import learn
    from unicuco.pipeline.options import LearnOptions, ProgressSink
    from unicuco.pipeline.packing import Int8Options, PackOptions, PackReport, pack, unpack
    from unicuco.pipeline.pictures import draw_front, draw_strategies
    from unicuco.pipeline.planner import FrontPoint, Planner
    from unicuco.pipeline.pruning import prune
    from unicuco.pipeline.report import write_report
    from unicuco.pipeline.run import Run
    from unicuco.search.drive import Progress

_MODULES: Final = {
    "Backend": "unicuco.pipeline.backend",
    "BitsOptions": "unicuco.pipeline.bits",
    "BitsRow": "unicuco.pipeline.bits",
    "CompareOptions": "unicuco.pipeline.comparison",
    "CompareReport": "unicuco.pipeline.comparison",
    "Comparison": "unicuco.pipeline.comparison",
    "CompressReport": "unicuco.pipeline.compression",
    "EvaluationReport": "unicuco.pipeline.evaluation",
    "FrontPoint": "unicuco.pipeline.planner",
    "Int8Options": "unicuco.pipeline.packing",
    "LatencyCheck": "unicuco.pipeline.latency",
    "LatencyOptions": "unicuco.pipeline.latency",
    "LatencyReport": "unicuco.pipeline.latency",
    "LearnOptions": "unicuco.pipeline.options",
    "LocalBackend": "unicuco.pipeline.backend",
    "PackOptions": "unicuco.pipeline.packing",
    "PackReport": "unicuco.pipeline.packing",
    "Planner": "unicuco.pipeline.planner",
    "ProgressSink": "unicuco.pipeline.options",
    "Run": "unicuco.pipeline.run",
    "check_cut": "unicuco.pipeline.latency",
    "compare": "unicuco.pipeline.comparison",
    "compress": "unicuco.pipeline.compression",
    "draw_front": "unicuco.pipeline.pictures",
    "draw_strategies": "unicuco.pipeline.pictures",
    "evaluate_variant": "unicuco.pipeline.evaluation",
    "learn": "unicuco.pipeline.learning",
    "measure_run": "unicuco.pipeline.latency",
    "pack": "unicuco.pipeline.packing",
    "prune": "unicuco.pipeline.pruning",
    "study": "unicuco.pipeline.bits",
    "unpack": "unicuco.pipeline.packing",
    "write_report": "unicuco.pipeline.report",
    "Progress": "unicuco.search.drive",
}


def __getattr__(name: str) -> object:
    """Import what is asked for."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Backend",
    "BitsOptions",
    "BitsRow",
    "CompareOptions",
    "CompareReport",
    "Comparison",
    "CompressReport",
    "EvaluationReport",
    "FrontPoint",
    "Int8Options",
    "LatencyCheck",
    "LatencyOptions",
    "LatencyReport",
    "LearnOptions",
    "LocalBackend",
    "PackOptions",
    "PackReport",
    "Planner",
    "Progress",
    "ProgressSink",
    "Run",
    "check_cut",
    "compare",
    "compress",
    "draw_front",
    "draw_strategies",
    "evaluate_variant",
    "learn",
    "measure_run",
    "pack",
    "prune",
    "study",
    "unpack",
    "write_report",
]
