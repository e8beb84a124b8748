"""More work than the node takes: Ray's real autoscaler adds a node, and takes it away again."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve.config import ServeConfig
from tests.ray_heads import Cluster, autoscaled_cluster
from tests.serve.conftest import Server, free_port, wait_until
from tests.serve.cutters import NOTES
from tests.serve.test_faults import FINAL, ask, check_done_once, job, pinging

pytestmark = pytest.mark.slow

QUEUED = 16  # four for each of four replicas; three may be


@contextmanager
def serving(cluster: Cluster, run: Path, data: Path) -> Iterator[Server]:
    """Run the service on the cluster, and stop it as one stops it."""
    words = [cluster.address, str(run), str(data), str(free_port())]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.autoscaled_service", *words],
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            pytest.fail(process.communicate(timeout=60)[1])
        yield Server(url=url, config=ServeConfig.of_runs([run], data=data), name="unicuco")
        process.terminate()
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, "")
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate(timeout=30)


def cuts(server: Server) -> list[tuple[str, str]]:
    """Return node and job of every cut that was made."""
    notes = Path(server.config.data) / NOTES
    lines = notes.read_text().splitlines() if notes.exists() else []
    return [(line.split()[0], line.split()[1]) for line in lines]


def test_demand_beyond_the_node_adds_one_that_works_and_goes_and_no_caller_notices(
    tiny_run: Path, tmp_path: Path
) -> None:
    with (
        autoscaled_cluster() as cluster,
        serving(cluster, tiny_run, tmp_path / "data") as server,
        server.client() as client,
        pinging(server.url) as bad,
    ):
        ids: list[str] = []

        def two_nodes_have_cut() -> bool:
            # However long a node takes to come, until then there is more to do than one can.
            made = cuts(server)
            while len(ids) < len(made) + QUEUED:
                slow = 0.305 + len(ids) % 50 / 100
                ids.append(ask(client, slow, f"burst-{len(ids)}"))
            return len({node for node, _ in made}) == 2

        assert cluster.num_raylets() == 1
        assert wait_until(two_nodes_have_cut, 120)
        assert cluster.num_raylets() == 2
        assert wait_until(lambda: all(job(client, i)["status"] in FINAL for i in ids), 90)
        for job_id in ids:
            check_done_once(server, client, job_id)
        assert sorted(job_id for _, job_id in cuts(server)) == sorted(ids)
        assert wait_until(lambda: cluster.num_raylets() == 1, 60)
        time.sleep(1)
        again = ask(client, 0.305, "after")
        assert wait_until(lambda: job(client, again)["status"] in FINAL, 30)
        check_done_once(server, client, again)
        assert cuts(server)[-1][0] == cuts(server)[0][0]
    assert bad == []
