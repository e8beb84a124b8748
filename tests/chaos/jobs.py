"""Learning the reference model by ``python -m cluster.learn`` in a process of its own."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.ray_heads import ROOT, Cluster

EVALUATIONS = 24  # seconds of work, for whoever is to meet it in the middle


@dataclass(frozen=True, slots=True)
class Job:
    """A running one, and the run that it learns."""

    process: subprocess.Popen[str]
    run: Path

    def rows(self) -> list[tuple[object, ...]]:
        """Return what is recorded of every evaluation, in ask order."""
        return rows(self.run)

    def wait_for_rows(self, count: int) -> None:
        """Wait until so many evaluations are recorded."""
        self.wait_for(lambda: len(self.rows()) >= count)

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds; fail if the job ends before."""
        deadline = time.monotonic() + 240
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.send_signal(signal.SIGKILL)
                pytest.fail(f"the job ended too early: {self.process.communicate()}")
            time.sleep(0.1)

    def end(self) -> tuple[int, str, str]:
        """Wait until it ends; return exit code, output and errors."""
        output, errors = self.process.communicate(timeout=200)
        return self.process.returncode, output, errors


@contextmanager
def learning(folder: Path, environment: Mapping[str, str], **options: object) -> Iterator[Job]:
    """Run a job whose run lies in ``folder`` inside the block."""
    document = {
        "model": "reference",
        "out": str(folder / "run"),
        "granularity": "block",
        "tokens": 512,
        "evaluations": EVALUATIONS,
        **options,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.learn", "--config", str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Job(process, Path(str(document["out"])))
    finally:
        process.kill()
        process.communicate(timeout=60)


def joined(cluster: Cluster) -> dict[str, str]:
    """Return the environment of a job that joins a cluster."""
    return cluster.environment | {"RAY_ADDRESS": cluster.address}


def rows(run: Path) -> list[tuple[object, ...]]:
    """Return what a run's store holds of every evaluation, in ask order."""
    if not (run / "evaluations.db").exists():
        return []
    with closing(sqlite3.connect(run / "evaluations.db", timeout=30)) as connection:
        try:
            return connection.execute(
                "SELECT round, position, strategy_key, kl, gradient, status FROM evaluations"
                " ORDER BY round, position"
            ).fetchall()
        except sqlite3.OperationalError:  # no tables yet
            return []
