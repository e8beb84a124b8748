"""What dies, and that nothing accepted is lost and nothing is done twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from ray import serve as ray_serve

from serve.running import running
from tests.serve.conftest import Server, small_config, wait_until
from tests.serve.cutters import LET_GO, ChaosCutter
from unicuco.export import read_variant
from unicuco.store import JobStatus, JobStore

pytestmark = pytest.mark.slow

FINAL = ("succeeded", "failed", "cancelled")


def ask(client: httpx.Client, sparsity: float, suffix: str) -> str:
    answer = client.post(
        "/v1/compression/jobs",
        json={"model": "run", "request": {"sparsity": sparsity}, "suffix": suffix},
    )
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def job(client: httpx.Client, job_id: str) -> dict[str, object]:
    found: dict[str, object] = client.get(f"/v1/compression/jobs/{job_id}").json()
    return found


def replicas(server: Server, deployment: str, *states: str) -> int:
    found = ray_serve.status().applications[server.name].deployments[deployment].replica_states
    return sum(int(found.get(state, 0)) for state in states or ("RUNNING",))


def check_done_once(server: Server, client: httpx.Client, job_id: str) -> None:
    """Succeeded, told once, and its variant whole."""
    found = job(client, job_id)
    assert found["status"] == "succeeded", found
    events = client.get(f"/v1/compression/jobs/{job_id}/events").json()["data"]
    kinds = [event["type"] for event in events]
    assert kinds[-1] == "succeeded"
    assert kinds.count("succeeded") == 1
    run, _, suffix = str(found["compressed_model"]).partition(":")
    document = read_variant(Path(server.config.data) / "variants" / run / suffix)
    assert document.plan.request.to_dict() == found["request"]


@contextmanager
def pinging(url: str, every_s: float = 0.05) -> Iterator[list[object]]:
    """Ask at a constant rate; what is no 2xx is noted."""
    bad: list[object] = []
    done = threading.Event()

    def ping() -> None:
        body = {"model": "run", "requests": [{"sparsity": 0.5}]}
        with httpx.Client(base_url=url, timeout=30) as client:
            while not done.wait(every_s):
                try:
                    answer = client.post("/v1/strategies", json=body)
                    if not answer.is_success:
                        bad.append((answer.status_code, answer.text))
                except httpx.HTTPError as error:
                    bad.append(repr(error))

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        yield bad
    finally:
        done.set()
        thread.join()


def test_sixty_four_jobs_scale_the_pruning_up_and_down_and_no_caller_notices(
    chaos: Server,
) -> None:
    with chaos.client() as client, pinging(chaos.url) as bad:
        assert replicas(chaos, "pruning") == 1
        # A slow one in four: four seconds of work for each of four replicas.
        ids = [ask(client, 0.605 if k % 4 == 0 else 0.3 + k / 200, f"many-{k}") for k in range(64)]
        # Whether a process starts in time is the machine's matter; that it is started is not.
        assert wait_until(lambda: replicas(chaos, "pruning", "STARTING", "RUNNING") == 4, 30)
        assert wait_until(lambda: replicas(chaos, "pruning") == 4, 60)
        assert wait_until(lambda: all(job(client, i)["status"] in FINAL for i in ids), 60)
        for job_id in ids:
            check_done_once(chaos, client, job_id)
        assert wait_until(lambda: replicas(chaos, "pruning") == 1, 60)
        time.sleep(1)
    assert bad == []


def test_a_job_whose_replica_dies_before_and_after_writing_is_finished_once(
    chaos: Server,
) -> None:
    with chaos.client() as client:
        ids = [ask(client, 0.601, "dies-before"), ask(client, 0.602, "dies-after")]
        listed: set[str] = set()
        while not all(job(client, job_id)["status"] in FINAL for job_id in ids):
            for model in client.get("/v1/models").json()["data"]:
                if model["kind"] == "variant" and model["id"] not in listed:
                    assert client.get(f"/v1/models/{model['id']}").status_code == 200
                    listed.add(model["id"])
            time.sleep(0.05)
        for job_id in ids:
            check_done_once(chaos, client, job_id)
            attempts = [
                event["data"]["attempt"]
                for event in client.get(f"/v1/compression/jobs/{job_id}/events").json()["data"]
                if event["type"] == "running"
            ]
            assert attempts == [1, 2]
    assert list((Path(chaos.config.data) / "staging").iterdir()) == []


def test_a_job_that_kills_every_replica_fails_and_the_others_do_not(chaos: Server) -> None:
    with chaos.client() as client:
        poison, good = ask(client, 0.603, "poison"), ask(client, 0.61, "good")
        assert wait_until(lambda: job(client, poison)["status"] in FINAL, 90)
        failed = job(client, poison)
        assert failed["status"] == "failed"
        assert failed["error"]["code"] == "worker_died"  # type: ignore[index]
        assert wait_until(lambda: job(client, good)["status"] in FINAL, 30)
        check_done_once(chaos, client, good)
        assert client.get("/v1/models/run:poison").status_code == 404


def test_a_running_job_can_be_cancelled_and_leaves_nothing(chaos: Server) -> None:
    with chaos.client() as client:
        waits = ask(client, 0.606, "cancelled")
        assert wait_until(lambda: job(client, waits)["status"] == "running", 30)
        client.post(f"/v1/compression/jobs/{waits}/cancel")
        (Path(chaos.config.data) / LET_GO).touch()
        assert wait_until(lambda: job(client, waits)["status"] in FINAL, 30)
        assert job(client, waits)["status"] == "cancelled"
        assert client.get("/v1/models/run:cancelled").status_code == 404
        again = ask(client, 0.62, "cancelled")
        assert wait_until(lambda: job(client, again)["status"] in FINAL, 30)
        check_done_once(chaos, client, again)


def test_an_ingress_that_dies_comes_back_and_has_forgotten_nothing(chaos: Server) -> None:
    with chaos.client() as client:
        slow = ask(client, 0.625, "through")
        for pid in pids("ingress", chaos):
            os.kill(pid, signal.SIGKILL)

        def answers() -> bool:
            answer = client.get("/ready")
            assert answer.is_success or "code" in answer.json()["error"], answer.text
            return answer.status_code == 200

        assert wait_until(answers, 60)
        assert wait_until(lambda: job(client, slow)["status"] in FINAL, 30)
        check_done_once(chaos, client, slow)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_service_that_is_started_again_finishes_what_was_queued_and_running(
    serve_port: int, tiny_run: Path, tmp_path: Path, request: pytest.FixtureRequest, database: str
) -> None:
    is_server = database == "postgresql"
    store = request.getfixturevalue("new_postgres_database")() if is_server else ""
    config = small_config(tiny_run, tmp_path / "data", serve_port, store=store)
    names = {"name": "again", "route_prefix": "/again"}
    with running(config, build_cutter=ChaosCutter, **names) as url:
        server = Server(url=url, config=config, name="again")
        with server.client() as client:
            ids = [ask(client, 0.505 + k / 100, f"again-{k}") for k in range(8)]
            assert wait_until(lambda: job(client, ids[0])["status"] != "queued", 30)
        for pid in pids("pruning", server):
            os.kill(pid, signal.SIGKILL)
    with JobStore.open(config.jobs_location) as left:
        assert left.num_active() > 0
    with running(config, build_cutter=ChaosCutter, **names), server.client() as client:
        assert wait_until(lambda: all(job(client, i)["status"] in FINAL for i in ids), 90)
        for job_id in ids:
            check_done_once(server, client, job_id)
        with JobStore.open(config.jobs_location) as left:
            assert left.counts()[JobStatus.SUCCEEDED] == 8
    assert (tmp_path / "data" / "jobs.db").exists() is not is_server


def pids(deployment: str, server: Server) -> list[int]:
    """Return the processes of a deployment's replicas."""
    title = f"ray::ServeReplica:{server.name}:{deployment}"
    processes = psutil.Process().children(recursive=True)
    alive = [p for p in processes if p.status() != psutil.STATUS_ZOMBIE]
    found = [process.pid for process in alive if title in " ".join(process.cmdline())]
    assert found
    return found
