"""What a run is that nothing happens to."""

from __future__ import annotations

import pytest

from tests.chaos.jobs import EVALUATIONS, learning, rows


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    """What is recorded of a job without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with learning(folder, {}, address="none") as job:
        code, output, errors = job.end()
    assert (code, errors) == (0, ""), output
    found = rows(folder / "run")
    assert len({row[2] for row in found}) == EVALUATIONS
    return found
