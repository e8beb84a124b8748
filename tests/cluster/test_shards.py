"""Pipelines of shard actors on a real Ray: the strategies and values of one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cluster.actors import Arrays
from cluster.driver import RayBackend
from cluster.learn import main
from tests.cluster.test_learn import evaluations, job
from unicuco.errors import ModelError, RequestError
from unicuco.models.weights import FolderSource
from unicuco.pipeline import Backend, LearnOptions, LocalBackend, Run, learn
from unicuco.search.drive import drive
from unicuco.search.screening import ALTERNATIVES, Screening
from unicuco.shards.evaluator import Relay, StageConfig, StageEvaluator
from unicuco.space import StrategySpace
from unicuco.store import EvaluationStore
from unicuco.testing.cases import EvaluationCase, make_evaluation_case
from unicuco.types import Ask, Evaluation, Outcome

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run learned in this process."""
    folder = tmp_path_factory.mktemp("alone")
    path = job(folder, tiny_llama, tiny_text_file, address="none")
    assert main(["--config", str(path)]) == 0
    return folder / "run"


def test_more_shards_than_blocks_are_one_line_and_leave_nothing(
    tmp_path: Path, tiny_llama: Path, tiny_text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = job(tmp_path, tiny_llama, tiny_text_file, shards=3, address="local")
    assert main(["--config", str(path)]) == 2
    assert "--shards 3 is more than the model has blocks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class DyingStage(StageEvaluator):
    """Kills its process when the fourth strategy comes back to the first stage, once."""

    def __init__(self, config: StageConfig, arrays: Arrays) -> None:
        super().__init__(config, arrays)
        self._marker = Path(os.environ["UNICUCO_TEST_MARKER"])
        self._returned = 0

    def backward(self, ask: Ask, relay: Relay) -> Relay | Evaluation:
        self._returned += 1
        if self._returned == 4 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().backward(ask, relay)


def test_without_ray_a_model_in_shards_is_refused(
    tmp_path: Path, tiny_llama: Path, tiny_text_file: Path
) -> None:
    options = LearnOptions(
        model=str(tiny_llama),
        out=tmp_path / "run",
        calibration=tiny_text_file,
        tokens=256,
        shards=2,
    )
    with pytest.raises(RequestError, match="judged on Ray"):
        learn(options, backend=LocalBackend(), progress=lambda step: None)


def die_once(marker: str) -> Any:
    def build(config: StageConfig, arrays: Arrays) -> StageEvaluator:
        os.environ["UNICUCO_TEST_MARKER"] = marker
        return DyingStage(config, arrays)

    return build


@pytest.mark.slow
def test_a_job_on_shards_one_of_which_is_killed_learns_what_one_process_does(
    tmp_path: Path,
    alone: Path,
    tiny_llama: Path,
    tiny_text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marker = tmp_path / "died"
    dying = partial(RayBackend, build_stage=die_once(str(marker)))
    monkeypatch.setattr("cluster.driver.RayBackend", dying)
    path = job(tmp_path, tiny_llama, tiny_text_file, shards=2, address="local")
    assert main(["--config", str(path)]) == 0
    assert marker.exists()
    assert evaluations(tmp_path / "run") == evaluations(alone), "to the bit, one record each"
    assert Run.open(tmp_path / "run").manifest["backend"] == {"replicas": 1, "shards": 2}


@pytest.fixture(scope="module")
def case(tiny_llama: Path) -> EvaluationCase:
    return make_evaluation_case(tiny_llama)


@pytest.mark.slow
def test_a_strategy_that_fails_in_one_stage_is_a_value_and_others_go_on(
    case: EvaluationCase,
) -> None:
    asks = [
        Ask(round=0, position=k, strategy=case.space.uniform(0.1 * k), derivatives=k > 1)
        for k in range(4)
    ]

    with RayBackend("auto", 1, 1, 2, build_stage=build_failing) as backend:
        pool = backend.start_pool(case.config, case.arrays)
        for ask in asks:
            pool.submit(ask)
        outcomes = dict(pool.next_outcome() for _ in asks)
    failed = outcomes.pop(asks[2])
    assert (failed.kind, failed.message) == ("RuntimeError", "no memory left")  # type: ignore[union-attr]
    for ask, outcome in outcomes.items():
        expected = case.evaluator().evaluate(ask.strategy, derivatives=ask.derivatives)
        assert isinstance(outcome, Evaluation)
        assert (outcome.kl, outcome.gradient) == (expected.kl, expected.gradient)


def build_failing(config: StageConfig, arrays: Arrays) -> StageEvaluator:
    return FailingStage(config, arrays)


class FailingStage(StageEvaluator):
    """Fails on the third strategy, on its way through the last stage."""

    def forward(self, ask: Ask, relay: Relay | None) -> Relay | Evaluation:
        if ask.position == 2 and self.stage.is_last:
            raise RuntimeError("no memory\nleft")
        return super().forward(ask, relay)


@pytest.mark.slow
def test_a_stage_that_can_not_be_built_is_its_own_line(
    case: EvaluationCase, tmp_path: Path
) -> None:
    assert isinstance(case.config.weights, FolderSource)
    weights = replace(case.config.weights, place=str(tmp_path / "elsewhere"))
    config = replace(case.config, weights=weights)
    with RayBackend("local", 1, 1, 2) as backend:
        pool = backend.start_pool(config, case.arrays)
        pool.submit(Ask(round=0, position=0, strategy=case.space.uniform(0.5), derivatives=False))
        with pytest.raises(ModelError, match=r"^no model folder at .*elsewhere$"):
            pool.next_outcome()
    assert ray.is_initialized()


class Alternatives:
    """Asks two rounds of two places, whatever it is told."""

    round_size = 2
    screening = Screening(tokens=32, derivatives=True)

    def __init__(self, space: StrategySpace) -> None:
        self._space = space

    def ask(self, round: int) -> list[Ask]:
        generator = torch.Generator().manual_seed(round)
        points = torch.rand(2 * ALTERNATIVES, self._space.num_axes, generator=generator).double()
        return self.screening.asks(
            round, [self._space.decode(part) for part in points.chunk(self.round_size)]
        )

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        pass


@pytest.mark.slow
def test_alternatives_are_screened_on_replicas_and_shards_as_in_one_process(
    case: EvaluationCase, tmp_path: Path
) -> None:
    search = Alternatives(case.space)

    def measured(name: str, backend: Backend) -> list[object]:
        with EvaluationStore.open(tmp_path / name, create=True) as store, backend:
            pool = backend.start_pool(case.config, case.arrays)
            drive(
                search,
                pool,
                store,
                num_evaluations=3,
                on_progress=lambda step: None,
                screening=search.screening,
            )
            return [replace(o, wall_s=0.0) for _, o in store.read()]  # type: ignore[type-var]

    alone = measured("alone", LocalBackend())
    assert len(alone) == 3 * (ALTERNATIVES + 1)
    assert measured("replicas", RayBackend("auto", 2)) == alone
    assert measured("shards", RayBackend("auto", 1, 1, 2)) == alone
