"""`python -m cluster.tune RUN --out FOLDER`: StratNet's and the surrogate's own options, tuned.

A trial learns surrogate and network anew from the evaluations that a finished run has stored, so it
costs seconds, and asks the network for strategies of `SPARSITIES`. They are judged a few at a step
on one half of the run's validation text; what is maximised is the hypervolume of (kept fraction,
log KL), and ASHA (Li et al., arXiv 1810.05934) stops trials that are behind after a step. Then the
best options and the default ones are judged on the other half, which no trial saw, and one line
says what tuning gained. A folder that is there is gone on with.

What it does not know: the search text, and how the run's evaluations came about.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from cluster.actors import Arrays, BuildEvaluator, build_local_evaluator
from cluster.experiments import RecordedJudge, judged_folder, run_experiment, sharing
from cluster.local_ray import connected
from unicuco.calibration import TokenSet
from unicuco.errors import ClusterError, RequestError
from unicuco.evaluate import EvaluatorConfig
from unicuco.failure import describe_failure
from unicuco.pipeline import LearnOptions, Run
from unicuco.pipeline.files import save_json
from unicuco.pipeline.preparation import Prepared, prepare
from unicuco.search import SearchConfig, learn_network
from unicuco.search.hypervolume import quality_volume
from unicuco.store import EvaluationStore
from unicuco.stratnet import StratNetAllocator, TrainOptions
from unicuco.surrogate import SurrogateOptions
from unicuco.types import Evaluation, Strategy

_METRIC: Final = "hypervolume"
# In the order they are judged: each step sees the whole front, ever finer.
SPARSITIES: Final = (0.5, 0.8, 0.2, 0.35, 0.65, 0.87, 0.1, 0.42, 0.72)
_PER_STEP: Final = 3
_STEPS: Final = len(SPARSITIES) // _PER_STEP
DEFAULTS: Final[Mapping[str, float]] = {
    "learning_rate": TrainOptions().learning_rate,
    "steps": 200,  # of a run's last training
    "batch": TrainOptions().batch,
    "hidden": 64,
    "caution": TrainOptions().caution,
    "directions": SurrogateOptions().directions,
    "fit_steps": SurrogateOptions().steps,
    "value_noise": SurrogateOptions().value_noise,
    "derivative_noise": SurrogateOptions().derivative_noise,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What trials learn from and are judged by; picklable.

    ``evaluator`` judges on one half of the validation text.
    """

    search: SearchConfig
    evaluations: tuple[tuple[Strategy, Evaluation], ...]
    evaluator: EvaluatorConfig

    def strategies(self, options: Mapping[str, float]) -> list[Strategy]:
        """Learn with options, and return what the network answers to `SPARSITIES`."""
        config = configured(self.search, options)
        _, net = learn_network(config, self.evaluations, seed=config.seed)
        low, high = config.sparsity_range
        asked = [min(max(one, low), high) for one in SPARSITIES]
        return StratNetAllocator(net, config.space()).allocate(asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What tuning came to; hypervolumes are those on the half that no trial saw."""

    options: dict[str, float]
    default: float
    tuned: float
    trials: int
    stopped: int

    @property
    def gain(self) -> float:
        """What the tuned options add, as a fraction of the default ones' hypervolume."""
        return self.tuned / self.default - 1

    def __str__(self) -> str:
        changed = {name: v for name, v in self.options.items() if v != DEFAULTS[name]}
        words = ", ".join(f"{name} {value:.3g}" for name, value in changed.items())
        return (
            f"tuned against default: {100 * self.gain:+.1f}% hypervolume ({self.tuned:.4f} against"
            f" {self.default:.4f}), {self.trials} trials, {self.stopped} stopped early;"
            f" {words or 'the defaults are best'}"
        )


def configured(search: SearchConfig, options: Mapping[str, float]) -> SearchConfig:
    """Return a search that learns with options of a trial."""
    return replace(
        search,
        training=TrainOptions(
            steps=int(options["steps"]),
            batch=int(options["batch"]),
            learning_rate=options["learning_rate"],
            hidden=int(options["hidden"]),
            caution=options["caution"],
        ),
        surrogate=replace(
            search.surrogate,
            directions=int(options["directions"]),
            steps=int(options["fit_steps"]),
            value_noise=options["value_noise"],
            derivative_noise=options["derivative_noise"],
        ),
    )


class _Trial(tune.Trainable):
    """Learns with one set of options, and judges a few of its answers at each step."""

    # Any: what `tune.with_parameters` hands over; see `tune_run`
    def setup(
        self, config: dict[str, float], *, build: Any = None, learned: Any = None, data: Any = None
    ) -> None:
        torch.set_num_threads(1)
        self._learned, folder = learned
        self._judge = RecordedJudge(build(self._learned.evaluator, data), folder)
        self.reset_config(config)

    def step(self) -> dict[str, Any]:
        strategies = self._strategies[: _PER_STEP * (self.iteration + 1)]
        return {_METRIC: volume(strategies, self._judge), "done": self.iteration + 1 == _STEPS}

    def reset_config(self, new_config: dict[str, float]) -> bool:
        self._strategies = self._learned.strategies(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep nothing: learning takes seconds, and what was judged lies in files."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Take nothing up."""


def volume(strategies: Sequence[Strategy], judge: RecordedJudge) -> float:
    """Return the hypervolume of the first of `SPARSITIES`' answers."""
    asked = SPARSITIES[: len(strategies)]
    return quality_volume(
        [(1 - sparsity, judge.kl(one)) for sparsity, one in zip(asked, strategies, strict=True)]
    )


def tune_run(
    learned: Learned,
    arrays: Arrays,
    folder: Path,
    *,
    trials: int,
    at_once: int = 2,
    seed: int = 0,
    build_evaluator: BuildEvaluator = build_local_evaluator,
) -> tuple[dict[str, float], int, int]:
    """Run the experiment on the Ray that this process is connected to, or go on with it.

    Args:
        learned: evaluations, and how they are learned from and judged.
        arrays: of its evaluator, by name; put into Ray's memory once.
        folder: of the experiment, made if missing.
        trials: to make in all; the first has the default options.
        at_once: trials side by side.
        seed: draws the options.
        build_evaluator: makes an evaluator; must pickle.

    Returns:
        The best options, how many trials were made, and how many were stopped early.

    Raises:
        ClusterError: no trial came to its end.
    """
    judged = judged_folder(folder)
    trainable = sharing(
        tune.with_parameters(
            _Trial, build=build_evaluator, learned=(learned, judged), data=dict(arrays)
        ),
        at_once,
    )
    options = tune.TuneConfig(
        metric=_METRIC,
        mode="max",
        num_samples=trials,
        reuse_actors=True,
        search_alg=BasicVariantGenerator(
            points_to_evaluate=[dict(DEFAULTS)], random_state=seed, max_concurrent=at_once
        ),
        scheduler=ASHAScheduler(max_t=_STEPS, grace_period=1, reduction_factor=2),
    )
    results = run_experiment(trainable, folder.absolute() / "experiment", options, _space())
    whole = [r for r in results if r.metrics and r.metrics.get("training_iteration") == _STEPS]
    if not whole:
        raise ClusterError("no trial came to its end: see the errors in the experiment's folder")
    best = max(whole, key=lambda result: float((result.metrics or {})[_METRIC]))
    return dict(best.config or {}), len(results), len(results) - len(whole)


def _space() -> dict[str, Any]:
    """Return what is drawn, as Tune describes it."""
    return {
        "learning_rate": tune.loguniform(0.005, 0.08),
        "steps": tune.choice([100, 200, 400, 800]),
        "batch": tune.choice([8, 16, 32]),
        "hidden": tune.choice([32, 64, 128]),
        "caution": tune.uniform(0.0, 2.0),
        "directions": tune.choice([4, 8, 16]),
        "fit_steps": tune.choice([20, 40, 80]),
        "value_noise": tune.loguniform(0.01, 0.1),
        "derivative_noise": tune.loguniform(0.05, 0.5),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """A run ready to be tuned: what trials see, and what judges the best of them."""

    learned: Learned
    arrays: Arrays
    judge: EvaluatorConfig
    judge_arrays: Arrays

    @classmethod
    def open(cls, folder: Path, calibration: Path | None) -> Halves:
        """Prepare a run's model and texts as they were, and divide the validation text.

        Raises:
            RequestError: a run of another preset, of shapes or tasks; another text than its own.
            UnicucoError: no run, or one that can't be read.
        """
        run = Run.open(folder)
        prepared = _prepared(run, folder, calibration)
        with EvaluationStore.open(folder / "evaluations.db", create=False) as store:
            evaluations = tuple(
                (ask.strategy, outcome)
                for ask, outcome in store.read()
                if isinstance(outcome, Evaluation) and ask.tokens is None
            )
        ids = prepared.texts.validation.ids
        if len(ids) < 2:
            raise RequestError(f"{folder} has one window of validation text; learn with --tokens")
        seen, unseen = (prepared.judging(TokenSet.from_ids(part)) for part in ids.chunk(2))
        return cls(
            learned=Learned(search=prepared.search, evaluations=evaluations, evaluator=seen[0]),
            arrays=seen[1],
            judge=unseen[0],
            judge_arrays=unseen[1],
        )

    def report(self, options: dict[str, float], trials: int, stopped: int, folder: Path) -> Report:
        """Judge options and the default ones on the half that no trial saw."""
        judged = folder / "unseen"
        judged.mkdir(parents=True, exist_ok=True)
        judge = RecordedJudge(build_local_evaluator(self.judge, self.judge_arrays), judged)
        default, tuned = (
            volume(self.learned.strategies(one), judge) for one in (DEFAULTS, options)
        )
        return Report(options=options, default=default, tuned=tuned, trials=trials, stopped=stopped)


def _prepared(run: Run, folder: Path, calibration: Path | None) -> Prepared:
    options = run.manifest["options"]
    if options["preset"] != "default" or options["dimensions"] != ["sparsity"] or run.tasks:
        raise RequestError(
            f"{folder}: options are tuned of runs by preset default, of sparsity, of one text"
        )
    names = ("pruner", "granularity", "tokens", "context", "seed", "max_sparsity")
    more = {
        name: options[name]
        for name in ("calibration_sampling", "round_size", "screen_tokens")
        if name in options
    }
    prepared = prepare(
        LearnOptions(
            model=str(run.base_folder),
            out=folder,
            calibration=calibration,
            resume=True,
            **{name: options[name] for name in names},
            **more,
        ),
        folder,
        lambda step: None,
    )
    if prepared.texts.digest != run.manifest["data"]["digest"]:
        raise RequestError(f"{folder} was learned on another text: name it with --calibration")
    return prepared


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, print one line and write ``tuned.json``; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.tune", description="Tune the options of learning."
    )
    parser.add_argument("run", type=Path, help="A finished run.")
    parser.add_argument("--out", type=Path, required=True, help="Of the experiment.")
    parser.add_argument("--calibration", type=Path, help="The run's text, if it had one.")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=2, help="Trials side by side.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--address", default="local", help="local, auto or ray://HOST:PORT.")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    values = parser.parse_args(arguments)
    try:
        return _tuned(values)
    except (Exception, KeyboardInterrupt) as error:
        if values.debug:
            traceback.print_exc()
        failure = describe_failure(error)
        print(failure.line, file=sys.stderr)
        return failure.exit_code


def _tuned(values: argparse.Namespace) -> int:
    if min(values.trials, values.at_once) < 1:
        raise RequestError("trials and at-once must be at least 1")
    halves = Halves.open(values.run, values.calibration)
    with connected(values.address, sum(array.nbytes for array in halves.arrays.values())):
        options, trials, stopped = tune_run(
            halves.learned,
            halves.arrays,
            values.out,
            trials=values.trials,
            at_once=values.at_once,
            seed=values.seed,
        )
    report = halves.report(options, trials, stopped, values.out.absolute())
    save_json(values.out / "tuned.json", {**asdict(report), "gain": report.gain})
    print(report, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
