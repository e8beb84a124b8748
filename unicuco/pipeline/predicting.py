"""Logits of a folder's model over windows: of the whole model in memory, or block by block.

The two agree; which of them it is depends on the memory that this process may take. A variant of
fewer bits needs memory for all of it in floats still. What this module does not know: what the
logits are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from unicuco.headers import read_header
from unicuco.memory import free_bytes
from unicuco.models import LoadedModel, load_model, read_site, resolve_model, weight_files
from unicuco.models.folder import read_config
from unicuco.shards.profile import load_ghost
from unicuco.shards.streaming import StreamedModel

_WINDOWS_PER_PASS: Final = 2
_FLOAT_BYTES: Final = 4
_PER_WORD: Final = {"I32": 8}  # weights of four bits
_SHARE: Final = 0.8  # of the memory that is free; activations need some too


class Predictor(Protocol):
    """A model that predicts."""

    @property
    def loaded(self) -> LoadedModel:
        """The model; its weights only where it is whole."""

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """Yield ``b x t x v`` float32 logits of ``n x t`` tokens, some windows at a time."""

    def sparsity(self, site_weights: int = 0) -> float:
        """Return the share of site weights that are zero or, of so many in the dense model, gone.

        ``site_weights`` of 0: as many as there are here.
        """


class WholePredictor:
    """A model in memory.

    Args:
        folder: of the model.
    """

    def __init__(self, folder: Path) -> None:
        self.loaded = load_model(folder, fewer_bits=True)

    @torch.no_grad()
    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """Yield the logits of two windows at a time."""
        for batch in windows.split(_WINDOWS_PER_PASS):
            yield self.loaded.model(input_ids=batch, use_cache=False).logits.float()

    def sparsity(self, site_weights: int = 0) -> float:
        """Count the zeros."""
        sites = self.loaded.profile.sites
        zeros = sum(int((read_site(self.loaded.model, site) == 0).sum()) for site in sites)
        return _sparsity(zeros, self.loaded, site_weights)


class BlockwisePredictor:
    """A model of which one block at a time is in memory.

    Args:
        folder: of the model, which stores floats.
    """

    def __init__(self, folder: Path) -> None:
        self.loaded = load_ghost(folder)
        config = self.loaded.model.config.to_json_string()
        self._streamed = StreamedModel(self.loaded.folder, config, self.loaded.profile)
        self._streamed.check_causal()

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """Yield the logits of one window at a time."""
        return (logits[None] for logits in self._streamed.logits(list(windows.split(1))))

    def sparsity(self, site_weights: int = 0) -> float:
        """Count the zeros block by block."""
        return _sparsity(self._streamed.count_zeros(), self.loaded, site_weights)


def _sparsity(zeros: int, loaded: LoadedModel, site_weights: int) -> float:
    here = loaded.profile.num_site_weights
    dense = site_weights or here
    return (zeros + dense - here) / dense


def open_predictors(*names: Path | str) -> list[Predictor]:
    """Open models to be run side by side: as wholes if all of them fit into memory together.

    A variant of fewer bits is taken as a whole even where it does not fit.

    Raises:
        ModelError: one of them is no usable model.
    """
    folders = [resolve_model(str(name)) for name in names]
    fit = sum(map(_whole_bytes, folders)) <= _SHARE * free_bytes()
    return [
        WholePredictor(folder)
        if fit or "quantization_config" in read_config(folder)
        else BlockwisePredictor(folder)
        for folder in folders
    ]


def _whole_bytes(folder: Path) -> int:
    """Return what a model takes: four bytes a weight, and its files, mapped while they are read."""
    headers = [read_header(path) for path in weight_files(folder)]
    stored = sum(
        math.prod(entry.shape) * _PER_WORD.get(entry.dtype, 1)
        for header in headers
        for entry in header.entries
    )
    return _FLOAT_BYTES * stored + sum(header.num_bytes for header in headers)
