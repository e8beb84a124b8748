"""OptSpa under Ray Tune on a real Ray: trials, the exact budget, going on, a multimodal model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.tune_optspa import tune_optspa
from tests.cluster.killed import run_and_kill
from unicuco.dimensions import Granularity
from unicuco.errors import ClusterError
from unicuco.evaluate import LocalEvaluator
from unicuco.search.request import RequestConfig, axis_blocks
from unicuco.testing.cases import EvaluationCase, make_evaluation_case
from unicuco.testing.tiny import tiny_model_folder
from unicuco.types import Evaluation, Strategy

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.slow]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> EvaluationCase:
    folder = tmp_path_factory.mktemp("models") / "llava"
    return make_evaluation_case(tiny_model_folder(folder, "llava"))


def request_to(case: EvaluationCase, sparsity: float = 0.6) -> RequestConfig:
    return RequestConfig(
        space=case.space,
        curves=case.curves,
        blocks=axis_blocks(case.loaded.profile, Granularity.LAYER),
        sparsity=sparsity,
        tokens=case.tokens.num_tokens,
        seed=3,
    )


def test_the_language_tower_of_a_multimodal_model_is_tuned_and_goes_on_where_it_was(
    llava: EvaluationCase, tmp_path: Path
) -> None:
    folder = tmp_path / "experiment"
    request = request_to(llava)
    report = tune_optspa(llava.config, llava.arrays, request, folder, trials=6)
    assert len(report.trials) == 6
    kept = llava.space.cost.kept_params(report.strategy.values)
    assert kept == llava.space.kept_for_sparsity(0.6)
    assert report.kl == min(kl for _, kl in report.trials)
    assert report.kl == pytest.approx(llava.evaluator().evaluate(report.strategy).kl, rel=1e-5)
    assert report.best_so_far == sorted(report.best_so_far, reverse=True)
    again = tune_optspa(llava.config, llava.arrays, request, folder, trials=6)
    assert sorted(again.trials) == sorted(report.trials), "nothing is judged again"


def test_what_was_judged_is_kept_when_a_kill_cuts_tunes_snapshot_short(
    llava: EvaluationCase, tmp_path: Path
) -> None:
    folder = tmp_path / "experiment"
    request = request_to(llava)
    report = tune_optspa(llava.config, llava.arrays, request, folder, trials=4)
    records = {path: path.stat().st_mtime_ns for path in (folder / "judged").iterdir()}
    assert {path.stem for path in records} == {key for key, _ in report.trials}
    (snapshot,) = (folder / "part-0").glob("experiment_state-*.json")
    snapshot.write_text(snapshot.read_text()[:-100])
    again = tune_optspa(llava.config, llava.arrays, request, folder, trials=4)
    assert sorted(again.trials) == sorted(report.trials)
    assert {path: path.stat().st_mtime_ns for path in (folder / "judged").iterdir()} == records


class Slow(LocalEvaluator):
    """An evaluator that takes long enough to be killed, and notes every evaluation in a file."""

    def evaluate(self, strategy: Strategy, **options: Any) -> Evaluation:
        time.sleep(0.3)
        with open(os.environ[_NOTES], "a") as notes:
            notes.write(strategy.key + "\n")
        return super().evaluate(strategy, **options)


_NOTES = "UNICUCO_TEST_NOTES"
_DRIVER = """
import sys
from pathlib import Path
from cluster.local_ray import local_ray
from cluster.tune_optspa import tune_optspa
from tests.cluster.test_tune_optspa import Slow, request_to
from unicuco.testing.cases import make_evaluation_case
case = make_evaluation_case(Path(sys.argv[1]))
with local_ray(array_bytes=64 * 2**20):
    report = tune_optspa(
        case.config, case.arrays, request_to(case), Path(sys.argv[2]), trials=10,
        build_evaluator=Slow,
    )
    print(len(report.trials), len({key for key, _ in report.trials}))
"""


def test_a_killed_experiment_goes_on_and_what_was_finished_is_not_judged_again(
    tiny_llama: Path, tmp_path: Path
) -> None:
    notes, folder = tmp_path / "notes", tmp_path / "experiment"
    words = [sys.executable, "-c", _DRIVER, str(tiny_llama), str(folder)]
    environment = run_and_kill(words, notes, _NOTES, after=5)
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trials, different = map(int, done.stdout.split()[-2:])
    assert trials == 10
    # What was in flight when the driver died may run twice.
    assert different <= len(notes.read_text().splitlines()) <= 10 + 4


def test_trials_that_all_fail_are_one_line(case: EvaluationCase, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="no trial of optspa succeeded"):
        tune_optspa(
            case.config,
            case.arrays,
            request_to(case),
            tmp_path / "experiment",
            trials=2,
            build_evaluator=_Refusing,
        )


class _Refusing:
    def __init__(self, config: object, arrays: object) -> None:
        pass

    def evaluate(self, strategy: object, *, tokens: object, derivatives: object) -> None:
        raise RuntimeError("no")


@pytest.fixture
def case(tiny_llama: Path) -> EvaluationCase:
    return make_evaluation_case(tiny_llama)
