"""Packed forms: made once, kept within bounds, gone with their variant. Without Ray."""

from __future__ import annotations

import asyncio
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.catalogue import Catalogue, ModelId, UnknownModelError
from serve.config import ServeConfig
from serve.errors import ApiError
from serve.packer import Packed, Packer, make_form
from serve.packing import Packing, link_class
from unicuco.errors import ModelError, StorageError, VariantError
from unicuco.pipeline import Run, prune, unpack
from unicuco.types import Request, Target

VARIANT = ModelId(run="run", suffix="v")
OTHER = ModelId(run="run", suffix="other")


@pytest.fixture(scope="module")
def cut(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A variant. Read it, never write into it."""
    folder = tmp_path_factory.mktemp("cut") / "v"
    prune(Run.open(tiny_run), Request(target=Target.SPARSITY, value=0.5), folder)
    return folder


@pytest.fixture
def catalogue(cut: Path, tiny_run: Path, tmp_path: Path) -> Catalogue:
    """Of a service with two variants."""
    made = Catalogue(ServeConfig.of_runs([tiny_run], data=tmp_path / "data"))
    made.make_folders()
    for variant in (VARIANT, OTHER):
        shutil.copytree(cut, made.place(variant))
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_form_unpacks_to_the_variant_and_goes_with_it(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    before = files(catalogue.find(VARIANT))
    form = make_form(catalogue, VARIANT, None)
    assert form == catalogue.packed_form(VARIANT, None)
    assert files(catalogue.find(VARIANT)) == before, "whoever loads the folder sees nothing of it"
    unpack(form, tmp_path / "back")
    assert files(tmp_path / "back") == before
    catalogue.remove(VARIANT)
    assert list(tmp_path.rglob("*.pack")) == []
    with pytest.raises(UnknownModelError):
        catalogue.packed_form(VARIANT, None)


def test_many_who_ask_at_once_get_one_packing(catalogue: Catalogue) -> None:
    together = threading.Barrier(4)

    def ask(number: int) -> int:
        together.wait()
        return make_form(catalogue, VARIANT, None).stat().st_ino  # another one's has another

    with ThreadPoolExecutor(4) as pool:
        inodes = set(pool.map(ask, range(4)))
    assert inodes == {make_form(catalogue, VARIANT, None).stat().st_ino}


def test_few_forms_are_kept_and_none_of_a_packer_that_was_killed(catalogue: Catalogue) -> None:
    folder = make_form(catalogue, VARIANT, None).parent
    (folder / ".4-mbps.pack.abc.tmp").write_bytes(b"half")
    for link_mbps in (4.0, 8.0, 16.0):
        newest = make_form(catalogue, VARIANT, link_mbps)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["16-mbps.pack", "4-mbps.pack", "8-mbps.pack"]
    assert newest.name == "16-mbps.pack"


def test_links_of_about_one_speed_share_a_form() -> None:
    assert {link_class(mbps) for mbps in (190.0, 256.0, 300.0)} == {256.0}
    assert (link_class(1e-300), link_class(1e300)) == (1.0, 2.0**20)


def packed(packer: Packer, variant: ModelId) -> Packed:
    return asyncio.run(packer.pack(variant, None))


def test_a_damaged_variant_is_not_packed(catalogue: Catalogue) -> None:
    config = catalogue.find(VARIANT) / "config.json"
    config.write_text(config.read_text() + " ")
    error = packed(Packer(catalogue), VARIANT)
    assert isinstance(error, VariantError)
    assert "config.json was altered" in str(error)
    assert list(catalogue.packed_form(VARIANT, None).parent.iterdir()) == []


def test_a_variant_deleted_while_it_is_packed_is_unknown(catalogue: Catalogue) -> None:
    (catalogue.find(VARIANT) / "strategy.json").unlink()
    assert isinstance(packed(Packer(catalogue), VARIANT), UnknownModelError)


def test_a_disk_that_refuses_is_one_line(catalogue: Catalogue) -> None:
    (catalogue.find(VARIANT) / ".packed").write_text("mine")
    error = packed(Packer(catalogue), VARIANT)
    assert isinstance(error, StorageError)
    assert "can't be made" in str(error)


class Held:
    """The handle of a real packer that begins when it is let go."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._packer = Packer(catalogue)
        self.go = asyncio.Event()
        self.asked: list[ModelId] = []
        self.pack = self

    async def remote(self, variant: ModelId, link_mbps: float | None) -> Packed:
        """Pack, later."""
        self.asked.append(variant)
        await self.go.wait()
        return await self._packer.pack(variant, link_mbps)


def test_callers_share_a_packing_and_others_are_refused_meanwhile(catalogue: Catalogue) -> None:
    async def work() -> None:
        held = Held(catalogue)
        packing = Packing(held, catalogue, max_waiting=1)
        same = [asyncio.create_task(packing.form(VARIANT, mbps)) for mbps in (250.0, 260.0, 255.0)]
        while not held.asked:
            await asyncio.sleep(0.01)
        with pytest.raises(ApiError) as refused:
            await packing.form(OTHER, None)
        assert (refused.value.status, refused.value.headers["Retry-After"]) == (503, "5")
        same[0].cancel()  # whoever goes away leaves the work to those who stay
        held.go.set()
        assert await same[1] == await same[2] == catalogue.packed_form(VARIANT, 256.0)
        assert held.asked == [VARIANT]
        assert await packing.form(VARIANT, 256.0) == await same[1]
        assert held.asked == [VARIANT], "it is there"
        await packing.form(OTHER, None)
        assert held.asked == [VARIANT, OTHER]

    asyncio.run(work())


def test_a_failure_is_told_to_all_who_wait_and_tried_again_for_the_next(
    catalogue: Catalogue,
) -> None:
    async def work() -> None:
        held = Held(catalogue)
        packing = Packing(held, catalogue, max_waiting=1)
        folder = catalogue.find(VARIANT)
        (folder / "config.json").rename(folder / "away")
        held.go.set()
        for error in await asyncio.gather(
            *(packing.form(VARIANT, None) for _ in range(2)), return_exceptions=True
        ):
            assert isinstance(error, ModelError)
        (folder / "away").rename(folder / "config.json")
        assert (await packing.form(VARIANT, None)).is_file()

    asyncio.run(work())
