"""The free choices of the methods, and the table that made them."""

from __future__ import annotations

import pytest

from benchmarks import rates
from benchmarks.rates import CHOICES, Entry


def entry(method: str, value: float, sparsity: float, kl: float) -> Entry:
    return Entry(method=method, value=value, sparsity=sparsity, kl=kl, seconds=1.0)


def test_the_least_geometric_mean_relative_to_uniform_is_best() -> None:
    entries = [
        entry("uniform", 0.0, 0.5, 0.1),
        entry("uniform", 0.0, 0.7, 1.0),
        entry("lua", 1.0, 0.5, 0.04),  # 0.4 and 0.9: 0.6
        entry("lua", 1.0, 0.7, 0.9),
        entry("lua", 2.0, 0.5, 0.08),  # 0.8 and 0.5: 0.63, though the mean KL is less
        entry("lua", 2.0, 0.7, 0.5),
        entry("lua", 3.0, 0.5, 0.01),  # was not asked for the other
    ]
    assert rates.ratios(entries, "lua") == pytest.approx({1.0: 0.6, 2.0: 0.4**0.5})
    assert rates.best(entries, "lua") == 1.0


def test_every_default_is_as_good_as_the_best_of_the_table() -> None:
    entries = rates.load_entries()
    assert {entry.method for entry in entries} == {"uniform", *CHOICES}
    assert all(rates.holds(entries, method) for method in CHOICES)


def test_an_unknown_method_is_one_line() -> None:
    with pytest.raises(SystemExit, match="no choice of owl; there are lua"):
        rates.main(["owl"])
