"""Learning on Ray's real autoscaler: nodes come when there is work and go when there is none."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.chaos.jobs import joined, learning, rows
from tests.ray_heads import actors, autoscaled_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_without_nodes_gets_three_gives_them_back_and_asks_what_it_would_have_asked(
    tmp_path: Path, undisturbed: list[tuple[object, ...]]
) -> None:
    held: set[psutil.Process] = set()

    def three_nodes() -> bool:
        # However long nodes take to come, until then nothing is finished.
        for process in set(actors(cluster.processes(), "EvaluatorActor.evaluate")) - held:
            held.add(process)
            process.suspend()
        return cluster.num_raylets() == 4

    with autoscaled_cluster(head_cpus=0, worker_cpus=1, max_workers=3) as cluster:
        assert cluster.num_raylets() == 1, "no node yet"
        with learning(tmp_path, joined(cluster), replicas=3) as job:
            job.wait_for(three_nodes)
            for process in held:
                with suppress(psutil.NoSuchProcess):
                    process.resume()
            job.wait_for_rows(3)
            (learner,) = actors(cluster.processes(), "LearnerActor")
            learner.suspend()  # nothing more is asked
            job.wait_for(lambda: cluster.num_raylets() == 2)
            learner.send_signal(signal.SIGCONT)
            code, output, errors = job.end()
            assert (code, errors) == (0, ""), output
    assert rows(tmp_path / "run") == undisturbed
