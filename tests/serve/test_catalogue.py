"""Ids in, folders out, nothing outside one root."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.catalogue import Catalogue, ModelId, UnknownModelError
from serve.config import ServeConfig
from unicuco.errors import StorageError

VARIANT = ModelId(run="run", suffix="v")


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    made = Catalogue(ServeConfig.of_runs([tmp_path / "run"], data=tmp_path / "data"))
    made.make_folders()
    return made


def stage(catalogue: Catalogue, name: str) -> str:
    folder = catalogue.staging_place(name)
    folder.mkdir()
    (folder / "strategy.json").write_text("{}")
    return name


@pytest.mark.parametrize("text", ["", ":", "run:", ":v", "..", "run:..", "run:a/b", "run:V", "a b"])
def test_what_matches_no_pattern_is_no_model(text: str) -> None:
    with pytest.raises(UnknownModelError):
        ModelId.parse(text)


def test_ids_read_back_as_they_are_written() -> None:
    for text in ("run", "run:v", "run-2.0:a-b"):
        assert str(ModelId.parse(text)) == text


def test_a_variant_is_there_once_it_is_published(catalogue: Catalogue) -> None:
    stage(catalogue, "job.1")
    assert list(catalogue.variants()) == []
    catalogue.publish("job.1", VARIANT)
    assert list(catalogue.variants()) == [VARIANT]
    catalogue.publish("job.1", VARIANT)
    assert catalogue.find(VARIANT).name == "v"


def test_nothing_is_published_over_what_stands_there(catalogue: Catalogue) -> None:
    catalogue.publish(stage(catalogue, "job.1"), VARIANT)
    with pytest.raises(StorageError, match="can't be published"):
        catalogue.publish(stage(catalogue, "job.2"), VARIANT)


def test_a_half_written_variant_is_not_there(catalogue: Catalogue) -> None:
    catalogue.place(VARIANT).mkdir()
    assert not catalogue.has(VARIANT)
    with pytest.raises(UnknownModelError):
        catalogue.remove(VARIANT)


def test_a_link_leads_nowhere(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "strategy.json").write_text("{}")
    catalogue.place(VARIANT).symlink_to(tmp_path / "else")
    assert not catalogue.has(VARIANT)
    catalogue.place(VARIANT).unlink()
    catalogue.place(VARIANT).parent.rmdir()
    catalogue.place(VARIANT).parent.symlink_to(tmp_path)
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "strategy.json").write_text("{}")
    assert not catalogue.has(VARIANT)


def test_a_removed_variant_is_gone_from_the_disk(catalogue: Catalogue, tmp_path: Path) -> None:
    catalogue.publish(stage(catalogue, "job.1"), VARIANT)
    catalogue.remove(VARIANT)
    assert not catalogue.has(VARIANT)
    assert list(tmp_path.rglob("strategy.json")) == []


def test_what_dead_writers_left_is_cleared_and_nothing_else(catalogue: Catalogue) -> None:
    for name in ("job-a.1", ".job-a.2.host.7.x.part", "job-b.1"):
        stage(catalogue, name)
    catalogue.clear_staging("job-a.")
    assert [path.name for path in catalogue.staging_place(".").iterdir()] == ["job-b.1"]


def test_unknown_runs_have_no_place(catalogue: Catalogue) -> None:
    for name in (ModelId(run="other", suffix="v"), ModelId(run="run")):
        with pytest.raises(UnknownModelError):
            catalogue.place(name)


def test_a_variant_may_lie_packed_only(catalogue: Catalogue) -> None:
    file = catalogue.place(VARIANT).with_name("v.pack")
    file.write_bytes(b"packed")
    assert list(catalogue.variants()) == [VARIANT]
    assert catalogue.find(VARIANT) == catalogue.packed_form(VARIANT, 8.0) == file
    catalogue.place(VARIANT).mkdir()
    assert catalogue.find(VARIANT) == file, "half a folder is none"
    catalogue.place(VARIANT).rmdir()
    with pytest.raises(StorageError, match=r"v\.pack is there"):
        catalogue.publish(stage(catalogue, "job.1"), VARIANT)
    catalogue.remove(VARIANT)
    assert not catalogue.has(VARIANT)
    assert not file.exists()


def test_a_folder_counts_before_the_file_beside_it(catalogue: Catalogue) -> None:
    catalogue.publish(stage(catalogue, "job.1"), VARIANT)
    catalogue.place(VARIANT).with_name("v.pack").write_bytes(b"packed")
    assert list(catalogue.variants()) == [VARIANT]
    assert catalogue.find(VARIANT).is_dir()
    catalogue.remove(VARIANT)
    assert not catalogue.has(VARIANT)


def test_a_packed_file_that_is_a_link_leads_nowhere(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "else").write_bytes(b"packed")
    catalogue.place(VARIANT).with_name("v.pack").symlink_to(tmp_path / "else")
    assert not catalogue.has(VARIANT)
