"""From a model and a request to a measured variant in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from unicuco.dimensions import DIMENSIONS
from unicuco.engines import require_vllm
from unicuco.errors import InfeasibleRequestError, RequestError
from unicuco.export.staging import check_target
from unicuco.models import load_tokenizer
from unicuco.pipeline.backend import Backend
from unicuco.pipeline.evaluation import EvaluationReport, evaluate_variant
from unicuco.pipeline.latency import LatencyOptions, measure_run
from unicuco.pipeline.latency_requests import no_latency_model
from unicuco.pipeline.learning import learn
from unicuco.pipeline.options import LearnOptions, ProgressSink
from unicuco.pipeline.preparation import read_texts
from unicuco.pipeline.pruning import prune
from unicuco.pipeline.run import MANIFEST, Run
from unicuco.types import Plan, Request, ServedAs, Target

_FLAGS: Final = {"tasks": "--task"}  # options that are called otherwise on the command line


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
    learning: LearnOptions,
    request: Request,
    out: Path,
    *,
    backend_factory: Callable[[], Backend],
    progress: ProgressSink,
) -> CompressReport:
    """Learn a run if there is none, cut the variant, and measure it on test text.

    Where latency is asked for and the run has no latency model yet, one is measured first.

    Args:
        learning: the base model, the run to use, or to learn if it is not there, and how; an
            unfinished one goes on.
        request: what is wanted.
        out: the variant's folder.
        backend_factory: makes the backend if learning is needed.
        progress: told of every stage.

    Raises:
        RequestError: the run is there, and was learned otherwise than ``learning`` says.
        InfeasibleRequestError: the run can't meet the request; before anything is learned where
            the request alone tells.
        EngineError: latency is asked for and vLLM is not installed.
    """
    check_target(out, overwrite=False)
    folder = learning.out
    if (folder / MANIFEST).exists():
        learned = Run.open(folder, base=learning.model)
        _check_learned(learned, learning)
    else:
        _check_learnable(request, learning)
        options = replace(learning, resume=(folder / "evaluations.db").exists())
        learned = learn(options, backend=backend_factory(), progress=progress)
    if request.target is Target.MAX_LATENCY_MS and learned.latency is None:
        batches = sorted({*LatencyOptions().batches, request.batch or 1})
        measure_run(learned, LatencyOptions(batches=tuple(batches)), progress)
        learned = Run.open(folder, base=learning.model)
    plan = prune(learned, request, out)
    measured = evaluate_variant(out, reference=learning.model, progress=progress)
    return CompressReport(plan=plan, out=out, run=folder, measured=measured)


def _check_learnable(request: Request, wanted: LearnOptions) -> None:
    """Refuse what no run learned as ``wanted`` could answer, before it is learned."""
    highest = wanted.max_sparsity
    if request.target is Target.SPARSITY and request.value > highest:
        raise InfeasibleRequestError(
            f"sparsity {request.value:g} lies outside what would be learned (up to {highest:g}); "
            "learn higher with --max-sparsity, or ask for less",
            nearest=highest,
        )
    if request.target is Target.MAX_LATENCY_MS:
        kinds = {DIMENSIONS[name].served_as for name in wanted.dimensions}
        if ServedAs.SHRINK not in kinds:
            raise no_latency_model((kinds - {ServedAs.MASK} or kinds).pop())
        require_vllm()


def _check_learned(run: Run, wanted: LearnOptions) -> None:
    """Refuse options that a run which is there was not learned with; a default asks for nothing."""
    plain = LearnOptions(model=wanted.model, out=wanted.out)
    recorded = run.manifest["options"]
    asked = {
        name: value
        for name, value in {**wanted.decisive(), "evaluations": wanted.evaluations}.items()
        if value != {**plain.decisive(), "evaluations": None}.get(name)
    }
    differing = [name for name, value in asked.items() if recorded.get(name) != value]
    if (wanted.calibration or wanted.tasks) and not differing:
        tokenizer = load_tokenizer(run.base_folder)
        texts = read_texts(wanted, tokenizer, int(recorded["context"]))
        if texts.search.digest != run.manifest["data"]["search"]:
            differing.append("tasks" if wanted.tasks else "calibration")
    if differing:
        names = " and ".join(_FLAGS.get(name, f"--{name.replace('_', '-')}") for name in differing)
        raise RequestError(
            f"{run.folder} was learned with another {names}: leave it out, or name another --run"
        )
