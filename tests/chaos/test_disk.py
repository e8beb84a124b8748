"""A disk that is full when evaluations are recorded."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.chaos.jobs import EVALUATIONS, learning, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_disk_that_takes_no_more_is_one_line_and_the_run_goes_on_when_it_does(
    tmp_path: Path, undisturbed: list[tuple[object, ...]]
) -> None:
    with learning(tmp_path, {}, address="none") as job:
        job.wait_for_rows(2)
        # No file of this process may grow from here on, as on a disk without space.
        resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        code, _, errors = job.end()
    assert code == 1
    assert errors.startswith("error: ")
    assert "evaluations.db" in errors
    assert errors.count("\n") == 1
    kept = rows(tmp_path / "run")
    assert 2 <= len(kept) < EVALUATIONS
    assert kept == undisturbed[: len(kept)]
    with learning(tmp_path, {}, address="none", resume=True) as job:
        code, output, errors = job.end()
    assert (code, errors) == (0, ""), output
    assert rows(tmp_path / "run") == undisturbed
