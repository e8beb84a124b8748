"""A base model with all that a cut needs: random ranks, a strategy at a sparsity, its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from unicuco.dimensions import build_space
from unicuco.export import CheckpointRef, write_variant
from unicuco.models import load_model
from unicuco.ranks import RankStore, rank_rows
from unicuco.rows import RowRule
from unicuco.space import StrategySpace
from unicuco.testing.cases import EvaluationCase
from unicuco.types import ModelProfile, Plan, Prediction, Request, Strategy, Target

PROVENANCE: Final[Mapping[str, object]] = {"run": "0" * 64, "seed": 7}


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantCase:
    """Everything that `write_variant` takes, for one base folder."""

    folder: Path
    profile: ModelProfile
    ranks: RankStore
    space: StrategySpace
    plan: Plan

    @property
    def drops(self) -> dict[str, int]:
        """Site path -> weights that the plan sets to zero."""
        return self.space.cost.site_drops(self.plan.strategy.values)

    def write(
        self,
        out: Path,
        *,
        base: Path | None = None,
        plan: Plan | None = None,
        rows: RowRule | None = None,
        overwrite: bool = False,
    ) -> CheckpointRef:
        """Write the variant, of another base folder or plan if given."""
        return write_variant(
            out,
            base=base or self.folder,
            profile=self.profile,
            ranks=self.ranks,
            space=self.space,
            plan=plan or self.plan,
            provenance=PROVENANCE,
            rows=rows,
            overwrite=overwrite,
        )


def make_variant_case(
    folder: Path, *, dtype: torch.dtype = torch.float32, sparsity: float = 0.6
) -> VariantCase:
    """Make a case with random ranks and a random strategy of exactly this sparsity; seeded.

    Args:
        folder: of the base model.
        dtype: in which it is loaded to be profiled.
        sparsity: over sites.
    """
    profile = load_model(folder, dtype=dtype).profile
    generator = torch.Generator().manual_seed(3)
    ranks = {
        site.path: rank_rows(torch.rand(site.num_rows, site.num_columns, generator=generator))
        for site in profile.sites
    }
    space = build_space(profile)
    unit = torch.rand(1, space.num_axes, generator=generator) * 0.5 + 0.25
    strategy = space.decode_exact(unit, [space.kept_for_sparsity(sparsity)])[0]
    return VariantCase(
        folder=folder,
        profile=profile,
        ranks=RankStore(metric="magnitude", ranks=ranks),
        space=space,
        plan=make_plan(profile, space, strategy),
    )


def make_plan(profile: ModelProfile, space: StrategySpace, strategy: Strategy) -> Plan:
    """Return the plan of a strategy, with its exact sizes and an invented prediction."""
    dropped = sum(space.cost.site_drops(strategy.values).values())
    sparsity = dropped / profile.num_site_weights
    return Plan(
        request=Request(target=Target.SPARSITY, value=min(sparsity, 0.99)),
        strategy=strategy,
        sparsity=sparsity,
        kept_params=space.cost.kept_params(strategy.values),
        total_params=profile.total_params,
        num_bytes=space.cost.num_bytes(strategy.values),
        served_as=space.cost.served_as,
        kl=Prediction(mean=0.1, lo95=0.05, hi95=0.2),
    )


def write_shrunk_case(
    case: EvaluationCase, settings: Mapping[str, float], out: Path, *, folder: Path | None = None
) -> Strategy:
    """Write the variant of some settings, all others at nothing, and return its strategy.

    Args:
        case: prepared with the dimensions.
        settings: axis name -> value.
        out: the variant's folder.
        folder: of the base, where it is not the case's own.
    """
    names = case.space.names
    assert settings.keys() <= set(names), "settings are of the case's axes"
    strategy = Strategy(settings=tuple((name, settings.get(name, 0.0)) for name in names))
    write_variant(
        out,
        base=folder or case.loaded.folder,
        profile=case.loaded.profile,
        ranks=RankStore(metric="wanda", ranks=case.ranks),
        space=case.space,
        plan=make_plan(case.loaded.profile, case.space, strategy),
        provenance=PROVENANCE,
        units=case.units,
    )
    return strategy
