"""Runs that a database server records while they are learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unicuco.pipeline.conftest import ignore_progress, tiny_options
from tests.unicuco.pipeline.test_learning import _Stop, stop_at, values
from unicuco.errors import RunError
from unicuco.pipeline import LocalBackend, Progress, Run, learn


@pytest.mark.slow
def test_a_run_on_postgresql_is_that_on_a_file_and_ends_with_a_copy(
    new_postgres_database: Callable[[], str],
    tiny_llama: Path,
    tiny_text_file: Path,
    tmp_path: Path,
    run: Run,
    quick: None,
) -> None:
    url = new_postgres_database()

    def go(progress: Callable[[Progress], None] = ignore_progress, **changes: object) -> Run:
        options = tiny_options(tiny_llama, tmp_path / "run", tiny_text_file, store=url, **changes)
        return learn(options, backend=LocalBackend(), progress=progress)

    with pytest.raises(_Stop):
        go(stop_at("evaluate", 3))
    assert not (tmp_path / "run" / "evaluations.db").exists()
    with pytest.raises(RunError, match="is not empty and holds no run"):
        go()
    (tmp_path / "run").rename(tmp_path / "lost")
    with pytest.raises(RunError, match=r"the database .* holds a run already; add --resume"):
        go()
    assert not (tmp_path / "run").exists()
    finished = go(resume=True)
    assert values(finished.folder) == values(run.folder)
    extended = go(resume=True, evaluations=8)
    assert values(extended.folder)[:6] == values(run.folder)
    assert Run.open(tmp_path / "run").manifest["evaluations"] == 8
