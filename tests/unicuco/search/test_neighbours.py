from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from unicuco.dimensions import Granularity, build_space
from unicuco.models import load_model
from unicuco.search.neighbours import Neighbourhood
from unicuco.space import StrategySpace


@pytest.fixture(scope="module")
def space(tiny_llama: Path) -> StrategySpace:
    profile = load_model(tiny_llama).profile
    return build_space(profile, ("depth", "width"), Granularity.LAYER)


def test_a_removed_part_is_left_for_narrower_ones_where_these_are_better(
    space: StrategySpace,
) -> None:
    depth = torch.tensor([axis.is_choice for axis in space.axes])
    dear = torch.tensor([9.0 * (".0." in axis.name) + 1 for axis in space.axes]).double()
    (removed,) = space.exactly(torch.eye(space.num_axes).double()[1:2], space.cost.total_params)
    budget = space.cost.kept_params(removed.values)
    narrow = torch.where(depth, 0.0, 0.9)[None].double()
    (alike,) = space.decode_exact(narrow, [budget])
    removing = 0.9 * float((space.encode([alike])[0].square() * dear).sum())

    def judge(points: Tensor) -> Tensor:
        """What goes costs its square, and a removed part less than the start that narrows alike."""
        return (points.square() * dear)[:, ~depth].sum(1) + removing * points[:, depth].sum(1)

    neighbourhood = Neighbourhood(space, narrow[0])
    starts, generator = [removed, alike], torch.Generator().manual_seed(0)
    (found,) = neighbourhood.improve(starts, budget, judge, generator)
    assert space.cost.kept_params(found.values) <= budget
    assert float(judge(space.encode([found]))) < removing
    assert not any(value for name, value in found.settings if name.startswith("depth/"))
    (stuck,) = neighbourhood.improve(starts[:1], budget, judge, generator)
    assert float(judge(space.encode([stuck]))) >= float(judge(space.encode([found])))
