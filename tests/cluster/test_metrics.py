"""What a node's real metrics endpoint says of learning."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from cluster.driver import RayBackend
from tests.cluster.endpoint import node_endpoint, read_metrics
from tests.cluster.synthetic import ARRAYS, Bowl, BowlConfig, DigestSearch
from unicuco.search.hypervolume import quality_volume
from unicuco.types import Ask, Evaluation, FailedEvaluation, Strategy

pytestmark = pytest.mark.usefixtures("ray_local")

GAUGES = {"unicuco_evaluations_in_flight", "unicuco_best_hypervolume"}


def ask(first: float, position: int) -> Ask:
    strategy = Strategy(settings=(("sparsity/0", first), ("sparsity/1", 0.5)))
    return Ask(round=0, position=position, strategy=strategy, derivatives=False)


def until(holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Return what the endpoint says once it says so.

    A node forgets a gauge that its process has not sent again within two intervals, and takes
    gauges in one by one, so on a busy machine one can be missing beside another that is there.
    """
    url = node_endpoint()
    deadline = time.monotonic() + 60
    while not holds(found := read_metrics(url)):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


@pytest.mark.slow
def test_the_node_s_endpoint_counts_what_the_driver_submits_gets_back_and_tells() -> None:
    with RayBackend("local", 1, build_evaluator=Bowl, build_search=DigestSearch) as backend:
        search, pool = backend.start(BowlConfig(seconds=0.02), ARRAYS, 4)
        asks = [ask(first, k) for k, first in enumerate((0.1, 0.2, 0.45))]
        for one in asks:
            pool.submit(one)
        # A process sends all it has at once: what came before this test is in it.
        before = until(lambda now: now.get("unicuco_evaluations_in_flight") == 3)
        results = [pool.next_outcome() for _ in asks]
        search.tell(0, results)

        def gained(now: dict[str, float], name: str) -> float:
            return now.get(name, 0.0) - before.get(name, 0.0)

        good = [outcome for _, outcome in results if isinstance(outcome, Evaluation)]
        volume = pytest.approx(quality_volume([(one.kept_fraction, one.kl) for one in good]))
        # What an earlier test told may still be there beside what this one counted.
        now = until(
            lambda now: (
                gained(now, "unicuco_evaluations_total") == 3
                and now.keys() >= GAUGES
                and now["unicuco_evaluations_in_flight"] == 0
                and now["unicuco_best_hypervolume"] == volume
            )
        )
        assert gained(now, "unicuco_failed_evaluations_total") == 1
        assert gained(now, "unicuco_evaluation_seconds_count") == 3
        seconds = sum(outcome.wall_s for _, outcome in results)
        assert gained(now, "unicuco_evaluation_seconds_total") == pytest.approx(seconds)
        assert [type(o) for _, o in results].count(FailedEvaluation) == 1
        assert now["unicuco_best_hypervolume"] > 0
        worse = [(asks[0], good[0])]
        search.tell(1, worse)
        pool.submit(asks[0])
        until(lambda now: now.get("unicuco_evaluations_in_flight") == 1)
    now = until(lambda now: now.keys() >= GAUGES and now["unicuco_evaluations_in_flight"] == 0)
    assert now["unicuco_best_hypervolume"] == pytest.approx(volume), "what is dominated stays so"
