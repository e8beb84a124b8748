"""From a model and a request to a measured variant in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from unicuco.export.staging import check_target
from unicuco.pipeline.backend import Backend
from unicuco.pipeline.evaluation import EvaluationReport, evaluate_variant
from unicuco.pipeline.learning import default_run_folder, learn
from unicuco.pipeline.options import LearnOptions, ProgressSink
from unicuco.pipeline.pruning import prune
from unicuco.pipeline.run import MANIFEST, Run
from unicuco.types import Plan, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressReport:
    """A variant with its plan, what was measured of it, and the run it came from."""

    plan: Plan
    out: Path
    run: Path
    measured: EvaluationReport

    def to_dict(self) -> dict[str, object]:
        """Return the plan document with folder, run and measurements."""
        return {
            **self.plan.to_dict(),
            "out": str(self.out),
            "run": str(self.run),
            "measured": asdict(self.measured),
        }


def compress(
    model: str,
    request: Request,
    out: Path,
    *,
    run: Path | None,
    backend_factory: Callable[[], Backend],
    progress: ProgressSink,
) -> CompressReport:
    """Learn a run if there is none, cut the variant, and measure it on test text.

    Args:
        model: the base model.
        request: what is wanted.
        out: the variant's folder.
        run: the run to use, or to learn if it is not there; none: a folder beside ``out``.
        backend_factory: makes the backend if learning is needed.
        progress: told of every stage.
    """
    check_target(out, overwrite=False)
    folder = default_run_folder(out) if run is None else run
    if (folder / MANIFEST).exists():
        learned = Run.open(folder, base=model)
    else:
        options = LearnOptions(model=model, out=folder, resume=(folder / "evaluations.db").exists())
        learned = learn(options, backend=backend_factory(), progress=progress)
    plan = prune(learned, request, out)
    measured = evaluate_variant(out, reference=model, progress=progress)
    return CompressReport(plan=plan, out=out, run=folder, measured=measured)
