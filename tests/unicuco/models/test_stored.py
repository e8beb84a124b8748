from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unicuco.models import load_model
from unicuco.testing import FAMILIES, tiny_model_folder


def bytes_in_file(path: Path) -> int:
    """Return the tensor bytes of a safetensors file, read off its header alone."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_file_whatever_type_is_loaded(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    folder = tiny_model_folder(tmp_path / "model", family, tied=True, dtype=dtype)
    profile = load_model(folder).profile
    assert profile.total_bytes == bytes_in_file(folder / "model.safetensors")
    outside = profile.total_params - sum(profile.block_params)
    assert profile.total_bytes - sum(profile.block_bytes) == outside * dtype.itemsize


def test_mixed_types_are_counted_tensor_by_tensor(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model", tied=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    halved = "model.layers.1.mlp.up_proj.weight"
    tensors[halved] = tensors[halved].to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    profile = load_model(folder).profile
    assert profile.total_bytes == bytes_in_file(path)
    assert profile.block_bytes[0] - profile.block_bytes[1] == 2 * tensors[halved].numel()
