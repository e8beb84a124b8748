from __future__ import annotations

import pytest
import torch

from unicuco.dimensions import Granularity, build_space
from unicuco.search.shapes import teach
from unicuco.stratnet import NetKind, StratNet, StratNetAllocator
from unicuco.testing.profiles import make_profile


@pytest.mark.slow
def test_a_network_answers_its_lessons_where_all_parts_stay_and_widths_jump() -> None:
    profile = make_profile([[(40, 60), (240, 40)]] * 10)
    space = build_space(profile, ("depth", "width"), Granularity.LAYER)
    targets = torch.linspace(0.05, 0.3, 12, dtype=torch.float64)
    kept = [space.kept_for_sparsity(target) for target in targets.tolist()]
    generator = torch.Generator().manual_seed(0)
    jumps = torch.randn(4, space.num_axes, generator=generator, dtype=torch.float64)
    removed = torch.tensor([axis.is_choice for axis in space.axes])
    logits = jumps.repeat_interleave(3, 0).masked_fill(removed, -12.0)
    points = space.project_logits(logits, torch.tensor(kept, dtype=torch.float64))
    lessons = space.decode_exact(points, kept)
    net = StratNet(NetKind.SHAPE, space.num_axes, seed=0)
    teach(net, space, targets, lessons)
    answers = StratNetAllocator(net, space).allocate(targets.tolist())
    assert [answer.key for answer in answers] == [lesson.key for lesson in lessons]
    assert not any(v for a in answers for n, v in a.settings if n.startswith("depth/"))
    assert len({answer.key for answer in answers}) == len(answers)
