"""Cutting the variant that a run answers a request with.

Needs neither transformers nor anything of learning, so that a worker that only cuts starts fast.
"""

from __future__ import annotations

from pathlib import Path

from unicuco.errors import UnicucoError
from unicuco.export import write_variant
from unicuco.pipeline.run import Run
from unicuco.types import Plan, Request


def prune(run: Run, request: Request, out: Path) -> Plan:
    """Cut the variant that a request describes.

    Args:
        run: a finished run.
        request: what is wanted.
        out: the folder to make.

    Raises:
        InfeasibleRequestError: the run can't meet the request.
        RunError: the base model is gone or another one.
        VariantError: something stands at ``out``.
        StorageError: the disk refuses; nothing is left behind.
    """
    (answer,) = run.plan([request])
    if isinstance(answer, UnicucoError):
        raise answer
    write_variant(
        out,
        base=run.base_folder,
        profile=run.profile,
        ranks=run.ranks,
        levels=run.levels,
        units=run.units,
        factors=run.factors,
        space=run.planner.space,
        plan=answer,
        provenance={"run": run.digest, "seed": run.seed},
    )
    return answer
