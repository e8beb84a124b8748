"""Acceptance of the pruners: magnitude, Wanda, SparseGPT, n:m, and the level database."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Finding
from unicuco.importance.hessian import collect_hessians
from unicuco.importance.sparsegpt import (
    InverseFactor,
    n_of_m_dropped,
    prune_n_of_m,
    prune_with_update,
)
from unicuco.levels import default_step
from unicuco.models import read_site
from unicuco.pruners import LevelPruner, build_levels, sparsegpt_plan
from unicuco.ranks import cut, keep_mask, rank_rows
from unicuco.testing.cases import EvaluationCase
from unicuco.testing.planted import planted_case

_SPARSITY = 0.5


def findings() -> list[Finding]:
    """Measure on the planted model's activations."""
    case = planted_case()
    return [*_errors(case), *_exactness(case), *_levels(case)]


def _errors(case: EvaluationCase) -> list[Finding]:
    evidence = case.context.require_evidence("acceptance")
    to_wanda, to_magnitude = [], []
    hessians = collect_hessians(case.loaded, case.loaded.profile.sites, case.calibration)
    for site in case.loaded.profile.sites:
        weight, h = read_site(case.loaded.model, site), hessians[site.path].double()
        count = round(_SPARSITY * site.num_weights)

        def error(pruned: Tensor, weight: Tensor = weight, h: Tensor = h) -> float:
            change = (pruned - weight).double()
            return float(((change @ h) * change).sum())

        updated = error(prune_with_update(weight, InverseFactor.of(hessians[site.path]), count))
        wanda = error(cut(weight, rank_rows(evidence.scores(site)), count))
        magnitude = error(cut(weight, rank_rows(evidence.scores(site, "magnitude")), count))
        to_wanda.append(updated / wanda)
        to_magnitude.append(wanda / magnitude)
    test = "output error on calibration activations at 0.5, relative to"
    return [
        Finding("sparsegpt", f"{test} Wanda's: worst site", max(to_wanda), "<= 1"),
        Finding("wanda", f"{test} magnitude's: mean of sites", _mean(to_magnitude), "<= 1"),
    ]


def _exactness(case: EvaluationCase) -> list[Finding]:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    white = InverseFactor.of(torch.eye(128))
    pruned = prune_with_update(weight, white, weight.numel() // 2)
    smallest = weight.abs().flatten().argsort(stable=True)[: weight.numel() // 2]
    expected = weight.clone().flatten()
    expected[smallest] = 0
    site = case.loaded.profile.sites[3]
    factor = InverseFactor.of(collect_hessians(case.loaded, [site], case.calibration)[site.path])
    own = read_site(case.loaded.model, site)
    scores = case.context.require_evidence("acceptance").scores(site)
    illegal = 0
    for n, m in ((2, 4), (4, 8)):
        for zeros in (prune_n_of_m(own, factor, n, m) == 0, n_of_m_dropped(scores, n, m)):
            illegal += int((zeros.unflatten(1, (-1, m)).sum(2) != m - n).sum())
    rank = rank_rows(scores)
    off_rows = 0
    for count in range(0, rank.numel(), 97):
        per_row = (~keep_mask(rank, count)).sum(1)
        off_rows += abs(int(per_row.sum()) - count) + int(per_row.max() - per_row.min() > 1)
    identity = float((prune_with_update(own, factor, 0) - own).abs().max())
    return [
        Finding(
            "sparsegpt",
            "white inputs, one block: difference to magnitude without update",
            float((pruned - expected.view_as(weight)).abs().max()),
            "<= 1e-6",
        ),
        Finding("sparsegpt", "difference to the dense weights at sparsity 0", identity, "== 0"),
        Finding("wanda, sparsegpt", "illegal groups at 2:4 and 4:8", float(illegal), "== 0"),
        Finding("wanda", "row counts off by more than one weight", float(off_rows), "== 0"),
    ]


def _levels(case: EvaluationCase) -> list[Finding]:
    plan = sparsegpt_plan(case.loaded, case.calibration, default_step(case.loaded.profile, 6))
    with tempfile.TemporaryDirectory() as folder:
        database = build_levels(case.loaded, case.calibration, Path(folder) / "levels", plan)
        files = list(database.folder.glob("objects/*/*"))
        found = sum(path.stat().st_size for path in files)
        weights = {s.path: read_site(case.loaded.model, s) for s in case.loaded.profile.sites}
        pruner = LevelPruner(database, weights)
        off = 0
        for site in case.loaded.profile.sites:
            for count in range(0, site.num_weights, 311):
                off += abs(int((pruner.materialise(site, count) == 0).sum()) - count)
    said = plan.num_bytes(case.loaded.profile, torch.float32)
    return [
        Finding("level database", "size on disk over the size said before", found / said, "<= 1.1"),
        Finding("level database", "weights off any asked count", float(off), "== 0"),
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
