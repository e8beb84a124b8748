"""`learn`: from a model to a finished run folder, resumable at every moment.

Prepare, drive the search over the backend, learn surrogate and StratNet from all evaluations,
calibrate the intervals on the validation text, write the results, the manifest last. Everything
measured is in the store before it counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Final

import torch
from torch import Tensor

from unicuco.allocate import ALLOCATORS
from unicuco.calibration import TokenSet
from unicuco.errors import AllocationError, RunError, SurrogateError
from unicuco.evaluate.arrays import reference_of, unpack
from unicuco.files import file_digest, replace_with
from unicuco.importance.hessian import FACTORS
from unicuco.importance.units import UNITS
from unicuco.levels import LevelDatabase
from unicuco.models.fetching import place_of
from unicuco.pipeline.backend import Backend
from unicuco.pipeline.dense import JudgeWindows
from unicuco.pipeline.files import save_json, save_tensors
from unicuco.pipeline.options import LearnOptions, ProgressSink
from unicuco.pipeline.pictures import draw_front, draw_strategies
from unicuco.pipeline.preparation import Prepared, allocation_context, build_levels, prepare
from unicuco.pipeline.publishing import Publisher
from unicuco.pipeline.run import DATABASE, FORMAT, MANIFEST, Run, profile_document
from unicuco.pipeline.run_folder import opened
from unicuco.search import learn_network
from unicuco.search.drive import AskTell, Pool, Progress, drive
from unicuco.store import EvaluationStore, Measurement
from unicuco.stratnet import StratNet, StratNetAllocator
from unicuco.surrogate import GaussianProcess, Intervals, Measured, Surrogate, TaskSurrogates
from unicuco.types import Ask, Evaluation, FailedEvaluation, Outcome, ServedAs, Strategy

_FINAL_STEPS: Final = 200  # of StratNet's last training: more change log KL by less than 0.001
_VALIDATION_POINTS: Final = 16
_VALIDATED_FROM: Final = 0.1  # above the lowest sparsity
_RIVAL_SPARSITIES: Final = (0.5, 0.65, 0.8)
_VERSIONS: Final = ("unicuco", "torch", "transformers", "gpytorch")


def learn(options: LearnOptions, *, backend: Backend, progress: ProgressSink) -> Run:
    """Learn a run, or continue one.

    Args:
        options: what to learn, and where to.
        backend: where evaluations run; entered and left here.
        progress: told of every stage.

    Returns:
        The finished run.

    Raises:
        RunError: the folder holds something else, an unfinished run without ``resume``, or one of
            other options.
        UnicucoError: model, text, storage or cluster refuse; what was measured stays in the store.
    """
    folder = options.out
    publisher = Publisher(options)
    publisher.begin()
    with opened(options) as store:
        prepared = _prepared(options, store, progress)
        publisher.checkpoint(progress, store)
        progress = publisher.watching(progress, store)
        _evaluate(options, prepared, store, backend, progress)
        evaluations = [(ask.strategy, o) for ask, o in _whole(store) if isinstance(o, Evaluation)]
        progress(Progress(stage="train", done=0, total=1, detail=f"{len(evaluations)} evaluations"))
        config = replace(
            prepared.search, training=replace(prepared.search.training, steps=_FINAL_STEPS)
        )
        try:
            surrogate, net = learn_network(config, evaluations, seed=options.seed)
        except SurrogateError as error:
            raise SurrogateError(f"{error}{_failures(store)}") from error
        progress(Progress(stage="train", done=1, total=1))
        validation, intervals = _validate(prepared, surrogate, net, store, progress)
        if options.store:
            replace_with(folder / DATABASE, store.copy_to)
        _write(options, prepared, store, surrogate, net, intervals, validation)
        run = Run.open(folder)
        draw_front(run, folder / "front.png")
        draw_strategies(run, folder / "strategies.png")
        publisher.publish(store)
    return run


def _failures(store: EvaluationStore) -> str:
    """Return what to add to a line that says that too little is known: why evaluations failed."""
    outcomes = [outcome for _, outcome in store.read()]
    failed = [outcome for outcome in outcomes if isinstance(outcome, FailedEvaluation)]
    if not failed:
        return ""
    return (
        f"; {len(failed)} of {len(outcomes)} failed, the last by {failed[-1].kind}: "
        f"{failed[-1].message}; mend that, then --resume with more --evaluations"
    )


def _prepared(options: LearnOptions, store: EvaluationStore, progress: ProgressSink) -> Prepared:
    """Prepare, and refuse to continue a run of another model, text or options."""

    def check(model_digest: str, data_digest: str) -> None:
        identity = {"base_model": model_digest, "data": data_digest, **options.decisive()}
        _check_identity(options, store, identity)

    prepared = prepare(options, options.out, progress, check=check)
    store.record_measurements(prepared.costs)
    store.set_meta("prepared", True)
    return prepared


def _check_identity(
    options: LearnOptions, store: EvaluationStore, identity: dict[str, object]
) -> None:
    recorded = store.get_meta("identity")
    if recorded is None:
        store.set_meta("identity", identity)
    else:
        names = {**identity, **recorded}  # what goes unnamed is as it always is
        differing = [name for name in names if recorded.get(name) != identity.get(name)]
        if differing:
            raise RunError(
                f"{options.place} was begun with another {' and '.join(differing)}; "
                "resume it with the same options, or choose another folder"
            )


def _evaluate(
    options: LearnOptions,
    prepared: Prepared,
    store: EvaluationStore,
    backend: Backend,
    progress: ProgressSink,
) -> None:
    finished = len(_whole(store)) >= options.num_evaluations
    if finished and not (prepared.levels and prepared.levels.missing_blocks()):
        return
    with backend:
        build_levels(prepared, backend, progress, lambda cost: store.record_measurements([cost]))
        search, pool = _start(backend, prepared, store)
        drive(
            search,
            pool,
            store,
            num_evaluations=options.num_evaluations,
            on_progress=progress,
            screening=prepared.search.screening,
        )


def _whole(store: EvaluationStore) -> list[tuple[Ask, Outcome]]:
    """Return what was judged on the whole search text: alternatives on few tokens are no values."""
    return [(ask, outcome) for ask, outcome in store.read() if ask.tokens is None]


def _start(backend: Backend, prepared: Prepared, store: EvaluationStore) -> tuple[AskTell, Pool]:
    """Start the backend; the dense predictions, large as they are, are then its own alone."""
    text = prepared.texts.search
    started = time.perf_counter()
    arrays = {**prepared.model_arrays(), **prepared.text_arrays(text)}
    _record_dense("search", text, store, time.perf_counter() - started)
    return backend.start(prepared.evaluator, arrays, prepared.search)


def _record_dense(name: str, text: TokenSet, store: EvaluationStore, seconds: float) -> None:
    store.record_measurements(
        [
            Measurement(
                purpose=f"dense {name}",
                tokens=text.num_tokens,
                cost_units=1.0,
                seconds=seconds,
                text_digest=text.digest,
                kl=0.0,
            )
        ]
    )


def _validate(
    prepared: Prepared,
    surrogate: Surrogate,
    net: StratNet,
    store: EvaluationStore,
    progress: ProgressSink,
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, object]]:
    """Measure StratNet and one-shot rivals on validation text, and calibrate on them.

    Returns:
        The measured curves, without what overflows, and the intervals as the manifest holds them.

    Raises:
        AllocationError: nearly all of StratNet's answers overflow.
    """
    space = prepared.space
    text = prepared.texts.validation
    started = time.perf_counter()
    config, arrays = prepared.judging(text)
    _record_dense("validation", text, store, time.perf_counter() - started)
    asked = _validated(prepared, net)
    windows = _measure(
        prepared.dense.judge(config, arrays), asked, text.num_tokens, text.digest, store, progress
    )
    measured = [  # the rest overflow
        (one, kl) for one, kl in zip(asked, windows, strict=True) if bool(kl.isfinite().all())
    ]
    curves: dict[str, list[tuple[float, float]]] = {"stratnet": [], "uniform": [], "fisher": []}
    for (name, sparsity, _), kl in measured:
        curves[name].append((sparsity, float(kl.mean())))
    if len(curves["stratnet"]) < 2:
        raise AllocationError(
            "StratNet's answers overflow on the validation text; learn in another folder, with a "
            "lower max-sparsity"
        )
    points = space.encode([strategy for (_, _, strategy), _ in measured])
    reference = reference_of(unpack(arrays))
    nothing = reference.kl_of_uniform(prepared.loaded.profile.vocabulary_size)
    return curves, _calibrated(
        surrogate,
        points,
        space.cost.size(space.settings(points)),
        torch.stack([kl for _, kl in measured]),
        len(curves["stratnet"]),
        nothing.double().view(len(text.ids), -1).mean(1),
    )


def _validated(prepared: Prepared, net: StratNet) -> list[tuple[str, float, Strategy]]:
    """Return whose strategies to measure on validation text: name, sparsity and strategy.

    StratNet's come first. Where strategies are few, as with blocks to drop, it answers several
    targets alike; each of its answers is measured once, but two in any case.
    """
    space = prepared.space
    low, high = prepared.search.sparsity_range
    # Nearly nothing is lost to the lowest; where the range is short, half of it will do.
    first = low + min(_VALIDATED_FROM, (high - low) / 2)
    targets = torch.linspace(first, high, _VALIDATION_POINTS, dtype=torch.float64).tolist()
    answers = StratNetAllocator(net, space).allocate(targets)
    own = [("stratnet", target, answer) for target, answer in zip(targets, answers, strict=True)]
    distinct: dict[str, tuple[str, float, Strategy]] = {}
    for one in own:
        distinct.setdefault(one[2].key, one)
    asked = list(distinct.values()) if len(distinct) > 1 else own[:2]
    context = allocation_context(prepared)
    # What a strategy of weights alone costs says nothing of shapes.
    rivals = [s for s in _RIVAL_SPARSITIES if s <= high and space.cost.served_as is ServedAs.MASK]
    for name in ("uniform", "fisher"):
        strategies = ALLOCATORS[name](context).allocate(rivals)
        asked += [
            (name, sparsity, strategy)
            for sparsity, strategy in zip(rivals, strategies, strict=True)
        ]
    return asked


@torch.no_grad()
def _calibrated(
    surrogate: Surrogate,
    points: Tensor,
    sizes: Tensor,
    window_kl: Tensor,
    num_front: int,
    nothing: Tensor,
) -> dict[str, object]:
    """Return the intervals that ``n x w`` measurements at ``n x d`` points give, task by task.

    The first ``num_front`` points are StratNet's, the others off the front; ``nothing`` is the KL
    of a model that knows nothing on each of the w windows.
    """

    def intervals(process: GaussianProcess, own: Tensor, ceiling: Tensor) -> dict[str, object]:
        columns = (own, *process.posterior(points), sizes)
        front, others = (
            Measured(window_kl=kl, mean=mean, std=std, sizes=kept)
            for kl, mean, std, kept in (
                [column[:num_front] for column in columns],
                [column[num_front:] for column in columns],
            )
        )
        found = Intervals.calibrate(
            front,
            others,
            deviation_scale=process.deviation_scale(),
            ceiling=float(ceiling.mean()),
        )
        return asdict(found)

    if not isinstance(surrogate, TaskSurrogates):
        assert isinstance(surrogate, GaussianProcess), "there is no other kind"
        return intervals(surrogate, window_kl, nothing)
    count = len(surrogate.processes)
    parts = zip(window_kl.chunk(count, dim=1), nothing.chunk(count), strict=True)
    return {
        task: intervals(process, own, ceiling)
        for (task, process), (own, ceiling) in zip(surrogate.processes.items(), parts, strict=True)
    }


def _measure(
    judge: JudgeWindows,
    asked: Sequence[tuple[str, float, Strategy]],
    tokens: int,
    digest: str,
    store: EvaluationStore,
    progress: ProgressSink,
) -> list[Tensor]:
    windows: list[Tensor] = []
    started = time.perf_counter()
    judged = judge([strategy for _, _, strategy in asked])
    for number, (name, _, strategy) in enumerate(asked):
        progress(Progress(stage="validate", done=number, total=len(asked)))
        windows.append(next(judged))
        kl = float(windows[-1].mean())
        store.record_measurements(
            [
                Measurement(
                    purpose=f"validation {name}",
                    strategy_key=strategy.key,
                    kl=kl if math.isfinite(kl) else None,
                    tokens=tokens,
                    cost_units=1.0,
                    seconds=time.perf_counter() - started,
                    text_digest=digest,
                )
            ]
        )
        started = time.perf_counter()
    progress(Progress(stage="validate", done=len(asked), total=len(asked)))
    return windows


def _write(
    options: LearnOptions,
    prepared: Prepared,
    store: EvaluationStore,
    surrogate: Surrogate,
    net: StratNet,
    intervals: dict[str, object],
    validation: dict[str, list[tuple[float, float]]],
) -> None:
    folder = options.out
    (folder / MANIFEST).unlink(
        missing_ok=True
    )  # of the run that this one extends: its files are replaced now
    save_tensors(folder / "stratnet.safetensors", net.state_dict())
    save_tensors(folder / "surrogate.safetensors", surrogate.state())
    results = list(store.read())
    units = sum(outcome.cost_units for _, outcome in results if isinstance(outcome, Evaluation))
    units += sum(item.cost_units for item in store.measurements())
    outcomes = [outcome for ask, outcome in results if ask.tokens is None]
    ok = [outcome for outcome in outcomes if isinstance(outcome, Evaluation)]
    manifest = {
        "format": FORMAT,
        "base_model": {
            "digest": prepared.loaded.profile.digest,
            "path": options.model
            if options.model == "reference"
            else place_of(prepared.loaded.folder),
        },
        "profile": profile_document(prepared.loaded.profile),
        "data": {
            "digest": prepared.texts.digest,
            "calibration": prepared.texts.calibration.digest,
            "search": prepared.texts.search.digest,
            "validation": prepared.texts.validation.digest,
        },
        "versions": {name: version(name) for name in _VERSIONS},
        "seed": options.seed,
        "options": {
            **options.decisive(),
            "evaluations": options.num_evaluations,
            "context": prepared.context,
        },
        "backend": {"replicas": options.replicas, "shards": options.shards},
        "sparsity_range": list(prepared.search.sparsity_range),
        "evaluations": len(outcomes),
        "failed": len(outcomes) - len(ok),
        "screenings": len(results) - len(outcomes),
        "cost_units": units,
        "derivatives": any(e.gradient is not None for e in ok),
        **_levels_document(prepared),
        "intervals": intervals,
        "validation": validation,
        "files": {
            name: file_digest(folder / name)
            for name in (
                "stratnet.safetensors",
                "surrogate.safetensors",
                "fisher.safetensors",
                UNITS,
                FACTORS,
            )
            if (folder / name).is_file()
        },
    }
    run = Run(folder, manifest, base=None)
    save_json(folder / "front.json", run.front_document())
    save_json(folder / MANIFEST, manifest)


def _levels_document(prepared: Prepared) -> dict[str, object]:
    """Return what the manifest says of the levels; nothing where there are none."""
    levels = prepared.levels
    if levels is None:
        return {}
    digest = LevelDatabase(levels.folder, levels.plan).digest(levels.profile)
    return {"levels": {"step": levels.plan.step, "bytes": levels.num_bytes, "digest": digest}}
