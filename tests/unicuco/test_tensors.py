from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unicuco.headers import read_header, read_metadata
from unicuco.tensors import TYPES, map_tensors, named_under


def one_of_each_type() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (6, 8), generator=generator, dtype=torch.uint8)
    return {
        **{word: bits.to(dtype).view(dtype) for word, dtype in TYPES.items()},
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }


def test_what_is_mapped_is_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved = one_of_each_type()
    save_file(saved, path, metadata={"by": "whom"})
    header, mapped = map_tensors(path)
    assert header == read_header(path)
    assert read_metadata(header) == {"by": "whom"}
    assert mapped.keys() == saved.keys()
    for name, expected in saved.items():
        assert (mapped[name].dtype, mapped[name].shape) == (expected.dtype, expected.shape)
        assert mapped[name].float().equal(expected.float())


def test_a_mapped_file_takes_no_memory_and_may_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"ones": torch.ones(2**24)}, path)
    process = psutil.Process()
    before = process.memory_info().data
    _, mapped = map_tensors(path)
    path.unlink()
    assert float(mapped["ones"].sum()) == 2**24
    assert process.memory_info().data - before < 2**25, "half of the file's size"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(2, 4)}, path)
    whole = path.read_bytes()
    for wrong, complaint in ((b"[2,5]", "do not fit"), (b"[2,3]", "do not fit")):
        path.write_bytes(whole.replace(b"[2,4]", wrong))
        with pytest.raises(ValueError, match=complaint):
            map_tensors(path)
    path.write_bytes(whole.replace(b"F32", b"X32"))
    with pytest.raises(ValueError, match="unknown type X32"):
        map_tensors(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="cut short"):
        map_tensors(path)


def test_named_tensors_are_found_by_how_their_names_begin() -> None:
    tensors = {name: torch.tensor(k) for k, name in enumerate(("a/b/c", "a/d", "b/c"))}
    assert named_under("a/", tensors) == {"b/c": tensors["a/b/c"], "d": tensors["a/d"]}
