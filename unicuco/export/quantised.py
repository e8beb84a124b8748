"""Writes a variant of fewer bits: compressed-tensors folders, as vLLM and Transformers load them.

One tensor at a time goes from the base's files to the variant's. Of a site its dropped weights
become zero first; what remains is rounded. 8 bits: ``weight`` (int8) and ``weight_scale``; 4 bits:
``weight_packed``, ``weight_scale`` and ``weight_shape``; everything else is bit-identical. What
this module does not know: how a strategy was found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from unicuco.bits import group_size, pack_words, round_matrix, scale_dtype
from unicuco.errors import ModelError
from unicuco.export.files import (
    read_checked_header,
    without_sparsity_config,
    write_index,
    write_json,
)
from unicuco.export.names import match_sites
from unicuco.export.precision import quantization_config
from unicuco.export.tensors import StoredTensor, write_tensors
from unicuco.headers import TensorEntry
from unicuco.models import weight_files
from unicuco.models.folder import read_config
from unicuco.models.index import SINGLE
from unicuco.tensors import FLOATS, map_tensors
from unicuco.types import ModelProfile, Site

_WORDS: Final = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write_quantised(
    stage: Path,
    folder: Path,
    profile: ModelProfile,
    bits: Mapping[str, int],
    cut: Callable[[Site, Tensor], None],
    uppers: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Write weights and ``config.json`` into ``stage`` and return file name -> sha256.

    Args:
        stage: the folder to write into.
        folder: the base model's.
        profile: of the base.
        bits: site path to 16, 8 or 4.
        cut: sets the dropped weights of a site's ``o x i`` matrix to zero, in place.
        uppers: site path to the factor that `round_matrix` takes, for GPTQ; none: to the nearest.

    Raises:
        ModelError: the base can't be read, or its tensors can't be told apart.
    """
    headers = [read_checked_header(path) for path in weight_files(folder)]
    entries = {entry.name: entry for header in headers for entry in header.entries}
    names = match_sites(profile, {name: entry.shape for name, entry in entries.items()})
    if names is None:
        raise ModelError(
            f"{folder} names its tensors in a way that matrices can't be told apart by; "
            "load it with transformers and save it again, or ask for masks"
        )
    sites = {names[site.path]: site for site in profile.sites}
    for name in sites:
        if entries[name].dtype not in FLOATS:
            raise ModelError(f"{folder} stores {name} as {entries[name].dtype}, which can't be cut")
    files: dict[str, str] = {}
    places: dict[str, str] = {}
    total = 0
    for header in headers:
        _, mapped = map_tensors(header.path)
        tensors: list[StoredTensor] = []
        for entry in header.entries:
            read = mapped[entry.name].clone
            site = sites.get(entry.name)
            if site is None:
                tensors.append(StoredTensor(entry.name, entry.dtype, entry.shape, read))
            else:
                upper = None if uppers is None else uppers[site.path]
                matrix = _Matrix(entry, site, bits[site.path], read, cut, upper)
                tensors += matrix.tensors()
        name = header.path.name
        files[name], num_bytes = write_tensors(stage / name, tensors)
        total += num_bytes
        places |= dict.fromkeys((tensor.name for tensor in tensors), name)
    modules = {
        name.removesuffix(".weight"): (site, bits[site.path]) for name, site in sites.items()
    }
    config = json.loads(without_sparsity_config(json.dumps(read_config(folder)).encode()))
    if any(own < 16 for _, own in modules.values()):
        config["quantization_config"] = quantization_config(modules, entries)
    files |= write_json(stage / "config.json", config)
    if SINGLE not in files:
        files |= write_index(stage, places, total)
    return files


class _Matrix:
    """What one site's stored matrix becomes; made when it is written, and let go with the last."""

    def __init__(
        self,
        entry: TensorEntry,
        site: Site,
        bits: int,
        read: Callable[[], Tensor],
        cut: Callable[[Site, Tensor], None],
        upper: Tensor | None,
    ) -> None:
        self._entry = entry
        self._site = site
        self._bits = bits
        self._read = read
        self._cut = cut
        self._upper = upper
        self._codes: Tensor | None = None

    def tensors(self) -> list[StoredTensor]:
        """Return what is stored in the matrix' place, in order."""
        site, name = self._site, self._entry.name
        if self._bits == 16:
            return [StoredTensor(name, self._entry.dtype, self._entry.shape, self._masked)]
        word = _WORDS[scale_dtype(site)]
        front = name.removesuffix("weight")
        shape = (site.num_rows, site.num_columns)
        if self._bits == 8:
            scales = StoredTensor(f"{front}weight_scale", word, (shape[0], 1), self._scales)
            return [scales, StoredTensor(name, "I8", shape, self._taken)]
        groups = shape[1] // group_size(shape[1])
        words = (shape[0], -(-shape[1] // 8))
        return [
            StoredTensor(f"{front}weight_scale", word, (shape[0], groups), self._scales),
            StoredTensor(f"{front}weight_packed", "I32", words, lambda: pack_words(self._taken())),
            StoredTensor(f"{front}weight_shape", "I64", (2,), lambda: torch.tensor(shape)),
        ]

    def _masked(self) -> Tensor:
        stored = self._read()
        self._cut(self._site, stored.T if self._site.transposed else stored)
        return stored

    def _scales(self) -> Tensor:
        """Round, and return the scales; the codes wait for `_taken`."""
        rounded = round_matrix(
            self._masked(), self._bits, scale_dtype(self._site), upper=self._upper
        )
        self._codes = rounded.codes
        return rounded.scales

    def _taken(self) -> Tensor:
        codes, self._codes = self._codes, None
        assert codes is not None, "scales are written first"
        return codes
