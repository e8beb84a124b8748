"""The level database of a run: its plan and size, said beforehand, and the building of it.

It lies in the run folder as ``levels/``. Its blocks are built by whatever the backend has, and a
build that was stopped anywhere goes on with the blocks that are missing. Levels are stored in the
type that the model's files have, so that what learning judges is what a variant holds.

Every process that builds or judges reads the folder itself: on a cluster of several nodes it must
lie where all of them reach it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unicuco.calibration import TokenSet
from unicuco.errors import StorageError
from unicuco.evaluate.level_builder import LevelConfig, pack_calibration
from unicuco.levels import FOLDER, LevelDatabase, LevelPlan, default_step
from unicuco.models import LoadedModel, weight_files
from unicuco.models.stored import stored_dtype
from unicuco.pipeline.options import ProgressSink
from unicuco.pruners import LEVEL_PRUNERS
from unicuco.search.drive import Progress
from unicuco.store import Measurement
from unicuco.types import ModelProfile

if TYPE_CHECKING:
    from unicuco.pipeline.backend import Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """Which levels a run has, and where."""

    folder: Path
    plan: LevelPlan
    dtype: torch.dtype
    profile: ModelProfile

    @property
    def num_bytes(self) -> int:
        """About how much of the disk all of them take."""
        return self.plan.num_bytes(self.profile, self.dtype)

    def missing_blocks(self) -> list[int]:
        """Return the blocks of which a site is missing.

        Raises:
            RunError: the folder holds another database.
        """
        if not self.folder.exists():
            return list(range(self.profile.num_blocks))
        missing = LevelDatabase(self.folder, self.plan).missing(self.profile)
        return sorted({site.block for site in missing})

    def check_room(self) -> None:
        """Refuse to begin where the disk hasn't room for what is missing.

        Raises:
            RunError: the folder holds another database.
            StorageError: too little room.
        """
        blocks = set(self.missing_blocks())
        sites = [site for site in self.profile.sites if site.block in blocks]
        needed = self.plan.num_bytes_of(sites, self.dtype)
        free = shutil.disk_usage(self.folder.parent).free
        if needed > free:
            raise StorageError(
                f"the levels need {megabytes(needed)} and the disk of {self.folder.parent} has "
                f"{megabytes(free)} free; free some space or choose another folder"
            )


def plan_levels(pruner: str, loaded: LoadedModel, tokens: TokenSet, run: Path) -> Levels | None:
    """Return the levels that a pruner needs; none where the drop order is all it needs."""
    if pruner not in LEVEL_PRUNERS:
        return None
    dtype = stored_dtype(weight_files(loaded.folder))
    plan = LEVEL_PRUNERS[pruner](loaded, tokens, default_step(loaded.profile), dtype=dtype)
    return Levels(folder=run / FOLDER, plan=plan, dtype=dtype, profile=loaded.profile)


def announce(levels: Levels, progress: ProgressSink) -> None:
    """Say how much of the disk the levels take, before any that is missing is built."""
    total = levels.profile.num_blocks
    done = total - len(levels.missing_blocks())
    detail = f"{megabytes(levels.num_bytes)} on disk"
    progress(Progress(stage="levels", done=done, total=total, detail=detail, announce=done < total))


def build(
    levels: Levels,
    model_config: str,
    state: dict[str, Tensor],
    calibration: TokenSet,
    search_tokens: int,
    *,
    backend: Backend,
    progress: ProgressSink,
    record: Callable[[Measurement], None],
) -> None:
    """Build the blocks that are missing on an entered backend.

    Args:
        levels: of the run.
        model_config: the model's configuration as JSON.
        state: the model's tensors.
        calibration: the text.
        search_tokens: of the search text: what units are counted in.
        backend: entered.
        progress: told after every block.
        record: told what every block cost: a pass over the calibration text.

    Raises:
        ModelError: a site's inputs are NaN or infinite.
        StorageError: the disk refused; what is finished stays and is not made again.
        ClusterError: actors can't be started, or die of it.
    """
    blocks, total = levels.missing_blocks(), levels.profile.num_blocks
    if not blocks:
        return
    began = time.perf_counter()
    LevelDatabase(levels.folder, levels.plan).sweep()
    finished: list[int] = []

    def on_done(block: int) -> None:
        finished.append(block)
        record(
            Measurement(
                purpose=f"levels of block {block}",
                tokens=calibration.num_tokens,
                cost_units=calibration.num_tokens / search_tokens,
                seconds=(time.perf_counter() - began) / len(finished),
                text_digest=calibration.digest,
            )
        )
        progress(
            Progress(
                stage="levels",
                done=total - len(blocks) + len(finished),
                total=total,
                detail=f"{megabytes(levels.num_bytes)} on disk",
            )
        )

    config = LevelConfig(
        model_config=model_config,
        profile=levels.profile,
        folder=str(levels.folder.resolve()),
        plan=levels.plan,
        dtype=str(levels.dtype).removeprefix("torch."),
    )
    backend.build_levels(config, pack_calibration(state, calibration), blocks, on_done)


def megabytes(num_bytes: int) -> str:
    """Return bytes as people read them."""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 1e10 else f"{num_bytes / 1e9:,.1f} GB"
