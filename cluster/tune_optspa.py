"""OptSpa under Ray Tune: the same bins and sampler as `unicuco.search.optspa`, Tune running trials.

Tune's `OptunaSearch` proposes one offset per bin, trials run at once in actors that keep their
model, and the experiment lies in a folder: called again after any kind of end, it goes on with the
trials that are missing. A kill can cut Tune's own snapshot short; the experiment then begins anew
and proposes the same, and as every judged strategy has left a file of its own, it is not judged
again. (Past the sampler's random start proposals also depend on which trial ended first.) Every
trial is projected onto the target exactly, none is thrown away. What this module does not know:
where the best strategy goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ray import tune

from cluster.actors import Arrays, BuildEvaluator, build_local_evaluator
from cluster.experiments import RecordedJudge, judged_folder, run_experiment, sharing
from unicuco.errors import ClusterError
from unicuco.search.optspa import NUM_TRIALS, bins_strategy, distributions
from unicuco.search.request import RequestConfig
from unicuco.types import Strategy

_METRIC: Final = "kl"
_MAX_PARTS: Final = 4  # of an experiment that is killed again and again


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneReport:
    """The best strategy, its KL on the search text, and the KL of every trial that succeeded.

    ``trials`` holds (strategy key, KL) in the order the trials were proposed.
    """

    strategy: Strategy
    kl: float
    trials: tuple[tuple[str, float], ...]

    @property
    def best_so_far(self) -> list[float]:
        """The best KL after every trial."""
        best, curve = math.inf, []
        for _, kl in self.trials:
            best = min(best, kl)
            curve.append(best)
        return curve


class _Trial(tune.Trainable):
    """One evaluator; judges one proposal per trial and is used again for the next."""

    # Any: what `tune.with_parameters` hands over; see `tune_optspa`
    def setup(
        self, config: dict[str, float], *, build: Any = None, settings: Any = None, data: Any = None
    ) -> None:
        evaluator_config, self._request, folder = settings
        self._judge = RecordedJudge(build(evaluator_config, data), folder)
        self._offsets = config

    def step(self) -> dict[str, Any]:
        offsets = tuple(self._offsets[name] for name in distributions())
        strategy = bins_strategy(self._request, offsets)
        return {_METRIC: self._judge.kl(strategy), "strategy_key": strategy.key, "done": True}

    def reset_config(self, new_config: dict[str, float]) -> bool:
        self._offsets = new_config
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep nothing: a trial is one evaluation."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Take nothing up."""


# Any: the evaluator's configuration goes to its builder unread
def tune_optspa(
    evaluator: Any,
    arrays: Arrays,
    request: RequestConfig,
    folder: Path,
    *,
    trials: int = NUM_TRIALS,
    at_once: int = 2,
    build_evaluator: BuildEvaluator = build_local_evaluator,
) -> TuneReport:
    """Search one request on the Ray that this process is connected to.

    A driver killed at a bad moment leaves an experiment whose sampler is ahead of its trials; what
    it then lacks is made up for by a further part.

    Args:
        evaluator: the evaluators' configuration.
        arrays: weights, ranks and text, by name; put into Ray's memory once.
        request: target, space and seed.
        folder: of the experiment, made if missing; what it holds is gone on with.
        trials: to make in all.
        at_once: trials side by side, each on one CPU share.
        build_evaluator: makes an evaluator; must pickle.

    Raises:
        ClusterError: no trial succeeded.
    """
    judged = judged_folder(folder)
    trainable = sharing(
        tune.with_parameters(
            _Trial, build=build_evaluator, settings=(evaluator, request, judged), data=dict(arrays)
        ),
        at_once,
    )
    results: list[tune.Result] = []
    for part in range(_MAX_PARTS):
        path = folder.absolute() / f"part-{part}"
        options = _tune_config(request.seed + part, trials - len(results), at_once)
        results += run_experiment(trainable, path, options)
        if len(results) >= trials:
            break
    return _report(results, request)


def _tune_config(seed: int, trials: int, at_once: int) -> tune.TuneConfig:
    from optuna.samplers import TPESampler
    from ray.tune.search.optuna import OptunaSearch

    search = OptunaSearch(
        space=distributions(), metric=_METRIC, mode="min", sampler=TPESampler(seed=seed)
    )
    return tune.TuneConfig(
        search_alg=search,
        metric=_METRIC,
        mode="min",
        num_samples=trials,
        max_concurrent_trials=at_once,
        reuse_actors=True,
    )


def _report(results: Sequence[tune.Result], request: RequestConfig) -> TuneReport:
    done = [(r.config or {}, r.metrics) for r in results if r.metrics and _METRIC in r.metrics]
    if not done:
        raise ClusterError(
            "no trial of optspa succeeded: see the errors in the experiment's folder"
        )
    config, metrics = min(done, key=lambda trial: float(trial[1][_METRIC]))
    offsets = tuple(float(config[name]) for name in distributions())
    return TuneReport(
        strategy=bins_strategy(request, offsets),
        kl=float(metrics[_METRIC]),
        trials=tuple((own["strategy_key"], float(own[_METRIC])) for _, own in done),
    )
