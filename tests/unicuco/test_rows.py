from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unicuco.errors import RunError, StorageError
from unicuco.ranks import cut, keep_mask, rank_rows
from unicuco.rows import RowRule, row_counts


def _scores(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@st.composite
def counted_rows(draw: st.DrawFn) -> tuple[int, Tensor]:
    columns = draw(st.integers(1, 12))
    counts = draw(st.lists(st.integers(0, columns), min_size=1, max_size=9))
    return columns, torch.tensor(counts)


@given(counted_rows())
def test_a_rule_made_of_counts_gives_those_counts_back(case: tuple[int, Tensor]) -> None:
    columns, counts = case
    offsets = RowRule.from_counts({"a": counts}).of("a")
    assert torch.equal(row_counts(len(counts), columns, int(counts.sum()), offsets), counts)


@given(counted_rows(), st.data())
def test_any_count_is_met_under_any_rule_and_masks_are_nested(
    case: tuple[int, Tensor], data: st.DataObject
) -> None:
    columns, counts = case
    offsets = RowRule.from_counts({"a": counts}).of("a")
    num_rows = len(counts)
    rank = rank_rows(_scores(num_rows, columns))
    before = torch.ones(num_rows, columns, dtype=torch.bool)
    for num_dropped in range(num_rows * columns + 1):
        mask = keep_mask(rank, num_dropped, offsets)
        assert int((~mask).sum()) == num_dropped
        assert bool((mask <= before).all())
        before = mask


@pytest.mark.parametrize("num_dropped", [0, 1, 7, 20, 35])
def test_zero_offsets_drop_as_without_a_rule(num_dropped: int) -> None:
    zero = torch.zeros(5, dtype=torch.int32)
    assert torch.equal(row_counts(5, 7, num_dropped, zero), row_counts(5, 7, num_dropped))


def test_cut_follows_the_rule_and_leaves_the_rest_to_the_bit() -> None:
    weight = _scores(4, 6, seed=3) - 0.5
    rank = rank_rows(weight.abs())
    counts = torch.tensor([6, 0, 3, 1])
    rows = RowRule.from_counts({"a": counts}).of("a")
    pruned = cut(weight, rank, 10, rows=rows)
    assert torch.equal((pruned == 0).sum(1), counts)
    kept = keep_mask(rank, 10, rows)
    assert torch.equal(pruned[kept], weight[kept])


def test_a_rule_survives_the_disk_and_says_when_it_was_altered(tmp_path: Path) -> None:
    rule = RowRule.from_counts({"a": torch.tensor([3, 1]), "b": torch.tensor([0, 5, 1])})
    path = tmp_path / "rows.safetensors"
    rule.save(path)
    assert list(tmp_path.iterdir()) == [path]
    again = RowRule.load(path)
    assert again.digest == rule.digest
    assert again.of("c") is None
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="row rule"):
        RowRule.load(path)
    with pytest.raises(RunError, match="can't be read"):
        RowRule.load(tmp_path / "none")
    with pytest.raises(StorageError, match="can't be written"):
        rule.save(tmp_path / "absent" / "rows.safetensors")


def test_offsets_sum_to_zero_and_fit_their_matrix() -> None:
    with pytest.raises(ValueError, match="sum zero"):
        RowRule({"a": torch.tensor([1, 0], dtype=torch.int32)})
    with pytest.raises(ValueError, match="int32"):
        RowRule({"a": torch.tensor([1, -1])})
    with pytest.raises(ValueError, match="don't fit a matrix of 3"):
        row_counts(3, 4, 5, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="num_dropped must be in"):
        row_counts(3, 4, 13)
