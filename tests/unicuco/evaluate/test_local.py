from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unicuco.calibration import token_windows
from unicuco.dimensions import Granularity
from unicuco.errors import EvaluationError, RunError
from unicuco.evaluate import LocalEvaluator
from unicuco.evaluate.arrays import narrowest, pack_model
from unicuco.models import gate, load_tokenizer, read_site
from unicuco.rows import RowRule
from unicuco.search.drive import outcome_of
from unicuco.testing.cases import EvaluationCase, make_evaluation_case
from unicuco.testing.tiny import tiny_model_folder
from unicuco.types import Ask, FailedEvaluation, Site, Strategy


def random_strategy(case: EvaluationCase, sparsity: float, seed: int = 0) -> Strategy:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(1, case.space.num_axes, generator=generator)
    return case.space.decode_exact(unit, [case.space.kept_for_sparsity(sparsity)])[0]


@torch.no_grad()
def slow_kl(case: EvaluationCase, strategy: Strategy, windows: Tensor) -> float:
    """Copy the model, prune by sorting all weights of a site, run window by window."""
    dense = case.loaded.model
    pruned = copy.deepcopy(dense)
    drops = case.space.cost.site_drops(strategy.values)
    for site in case.loaded.profile.sites:
        order = sorted(
            (int(case.ranks[site.path][row, column]), row, column)
            for row in range(site.num_rows)
            for column in range(site.num_columns)
        )
        weight = read_site(pruned, site)
        for _, row, column in order[: drops[site.path]]:
            weight[row, column] = 0.0
    total = 0.0
    for window in windows:
        p = dense(input_ids=window[None], use_cache=False).logits[0].double().log_softmax(-1)
        q = pruned(input_ids=window[None], use_cache=False).logits[0].double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total / windows.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_an_evaluation_is_what_the_straightforward_loop_finds(family: str, tmp_path: Path) -> None:
    case = make_evaluation_case(tiny_model_folder(tmp_path / "model", family))
    evaluator = case.evaluator()
    for sparsity in (0.2, 0.7):
        strategy = random_strategy(case, sparsity)
        found = evaluator.evaluate(strategy)
        assert found.kl == pytest.approx(slow_kl(case, strategy, case.tokens.ids), abs=1e-6)
        assert found.kept_fraction == pytest.approx(1 - sparsity, abs=1e-3)
        assert found.strategy_key == strategy.key
        assert found.tokens == case.tokens.num_tokens
        assert found.text_digest == case.tokens.digest
        assert (found.gradient, found.cost_units) == (None, 1.0)
        assert found.wall_s > 0


def test_the_dense_strategy_costs_nothing(case: EvaluationCase) -> None:
    found = case.evaluator().evaluate(case.space.uniform(0.0))
    assert 0 <= found.kl < 1e-6
    assert found.kept_fraction == 1.0


def test_no_strategy_leaves_a_trace_on_the_next(case: EvaluationCase) -> None:
    strategies = [random_strategy(case, 0.1 + 0.2 * seed, seed) for seed in range(5)]
    fresh = [case.evaluator().evaluate(strategy).kl for strategy in strategies]
    evaluator = case.evaluator()
    for _ in range(2):
        for k in (3, 0, 4, 2, 1):
            derivatives = k % 2 == 0
            assert evaluator.evaluate(strategies[k], derivatives=derivatives).kl == fresh[k]


def test_a_cut_that_fails_spoils_no_later_strategy(
    case: EvaluationCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = case.evaluator()
    before, failing = random_strategy(case, 0.3), random_strategy(case, 0.6, seed=1)
    expected = evaluator.evaluate(before).kl
    last = case.loaded.profile.sites[-1].path

    def cut_all_but_the_last(self: LocalEvaluator, site: Site, *rest: Any) -> None:
        if site.path == last:
            raise RunError("the level can't be read")
        whole(self, site, *rest)

    whole = LocalEvaluator._cut
    with monkeypatch.context() as patch:
        patch.setattr(LocalEvaluator, "_cut", cut_all_but_the_last)
        with pytest.raises(RunError):
            evaluator.evaluate(failing)
    assert evaluator.evaluate(before).kl == expected


def test_fewer_tokens_are_the_first_windows_and_cost_their_share(case: EvaluationCase) -> None:
    strategy = random_strategy(case, 0.5)
    evaluator = case.evaluator()
    context = case.tokens.context
    found = evaluator.evaluate(strategy, tokens=context + 1, derivatives=True)
    assert found.tokens == 2 * context
    assert found.kl == pytest.approx(slow_kl(case, strategy, case.tokens.ids[:2]), abs=1e-6)
    assert found.cost_units == pytest.approx(3 * 2 / len(case.tokens.ids))
    start = evaluator.evaluate(strategy, tokens=5)
    assert start.tokens == 5
    assert start.kl == pytest.approx(slow_kl(case, strategy, case.tokens.ids[:1, :5]), abs=1e-6)
    assert start.cost_units == pytest.approx(5 / case.tokens.num_tokens)
    assert evaluator.evaluate(strategy, tokens=10**9).tokens == case.tokens.num_tokens
    assert evaluator.evaluate(strategy, derivatives=True).cost_units == 3.0


def test_the_kl_of_every_window_averages_to_the_kl(case: EvaluationCase) -> None:
    strategy = random_strategy(case, 0.6)
    evaluator = case.evaluator()
    windows = evaluator.window_kl(strategy)
    assert windows.shape == (len(case.tokens.ids),)
    assert float(windows.mean()) == pytest.approx(evaluator.evaluate(strategy).kl, rel=1e-5)
    assert float(windows[2]) == pytest.approx(
        slow_kl(case, strategy, case.tokens.ids[2:3]), abs=1e-6
    )


def test_arrays_may_be_read_only_and_stay_as_they_are(case: EvaluationCase) -> None:
    arrays = {name: array.copy() for name, array in case.arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False
    evaluator = LocalEvaluator.from_arrays(case.config, arrays)
    strategy = random_strategy(case, 0.5)
    expected = case.evaluator().evaluate(strategy, derivatives=True)
    found = evaluator.evaluate(strategy, derivatives=True)
    assert replace(found, wall_s=expected.wall_s) == expected
    assert all(np.array_equal(arrays[name], case.arrays[name]) for name in arrays)


def test_a_configuration_travels_by_pickle_and_stays_small(case: EvaluationCase) -> None:
    data = pickle.dumps(case.config)
    assert pickle.loads(data) == case.config
    assert len(data) < 20_000
    assert json.loads(case.config.model_config)["model_type"] == "llama"


def test_only_matrices_that_bfloat16_holds_become_it() -> None:
    exact = torch.randn(300, 7).bfloat16().float()
    odd = exact.clone()
    odd[299, 6] += 1e-6
    assert narrowest(exact).dtype is torch.bfloat16
    assert torch.equal(narrowest(exact).float(), exact)
    for tensor in (odd, exact[0], exact.double(), exact.half()):
        assert narrowest(tensor) is tensor


@pytest.mark.parametrize("tied", [True, False])
def test_weights_may_come_in_bfloat16(tied: bool, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model", tied=tied, dtype=torch.bfloat16)
    case = make_evaluation_case(folder)
    state = {name: p.detach().bfloat16() for name, p in case.loaded.model.named_parameters()}
    packed = pack_model(state, case.ranks, case.fisher)
    assert all(array.dtype == np.int16 for name, array in packed.items() if "state/" in name)
    arrays = {name: array for name, array in case.arrays.items() if name.startswith("text/")}
    evaluator = LocalEvaluator.from_arrays(case.config, {**packed, **arrays})
    for seed, sparsity in enumerate((0.5, 0.0, 0.7)):
        strategy = random_strategy(case, sparsity, seed)
        expected = case.evaluator().evaluate(strategy, derivatives=True)
        found = evaluator.evaluate(strategy, derivatives=True)
        assert replace(found, wall_s=expected.wall_s) == expected


def _overflowing(case: EvaluationCase) -> EvaluationCase:
    """Scale a down-projection beyond float32: dense text stays cached, every run overflows."""
    name = next(name for name in case.arrays if name.endswith("down_proj.weight"))
    arrays = {**case.arrays, name: case.arrays[name] * np.float32(1e38)}
    return replace(case, arrays=arrays)


@pytest.mark.parametrize("derivatives", [False, True])
def test_a_model_that_overflows_is_an_error_with_its_strategy(
    case: EvaluationCase, derivatives: bool
) -> None:
    evaluator = _overflowing(case).evaluator()
    strategy = random_strategy(case, 0.3)
    with pytest.raises(EvaluationError, match=strategy.key[:12]) as caught:
        evaluator.evaluate(strategy, derivatives=derivatives)
    assert caught.value.strategy_key == strategy.key
    assert "\n" not in str(caught.value)
    outcome = outcome_of(evaluator, Ask(round=0, position=0, strategy=strategy, derivatives=True))
    assert isinstance(outcome, FailedEvaluation)
    assert (outcome.strategy_key, outcome.kind) == (strategy.key, "EvaluationError")


# --- derivatives --------------------------------------------------------------------------------


def trained_case(folder: Path, text_file: Path, dimensions: tuple[str, ...]) -> EvaluationCase:
    tokenizer, text = load_tokenizer(folder), text_file.read_text(encoding="utf-8")
    half = len(text) // 2
    return make_evaluation_case(
        folder,
        tokens=token_windows(tokenizer, text[:half], tokens=512, context=64),
        calibration=token_windows(tokenizer, text[half:], tokens=512, context=64),
        dimensions=dimensions,
    )


@pytest.fixture(scope="module")
def trained(trained_folder: Path, tiny_text_file: Path) -> EvaluationCase:
    return trained_case(trained_folder, tiny_text_file, ("sparsity",))


def central_differences(case: EvaluationCase, strategy: Strategy, step: float) -> list[float]:
    evaluator = case.evaluator()
    slopes = []
    for index, axis in enumerate(case.space.axes):
        ends = []
        for sign in (-1, 1):
            values = list(strategy.values)
            count = round((values[index] + sign * step) * axis.num_steps)
            values[index] = min(max(count, 0), axis.max_step) / axis.num_steps
            moved = Strategy(settings=tuple(zip(case.space.names, values, strict=True)))
            ends.append((values[index], evaluator.evaluate(moved).kl))
        slopes.append((ends[1][1] - ends[0][1]) / (ends[1][0] - ends[0][0]))
    return slopes


@pytest.mark.parametrize("sparsity", [0.4, 0.6])
def test_the_derivative_along_every_axis_is_that_of_central_differences(
    trained: EvaluationCase, sparsity: float
) -> None:
    strategy = trained.space.uniform(sparsity)
    gradient = trained.evaluator().evaluate(strategy, derivatives=True).gradient
    assert gradient is not None
    expected = central_differences(trained, strategy, 0.06)
    correlation = float(np.corrcoef(gradient, expected)[0, 1])
    scale = float(np.dot(gradient, expected) / np.dot(expected, expected))
    assert correlation > 0.9, (correlation, scale)
    assert 0.7 < scale < 1.3, (correlation, scale)


def test_near_the_dense_model_the_fisher_sums_give_the_derivative(trained: EvaluationCase) -> None:
    dense = trained.space.uniform(0.0)
    gradient = trained.evaluator().evaluate(dense, derivatives=True).gradient
    assert gradient is not None
    expected = central_differences(trained, dense, 0.1)  # clamped at 0: one-sided
    assert min(gradient) > 0
    assert float(np.corrcoef(gradient, expected)[0, 1]) > 0.7


def test_a_block_axis_sums_its_sites(tiny_llama: Path, case: EvaluationCase) -> None:
    blocks = make_evaluation_case(tiny_llama, granularity=Granularity.BLOCK)
    strategy = blocks.space.uniform(0.5)
    drops = blocks.space.cost.site_drops(strategy.values)
    settings = tuple(
        (f"sparsity/{site.path}", drops[site.path] / site.num_weights)
        for site in case.loaded.profile.sites
    )
    by_site = case.evaluator().evaluate(Strategy(settings=settings), derivatives=True)
    by_block = blocks.evaluator().evaluate(strategy, derivatives=True)
    assert by_block.kl == by_site.kl
    assert by_site.gradient is not None
    for block in range(2):
        parts = [
            slope
            for slope, site in zip(by_site.gradient, case.loaded.profile.sites, strict=True)
            if site.block == block
        ]
        assert by_block.gradient is not None
        assert by_block.gradient[block] == pytest.approx(sum(parts))


def test_a_conv1d_has_the_derivatives_of_the_same_matrix_as_a_linear(tmp_path: Path) -> None:
    case = make_evaluation_case(tiny_model_folder(tmp_path / "gpt2", "gpt2", hidden_size=32))
    assert all(site.transposed for site in case.loaded.profile.sites)
    strategy = case.space.uniform(0.5)
    gradient = case.evaluator().evaluate(strategy, derivatives=True).gradient
    assert gradient is not None
    expected = central_differences(case, strategy, 0.06)
    assert float(np.corrcoef(gradient, expected)[0, 1]) > 0.6


def test_derivatives_along_axes_that_have_none_are_refused(tiny_llama: Path) -> None:
    mixed = make_evaluation_case(tiny_llama, dimensions=("width", "low_rank"))
    evaluator = mixed.evaluator()
    strategy = mixed.space.uniform(0.3)
    assert evaluator.evaluate(strategy).gradient is None
    with pytest.raises(ValueError, match="no derivatives along axes of width, low_rank"):
        evaluator.evaluate(strategy, derivatives=True)


@pytest.fixture(scope="module")
def shaped(trained_folder: Path, tiny_text_file: Path) -> EvaluationCase:
    return trained_case(trained_folder, tiny_text_file, ("sparsity", "depth", "width"))


def stepwise(case: EvaluationCase, **settings: float) -> Strategy:
    """A strategy whose axes of a dimension all have the grid's setting below a number."""
    values = [
        min(int(settings.get(axis.name.split("/")[0], 0.0) * axis.num_steps), axis.max_step)
        / axis.num_steps
        for axis in case.space.axes
    ]
    return Strategy(settings=tuple(zip(case.space.names, values, strict=True)))


def with_setting(strategy: Strategy, **changed: float) -> Strategy:
    own = dict(strategy.settings)
    assert changed.keys() <= own.keys()
    return Strategy(settings=tuple({**own, **changed}.items()))


def test_the_derivative_along_widths_is_that_of_the_steps_around(shaped: EvaluationCase) -> None:
    strategy = stepwise(shaped, width=0.5, sparsity=0.2)
    evaluator = shaped.evaluator()
    gradient = evaluator.evaluate(strategy, derivatives=True).gradient
    assert gradient is not None
    found, expected = [], []
    for axis, value, slope in zip(shaped.space.axes, strategy.values, gradient, strict=True):
        step = round(value * axis.num_steps)
        if axis.name.startswith("width/") and 0 < step < axis.max_step:
            low, high = (
                evaluator.evaluate(with_setting(strategy, **{axis.name: end / axis.num_steps})).kl
                for end in (step - 1, step + 1)
            )
            found.append(slope)
            expected.append((high - low) / 2 * axis.num_steps)
    assert len(found) >= 3
    assert float(np.corrcoef(found, expected)[0, 1]) > 0.9, (found, expected)
    assert 0.7 < float(np.dot(found, expected) / np.dot(expected, expected)) < 1.3


@pytest.mark.parametrize("removed", [0.0, 1.0])
def test_the_derivative_of_a_part_is_that_of_its_gate(
    shaped: EvaluationCase, removed: float
) -> None:
    part = shaped.loaded.profile.parts[1]
    strategy = with_setting(
        stepwise(shaped, width=0.3, sparsity=0.3), **{f"depth/{part.path}": removed}
    )
    evaluator = shaped.evaluator()
    gradient = evaluator.evaluate(strategy, derivatives=True).gradient
    assert gradient is not None
    slope = dict(zip(shaped.space.names, gradient, strict=True))[f"depth/{part.path}"]
    # The same model with the part's output turned down by hand: a difference around its gate.
    there = with_setting(strategy, **{f"depth/{part.path}": 0.0})
    if removed:  # what is narrowed of a part that is gone comes back whole
        wide = {n: 0.0 for n in shaped.space.names if part.path in n}
        there = with_setting(there, **wide)
    module = evaluator.model_at(there).get_submodule(part.path)
    kls = []
    for factor in (1 - removed - 1e-2, 1 - removed + 1e-2):
        handle = gate(module, torch.tensor(factor))
        kls.append(evaluator.evaluate(there).kl)
        handle.remove()
    assert slope == pytest.approx((kls[0] - kls[1]) / 2e-2, rel=0.02, abs=1e-4)


def test_derivatives_of_shapes_leave_no_trace(shaped: EvaluationCase) -> None:
    evaluator = shaped.evaluator()
    one = with_setting(
        stepwise(shaped, width=0.4, sparsity=0.3),
        **{f"depth/{shaped.loaded.profile.parts[2].path}": 1.0},
    )
    other = stepwise(shaped, width=0.2)
    values = [evaluator.evaluate(strategy).kl for strategy in (one, other)]
    for strategy, value in zip((one, other, one), (*values, values[0]), strict=True):
        found = evaluator.evaluate(strategy, derivatives=True)
        assert found.kl == value
        assert found.kept_fraction == evaluator.evaluate(strategy).kept_fraction
        assert evaluator.evaluate(other).kl == values[1]


def test_what_is_gone_has_no_slope_of_its_own(shaped: EvaluationCase) -> None:
    part = shaped.loaded.profile.parts[0]
    strategy = with_setting(stepwise(shaped, sparsity=0.3), **{f"depth/{part.path}": 1.0})
    gradient = shaped.evaluator().evaluate(strategy, derivatives=True).gradient
    assert gradient is not None
    slopes = dict(zip(shaped.space.names, gradient, strict=True))
    own = {f"sparsity/{path}" for path in part.sites} | {f"width/{part.path}"}
    assert all(slopes[name] == 0 for name in own)
    others = [slope for name, slope in slopes.items() if name not in own]
    assert all(slope != 0 for slope in others if slope is not None)


def test_a_removed_block_is_gone_for_one_strategy_and_back_for_the_next(tiny_llama: Path) -> None:
    mixed = make_evaluation_case(tiny_llama, dimensions=("sparsity", "depth"))
    evaluator = mixed.evaluator()
    dense = mixed.space.uniform(0.0)
    names = mixed.space.names
    gone = {f"depth/{part.path}" for part in mixed.loaded.profile.parts if part.block == 1}
    without = Strategy(settings=tuple((name, float(name in gone)) for name in names))
    removed = evaluator.evaluate(without)
    assert removed.kl > 1e-3
    weights = [site.num_weights for site in mixed.loaded.profile.sites if site.block == 0]
    assert removed.kept_fraction == sum(weights) / mixed.loaded.profile.num_site_weights
    assert evaluator.evaluate(dense).kl < 1e-6


def test_the_working_copy_is_private(case: EvaluationCase) -> None:
    before = {name: array.copy() for name, array in case.arrays.items()}
    case.evaluator().evaluate(random_strategy(case, 0.9), derivatives=True)
    assert all(np.array_equal(before[name], case.arrays[name]) for name in before)
    assert isinstance(case.loaded.model, nn.Module)
    assert not any(p.requires_grad for p in case.loaded.model.parameters())


def test_a_row_rule_is_cut_and_forgotten_again(case: EvaluationCase) -> None:
    evaluator = case.evaluator()
    strategy = case.space.uniform(0.5)
    site = case.loaded.profile.sites[0]
    plain = evaluator.evaluate(strategy)
    half = site.num_rows // 2
    counts = torch.full((site.num_rows,), site.num_columns)
    counts[half:] = 0  # the same total: the first half of the rows goes, the rest stays whole
    ruled = evaluator.evaluate(strategy, rows=RowRule.from_counts({site.path: counts}))
    assert ruled.kept_fraction == plain.kept_fraction
    assert ruled.kl != plain.kl
    assert evaluator.evaluate(strategy).kl == plain.kl
    rule = RowRule.from_counts({site.path: counts})
    with pytest.raises(ValueError, match="no derivatives under a row rule"):
        evaluator.evaluate(strategy, derivatives=True, rows=rule)
    windows = evaluator.window_kl(strategy, rows=rule)
    assert float(windows.mean()) == pytest.approx(ruled.kl, rel=1e-5)
