"""OptSpa under Ray Tune on a real Ray: trials, the exact budget, going on, a multimodal model."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.tune_optspa import tune_optspa
from unicuco.dimensions import Granularity
from unicuco.errors import ClusterError
from unicuco.search.request import RequestConfig, axis_blocks
from unicuco.testing.cases import EvaluationCase, make_evaluation_case
from unicuco.testing.tiny import tiny_model_folder

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
