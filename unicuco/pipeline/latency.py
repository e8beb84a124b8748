"""Measures what latency depends on, once per machine, and keeps a model of it with a run.

Some shapes of the run's space (`unicuco.pipeline.latency_design`), as configurations without
weights, are timed in vLLM in turns with the dense model: what a shape takes is the ratio of the two
times the dense model's median. A variant that was cut is timed against its base likewise.

What it does not know: how requests are answered.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from unicuco.engines import (
    DecodeLoad,
    DecodeTimer,
    VllmEngine,
    VllmOptions,
    compare_decoding,
    require_vllm,
)
from unicuco.errors import RequestError, RunError
from unicuco.export.files import write_json
from unicuco.export.shrunk import ShrinkPlan
from unicuco.models.folder import read_config
from unicuco.objectives import LatencyModel, latency_features, leave_one_out
from unicuco.pipeline.latency_design import design
from unicuco.pipeline.latency_file import save_latency
from unicuco.pipeline.latency_requests import no_latency_model
from unicuco.pipeline.options import ProgressSink
from unicuco.pipeline.run import Run
from unicuco.search.drive import Progress
from unicuco.space import StrategySpace
from unicuco.types import ModelProfile, Plan, ServedAs, Strategy, Target

_MAX_BATCH: Final = 256
_PROMPT_TOKENS: Final = 16
_STEPS: Final = 8  # a turn is then a tenth of a second of a small model
_CHECK_ROUNDS: Final = 20
_GPU_SHARE: Final = 0.4  # of a GPU's memory, for each of two engines side by side


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions:
    """How to measure.

    ``batches``: sequences decoded at a time, each in [1, 256]; others between them are
    interpolated. ``shapes``: how many to time, the dense one included. ``rounds``: of dense and
    shape in turns, whose median counts. ``threads``: of the engine, 0 = one per core.

    Raises:
        RequestError: a value outside its range.
    """

    batches: tuple[int, ...] = (1, 4, 16)
    shapes: int = 12
    rounds: int = 20
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.batches or any(not 1 <= batch <= _MAX_BATCH for batch in self.batches):
            raise RequestError(f"batches must lie in [1, {_MAX_BATCH}], got {self.batches}")
        if list(self.batches) != sorted(set(self.batches)):
            raise RequestError(f"batches must differ and rise, got {self.batches}")
        if self.shapes < 2 or self.rounds < 1 or self.threads < 0:
            raise RequestError(
                "measure at least 2 shapes in at least 1 round, with 0 or more threads; got "
                f"{self.shapes}, {self.rounds} and {self.threads}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStrategies:
    """Times per token: ``n x m`` ratios to the dense model's, whose medians are ``m`` ms.

    ``engine`` says what ran: device and version.
    """

    ratios: Tensor
    dense_ms: Tensor
    engine: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyReport:
    """A latency model with what it was fitted to.

    ``features`` are ``n x f`` and ``ms`` ``n x m`` of the shapes, the dense one first; ``errors``
    ``n x m`` relative, of each shape predicted by a fit to the others; ``machine`` says what ran.
    """

    model: LatencyModel
    features: Tensor
    ms: Tensor
    errors: Tensor
    machine: dict[str, object]

    def to_dict(self) -> dict[str, object]:
        """Return what ``latency.json`` keeps beside the model, and the command prints."""
        return {
            "dense_ms_per_token": self.ms[0].tolist(),
            "error": {"median": float(self.errors.median()), "worst": float(self.errors.max())},
            "rows": [
                {"features": row, "ms_per_token": own}
                for row, own in zip(self.features.tolist(), self.ms.tolist(), strict=True)
            ],
            "machine": self.machine,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyCheck:
    """What was predicted of a variant beside what was measured, both relative to dense."""

    batch: int
    predicted_ratio: float
    measured_ratio: float
    ms: float
    dense_ms: float

    def to_dict(self) -> dict[str, float]:
        """Return the JSON object that commands print."""
        return {
            "batch": self.batch,
            "predicted_ratio": self.predicted_ratio,
            "measured_ratio": self.measured_ratio,
            "ms_per_token": self.ms,
            "dense_ms_per_token": self.dense_ms,
        }


def measure_run(run: Run, options: LatencyOptions, progress: ProgressSink) -> LatencyReport:
    """Measure the latency of a run's shapes on this machine, and keep the model with the run.

    Raises:
        InfeasibleRequestError: the run did not learn shapes.
        EngineError: vLLM is not installed, or can't run the model.
        RunError: the base model is gone or another one, or the run does not lie here.
        StorageError: the disk refuses.
    """
    space = run.planner.space
    if space.cost.served_as is not ServedAs.SHRINK:
        raise no_latency_model(space.cost.served_as)
    if run.copy.remote is not None:
        raise RunError(f"{run.copy.place} is not on this machine; copy the run here to measure it")
    report = measure_shapes(run.profile, space, run.base_folder, options, progress)
    save_latency(
        run.folder, report.model, base_digest=run.profile.digest, measured=report.to_dict()
    )
    return report


def measure_shapes(
    profile: ModelProfile,
    space: StrategySpace,
    base: Path,
    options: LatencyOptions,
    progress: ProgressSink,
) -> LatencyReport:
    """Time some shapes of a space beside the dense model, and fit a latency model to them.

    Args:
        profile: of the dense model.
        space: of its shapes.
        base: the dense model's folder; no weights are read.
        options: how.
        progress: told of every shape.

    Raises:
        EngineError: vLLM is not installed, or can't run a shape.
        VariantError: no configuration of this family describes such shapes.
    """
    strategies = design(space, options.shapes, seed=options.seed)
    timed = time_strategies(profile, space, strategies, base, options, progress)
    features = latency_features(space.cost, strategies)
    times = timed.ratios * timed.dense_ms
    return LatencyReport(
        model=LatencyModel.fit(features, times, options.batches),
        features=features,
        ms=times,
        errors=leave_one_out(features, times, options.batches),
        machine=_machine(timed.engine, options),
    )


def time_strategies(
    profile: ModelProfile,
    space: StrategySpace,
    strategies: Sequence[Strategy],
    base: Path,
    options: LatencyOptions,
    progress: ProgressSink,
) -> TimedStrategies:
    """Time strategies in turns with the dense model; arguments and errors as `measure_shapes`."""
    require_vllm()
    loads = _loads(profile, options.batches)
    timer = partial(
        DecodeTimer,
        _engine_options(options.threads),
        max_batch=options.batches[-1],
        context=loads[0].prompt_tokens + loads[0].steps + 1,
    )
    ratios, dense_ms = [], []
    with tempfile.TemporaryDirectory() as scratch, timer() as dense, timer() as other:
        whole = space.decode(torch.zeros(1, space.num_axes))
        first, *folders = _write_configs(profile, space, [*whole, *strategies], base, Path(scratch))
        progress(Progress(stage="latency", done=0, total=len(folders), detail="starting vLLM"))
        engine = dense.load(first)
        for k, folder in enumerate(folders, start=1):
            other.load(folder)
            ratio, ms = compare_decoding(dense, other, loads, options.rounds)
            ratios.append(ratio)
            dense_ms.append(ms)
            progress(Progress(stage="latency", done=k, total=len(folders)))
    return TimedStrategies(
        ratios=torch.tensor(ratios, dtype=torch.float64),
        dense_ms=torch.tensor(dense_ms, dtype=torch.float64).median(0).values,
        engine=engine,
    )


def _write_configs(
    profile: ModelProfile,
    space: StrategySpace,
    strategies: Sequence[Strategy],
    base: Path,
    scratch: Path,
) -> list[Path]:
    """Write the configuration of every strategy's variant into a folder of its own.

    The dense strategy gets the base model's own.

    Raises:
        VariantError: no configuration of this family describes one of them.
    """
    folders = []
    for k, strategy in enumerate(strategies):
        folder = scratch / str(k)
        folder.mkdir()
        config = read_config(base)
        if any(strategy.values):
            config = ShrinkPlan.of(profile, space, strategy, base).config
        write_json(folder / "config.json", config)
        folders.append(folder)
    return folders


def check_cut(run: Run, plan: Plan, variant: Path) -> LatencyCheck | None:
    """Time a variant that was cut beside its base model, where its request was of latency.

    Returns:
        Predicted and measured; none: the request was of something else.

    Raises:
        EngineError: vLLM is not installed, or can't run one of them.
        RunError: the base model is gone or another one.
    """
    predicted = plan.latency
    if plan.request.target is not Target.MAX_LATENCY_MS or predicted is None or not run.latency:
        return None
    require_vllm()
    engine = partial(VllmEngine, _engine_options(run.latency.threads))
    with engine() as dense, engine() as other:
        dense.load(run.base_folder)
        other.load(variant)
        loads = _loads(run.profile, (predicted.batch,))
        (ratio,), (dense_ms,) = compare_decoding(dense, other, loads, _CHECK_ROUNDS)
    return LatencyCheck(
        batch=predicted.batch,
        predicted_ratio=predicted.ms / predicted.dense_ms,
        measured_ratio=ratio,
        ms=ratio * dense_ms,
        dense_ms=dense_ms,
    )


def _loads(profile: ModelProfile, batches: Sequence[int]) -> list[DecodeLoad]:
    prompt = min(_PROMPT_TOKENS, profile.max_context // 2)
    return [
        DecodeLoad(
            batch=batch,
            prompt_tokens=prompt,
            steps=min(_STEPS, profile.max_context - prompt - 1),
            vocabulary=profile.vocabulary_size,
        )
        for batch in batches
    ]


def _engine_options(threads: int) -> VllmOptions:
    return VllmOptions(threads=threads, memory_fraction=_GPU_SHARE)


def _machine(engine: dict[str, str], options: LatencyOptions) -> dict[str, object]:
    cores = len(os.sched_getaffinity(0))
    return {
        "processor": _processor(),
        "threads": options.threads or cores,
        **engine,
        "versions": {name: version(name) for name in ("unicuco", "torch")},
    }


def _processor() -> str:
    """Return the processor's name as Linux tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
