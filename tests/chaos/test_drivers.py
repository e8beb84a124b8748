"""Drivers that are killed: their run goes on where it was, and nothing of them stays behind."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import unicuco
from tests.cluster.test_driver import local_asks
from unicuco.store import EvaluationStore

ROOT = Path(unicuco.__file__).parents[1]


def run_driver(path: Path, num_evaluations: int, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.driver", str(path), str(num_evaluations), str(seconds)],
        cwd=ROOT,
        env=os.environ
        | {"TMPDIR": str(path.parent), "HOME": str(path.parent), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def read_rows(path: Path) -> dict[str, tuple[object, ...]]:
    try:
        connection = sqlite3.connect(path)
        rows = connection.execute(
            "SELECT strategy_key, status, kl, finished_at FROM evaluations"
        ).fetchall()
    except sqlite3.OperationalError:  # the driver has not made it yet
        rows = []
    connection.close()
    return {row[0]: row for row in rows}


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def kill(driver: subprocess.Popen[str], signal_: signal.Signals) -> str:
    if signal_ is signal.SIGINT:  # a terminal's Ctrl-C goes to the whole group
        os.killpg(driver.pid, signal_)
    else:
        driver.send_signal(signal_)
    try:
        _, errors = driver.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        driver.kill()  # or the tests that follow would meet it
        driver.communicate()
        raise
    return errors


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_killed_driver_s_run_goes_on_with_nothing_lost_and_nothing_done_twice(
    tmp_path: Path,
) -> None:
    path = tmp_path / "evaluations.db"
    driver = run_driver(path, 40, 0.5)
    try:
        assert wait_until(lambda: len(read_rows(path)) >= 5, 120)
        started = psutil.Process(driver.pid).children(recursive=True)
        assert {"raylet", "gcs_server"} <= {process.name() for process in started}
    finally:
        kill(driver, signal.SIGKILL)
    # Two idle agents of Ray's wait a minute for the killed one to come back, then end.
    workers = [process for process in started if "Agent" not in process.name()]
    assert wait_until(lambda: not any(map(is_alive, workers)), 60)
    kept = read_rows(path)
    assert 5 <= len(kept) < 40
    again = run_driver(path, 40, 0.0)
    _, errors = again.communicate(timeout=120)
    assert (again.returncode, errors) == (0, "")
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluations.db"]
    rows = read_rows(path)
    assert rows | kept == rows
    with EvaluationStore.open(path, create=False) as store:
        assert [ask for ask, _ in store.read()] == local_asks(10, 4)


@pytest.mark.slow
def test_a_stopped_driver_leaves_its_run_and_nothing_else_and_a_second_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "evaluations.db"
    for signal_ in (signal.SIGTERM, signal.SIGINT):
        driver = run_driver(path, 400, 0.5)
        kept = len(read_rows(path))
        try:
            assert wait_until(lambda: len(read_rows(path)) >= kept + 2, 120)  # noqa: B023 - run now
            started = psutil.Process(driver.pid).children(recursive=True)
            if signal_ is signal.SIGTERM:
                second = run_driver(path, 400, 0.5)
                _, errors = second.communicate(timeout=120)
                assert second.returncode == 1
                assert f"evaluations.db is in use by driver (process {driver.pid} on" in errors
        finally:
            errors = kill(driver, signal_)
        assert "*** SIG" not in errors, "no stack trace of Ray's"
        assert wait_until(lambda: not any(map(is_alive, started)), 30)  # noqa: B023 - run now
        assert [entry.name for entry in tmp_path.iterdir()] == ["evaluations.db"]
