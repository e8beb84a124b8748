"""Learning's own options under Ray Tune: a run tuned, killed in the middle, gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.tune import DEFAULTS, SPARSITIES, Halves, configured, main
from tests.cluster.killed import run_and_kill
from unicuco.errors import RequestError
from unicuco.evaluate import LocalEvaluator
from unicuco.search.hypervolume import quality_volume
from unicuco.types import Evaluation, Strategy

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("ray_local")
def test_a_run_is_tuned_and_one_line_says_what_for(
    tiny_run: Path, tiny_text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    words = [str(tiny_run), "--out", str(tmp_path), "--calibration", str(tiny_text_file)]
    assert main([*words, "--trials", "3", "--address", "auto"]) == 0
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert line.startswith("tuned against default: ")
    report = json.loads((tmp_path / "tuned.json").read_text())
    assert f"{100 * report['gain']:+.1f}% hypervolume" in line
    assert report["gain"] == pytest.approx(report["tuned"] / report["default"] - 1)
    assert report["trials"] == 3
    assert 0 <= report["stopped"] <= 2
    assert set(report["options"]) == set(DEFAULTS)
    halves = Halves.open(tiny_run, tiny_text_file)
    answers = halves.learned.strategies(DEFAULTS)
    judge = LocalEvaluator(halves.judge, halves.judge_arrays)
    points = [
        (1 - sparsity, judge.evaluate(one).kl)
        for sparsity, one in zip(SPARSITIES, answers, strict=True)
    ]
    assert report["default"] == pytest.approx(quality_volume(points)), "on the unseen half"
    judged = {path.stem for path in (tmp_path / "judged").iterdir()}
    assert {one.key for one in answers[:3]} <= judged, "the defaults are a trial"
    after = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    assert after == before, "the run is read only"


def test_options_of_a_trial_are_those_of_learning(tiny_run: Path, tiny_text_file: Path) -> None:
    halves = Halves.open(tiny_run, tiny_text_file)
    assert halves.learned.evaluator.text_digest != halves.judge.text_digest
    default = configured(halves.learned.search, DEFAULTS)
    assert default.surrogate == halves.learned.search.surrogate
    other = configured(halves.learned.search, {**DEFAULTS, "hidden": 32, "caution": 0.5})
    assert (other.training.hidden, other.training.caution) == (32, 0.5)
    assert len(halves.learned.strategies({**DEFAULTS, "hidden": 32})) == len(SPARSITIES)


def test_another_text_and_what_is_no_run_are_one_line(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError, match="another text: name it with --calibration"):
        Halves.open(tiny_run, None)
    assert main([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert main([str(tiny_run), "--out", str(tmp_path / "out"), "--trials", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert not (tmp_path / "out").exists()


class Noting(LocalEvaluator):
    """An evaluator that takes long enough to be killed, and notes every evaluation in a file."""

    def evaluate(self, strategy: Strategy, **options: Any) -> Evaluation:
        time.sleep(0.2)
        with open(os.environ[_NOTES], "a") as notes:
            notes.write(strategy.key + "\n")
        return super().evaluate(strategy, **options)


def build_noting(config: Any, arrays: Any) -> Noting:
    return Noting(config, arrays)


_NOTES = "UNICUCO_TEST_NOTES"
_TRIALS = 4
_DRIVER = """
import sys
from pathlib import Path
from cluster.local_ray import local_ray
from cluster.tune import Halves, tune_run
from tests.cluster.test_tune import _TRIALS, build_noting
halves = Halves.open(Path(sys.argv[1]), Path(sys.argv[2]))
with local_ray(array_bytes=64 * 2**20):
    _, trials, stopped = tune_run(
        halves.learned, halves.arrays, Path(sys.argv[3]), trials=_TRIALS,
        build_evaluator=build_noting,
    )
    print(trials, stopped)
"""


def test_an_experiment_that_is_killed_in_the_middle_is_restored_and_nothing_is_judged_again(
    tiny_run: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    notes, folder = tmp_path / "notes", tmp_path / "tuning"
    words = [sys.executable, "-c", _DRIVER, str(tiny_run), str(tiny_text_file), str(folder)]
    environment = run_and_kill(words, notes, _NOTES, after=4)
    # Workers of the killed Ray end by themselves; what they still judge is noted until then.
    judged = {path.stem for path in (folder / "judged").glob("*.json")}
    cut = len(notes.read_text().splitlines())
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    trials, stopped = map(int, done.stdout.split()[-2:])
    assert trials == _TRIALS
    assert stopped < _TRIALS
    later = notes.read_text().splitlines()[cut:]
    assert not judged & set(later[2:]), "two may have been under way when it was killed"
