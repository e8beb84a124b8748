"""``unicuco serve`` as a process: one line when it answers, killed, started again, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

import unicuco
from tests.serve.conftest import free_port, wait_until
from tests.unicuco.cli.conftest import Runner

ROOT = Path(unicuco.__file__).parents[1]


def start(run: Path, data: Path, port: int) -> tuple[subprocess.Popen[str], str]:
    """Start the service and wait until it says that it answers."""
    words = [str(run), "--data", str(data), "--port", str(port), "--engines", "0", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "unicuco.cli", "serve", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(data.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate(timeout=60)[1])
    return process, str(json.loads(line)["url"])


def kill(process: subprocess.Popen[str]) -> None:
    """Kill the service and everything that it started, as a machine that goes down does."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.communicate(timeout=30)


@pytest.mark.slow
def test_a_killed_service_that_is_started_again_finishes_its_jobs_and_stops_when_told(
    tiny_run: Path, tmp_path: Path
) -> None:
    data, port = tmp_path / "data", free_port()
    process, url = start(tiny_run, data, port)
    try:
        bodies = [
            {"model": "run", "request": {"sparsity": 0.2 + k / 100}, "suffix": f"v-{k}"}
            for k in range(48)
        ]
        with httpx.Client(base_url=url, timeout=60) as client:
            assert wait_until(lambda: client.get("/ready").status_code == 200, 60)
            made = [client.post("/v1/compression/jobs", json=body) for body in bodies]
        assert {answer.status_code for answer in made} == {202}
    finally:
        kill(process)
    process, url = start(tiny_run, data, port)
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            ids = [answer.json()["id"] for answer in made]

            def all_done() -> bool:
                jobs = [client.get(f"/v1/compression/jobs/{job_id}").json() for job_id in ids]
                return {job["status"] for job in jobs} == {"succeeded"}

            assert wait_until(all_done, 60)
            listed = {model["id"] for model in client.get("/v1/models").json()["data"]}
            assert listed == {"run", *(f"run:v-{k}" for k in range(48))}
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, "")
        assert "Traceback" not in errors
        assert wait_until(lambda: not any(map(psutil.Process.is_running, started)), 30)
    finally:
        if process.poll() is None:
            kill(process)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "set UNICUCO_API_KEYS"),
        (["--port", "0"], "port must be in"),
        (["--address", "here"], "--address must be local, auto or HOST:PORT"),
        (["--address", "ray://here:10001"], "--address must be local, auto or HOST:PORT"),
    ],
)
def test_wrong_use_is_one_line_and_starts_nothing(
    unicuco: Runner, tiny_run: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    result = unicuco("serve", tiny_run, "--data", tmp_path / "data", *words)
    assert result.code == 2
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "data").exists()


def test_a_cluster_that_is_not_there_is_one_line(
    unicuco: Runner, tiny_run: Path, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    result = unicuco("serve", tiny_run, "--data", tmp_path / "data", "--address", address)
    assert result.code == 1
    assert f"nothing answers at {address}" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_that_is_no_run_is_one_line(unicuco: Runner, tmp_path: Path) -> None:
    result = unicuco("serve", tmp_path, "--data", tmp_path / "data")
    assert result.code in (1, 2)
    result = unicuco("serve", tmp_path / "none", "--data", tmp_path / "data")
    assert result.code == 1
    assert "is no run folder" in result.stderr
    assert "Traceback" not in result.stderr
