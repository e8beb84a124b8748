"""`LevelBuilder`: makes the levels of a model's blocks on one private copy of the model.

Model and calibration text may be read-only arrays shared by all builders of a node; the database is
a folder that all of them reach, the run folder's own. A block is a unit of work, for one pass over
the text gives the Hessians of all its sites.

What it does not know: who builds which block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from unicuco.calibration import TokenSet
from unicuco.evaluate.arrays import Arrays, pack_model, state_of, unpack, working_copy
from unicuco.levels import LevelPlan
from unicuco.models import LoadedModel
from unicuco.pruners import build_levels
from unicuco.types import ModelProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelConfig:
    """What a builder needs besides its arrays; small, and the same on every node.

    ``model_config`` is the model's configuration as JSON; ``folder`` the database's; ``dtype`` the
    type that levels are stored as, e.g. "bfloat16"; ``threads`` are torch threads (0: leave as they
    are).
    """

    model_config: str
    profile: ModelProfile
    folder: str
    plan: LevelPlan
    dtype: str
    threads: int = 0


class LevelBuilder:
    """Builds levels, block by block.

    Args:
        config: the builder's configuration.
        arrays: as `pack_calibration` names them.
    """

    def __init__(self, config: LevelConfig, arrays: Arrays) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        tensors = unpack(arrays)
        self._tokens = TokenSet.from_ids(tensors["calibration/ids"])
        model = working_copy(config.model_config, state_of(tensors))
        self._loaded = LoadedModel(model=model, profile=config.profile, folder=Path())

    @classmethod
    def from_arrays(cls, config: LevelConfig, arrays: Arrays) -> LevelBuilder:
        """Build a builder: the constructor under the name that every backend uses."""
        return cls(config, arrays)

    def build(self, block: int) -> None:
        """Build the levels of a block's sites that are not there yet.

        Raises:
            ModelError: a site's inputs are NaN or infinite.
            RunError: the folder holds another database.
            StorageError: the disk refused.
        """
        config = self.config
        build_levels(
            self._loaded,
            self._tokens,
            Path(config.folder),
            config.plan,
            sites=[site for site in config.profile.sites if site.block == block],
            dtype=getattr(torch, config.dtype),
        )


def pack_calibration(
    state: dict[str, torch.Tensor], tokens: TokenSet
) -> dict[str, NDArray[np.generic]]:
    """Name a model's tensors and its calibration text as the arrays of a builder."""
    return {**pack_model(state, {}, {}), "calibration/ids": tokens.ids.numpy()}
