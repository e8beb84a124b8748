from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from unicuco.errors import ContainerError, InfeasibleRequestError, StorageError, VariantError
from unicuco.export import read_variant
from unicuco.packing import Scheme, read_header
from unicuco.pipeline import Int8Options, PackOptions, evaluate_variant, pack, unpack
from unicuco.testing.tiny import tiny_model_folder
from unicuco.testing.variants import make_variant_case


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    base = tiny_model_folder(folder / "base", tied=True, dtype=torch.bfloat16, hidden_size=64)
    make_variant_case(base, dtype=torch.bfloat16).write(folder / "variant")
    return folder / "variant"


@pytest.fixture(scope="module")
def packed(variant: Path) -> Path:
    file = variant.parent / "variant.pack"
    pack(PackOptions(model=str(variant), out=file))
    return file


@pytest.fixture(scope="module")
def int8(trained_folder: Path, tiny_text_file: Path, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("int8") / "model.pack"
    options = Int8Options(max_kl=0.05, calibration=tiny_text_file, tokens=512)
    pack(PackOptions(model=str(trained_folder), out=file, int8=options))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_variant_comes_back_to_the_byte_and_is_still_one(
    variant: Path, packed: Path, tmp_path: Path
) -> None:
    unpack(packed, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(variant)
    assert read_variant(tmp_path / "back").base_digest == read_header(packed).base_digest
    assert packed.stat().st_size < sum(map(len, contents(variant).values()))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llava"])
def test_folders_of_other_families_and_of_shards_come_back(family: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model", family, max_shard_size="20KB")
    pack(PackOptions(model=str(folder), out=tmp_path / "file"))
    unpack(tmp_path / "file", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


def test_threads_change_no_byte(variant: Path, packed: Path, tmp_path: Path) -> None:
    pack(PackOptions(model=str(variant), out=tmp_path / "one", threads=1))
    pack(PackOptions(model=str(variant), out=tmp_path / "four", threads=4))
    first = (tmp_path / "one").read_bytes()
    assert first == (tmp_path / "four").read_bytes() == packed.read_bytes()


def test_a_fast_link_leaves_tensors_as_they_are_and_a_slow_one_does_not(
    variant: Path, tmp_path: Path
) -> None:
    pack(PackOptions(model=str(variant), out=tmp_path / "fast", link_mbps=1e9))
    pack(PackOptions(model=str(variant), out=tmp_path / "slow", link_mbps=0.1))
    assert {e.scheme for e in read_header(tmp_path / "fast").entries} == {Scheme.RAW}
    assert Scheme.CODED in {e.scheme for e in read_header(tmp_path / "slow").tensors}
    for name in ("fast", "slow"):
        unpack(tmp_path / name, tmp_path / f"{name}-back")
        assert contents(tmp_path / f"{name}-back") == contents(variant)


def test_int8_meets_its_kl_and_is_far_smaller(
    int8: Path, trained_folder: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    header = read_header(int8)
    assert header.facts["int8"]["validation_kl"] <= 0.05
    matrices = [entry for entry in header.tensors if entry.scheme is Scheme.INT8]
    assert {entry.name for entry in header.tensors if len(entry.shape) == 2} == {
        entry.name for entry in matrices
    }
    unpack(int8, tmp_path / "back")
    report = evaluate_variant(
        tmp_path / "back", reference=str(trained_folder), text=tiny_text_file, tokens=512
    )
    assert 0 < report.kl < 0.1


def test_int8_of_a_variant_keeps_its_zeros_and_its_manifest(
    variant: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    # Random weights have no meaning to lose: any KL will do.
    options = Int8Options(max_kl=1.0, calibration=tiny_text_file, tokens=256)
    report = pack(PackOptions(model=str(variant), out=tmp_path / "file", int8=options))
    assert report.int8_bytes < report.stored_bytes
    unpack(tmp_path / "file", tmp_path / "back")
    document = read_variant(tmp_path / "back")  # digests fit
    assert document.plan == read_variant(variant).plan
    packed = json.loads((tmp_path / "back" / "strategy.json").read_text())["packed"]
    assert packed["validation_kl"] <= 1.0
    before = evaluate_variant(variant, text=tiny_text_file, tokens=128).sparsity
    assert evaluate_variant(tmp_path / "back", text=tiny_text_file, tokens=128).sparsity >= before


def test_what_no_step_meets_is_refused_with_what_can_be_met(
    trained_folder: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    options = Int8Options(max_kl=1e-6, sparsity=0.9, calibration=tiny_text_file, tokens=256)
    with pytest.raises(InfeasibleRequestError, match="do not get below") as caught:
        pack(PackOptions(model=str(trained_folder), out=tmp_path / "file", int8=options))
    assert caught.value.nearest > 1e-6
    assert list(tmp_path.iterdir()) == []


def test_an_altered_tensor_is_named_and_nothing_is_written(packed: Path, tmp_path: Path) -> None:
    header = read_header(packed)
    data = bytearray(packed.read_bytes())
    start = len(data) - header.packed_bytes
    for offset, entry in zip(header.offsets(), header.entries, strict=True):
        altered = bytearray(data)
        altered[start + offset + entry.packed_bytes // 2] ^= 1
        file = tmp_path / "altered"
        file.write_bytes(altered)
        with pytest.raises(ContainerError, match="was altered") as caught:
            unpack(file, tmp_path / "out")
        assert entry.name in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_cut_file_is_refused_wherever_it_ends(packed: Path, tmp_path: Path) -> None:
    data = packed.read_bytes()
    last = read_header(packed).entries[-1].name
    for size in (0, 5, 12, 40, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(ContainerError, match=r"cut short|is no packed model") as caught:
            unpack(tmp_path / "cut", tmp_path / "out")
    assert last in str(caught.value)
    (tmp_path / "long").write_bytes(data + b"\0")
    with pytest.raises(ContainerError, match="behind its end"):
        unpack(tmp_path / "long", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "long"]


def test_a_damaged_header_is_refused(packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    data[30] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(ContainerError, match="its header is damaged"):
        unpack(tmp_path / "damaged", tmp_path / "out")


def test_a_container_of_another_base_model_is_refused(
    packed: Path, variant: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    unpack(packed, tmp_path / "fine", base=str(variant.parent / "base"))
    with pytest.raises(ContainerError, match="was packed from base model"):
        unpack(packed, tmp_path / "out", base=str(tiny_llama))
    assert not (tmp_path / "out").exists()


def test_an_altered_variant_is_not_packed(variant: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(variant, tmp_path / "copy")
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with pytest.raises(VariantError, match="was altered"):
        pack(PackOptions(model=str(copy), out=tmp_path / "file"))
    assert not (tmp_path / "file").exists()


def test_what_stands_in_the_way_stays(variant: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ContainerError, match="exists already"):
        pack(PackOptions(model=str(variant), out=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(VariantError):
        unpack(packed, tmp_path)


def test_a_disk_that_refuses_leaves_nothing(
    variant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        pack(PackOptions(model=str(variant), out=tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []
