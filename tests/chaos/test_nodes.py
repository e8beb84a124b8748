"""Nodes and heads that are killed, hang and come while the reference model is learned.

Jobs are ``python -m cluster.learn`` on clusters of ``ray start``. After each, the run holds what an
undisturbed run in one process holds: the same strategies with the same values, one record each.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.chaos.jobs import EVALUATIONS, Job, joined, learning, rows
from tests.ray_heads import ROOT, Cluster, Node, actors, kill, ray_head
from tests.serve.conftest import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that runs no evaluations."""
    with bare_head() as cluster:
        yield cluster


def bare_head(**more: object) -> AbstractContextManager[Cluster]:
    options = {"num-cpus": 0, "include-dashboard": "false", **more}
    # A server for a client is a process that imports Ray: half a minute is short where all is busy.
    return ray_head(
        lambda cluster: dict(options), {"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "200"}
    )


def test_killed_hung_and_new_nodes_leave_the_run_as_it_would_have_been(
    tmp_path: Path, cluster: Cluster, undisturbed: list[tuple[object, ...]]
) -> None:
    with learning(tmp_path, joined(cluster), replicas=2) as job:
        job.wait_for(
            lambda: actors(cluster.processes(), "LearnerActor")
        )  # on the head: there is no other node yet
        first = cluster.start_node()
        job.wait_for_rows(2)
        job.wait_for(lambda: first.actors("EvaluatorActor.evaluate"))
        first.send(signal.SIGKILL)
        others = cluster.start_node(), cluster.start_node()
        job.wait_for(lambda: any(hangs(node) for node in others))
        assert 2 <= len(job.rows()) < EVALUATIONS
        code, output, errors = job.end()
    assert (code, errors) == (0, ""), output
    assert rows(tmp_path / "run") == undisturbed


def test_replicas_are_spread_where_one_node_has_room_for_all(
    tmp_path: Path, tiny_llama: Path, tiny_text_file: Path
) -> None:
    small = {"model": str(tiny_llama), "calibration": str(tiny_text_file), "context": 64}
    # A head of its own: Ray spreads over nodes in turn, also over killed ones it still counts.
    with bare_head() as cluster:
        nodes = [cluster.start_node(4) for _ in range(2)]
        with learning(tmp_path, joined(cluster), **small, replicas=2, evaluations=999) as job:
            job.wait_for(lambda: all(node.actors("EvaluatorActor") for node in nodes))


def leave_the_head_alone(cluster: Cluster) -> None:
    """Kill the nodes that earlier tests added."""
    for node in cluster.nodes:
        node.send(signal.SIGKILL)


def test_what_nodes_can_not_do_is_one_line(
    tmp_path: Path, cluster: Cluster, tiny_llama: Path, tiny_text_file: Path
) -> None:
    leave_the_head_alone(cluster)
    other = tmp_path / "site" / "transformers-5.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.0\n")
    for name in ("large", "mixed", "nowhere"):
        (tmp_path / name).mkdir()
    small = {"model": str(tiny_llama), "calibration": str(tiny_text_file), "context": 64}
    with learning(tmp_path / "large", joined(cluster), **small, threads=64) as large:
        large.wait_for(lambda: actors(cluster.processes(), "LearnerActor"))  # on the head
        cluster.start_node(PYTHONPATH=f"{other.parent}:{ROOT}")
        with (
            learning(tmp_path / "mixed", joined(cluster), **small) as mixed,
            learning(tmp_path / "nowhere", {}, **small, address="ray://127.0.0.1:9") as nowhere,
        ):
            assert " has transformers 5.0 and not 5." in one_line(mixed)
            assert one_line(nowhere).startswith("nothing answers at ray://127.0.0.1:9 (Connection")
        assert one_line(large).startswith("a replica of 64 threads fits on no node: the largest")


def one_line(job: Job) -> str:
    """Return what a job that ends by an expected error says."""
    code, _, errors = job.end()
    assert code == 1
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    return errors.removeprefix("error: ")


def hangs(node: Node) -> bool:
    """Stop all processes of a node in mid-evaluation; say whether that was hit."""
    if node.actors("EvaluatorActor.evaluate"):
        node.send(signal.SIGSTOP)
        if node.actors("EvaluatorActor.evaluate"):
            return True
        node.send(signal.SIGCONT)
    return False


def test_a_head_that_is_gone_is_one_line_and_the_run_goes_on_on_another(
    tmp_path: Path, undisturbed: list[tuple[object, ...]]
) -> None:
    with bare_head() as cluster:
        cluster.start_node()
        environment = joined(cluster) | {"RAY_gcs_rpc_server_reconnect_timeout_s": "30"}
        with learning(tmp_path, environment) as job:
            job.wait_for_rows(3)
            kill(cluster)
            line = one_line(job)
    assert line.startswith(f"the head of the Ray cluster at {cluster.address} is gone")
    assert line.endswith("go on with --resume\n")
    kept = rows(tmp_path / "run")
    assert 3 <= len(kept) < EVALUATIONS
    assert set(kept) <= set(undisturbed)
    with bare_head() as cluster:
        cluster.start_node()
        with learning(tmp_path, joined(cluster), resume=True) as job:
            code, output, errors = job.end()
        assert (code, errors) == (0, ""), output
    assert rows(tmp_path / "run") == undisturbed


def test_a_driver_outside_whose_head_is_gone_is_one_line_and_the_run_goes_on(
    tmp_path: Path, tiny_llama: Path, tiny_text_file: Path
) -> None:
    port = free_port()
    small = {"model": str(tiny_llama), "calibration": str(tiny_text_file), "context": 64}
    with bare_head(**{"num-cpus": 1, "ray-client-server-port": port}) as cluster:
        environment = cluster.environment | {"RAY_CLIENT_RECONNECT_GRACE_PERIOD": "12"}
        address = f"ray://127.0.0.1:{port}"
        with learning(tmp_path, environment, **small, address=address, evaluations=999) as job:
            job.wait_for_rows(3)
            kill(cluster)
            line = one_line(job)
    assert line.startswith(f"the head of the Ray cluster at {address} is gone: what was recorded")
    kept = rows(tmp_path / "run")
    with learning(
        tmp_path, {}, **small, address="none", resume=True, evaluations=len(kept) + 3
    ) as job:
        code, output, errors = job.end()
    assert (code, errors) == (0, ""), output
    assert rows(tmp_path / "run")[: len(kept)] == kept
