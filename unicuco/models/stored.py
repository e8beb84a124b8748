"""How many bytes a model's tensors take in its files, whatever type they were loaded as.

What it does not know: shapes and sites; the parameters are counted where the model was profiled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from unicuco.headers import read_header
from unicuco.models.parts import count_parts
from unicuco.tensors import FLOATS, TYPES
from unicuco.types import ModelProfile


def stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """Return the floating-point type that most tensors of some files have; float32 if none has.

    Args:
        files: safetensors files of a model.
    """
    kinds = Counter(kind for kind in _stored_types(files).values() if kind in FLOATS)
    return FLOATS[kinds.most_common(1)[0][0]] if kinds else torch.float32


def with_stored_bytes(
    profile: ModelProfile, model: nn.Module, files: Sequence[Path]
) -> ModelProfile:
    """Return the profile with bytes as the files store them, tied tensors once.

    Args:
        profile: of ``model``, its bytes counted in memory.
        model: as loaded, in any type.
        files: the safetensors files that it was loaded from.
    """
    types = _stored_types(files)
    blocks = [0] * profile.num_blocks
    total = 0
    items: dict[str, int] = {}
    for name, parameter in model.named_parameters():  # tied ones once
        items[name] = _item_bytes(name, parameter, types)
        num_bytes = parameter.numel() * items[name]
        total += num_bytes
        for block, path in enumerate(profile.block_paths):
            if name.startswith(f"{path}."):
                blocks[block] += num_bytes
    return replace(
        profile,
        sites=tuple(
            replace(site, item_bytes=items.get(f"{site.path}.weight", site.item_bytes))
            for site in profile.sites
        ),
        total_bytes=total,
        block_bytes=tuple(blocks),
        parts=count_parts(profile.parts, profile.sites, model, items),
    )


def _stored_types(files: Sequence[Path]) -> dict[str, str]:
    types: dict[str, str] = {}
    for path in files:
        types |= {entry.name: entry.dtype for entry in read_header(path).entries}
    return types


def _item_bytes(name: str, parameter: torch.Tensor, types: Mapping[str, str]) -> int:
    """Return the bytes of one stored weight of a parameter.

    Names in files and in memory may differ in front; where the tail does not settle it, the type
    that most tensors have does.
    """
    found = {types[name]} if name in types else _by_tail(name, types)
    kind = found.pop() if len(found) == 1 else Counter(types.values()).most_common(1)[0][0]
    dtype = TYPES.get(kind, parameter.dtype)
    return (dtype if dtype.is_floating_point else parameter.dtype).itemsize


def _by_tail(name: str, types: Mapping[str, str]) -> set[str]:
    parts = name.split(".")
    for first in range(1, len(parts)):
        tail = ".".join(parts[first:])
        found = {kind for stored, kind in types.items() if f".{stored}".endswith(f".{tail}")}
        if found:
            return found
    return set()
