"""What learning needs of spaces with shapes or bits before it measures anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unicuco.dimensions import Granularity, any_narrows, build_space
from unicuco.export.shrunk import ShrinkPlan
from unicuco.importance.hessian import FACTORS
from unicuco.importance.units import UNITS, UnitStore
from unicuco.pipeline.files import load_tensors, save_tensors
from unicuco.pipeline.options import LearnOptions, ProgressSink
from unicuco.search.drive import Progress
from unicuco.types import ServedAs

if TYPE_CHECKING:
    from unicuco.models import LoadedModel


def check_shapes(options: LearnOptions, loaded: LoadedModel) -> None:
    """Refuse to learn what could not be written.

    Raises:
        RequestError: the model's structure lacks what a dimension is of.
        VariantError: no configuration of this family describes such variants.
    """
    profile = loaded.profile
    space = build_space(profile, options.dimensions, Granularity(options.granularity))
    if space.cost.served_as is ServedAs.SHRINK:
        fewest, _ = space.kept_range()  # the smallest has all that can occur
        (smallest,) = space.decode_exact(torch.ones(1, space.num_axes), [fewest])
        ShrinkPlan.of(profile, space, smallest, loaded.folder)


def units_of(
    options: LearnOptions, folder: Path, build: Callable[[], UnitStore], progress: ProgressSink
) -> UnitStore | None:
    """Build, or read back, the order of every part's units; none where parts are not narrowed.

    Args:
        options: of the run.
        folder: the run folder, which exists.
        build: makes them; counted by the caller.
        progress: told of the stage.
    """
    if not any_narrows(options.dimensions):
        return None
    path = folder / UNITS
    if options.resume and path.is_file():
        return UnitStore.from_tensors(load_tensors(path))
    progress(Progress(stage="units", done=0, total=1))
    units = build()
    save_tensors(path, units.tensors())
    progress(Progress(stage="units", done=1, total=1))
    return units


def factors_of(
    options: LearnOptions,
    folder: Path,
    build: Callable[[], dict[str, Tensor]],
    progress: ProgressSink,
) -> dict[str, Tensor] | None:
    """Build, or read back, what GPTQ rounds by; none where rounding is to the nearest.

    Args:
        options: of the run.
        folder: the run folder, which exists.
        build: makes them; counted by the caller.
        progress: told of the stage.
    """
    if options.rounding == "nearest":
        return None
    path = folder / FACTORS
    if options.resume and path.is_file():
        return load_tensors(path)
    progress(Progress(stage="factors", done=0, total=1))
    factors = build()
    save_tensors(path, factors)
    progress(Progress(stage="factors", done=1, total=1))
    return factors
