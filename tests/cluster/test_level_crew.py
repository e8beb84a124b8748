"""Levels built by actors on a real Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from cluster.actors import Handle
from cluster.driver import RayBackend
from cluster.level_crew import LevelCrew
from tests.cluster.synthetic import LevelMaker
from unicuco.errors import ClusterError, StorageError
from unicuco.levels import LevelDatabase
from unicuco.pipeline import Backend, LearnOptions, LocalBackend, Progress
from unicuco.pipeline.preparation import build_levels, prepare

pytestmark = pytest.mark.usefixtures("ray_local")


def starter(folder: Path, **options: object) -> Callable[[], Handle]:
    return lambda: ray.remote(LevelMaker).options(num_cpus=0.1).remote(folder, **options)


@pytest.mark.slow
def test_actors_build_the_same_levels_as_one_process(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    digests = []
    backends: list[Backend] = [LocalBackend(), RayBackend("local", 2)]
    for number, backend in enumerate(backends):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        options = LearnOptions(
            model=str(tiny_llama),
            out=folder,
            pruner="sparsegpt",
            calibration=tiny_text_file,
            tokens=256,
            context=32,
        )
        told: list[Progress] = []
        prepared = prepare(options, folder, told.append)
        with backend:
            build_levels(prepared, backend, told.append)
        assert prepared.levels is not None
        database = LevelDatabase(prepared.levels.folder)
        digests.append(database.digest(prepared.loaded.profile))
        assert [step.done for step in told if step.stage == "levels"] == [0, 1, 2]
        assert not list(folder.rglob("*.tmp"))
    assert digests[0] == digests[1]


def test_every_block_is_built_once_and_told_by_as_many_as_there_are(tmp_path: Path) -> None:
    done: list[int] = []
    LevelCrew(starter(tmp_path), 2).build(range(6), done.append)
    assert sorted(done) == list(range(6))
    assert {path.name for path in tmp_path.iterdir()} == {str(block) for block in range(6)}


def test_a_builder_that_dies_is_replaced_and_its_block_built_again(tmp_path: Path) -> None:
    done: list[int] = []
    LevelCrew(starter(tmp_path, die="once"), 1).build(range(3), done.append)
    assert done == [0, 1, 2]
    assert (tmp_path / "died").exists()


def test_three_deaths_end_the_build(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="3 builders of levels died"):
        LevelCrew(starter(tmp_path, die="always"), 1).build(range(3), lambda block: None)


def test_what_a_builder_raises_reaches_the_driver(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the disk is full"):
        LevelCrew(starter(tmp_path, refuse=True), 2).build(range(3), lambda block: None)


def test_no_room_for_any_builder_is_said(tmp_path: Path) -> None:
    def start() -> Handle:
        return ray.remote(LevelMaker).options(num_cpus=10_000).remote(tmp_path)

    with pytest.raises(ClusterError, match="no builder of levels could be started"):
        LevelCrew(start, 1, start_timeout_s=0.1).build(range(1), lambda block: None)
