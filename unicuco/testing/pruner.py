"""The contract of pruners: subclass `PrunerContract`, and its tests run."""

# ruff: noqa: D102 - a test's name is its sentence of behaviour

from __future__ import annotations

import pytest
import torch

from unicuco.models import read_site
from unicuco.pruners import Pruner
from unicuco.testing.cases import EvaluationCase
from unicuco.types import Site


class PrunerContract:
    """What every pruner satisfies; subclasses give a ``pruner`` fixture for the ``case``."""

    @pytest.fixture
    def site(self, case: EvaluationCase) -> Site:
        return case.loaded.profile.sites[5]

    def test_any_count_is_met_exactly(self, pruner: Pruner, site: Site) -> None:
        for count in (0, 1, site.num_weights // 3, site.num_weights // 2 + 1, site.num_weights):
            matrix = pruner.materialise(site, count)
            assert matrix.shape == (site.num_rows, site.num_columns)
            assert int((matrix == 0).sum()) == count

    def test_dropping_nothing_is_the_identity(
        self, pruner: Pruner, case: EvaluationCase, site: Site
    ) -> None:
        assert torch.equal(pruner.materialise(site, 0), read_site(case.loaded.model, site))

    def test_is_deterministic_and_leaves_the_dense_weights_alone(
        self, pruner: Pruner, case: EvaluationCase, site: Site
    ) -> None:
        before = read_site(case.loaded.model, site).clone()
        count = site.num_weights // 2
        first = pruner.materialise(site, count)
        assert torch.equal(pruner.materialise(site, count), first)
        first.fill_(7.0)  # what it returns is the caller's own
        assert torch.equal(read_site(case.loaded.model, site), before)
        assert not torch.equal(pruner.materialise(site, count), first)
        assert first.dtype == before.dtype

    def test_a_count_that_no_matrix_has_is_refused(self, pruner: Pruner, site: Site) -> None:
        for count in (-1, site.num_weights + 1):
            with pytest.raises(ValueError, match="num_dropped must be in"):
                pruner.materialise(site, count)
