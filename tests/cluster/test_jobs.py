"""Learning as a real `ray job submit`, on a head with a dashboard: seen, stopped, gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from tests.cluster.endpoint import read_metrics
from tests.cluster.test_learn import evaluations
from tests.ray_heads import ROOT, Cluster, ray_head
from tests.serve.conftest import free_port, wait_until

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True, kw_only=True)
class JobServer:
    """A head that takes jobs."""

    cluster: Cluster
    dashboard: str
    metrics: str
    client: JobSubmissionClient

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Ray's from the root of this project, as its documentation says it."""
        return subprocess.run(
            [str(Path(sys.executable).with_name("ray")), "job", *words],
            cwd=ROOT,
            env=self.cluster.environment | {"RAY_ADDRESS": self.dashboard},
            capture_output=True,
            text=True,
            timeout=200,
        )

    def submit(self, name: str, config: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Submit a learning job."""
        command = (sys.executable, "-m", "cluster.learn", "--config", str(config))
        named = ("--submission-id", name, "--working-dir", ".")
        return self.ray("submit", *options, *named, "--", *command)

    def info(self, name: str) -> JobDetails:
        """Return what the head knows of a job."""
        return self.client.get_job_info(name)

    def num_counted(self) -> float:
        """Return how many evaluations the head's metrics endpoint knows of."""
        with suppress(OSError):  # the endpoint comes up a moment after the head
            return read_metrics(self.metrics).get("unicuco_evaluations_total", 0.0)
        return 0.0


@pytest.fixture(scope="module")
def server() -> Iterator[JobServer]:
    """One head for the module."""
    ports = {"dashboard-port": free_port(), "metrics-export-port": free_port()}
    options = {"include-dashboard": "true", "dashboard-host": "127.0.0.1", **ports}
    # Ray kills what has not ended three seconds after it was told to; a busy machine needs longer.
    environment = {"RAY_metrics_report_interval_ms": "1000", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    with ray_head(lambda _: options, environment) as cluster:
        dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
        token = cluster.environment["RAY_AUTH_TOKEN"]
        client = JobSubmissionClient(dashboard, headers={"Authorization": f"Bearer {token}"})
        host = cluster.address.rpartition(":")[0]
        yield JobServer(
            cluster=cluster,
            dashboard=dashboard,
            metrics=f"http://{host}:{ports['metrics-export-port']}/metrics",
            client=client,
        )


def write_config(path: Path, **options: object) -> Path:
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return path


def test_a_job_is_counted_while_it_runs_stopped_and_gone_on_with(
    server: JobServer, tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options: dict[str, object] = {
        "model": str(tiny_llama),
        "out": str(run),
        "calibration": str(tiny_text_file),
        "tokens": 256,
        "context": 64,
    }
    begun = write_config(tmp_path / "begun.yaml", **options, evaluations=2000)
    submitted = server.submit("begun", begun, "--no-wait")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert wait_until(lambda: server.num_counted() >= 3, 120), server.client.get_job_logs("begun")
    stopped = server.ray("stop", "begun")
    assert stopped.returncode == 0, stopped.stderr
    assert server.info("begun").status is JobStatus.STOPPED
    log = server.client.get_job_logs("begun").splitlines()
    (effective,) = [line for line in log if line.startswith("options ")]
    assert json.loads(effective.removeprefix("options "))["evaluations"] == 2000
    assert json.loads(effective.removeprefix("options "))["address"] == "auto"
    assert any(line.startswith("evaluate ") for line in log)
    assert log[-1] == "stopped: `resume: true` goes on from here"
    rows = evaluations(run)
    assert 3 <= len(rows) < 2000

    total = len(rows) + 4
    going_on = write_config(tmp_path / "on.yaml", **options, evaluations=total, resume=True)
    finished = server.submit("on", going_on)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"learned {run}" in finished.stdout
    assert server.info("on").status is JobStatus.SUCCEEDED
    assert evaluations(run)[: len(rows)] == rows
    assert len(evaluations(run)) == total
    assert (run / "run.json").exists()


def test_a_job_s_exit_code_and_its_one_line_are_those_of_the_command_line(
    server: JobServer, tmp_path: Path
) -> None:
    wrong = write_config(tmp_path / "wrong.yaml", model="m", out="o", evaluation=3)
    refused = server.submit("wrong", wrong)
    assert refused.returncode == 1, "Ray's own, whatever the job's"
    assert server.info("wrong").status is JobStatus.FAILED
    assert server.info("wrong").driver_exit_code == 2
    log = server.client.get_job_logs("wrong").splitlines()
    (line,) = [line for line in log if line.startswith("error: ")]
    assert "evaluation: is no option; options: model" in line
