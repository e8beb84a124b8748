"""The contract of dimensions: subclass `DimensionContract`, and its tests run."""

# ruff: noqa: D102 - a test's name is its sentence of behaviour

from __future__ import annotations

from typing import Any, ClassVar, Final

import pytest
import torch
from torch import Tensor, nn

from unicuco.dimensions import DIMENSIONS, Dimension, Granularity, ProductCost, build_cost
from unicuco.errors import RequestError
from unicuco.testing.profiles import make_profile
from unicuco.testing.tiny import FAMILIES, build_tiny
from unicuco.types import ModelProfile, ServedAs

_PROFILE: Final = make_profile([[(40, 60), (80, 30)], [(50, 50), (20, 90)], [(60, 60)]])
_SETTINGS: Final = 5  # random points per law


class DimensionContract:
    """What every entry of `DIMENSIONS` satisfies; subclasses set ``dimension``.

    ``families`` are those of `FAMILIES` that the dimension has axes for; others it refuses.
    ``profile`` is one that it has axes for.
    """

    dimension: ClassVar[Dimension]
    profile: ClassVar[ModelProfile] = _PROFILE
    families: ClassVar[frozenset[str]] = frozenset(FAMILIES)

    @pytest.fixture(params=list(Granularity), ids=str)
    def granularity(self, request: Any) -> Granularity:
        return Granularity(request.param)

    def test_is_registered_under_its_name(self) -> None:
        assert type(DIMENSIONS[self.dimension.name]) is type(self.dimension)

    def test_says_how_it_is_served_and_what_comes_before_it(self) -> None:
        assert isinstance(self.dimension.served_as, ServedAs)
        assert self.dimension.must_follow <= DIMENSIONS.keys() - {self.dimension.name}

    def test_names_its_axes_after_itself(self, granularity: Granularity) -> None:
        names = [axis.name for axis in self.dimension.axes(self.profile, granularity)]
        assert names
        assert len(set(names)) == len(names)
        assert all(name.startswith(f"{self.dimension.name}/") for name in names)

    def test_its_identity_costs_and_saves_nothing(self, granularity: Granularity) -> None:
        cost = self._cost(granularity)
        zeros = torch.zeros(1, self._num_axes(granularity), dtype=torch.float64)
        values = zeros[0].tolist()
        assert cost.kept_params(values) == self.profile.total_params
        assert cost.num_bytes(values) == self.profile.total_bytes
        assert set(cost.site_drops(values).values()) == {0}
        assert float(cost.size(zeros)[0]) == cost.size_of(values) == cost.total_size

    def test_the_relaxed_cost_is_the_exact_one_on_the_grid(self, granularity: Granularity) -> None:
        cost = self._cost(granularity)
        for row in self._points(granularity):
            exact = cost.size_of(row.tolist())
            # A block's count is split over its sites by rounding: less than a weight for each.
            assert abs(float(cost.size(row[None])[0]) - exact) < 1e-6 * cost.total_size

    def test_cost_never_rises_along_an_axis(self, granularity: Granularity) -> None:
        cost = self._cost(granularity)
        axes = self.dimension.axes(self.profile, granularity)
        for row in self._points(granularity):
            for index, axis in enumerate(axes):
                steps = sorted({int(axis.max_step * share / 8) for share in range(9)})
                line = row.repeat(len(steps), 1)
                line[:, index] = torch.tensor(steps, dtype=torch.float64) / axis.num_steps
                relaxed = cost.size(line)
                assert bool((relaxed.diff() < 0).all())
                exact = [cost.size_of(point.tolist()) for point in line]
                assert exact == sorted(exact, reverse=True)
                kept = [cost.kept_params(point.tolist()) for point in line]
                assert kept == sorted(kept, reverse=True)
                stored = [cost.num_bytes(point.tolist()) for point in line]
                assert stored == sorted(stored, reverse=True)

    def test_no_site_loses_more_than_it_has(self, granularity: Granularity) -> None:
        cost = self._cost(granularity)
        weights = {site.path: site.num_weights for site in self.profile.sites}
        ends = [
            axis.max_step / axis.num_steps
            for axis in self.dimension.axes(self.profile, granularity)
        ]
        for values in [*(row.tolist() for row in self._points(granularity)), ends]:
            drops = cost.site_drops(values)
            assert drops.keys() == weights.keys()
            assert all(0 <= drops[path] <= weights[path] for path in weights)

    @pytest.mark.parametrize("family", sorted(FAMILIES))
    def test_its_identity_leaves_a_live_model_bit_identical(self, family: str) -> None:
        model, profile = build_tiny(family)
        if family not in self.families:
            with pytest.raises(RequestError, match=profile.architecture):
                self.dimension.axes(profile, Granularity.LAYER)
            return
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        dense = _logits(model, profile)
        num_axes = len(self.dimension.axes(profile, Granularity.LAYER))
        self.dimension.apply(model, profile, [0.0] * num_axes, Granularity.LAYER)
        assert torch.equal(_logits(model, profile), dense)
        # Whatever was applied in between, the identity undoes it.
        ends = [a.max_step / a.num_steps for a in self.dimension.axes(profile, Granularity.LAYER)]
        some = [ends[0], *[0.0] * (num_axes - 1)]
        self.dimension.apply(model, profile, some, Granularity.LAYER)
        self.dimension.apply(model, profile, [0.0] * num_axes, Granularity.LAYER)
        assert torch.equal(_logits(model, profile), dense)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def _cost(self, granularity: Granularity) -> ProductCost:
        return build_cost(self.profile, [self.dimension.name], granularity)

    def _num_axes(self, granularity: Granularity) -> int:
        return len(self.dimension.axes(self.profile, granularity))

    def _points(self, granularity: Granularity) -> Tensor:
        """Return settings on the grid."""
        axes = self.dimension.axes(self.profile, granularity)
        generator = torch.Generator().manual_seed(4)
        share = torch.rand(_SETTINGS, len(axes), generator=generator, dtype=torch.float64)
        steps = torch.tensor([axis.num_steps for axis in axes], dtype=torch.float64)
        most = torch.tensor([axis.max_step for axis in axes], dtype=torch.float64)
        return torch.round(share * most) / steps


@torch.no_grad()
def _logits(model: nn.Module, profile: ModelProfile) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(1, 257, (2, min(16, profile.max_context)), generator=generator)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
