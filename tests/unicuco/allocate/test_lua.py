from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unicuco.allocate import Lua, Uniform
from unicuco.allocate.learned import call_with_weights, token_loss
from unicuco.allocate.lua import (
    LuaOptions,
    LuaThresholds,
    budget_penalty,
    row_places,
    soft_mask,
)
from unicuco.calibration import TokenSet, token_windows
from unicuco.errors import RunError
from unicuco.models import load_tokenizer
from unicuco.ranks import keep_mask, rank_rows
from unicuco.rows import RowRule, row_counts
from unicuco.testing.cases import EvaluationCase, make_evaluation_case
from unicuco.types import Strategy

SPARSITY = 0.6


@pytest.fixture(scope="module")
def texts(trained_folder: Path, tiny_text_file: Path) -> tuple[TokenSet, TokenSet]:
    """Calibration windows and held-out ones, of two halves of the text."""
    text = tiny_text_file.read_text(encoding="utf-8")
    half = len(text) // 2
    tokenizer = load_tokenizer(trained_folder)
    first, second = (
        token_windows(tokenizer, part, tokens=512, context=64)
        for part in (text[:half], text[half:])
    )
    return first, second


@pytest.fixture(scope="module")
def trained(trained_folder: Path, texts: tuple[TokenSet, TokenSet]) -> EvaluationCase:
    return make_evaluation_case(trained_folder, tokens=texts[1], calibration=texts[0])


@pytest.fixture(scope="module")
def lua(trained: EvaluationCase) -> Lua:
    learned = Lua(trained.context, LuaOptions(steps=60))
    learned.thresholds(SPARSITY)
    return learned


def held_out_loss(
    case: EvaluationCase, tokens: TokenSet, strategy: Strategy, rule: RowRule | None
) -> float:
    drops = case.space.cost.site_drops(strategy.values)
    evidence = case.context.require_evidence("test")
    weights = {}
    for site in case.loaded.profile.sites:
        offsets = None if rule is None else rule.of(site.path)
        mask = keep_mask(case.ranks[site.path], drops[site.path], offsets)
        weights[f"{site.path}.weight"] = evidence.weight(site) * mask
    with torch.no_grad():
        output = call_with_weights(case.loaded.model, weights, input_ids=tokens.ids)
    return float(token_loss(output.logits, tokens.ids))


def test_places_in_a_row_are_its_empirical_distribution() -> None:
    scores = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    slow = (scores[:, None, :] <= scores[:, :, None]).float().mean(-1)
    torch.testing.assert_close(row_places(rank_rows(scores)), slow)


def test_places_do_not_change_under_a_rising_transform_of_the_scores() -> None:
    scores = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    places = row_places(rank_rows(scores))
    for same in (7 * scores + 3, scores.exp(), scores**3, scores.log()):
        assert torch.equal(row_places(rank_rows(same)), places)


def test_equal_scores_go_by_column_as_in_the_rank_store() -> None:
    assert row_places(rank_rows(torch.ones(1, 4))).tolist() == [[0.25, 0.5, 0.75, 1.0]]


def test_rounded_masks_drop_what_the_row_counts_say() -> None:
    rank = rank_rows(torch.rand(7, 30, generator=torch.Generator().manual_seed(0)))
    t = torch.tensor([-0.2, 0.0, 0.26, 0.5, 0.731, 1.0, 1.4])
    found = LuaThresholds(sparsity=0.5, thresholds={"a": t}, soft_loss=0, hard_loss=0)
    mask = soft_mask(rank, t).round()
    assert torch.equal(found.row_counts({"a": 30})["a"], (mask == 0).sum(1))


def test_no_mask_is_so_small_that_its_products_are_subnormal() -> None:
    rank, t = torch.arange(1024).expand(2, 1024), torch.tensor([0.5, 0.9])
    mask = soft_mask(rank, t)
    assert float(mask.min()) > 1e8 * torch.finfo(torch.float32).tiny
    exact = torch.sigmoid(1024 * (row_places(rank) - t[:, None]).double())
    assert torch.allclose(mask.double(), exact, rtol=1e-4, atol=1e-25)


def test_the_budget_penalty_is_the_log_ratio_either_way_with_a_gradient() -> None:
    t = torch.tensor([0.5, 0.5], requires_grad=True)
    mask = soft_mask(torch.arange(10).expand(2, 10), t)
    kept = float(mask.detach().round().mean())
    for wanted in (0.2, 0.9):
        penalty = budget_penalty([mask], wanted)
        assert float(penalty.detach()) == pytest.approx(abs(math.log(kept / wanted)))
        (gradient,) = torch.autograd.grad(penalty, t, retain_graph=True)
        # Too much is kept at 0.2, so thresholds should rise, and fall at 0.9.
        assert bool(((gradient < 0) if wanted == 0.2 else (gradient > 0)).all())


def test_the_learned_masks_meet_the_budget_to_half_a_percent(
    lua: Lua, trained: EvaluationCase
) -> None:
    columns = {site.path: site.num_columns for site in trained.loaded.profile.sites}
    counts = lua.thresholds(SPARSITY).row_counts(columns)
    dropped = sum(int(rows.sum()) for rows in counts.values())
    assert dropped / trained.loaded.profile.num_site_weights == pytest.approx(SPARSITY, abs=0.005)


def test_rows_get_thresholds_of_their_own(lua: Lua) -> None:
    spreads = [float(t.std()) for t in lua.thresholds(SPARSITY).thresholds.values()]
    assert min(spreads) > 1e-3


def test_learned_masks_lose_less_than_uniform_ones_on_text_that_they_never_saw(
    lua: Lua, trained: EvaluationCase, texts: tuple[TokenSet, TokenSet]
) -> None:
    strategy = lua.allocate([SPARSITY])[0]
    uniform = Uniform(trained.context).allocate([SPARSITY])[0]
    own = held_out_loss(trained, texts[1], strategy, lua.row_rule(strategy))
    assert own < held_out_loss(trained, texts[1], uniform, None)


def test_the_gap_between_soft_and_rounded_masks_is_reported(lua: Lua) -> None:
    found = lua.thresholds(SPARSITY)
    assert 0 < found.soft_loss < 10
    assert 0 < abs(found.hard_loss - found.soft_loss) < 0.5


def test_the_row_rule_spreads_exactly_the_counts_of_the_strategy(
    lua: Lua, trained: EvaluationCase
) -> None:
    (strategy,) = lua.allocate([SPARSITY])
    drops = trained.space.cost.site_drops(strategy.values)
    rule = lua.row_rule(strategy)
    columns = {site.path: site.num_columns for site in trained.loaded.profile.sites}
    learned = lua.thresholds(SPARSITY).row_counts(columns)
    for site in trained.loaded.profile.sites:
        rows = row_counts(site.num_rows, site.num_columns, drops[site.path], rule.of(site.path))
        assert int(rows.sum()) == drops[site.path]
        own = learned[site.path]
        same = row_counts(site.num_rows, site.num_columns, int(own.sum()), rule.of(site.path))
        assert torch.equal(same, own)


def test_rows_of_strategies_of_others_are_refused(lua: Lua, trained: EvaluationCase) -> None:
    with pytest.raises(ValueError, match="none of this allocator's own"):
        lua.row_rule(trained.space.uniform(0.123))


def test_thresholds_are_saved_and_read_back(lua: Lua, tmp_path: Path) -> None:
    found = lua.thresholds(SPARSITY)
    found.save(tmp_path / "lua.safetensors")
    back = LuaThresholds.load(tmp_path / "lua.safetensors")
    assert (back.sparsity, back.soft_loss, back.hard_loss) == (
        found.sparsity, found.soft_loss, found.hard_loss,
    )  # fmt: skip
    assert back.thresholds.keys() == found.thresholds.keys()
    assert all(torch.equal(back.thresholds[k], t) for k, t in found.thresholds.items())
    assert [path.name for path in tmp_path.iterdir()] == ["lua.safetensors"]


def test_thresholds_that_can_not_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no thresholds that can be read"):
        LuaThresholds.load(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    others: dict[str, Tensor] = {"a": torch.zeros(2)}
    save_file(others, tmp_path / "other.safetensors")
    with pytest.raises(RunError, match="another format"):
        LuaThresholds.load(tmp_path / "other.safetensors")
