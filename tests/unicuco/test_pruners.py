from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unicuco.errors import RunError, StorageError
from unicuco.evaluate import LocalEvaluator
from unicuco.importance.hessian import collect_hessians
from unicuco.importance.sparsegpt import InverseFactor, prune_with_update
from unicuco.levels import LevelDatabase, LevelPlan, default_step
from unicuco.models import read_site
from unicuco.pruners import LevelPruner, Pruner, RankPruner, build_levels, sparsegpt_plan
from unicuco.ranks import keep_mask
from unicuco.rows import RowRule
from unicuco.testing.cases import EvaluationCase
from unicuco.testing.pruner import PrunerContract
from unicuco.types import Site


def _weights(case: EvaluationCase) -> dict[str, Tensor]:
    return {site.path: read_site(case.loaded.model, site) for site in case.loaded.profile.sites}


def _plan(case: EvaluationCase) -> LevelPlan:
    step = default_step(case.loaded.profile, levels=6)
    return sparsegpt_plan(case.loaded, case.calibration, step)


@pytest.fixture(scope="module")
def database(case: EvaluationCase, tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    folder = tmp_path_factory.mktemp("levels") / "db"
    return build_levels(case.loaded, case.calibration, folder, _plan(case))


def test_levels_of_all_sites_are_equally_many_weights_apart(case: EvaluationCase) -> None:
    plan = _plan(case)
    for site in case.loaded.profile.sites:
        counts = plan.counts(site)
        assert counts
        steps = {b - a for a, b in zip((0, *counts), counts, strict=False)}
        assert steps == {plan.step}
        assert counts[-1] <= 0.98 * site.num_weights < counts[-1] + plan.step


def test_its_size_is_known_beforehand(case: EvaluationCase, database: LevelDatabase) -> None:
    files = list(database.folder.glob("objects/*/*.safetensors"))
    said = database.plan.num_bytes(case.loaded.profile, torch.float32)
    assert sum(path.stat().st_size for path in files) == pytest.approx(said, rel=0.2)
    large = LevelPlan(model_digest="", data_digest="", method="", step=1 << 20)
    assert large.num_bytes(case.loaded.profile, torch.float32) == 0


def test_a_level_is_what_sparsegpt_makes_of_the_dense_model(
    case: EvaluationCase, database: LevelDatabase
) -> None:
    site = case.loaded.profile.sites[5]
    hessian = collect_hessians(case.loaded, [site], case.calibration)[site.path]
    factor = InverseFactor.of(hessian)
    for count in database.plan.counts(site):
        expected = prune_with_update(read_site(case.loaded.model, site), factor, count)
        assert torch.equal(database.read(site, count), expected)


class TestRankPruner(PrunerContract):
    @pytest.fixture
    def pruner(self, case: EvaluationCase) -> Pruner:
        return RankPruner(_weights(case), case.ranks)


class TestLevelPruner(PrunerContract):
    @pytest.fixture
    def pruner(self, case: EvaluationCase, database: LevelDatabase) -> Pruner:
        return LevelPruner(database, _weights(case))


def test_between_two_levels_the_lower_one_loses_its_smallest_weights(
    case: EvaluationCase, database: LevelDatabase
) -> None:
    site, step = case.loaded.profile.sites[5], database.plan.step
    level = database.read(site, 2 * step)
    between = LevelPruner(database, _weights(case)).materialise(site, 2 * step + 5)
    changed = level[(between != level)]
    kept = level[(between == level) & (level != 0)]
    assert len(changed) == 5
    assert float(changed.abs().max()) <= float(kept.abs().min())


def test_the_rank_pruner_follows_a_row_rule(case: EvaluationCase) -> None:
    weights = _weights(case)
    site = case.loaded.profile.sites[2]
    counts = torch.arange(site.num_rows) % site.num_columns
    rule = RowRule.from_counts({site.path: counts})
    pruned = RankPruner(weights, case.ranks, rule).materialise(site, int(counts.sum()))
    mask = keep_mask(case.ranks[site.path], int(counts.sum()), rule.of(site.path))
    assert torch.equal(pruned, torch.where(mask, weights[site.path], 0.0))
    assert torch.equal((pruned == 0).sum(1), counts)


def test_a_stopped_build_goes_on_without_making_anything_twice(
    case: EvaluationCase, database: LevelDatabase, tmp_path: Path
) -> None:
    folder, sites = tmp_path / "db", case.loaded.profile.sites
    done: list[int] = []
    build_levels(case.loaded, case.calibration, folder, _plan(case), sites=sites[:3])
    half = LevelDatabase(folder)
    assert half.missing(case.loaded.profile) == list(sites[3:])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    build_levels(
        case.loaded,
        case.calibration,
        folder,
        _plan(case),
        progress=lambda now, total: done.append(now),
    )
    assert done == list(range(4, len(sites) + 1))
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    names = {path.name for path in folder.rglob("*.safetensors")}
    assert names == {path.name for path in database.folder.rglob("*.safetensors")}
    assert not list(folder.rglob("*.tmp"))


def test_a_site_that_fails_on_the_way_is_missing_and_leaves_no_site_file(
    case: EvaluationCase, tmp_path: Path
) -> None:
    database = LevelDatabase(tmp_path / "db", _plan(case))
    site = case.loaded.profile.sites[0]
    weight = read_site(case.loaded.model, site)

    def breaks(count: int) -> Tensor:
        if count > database.plan.step:
            raise StorageError("the disk is full")
        return torch.zeros_like(weight)

    with pytest.raises(StorageError, match="disk is full"):
        database.build_site(site, breaks)
    assert not database.has_site(site)
    with pytest.raises(RunError, match=r"lacks the levels of .*; build them first"):
        database.read(site, database.plan.step)
    with pytest.raises(ValueError, match="drops too few weights"):
        database.build_site(site, lambda count: weight)
    with pytest.raises(ValueError, match="has shape"):
        database.build_site(site, lambda count: weight[:1])


def test_another_model_or_step_is_refused_and_altered_levels_are_noticed(
    case: EvaluationCase, database: LevelDatabase, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="another model, text or step"):
        LevelDatabase(database.folder, replace(database.plan, model_digest="1" * 64))
    with pytest.raises(RunError, match="holds no levels"):
        LevelDatabase(tmp_path)
    site = case.loaded.profile.sites[0]
    own = LevelDatabase(tmp_path / "db", _plan(case))
    zero = torch.zeros(site.num_rows, site.num_columns)
    own.build_site(site, lambda count: zero)
    (path,) = own.folder.rglob("*.safetensors")  # equal matrices are stored once
    assert torch.equal(own.read(site, own.plan.step), zero)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="was altered"):
        own.read(site, own.plan.step)
    path.unlink()
    with pytest.raises(RunError, match="can't be read"):
        own.read(site, own.plan.step)
    with pytest.raises(RunError, match="holds no level of"):
        own.read(site, 1)


def test_a_full_disk_is_one_clear_error(case: EvaluationCase, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(StorageError, match="can't be written"):
        LevelDatabase(blocker / "db", _plan(case))


# --- judging ------------------------------------------------------------------------------------


def _slow_output_error(case: EvaluationCase, site: Site, matrix: Tensor) -> float:
    hessian = collect_hessians(case.loaded, [site], case.calibration)[site.path].double()
    change = (matrix - read_site(case.loaded.model, site)).double()
    return float(((change @ hessian) * change).sum())


def test_levels_lose_less_on_calibration_activations_than_wanda(
    case: EvaluationCase, database: LevelDatabase
) -> None:
    weights = _weights(case)
    ranked, levelled = RankPruner(weights, case.ranks), LevelPruner(database, weights)
    for site in case.loaded.profile.sites:
        for count in database.plan.counts(site):
            if count <= 0.7 * site.num_weights:
                assert _slow_output_error(
                    case, site, levelled.materialise(site, count)
                ) < _slow_output_error(case, site, ranked.materialise(site, count))


def test_an_evaluator_judges_levels(case: EvaluationCase, database: LevelDatabase) -> None:
    config = replace(case.config, levels=str(database.folder))
    evaluator = LocalEvaluator(config, case.arrays)
    strategy = case.space.uniform(0.5)
    found = evaluator.evaluate(strategy)
    plain = case.evaluator()
    # The same judge, the matrices put in by hand.
    weights = _weights(case)
    pruner = LevelPruner(database, weights)
    drops = case.space.cost.site_drops(strategy.values)
    arrays = dict(case.arrays)
    for site in case.loaded.profile.sites:
        matrix = pruner.materialise(site, drops[site.path])
        arrays[f"state/{site.path}.weight"] = matrix.numpy()
    by_hand = LocalEvaluator(case.config, arrays).evaluate(case.space.uniform(0.0))
    assert found.kl == pytest.approx(by_hand.kl, rel=1e-6)
    assert found.kept_fraction == plain.evaluate(strategy).kept_fraction
    assert evaluator.evaluate(case.space.uniform(0.0)).kl == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="no derivatives"):
        evaluator.evaluate(strategy, derivatives=True)
    with pytest.raises(ValueError, match="row rule can't spread"):
        evaluator.evaluate(strategy, rows=RowRule({}))


def test_levels_are_stored_in_the_type_asked_for_and_read_memory_mapped(
    case: EvaluationCase, tmp_path: Path
) -> None:
    plan = replace(_plan(case), method="half")
    sites = case.loaded.profile.sites
    own = build_levels(
        case.loaded, case.calibration, tmp_path / "db", plan, sites=sites[:1], dtype=torch.bfloat16
    )
    first = own.read(sites[0], plan.step)
    assert first.dtype == torch.bfloat16
    assert str(tmp_path / "db") in Path("/proc/self/maps").read_text()
    assert torch.equal(own.read(sites[0], plan.step), first)
    with pytest.raises(RunError, match="lacks the levels"):
        own.digest(case.loaded.profile)
