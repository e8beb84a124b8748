from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unicuco.allocate import TextPart, Trim, Uniform
from unicuco.allocate.trim import (
    TrimOptions,
    _Rows,
    exact_counts,
    last_token_inputs,
    refine_rows,
)
from unicuco.calibration import TokenSet, token_windows
from unicuco.models import load_tokenizer, site_module
from unicuco.ranks import keep_mask, rank_rows
from unicuco.rows import row_counts
from unicuco.testing.cases import RandomTexts, make_evaluation_case
from unicuco.testing.planted import planted_case

_FEW = TrimOptions(samples=32)


def _unequal_rows(seed: int = 0) -> _Rows:
    """Rows between one large weight (bears anything) and equal weights (bears nothing)."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0, 4, 24)[:, None]
    weight = torch.randn(24, 40, generator=generator)
    weight = weight.sign() * weight.abs() ** sharpness
    weight = weight / weight.norm(dim=1, keepdim=True)
    return _Rows(weight, rank_rows(weight.abs()), torch.randn(64, 40, generator=generator))


def _slow_cosine(rows: _Rows, counts: Tensor) -> float:
    kept = rows.weight.clone()
    for row, count in enumerate(counts.tolist()):
        kept[row, rows.rank[row] < count] = 0
    dense, pruned = (rows.inputs @ matrix.T for matrix in (rows.weight, kept))
    return float(torch.cosine_similarity(dense.flatten(), pruned.flatten(), dim=0))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.55, 0.8, 0.97])
def test_no_site_gets_worse_and_its_count_is_met_exactly(sparsity: float) -> None:
    rows = _unequal_rows()
    num_dropped = round(sparsity * rows.weight.numel())
    counts, report = refine_rows(rows, num_dropped, TrimOptions())
    assert int(counts.sum()) == num_dropped
    assert report.cosine_after >= report.cosine_before
    assert report.cosine_after == pytest.approx(_slow_cosine(rows, counts), abs=1e-5)
    equal = row_counts(24, 40, num_dropped)
    assert report.cosine_before == pytest.approx(_slow_cosine(rows, equal), abs=1e-5)


def test_rows_that_bear_it_lose_more_and_quality_evens_out() -> None:
    rows = _unequal_rows()
    counts, report = refine_rows(rows, round(0.7 * rows.weight.numel()), TrimOptions())
    assert report.rate != 0
    assert report.cosine_after > report.cosine_before
    assert float(counts[16:].double().mean()) > float(counts[:8].double().mean())
    assert report.row_variance_after < report.row_variance_before
    assert int(counts.max()) <= 0.95 * 40 + 1


def test_without_learning_rates_it_is_wanda() -> None:
    rows = _unequal_rows()
    options = TrimOptions(rates=(), fallback_rates=())
    counts, report = refine_rows(rows, 500, options)
    assert torch.equal(counts, row_counts(24, 40, 500))
    assert report.rate == 0
    context = planted_case().context
    trim = Trim(context, Uniform, TrimOptions(samples=8, rates=(), fallback_rates=()))
    assert not trim.row_rule(trim.allocate([0.6])[0]).offsets


def test_fractions_become_counts_within_one_weight_of_their_row() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        x = torch.rand(30, generator=generator, dtype=torch.float64) * 0.95
        total = round(float((x * 50).sum()))
        counts = exact_counts(x, 50, total)
        assert int(counts.sum()) == total
        assert float((counts - x * 50).abs().max()) < 1
    full = exact_counts(torch.full((3,), 0.5, dtype=torch.float64), 4, 12)
    assert full.tolist() == [4, 4, 4]
    assert exact_counts(torch.full((3,), 0.5, dtype=torch.float64), 4, 0).tolist() == [0, 0, 0]


def test_inputs_are_those_of_the_last_token_of_every_sequence() -> None:
    evidence = planted_case().context.require_evidence("test")
    found = last_token_inputs(evidence, 3)
    ids = RandomTexts().windows("calibration", tokens=3 * 48, context=48).ids  # type: ignore[arg-type]
    site = evidence.profile.sites[9]
    seen: list[Tensor] = []
    handle = site_module(evidence.loaded.model, site).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0][0, -1])
    )
    for window in ids:
        evidence.loaded.model(input_ids=window[None], use_cache=False)
    handle.remove()
    torch.testing.assert_close(found[site.path], torch.stack(seen), rtol=1e-4, atol=1e-5)


def test_the_rule_keeps_every_sites_count_and_is_deterministic() -> None:
    case = planted_case()
    trim = Trim(case.context, Uniform, _FEW)
    (strategy,) = trim.allocate([0.6])
    rule = trim.row_rule(strategy)
    drops = case.space.cost.site_drops(strategy.values)
    assert rule.offsets
    for site in case.loaded.profile.sites:
        mask = keep_mask(case.ranks[site.path], drops[site.path], rule.of(site.path))
        assert int((~mask).sum()) == drops[site.path]
    assert [report.path for report in trim.reports] == [s.path for s in case.loaded.profile.sites]
    assert all(report.cosine_after >= report.cosine_before for report in trim.reports)
    again = Trim(case.context, Uniform, _FEW).row_rule(strategy)
    assert again.digest == rule.digest


@pytest.mark.slow
def test_rows_lower_the_real_kl_of_a_trained_model(
    trained_folder: Path, tiny_text_file: Path
) -> None:
    tokenizer = load_tokenizer(trained_folder)
    text = tiny_text_file.read_text(encoding="utf-8")
    half = len(text) // 2

    class Texts:
        def windows(self, part: TextPart, *, tokens: int, context: int) -> TokenSet:
            return token_windows(tokenizer, text[half:], tokens=tokens, context=context)

    case = make_evaluation_case(
        trained_folder,
        tokens=token_windows(tokenizer, text[:half], tokens=1024, context=64),
        calibration=Texts().windows(TextPart.CALIBRATION, tokens=1024, context=64),
    )
    evidence = replace(case.context.require_evidence("test"), texts=Texts())
    trim = Trim(replace(case.context, evidence=evidence), Uniform, TrimOptions(samples=64))
    judge = case.evaluator()
    ratios = [
        judge.evaluate(strategy, rows=trim.row_rule(strategy)).kl / judge.evaluate(strategy).kl
        for strategy in trim.allocate([0.4, 0.5, 0.6, 0.7])
    ]
    assert sum(ratios) / 4 < 0.97
