"""The backend on a real Ray: the same loop, store and search as without it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cluster import driver
from cluster.driver import RayBackend, cpu_share
from cluster.local_ray import connect
from cluster.replicas import Replica
from cluster.room import Share, gpu_share, too_large
from tests.cluster.synthetic import (
    ARRAYS,
    Bowl,
    BowlConfig,
    BreakingSearch,
    DigestSearch,
    make_ask,
)
from unicuco.errors import ClusterError, ModelError, RequestError, SurrogateError
from unicuco.search.drive import Progress, drive, outcome_of
from unicuco.store import EvaluationStore
from unicuco.types import Ask, Evaluation, FailedEvaluation

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EvaluationStore]:
    with EvaluationStore.open(tmp_path / "evaluations.db", create=True) as store:
        yield store


def backend(replicas: int, threads: int = 1) -> RayBackend:
    return RayBackend("local", replicas, threads, build_evaluator=Bowl, build_search=DigestSearch)


def ignore(progress: Progress) -> None:
    pass


def local_asks(num_rounds: int, round_size: int) -> list[Ask]:
    search = DigestSearch(round_size)
    rounds: list[list[Ask]] = []
    for round_ in range(num_rounds):
        if round_ >= 2:
            told = [
                (ask, outcome_of(Bowl(BowlConfig(), ARRAYS), ask)) for ask in rounds[round_ - 2]
            ]
            search.tell(round_ - 2, told)
        rounds.append(search.ask(round_))
    return [ask for asks in rounds for ask in asks]


def without_place(outcome: Evaluation) -> tuple[object, ...]:
    return outcome.strategy_key, outcome.kl, outcome.kept_fraction, outcome.gradient


def dies_soon(replica: Replica) -> bool:
    """Say whether an actor ends by itself; killing takes effect a moment after it is asked for."""
    for _ in range(300):
        try:
            ray.get(replica.start(), timeout=30)
        except ray.exceptions.ActorDiedError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_any_number_of_replicas_asks_and_measures_what_one_process_does(
    store: EvaluationStore, replicas: int
) -> None:
    with backend(replicas) as ray_backend:
        search, pool = ray_backend.start(BowlConfig(), ARRAYS, 4)
        drive(search, pool, store, num_evaluations=24, on_progress=ignore)
    asks = local_asks(6, 4)
    assert store.asks() == asks
    for ask, outcome in store.read():
        here = outcome_of(Bowl(BowlConfig(), ARRAYS), ask)
        if isinstance(outcome, Evaluation):
            assert isinstance(here, Evaluation)
            assert without_place(outcome) == without_place(here)
        else:
            assert isinstance(here, FailedEvaluation)
            assert (outcome.kind, outcome.message) == ("RuntimeError", "no memory left")
    assert any(isinstance(outcome, FailedEvaluation) for _, outcome in store.read())


def test_replicas_share_the_arrays_read_only_and_have_their_own_threads(
    store: EvaluationStore,
) -> None:
    with backend(2, threads=2) as ray_backend:
        search, pool = ray_backend.start(BowlConfig(seconds=0.05), ARRAYS, 4)
        drive(search, pool, store, num_evaluations=24, on_progress=ignore)
        # One may have done it all while the other started: both are asked.
        asked = [replica.evaluate(make_ask(b"12345678")) for replica in pool.replicas]
        places = {outcome.text_digest for outcome in ray.get(asked, timeout=60)}
    assert len(places) == 2
    assert all(place.startswith("cpu read-only threads=2 pid=") for place in places)
    outcomes = [outcome for _, outcome in store.read() if isinstance(outcome, Evaluation)]
    assert {outcome.text_digest for outcome in outcomes} <= places


@pytest.mark.slow
def test_two_backends_beside_each_other_get_all_their_replicas() -> None:
    with backend(2) as first, backend(2) as second:
        pools = [first.start(BowlConfig(), ARRAYS, 4)[1], second.start(BowlConfig(), ARRAYS, 4)[1]]
        for pool in pools:
            for replica in pool.replicas:
                ray.get(replica.start(), timeout=60)


def test_leaving_the_backend_ends_its_actors_and_no_others(store: EvaluationStore) -> None:
    with backend(2) as ray_backend:
        search, pool = ray_backend.start(BowlConfig(), ARRAYS, 4)
        replicas = pool.replicas
        drive(search, pool, store, num_evaluations=4, on_progress=ignore)
    for replica in replicas:
        assert dies_soon(replica)
    assert ray.is_initialized(), "the session's Ray was there before"


def test_a_pool_that_is_closed_says_so_to_whoever_waits() -> None:
    with backend(1) as ray_backend:
        _, pool = ray_backend.start(BowlConfig(), ARRAYS, 4)
        pool.close()
        pool.submit(make_ask(b"12345678"))
        for _ in range(2):
            with pytest.raises(ClusterError, match="was closed"):
                pool.next_outcome()


@pytest.mark.slow
def test_an_evaluator_that_can_not_be_built_is_one_line(store: EvaluationStore) -> None:
    for refuse, error, message in (
        ("model", ModelError, "^the model is none$"),
        ("weights", ClusterError, "^a replica can't start: ValueError: two lines of weights$"),
    ):
        with backend(2) as ray_backend:
            search, pool = ray_backend.start(BowlConfig(refuse=refuse), ARRAYS, 4)
            with pytest.raises(error, match=message):
                drive(search, pool, store, num_evaluations=8, on_progress=ignore)


def test_a_search_that_fails_is_one_line(store: EvaluationStore) -> None:
    for broken, error, message in (
        (SurrogateError("too few"), SurrogateError, "^too few$"),
        (KeyError("a\nb"), ClusterError, r"^the learner failed: KeyError: 'a\\nb'$"),
    ):
        with RayBackend(build_evaluator=Bowl, build_search=BreakingSearch) as ray_backend:
            search, pool = ray_backend.start(BowlConfig(), ARRAYS, broken)
            with pytest.raises(error, match=message):
                drive(search, pool, store, num_evaluations=40, on_progress=ignore)


def test_a_replica_larger_than_any_node_is_one_line() -> None:
    with RayBackend("auto", 1, 1000, build_evaluator=Bowl, build_search=DigestSearch) as crowded:
        _, pool = crowded.start(BowlConfig(), ARRAYS, 4)
        pool._start_timeout_s = 1.0
        pool.submit(make_ask(b"12345678"))
        with pytest.raises(ClusterError, match="of 1000 threads fits on no node: the largest has"):
            pool.next_outcome()


def test_more_shards_than_the_nodes_have_room_for_are_one_line() -> None:
    assert too_large(Share(1.0), 2) is None
    assert too_large(Share(0.001), 2000) is None
    message = too_large(Share(1.0), 2000)
    assert message is not None
    assert message.startswith("2000 shards of 1 threads have no room: 1 nodes have together ")


def test_a_cluster_without_room_is_one_line() -> None:
    cpus = ray.cluster_resources()["CPU"]
    all_of_it = placement_group([{"CPU": cpus}])
    try:
        ray.get(all_of_it.ready(), timeout=30)
        with RayBackend("auto", 1, build_evaluator=Bowl, build_search=DigestSearch) as crowded:
            _, pool = crowded.start(BowlConfig(), ARRAYS, 4)
            pool._start_timeout_s = 1.0
            pool.submit(make_ask(b"12345678"))
            with pytest.raises(ClusterError, match="no free CPU"):
                pool.next_outcome()
    finally:
        remove_placement_group(all_of_it)


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:9"])
def test_a_cluster_that_is_not_there_is_one_line(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # the discard service, which nobody runs
    with pytest.raises(ClusterError, match=r"nothing answers at .*127\.0\.0\.1:9"):
        connect(address=address)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (-2, 1, 1), (1, 1, 0)])
def test_replicas_threads_and_shards_below_one_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(RequestError, match="must be at least 1"):
        RayBackend("local", *numbers)


@pytest.mark.parametrize("gpus", [-0.5, 1.5, 2])
def test_more_than_one_gpu_for_one_replica_is_refused(gpus: float) -> None:
    with pytest.raises(RequestError, match="gpus must lie from 0 to 1"):
        RayBackend("local", gpus=gpus)


def test_gpus_that_torch_was_not_built_for_are_one_line() -> None:
    with (
        RayBackend("local", gpus=1, build_evaluator=Bowl, build_search=DigestSearch) as wanting,
        pytest.raises(RequestError, match="this torch is built for CPUs alone"),
    ):
        wanting.start(BowlConfig(), ARRAYS, 4)


def test_gpus_that_this_machine_lacks_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "torch_knows_gpus", lambda: True)
    with (
        RayBackend(
            "local", 2, gpus=0.5, build_evaluator=Bowl, build_search=DigestSearch
        ) as wanting,
        pytest.raises(RequestError, match=r"2 times 0\.5 GPU have no room on the 0 GPUs of this"),
    ):
        wanting.start(BowlConfig(), ARRAYS, 4)


def test_gpus_that_no_node_has_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "torch_knows_gpus", lambda: True)
    with RayBackend("auto", 1, gpus=1, build_evaluator=Bowl, build_search=DigestSearch) as wanting:
        _, pool = wanting.start(BowlConfig(), ARRAYS, 4)
        pool._start_timeout_s = 1.0
        pool.submit(make_ask(b"12345678"))
        line = "a replica of 1 threads and 1 GPU fits on no node: the largest has .* and 0 GPUs"
        with pytest.raises(ClusterError, match=line):
            pool.next_outcome()


@pytest.mark.parametrize(
    ("gpus", "actors", "share"), [(0, 3, 0), (1, 1, 1), (1, 3, 0.3333), (2, 3, 0.5), (4, 3, 1)]
)
def test_actors_share_the_gpus_that_there_are(gpus: float, actors: int, share: float) -> None:
    assert gpu_share(gpus, actors) == share


@pytest.mark.parametrize(
    ("cpus", "replicas", "share"), [(2, 1, 2), (2, 2, 1), (2, 3, 0.666), (8, 3, 2), (2, 64, 0.031)]
)
def test_replicas_share_the_cores_that_there_are(cpus: float, replicas: int, share: float) -> None:
    assert cpu_share(cpus, replicas) == share
    assert cpu_share(cpus, replicas) * replicas <= cpus
