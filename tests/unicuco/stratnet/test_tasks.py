from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unicuco.dimensions import build_space
from unicuco.stratnet import NetKind, StratNet, StratNetAllocator, TrainOptions, train_on_tasks
from unicuco.stratnet.net import size_features, task_features
from unicuco.stratnet.train import draw_weightings, task_answers
from unicuco.surrogate.tasks import combine
from unicuco.testing.profiles import make_profile

SPACE = build_space(make_profile([[(40, 50)], [(40, 50)], [(40, 50)]]))


def test_a_network_without_tasks_is_the_same_to_the_bit_as_before_there_were_any() -> None:
    one, other = (StratNet(NetKind.SIZE, 3, seed=1, **more) for more in ({}, {"num_tasks": 0}))
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert one.layers[0].in_features == 3


def test_features_are_those_of_the_size_and_then_the_weights() -> None:
    sparsity, weights = torch.tensor([0.3, 0.8]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    features = task_features(sparsity, weights)
    assert torch.equal(features[:, :3], size_features(sparsity))
    assert features[:, 3:].tolist() == [[1.0, -1.0], [0.0, 0.0]]


def test_weightings_lie_on_the_simplex_and_every_fourth_is_one_task() -> None:
    weights = draw_weightings(400, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights.sum(1), torch.ones(400, dtype=torch.float64))
    assert float(weights.min()) >= 0
    corners = weights[::4]
    assert bool((corners.max(1).values == 1).all())
    assert bool((corners.sum(0) >= 20).all())
    torch.testing.assert_close(
        weights[1::4].mean(0), torch.full((3,), 1 / 3).double(), atol=0.05, rtol=0
    )


def test_training_gives_every_weighting_an_answer_of_its_own() -> None:
    costs = torch.tensor([[9.0, 1.0, 1.0], [1.0, 1.0, 9.0]], dtype=torch.float64)

    def judge(points: Tensor, weights: Tensor) -> Tensor:
        return ((weights @ costs) * points.square()).sum(1)

    net = StratNet(NetKind.SIZE, 3, seed=0, num_tasks=2)
    history = train_on_tasks(
        net, SPACE, judge, (0.1, 0.8), TrainOptions(steps=200), num_tasks=2, seed=0
    )
    assert history[-1] < history[0]
    corners = torch.eye(2, dtype=torch.float64)
    with torch.no_grad():
        first, second = task_answers(net, SPACE, torch.tensor([0.5, 0.5]).double(), corners)
    assert float(first[0]) < 0.25 < float(first[2])
    assert float(second[2]) < 0.25 < float(second[0])
    allocator = StratNetAllocator(net, SPACE)
    even = allocator.units(torch.tensor([0.5]).double())
    half = allocator.units(torch.tensor([0.5]).double(), torch.full((1, 2), 0.5).double())
    assert torch.equal(even, half)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_weighted_kl_is_a_mean_of_kls(share: float) -> None:
    log_kl = torch.tensor([[-3.0, 0.5], [1.0, -200.0]], dtype=torch.float64)
    weights = torch.tensor([[share, 1 - share]] * 2, dtype=torch.float64)
    found, shares = combine(log_kl, weights)
    expected = (weights.T * log_kl.exp()).sum(0)
    torch.testing.assert_close(found.exp(), expected, atol=1e-80, rtol=1e-9)
    torch.testing.assert_close(shares.sum(0), torch.ones(2, dtype=torch.float64))
