"""What an engine serves, held in a scratch folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from unicuco.engines.holding import hold
from unicuco.errors import ContainerError, EngineError
from unicuco.export.document import DOCUMENT_NAME
from unicuco.files import file_digest
from unicuco.models import model_digest
from unicuco.packing import read_header
from unicuco.pipeline import PackOptions, pack
from unicuco.testing.variants import make_variant_case


@pytest.fixture(scope="module")
def variant(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("holding") / "variant"
    make_variant_case(tiny_llama).write(folder)
    return folder


@pytest.fixture(scope="module")
def container(variant: Path) -> Path:
    file = variant.with_name("variant.pack")
    pack(PackOptions(model=str(variant), out=file))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_held_by_links_until_it_is_released(variant: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(variant, tmp_path / "mine")
    (mine / ".packed").mkdir()
    scratch = tmp_path / "scratch"
    held = hold(mine, scratch)
    shutil.rmtree(mine)
    assert contents(held.folder) == contents(variant)
    assert held.digest() == file_digest(variant / DOCUMENT_NAME)
    held.release()
    assert list(scratch.iterdir()) == []


def test_without_a_scratch_folder_a_model_is_read_where_it_lies(tiny_llama: Path) -> None:
    held = hold(tiny_llama, None)
    assert (held.folder, held.digest()) == (tiny_llama, model_digest(tiny_llama))
    held.release()
    assert tiny_llama.is_dir()


@pytest.mark.parametrize("has_scratch", [True, False])
def test_a_container_is_held_unpacked_and_named_by_its_header(
    variant: Path, container: Path, tmp_path: Path, has_scratch: bool
) -> None:
    held = hold(container, tmp_path / "scratch" if has_scratch else None)
    assert contents(held.folder) == contents(variant)
    assert (held.folder.parent == tmp_path / "scratch") is has_scratch
    assert held.digest() == read_header(container).digest
    held.release()
    assert not held.folder.exists()
    assert container.is_file()


def test_what_can_not_be_held_leaves_nothing(container: Path, tmp_path: Path) -> None:
    header, data = read_header(container), bytearray(container.read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged.pack").write_bytes(data)
    scratch = tmp_path / "scratch"
    with pytest.raises(ContainerError, match="was altered") as caught:
        hold(tmp_path / "damaged.pack", scratch)
    assert header.entries[-1].name in str(caught.value)
    with pytest.raises(EngineError, match="can't be read"):
        hold(tmp_path / "nothing", scratch)
    assert list(scratch.iterdir()) == []
