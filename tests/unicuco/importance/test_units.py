from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unicuco.importance.units import (
    UnitStore,
    build_units,
    elimination_order,
    unit_indices,
)
from unicuco.models import load_model, read_site
from unicuco.space import Narrowing
from unicuco.testing.cases import random_tokens
from unicuco.testing.tiny import tiny_model_folder
from unicuco.types import Part

OUT, COLUMNS, TOKENS = 6, 12, 400


def inputs(seed: int = 0) -> Tensor:
    """Inputs whose columns depend on each other, so that some can stand in for others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator)
    return torch.randn(TOKENS, COLUMNS, generator=generator) @ mixing


def matrix(seed: int = 1) -> Tensor:
    return torch.randn(OUT, COLUMNS, generator=torch.Generator().manual_seed(seed))


def a_part(num_units: int) -> Part:
    return Part(
        block=0, modules=("n", "m"), sites=("a", "b"), num_params=1, num_bytes=1,
        num_units=num_units,
    )  # fmt: skip


def store_of(x: Tensor, w: Tensor, num_units: int) -> UnitStore:
    moment = x.T @ x / len(x)
    return UnitStore({"m": elimination_order(w, moment, num_units)}, {"m": moment})


def error(x: Tensor, w: Tensor, columns: Tensor, fitted: Tensor) -> float:
    return float((x @ w.T - x[:, columns] @ fitted.T).square().mean())


@pytest.mark.parametrize("num_units", [12, 4])
def test_what_stays_is_fitted_as_least_squares_fits_it(num_units: int) -> None:
    x, w = inputs().double(), matrix().double()
    store, part = store_of(x, w, num_units), a_part(num_units)
    assert torch.equal(store.last_matrix(part, 0, w), w)
    for removed in range(1, num_units):
        columns = unit_indices(store.kept(part, removed), num_units, COLUMNS)
        fitted = store.last_matrix(part, removed, w)
        assert fitted.shape == (OUT, len(columns))
        best = torch.linalg.lstsq(x[:, columns], x @ w.T).solution.T
        # Damping, which keeps noise out of the fit, costs a little of it; plain slicing a lot.
        assert error(x, w, columns, fitted) <= 2 * error(x, w, columns, best) + 1e-9
        assert error(x, w, columns, fitted) < error(x, w, columns, w[:, columns])


@pytest.mark.parametrize("num_units", [12, 4])
def test_the_units_that_go_first_are_the_cheapest_with_what_others_make_up_for(
    num_units: int,
) -> None:
    x, w = inputs(3).double(), matrix(4).double()
    store, part = store_of(x, w, num_units), a_part(num_units)
    order = store.orders["m"]
    assert sorted(order.tolist()) == list(range(num_units))

    def cost(kept: list[int]) -> float:
        columns = unit_indices(torch.tensor(kept), num_units, COLUMNS)
        best = torch.linalg.lstsq(x[:, columns], x @ w.T).solution.T
        return error(x, w, columns, best)

    every = range(num_units)
    alone = [cost([u for u in every if u != gone]) for gone in every]
    assert alone[int(order[0])] <= 1.1 * min(alone)
    assert alone[int(order[-1])] > min(alone)
    kept = [set(store.kept(part, removed).tolist()) for removed in range(num_units)]
    assert all(fewer < more for more, fewer in pairwise(kept))


def test_a_part_that_is_never_active_can_be_narrowed_too() -> None:
    w = matrix()
    store = store_of(torch.zeros(TOKENS, COLUMNS), w, 12)
    assert bool(torch.isfinite(store.last_matrix(a_part(12), 5, w)).all())


def test_a_model_s_units_travel_by_name_and_keep_groups_of_heads_together(tmp_path: Path) -> None:
    loaded = load_model(tiny_model_folder(tmp_path / "qwen2", "qwen2"))
    built = build_units(loaded, random_tokens(seed=2))
    store = UnitStore.from_tensors({**built.tensors(), "state/other": torch.zeros(1)})
    for part in loaded.profile.parts:
        weights = {s.path: s for s in loaded.profile.sites if s.path in part.sites}
        for path, site in weights.items():
            rows, columns, narrowed = store.narrowed(
                part, Narrowing(units=1), site, read_site(loaded.model, site)
            )
            lines, size = (columns, site.num_columns) if rows is None else (rows, site.num_rows)
            assert lines is not None
            each = size // part.num_units
            units = lines.view(-1, each)
            assert bool((units // each == units[:, :1] // each).all())  # whole units
            assert len(units) == part.num_units - 1
            assert (path == part.sites[-1]) == (rows is None)
            assert narrowed.numel() == site.num_weights // part.num_units * (part.num_units - 1)
