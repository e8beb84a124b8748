"""Experiments of Ray Tune that go on after any kind of end.

Every judged strategy leaves a file of its own, so that whatever becomes of Tune's own snapshots,
which a kill can cut short, nothing is judged again. What this module does not know: what is tuned.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
from ray import tune

from unicuco.pipeline.files import save_json
from unicuco.types import Strategy

if TYPE_CHECKING:
    from unicuco.search.drive import Evaluator

_KL: Final = "kl"


class RecordedJudge:
    """An evaluator of values that remembers in files what it judged.

    Args:
        evaluator: judges what is not there yet.
        folder: of the files, one per strategy; exists.
    """

    def __init__(self, evaluator: Evaluator, folder: Path) -> None:
        self._evaluator = evaluator
        self._folder = folder

    def kl(self, strategy: Strategy) -> float:
        """Return a strategy's KL in nats per token."""
        record = self._folder / f"{strategy.key}.json"
        if record.exists():
            return float(json.loads(record.read_text())[_KL])
        outcome = self._evaluator.evaluate(strategy, tokens=None, derivatives=False)
        save_json(record, {_KL: outcome.kl})
        return float(outcome.kl)


def judged_folder(folder: Path) -> Path:
    """Return, and make, where an experiment in ``folder`` leaves what was judged."""
    judged = folder.absolute() / "judged"
    judged.mkdir(parents=True, exist_ok=True)
    return judged


# Any: a trainable, as Tune's functions take and return it
def sharing(trainable: Any, at_once: int) -> Any:
    """Return a trainable of which so many run at once on what CPUs there are, one each at most."""
    cpus = ray.cluster_resources().get("CPU", 1.0)  # type: ignore[no-untyped-call]
    share = min(1.0, math.floor(1000 * cpus / at_once) / 1000)
    return tune.with_resources(trainable, {"cpu": share})


# Any: as `sharing`, and a space as Tune describes it
def run_experiment(
    trainable: Any, path: Path, options: tune.TuneConfig, space: dict[str, Any] | None = None
) -> list[tune.Result]:
    """Begin an experiment in ``path``, or go on with the one that is there.

    Args:
        trainable: with its resources and parameters.
        path: of the experiment.
        options: how it searches.
        space: what it searches, where its searcher doesn't know by itself.
    """
    # Tune would otherwise install its own loggers and reporters for TensorBoard and the terminal;
    # only the older of its two outputs can be silent.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    if not _is_whole(path):
        shutil.rmtree(path)  # Tune would begin anew, with the sampler where it was
    if tune.Tuner.can_restore(str(path)):
        tuner = tune.Tuner.restore(
            str(path), trainable=trainable, restart_errored=True, param_space=space
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=options,
            run_config=tune.RunConfig(name=path.name, storage_path=str(path.parent), verbose=0),
        )
    grid = tuner.fit()
    return [grid[index] for index in range(len(grid))]


def _is_whole(path: Path) -> bool:
    """Say whether Tune's snapshots in ``path``, if there are any, can be read."""
    for snapshot in path.glob("experiment_state-*.json"):
        try:
            json.loads(snapshot.read_text())
        except ValueError:
            return False
    return True
