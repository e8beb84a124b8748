from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from unicuco.allocate.adapmtl import AdapMtlOptions, learn_path
from unicuco.allocate.soft_threshold import (
    BETAS,
    JointOptions,
    JointResult,
    SparseModel,
    TaskWeights,
    mean_relative_change,
    num_zeroed,
    soft_threshold,
    train_jointly,
)
from unicuco.testing.planted import SENSITIVE_BLOCKS, planted_case
from unicuco.testing.two_tasks import TwoTaskModel, two_task_batches

STEPS = 600
GOAL = 0.55


def test_thresholding_is_soft_and_keeps_signs() -> None:
    w = torch.tensor([-1.0, -0.3, 0.0, 0.3, 1.0])
    s = torch.tensor(0.0)  # σ(0) = 0.5
    assert soft_threshold(w, s).tolist() == [-0.5, 0.0, 0.0, 0.0, 0.5]
    assert num_zeroed(w, s) == 3
    torch.testing.assert_close(soft_threshold(w, torch.tensor(-1000.0)), w)


def test_sparsity_rises_with_s() -> None:
    w = torch.randn(200, generator=torch.Generator().manual_seed(0)) / 4
    counts = [num_zeroed(w, s) for s in torch.linspace(-12, 4, 33)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] > 190


def test_gradients_flow_to_the_threshold_of_every_component() -> None:
    model = TwoTaskModel(seed=0)
    sparse = SparseModel(model, shared=False, initial=-3.0)
    losses = sparse.losses(next(two_task_batches(seed=0)))
    for task, untouched in (("next", 2), ("kind", 1)):
        (gradient,) = torch.autograd.grad(losses[task], sparse.s, retain_graph=True)
        reached = [float(g) != 0 for g in gradient]
        assert reached == [part != untouched for part in range(3)]  # the other task's head


def test_task_weights_sum_to_the_number_of_tasks_and_favour_what_still_moves() -> None:
    weights = TaskWeights(["a", "b", "c"], window=4, start=2)
    assert weights.update({"a": 1.0, "b": 1.0, "c": 1.0}) == {"a": 1.0, "b": 1.0, "c": 1.0}
    for step in range(1, 10):
        last = weights.update({"a": 1.0 / step, "b": 1.0 + 0.01 * step, "c": 2.0})
        assert sum(last.values()) == pytest.approx(3)
    assert last["a"] > last["b"] > last["c"] == 0


def test_a_move_is_relative_to_the_loss_it_comes_to() -> None:
    weights = TaskWeights(["a", "b"], window=1, start=0)
    weights.update({"a": 2.0, "b": 3.0})
    found = weights.update({"a": 1.0, "b": 2.0})  # |2 - 1| / 1 and |3 - 2| / 2
    assert found == {"a": pytest.approx(4 / 3), "b": pytest.approx(2 / 3)}


# --- trained together ---------------------------------------------------------------------------


def held_out(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    return {task: float(loss.detach()) for task, loss in losses.items()}


def fresh_batch() -> torch.Tensor:
    return next(two_task_batches(seed=99, size=512))


def dense_losses(seed: int) -> dict[str, float]:
    model = TwoTaskModel(seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=BETAS)
    batches = two_task_batches(seed=seed + 1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.stack(list(model(next(batches)).values())).sum().backward()
        optimizer.step()
    return held_out(model(fresh_batch()))


def trained(seed: int, *, shared: bool) -> tuple[dict[str, float], JointResult]:
    # One threshold for all needs more decay to reach the goal in the same steps.
    decay = 3.0 if shared else 1.0
    options = JointOptions(steps=STEPS, goal=GOAL, shared=shared, weight_decay=decay)
    sparse, result = train_jointly(
        TwoTaskModel(seed=seed), two_task_batches(seed=seed + 1), options
    )
    return held_out(sparse.losses(fresh_batch())), result


@pytest.fixture(scope="module")
def joint() -> tuple[dict[str, float], JointResult]:
    return trained(0, shared=False)


@pytest.mark.slow
def test_the_goal_is_reached_and_held_with_thresholds_that_stay(
    joint: tuple[dict[str, float], JointResult],
) -> None:
    result = joint[1]
    assert result.frozen_at is not None
    assert 50 < result.frozen_at < STEPS - 50
    assert all(share < GOAL for share in result.history[: result.frozen_at])
    assert all(GOAL <= share < GOAL + 0.05 for share in result.history[result.frozen_at :])


@pytest.mark.slow
def test_components_end_at_different_sparsities(
    joint: tuple[dict[str, float], JointResult],
) -> None:
    found = sorted(joint[1].sparsity.values())
    assert all(high - low > 0.02 for low, high in pairwise(found))
    assert len(set(joint[1].thresholds.values())) == 3


@pytest.mark.slow
def test_task_weights_sum_to_the_number_of_tasks_at_every_step(
    joint: tuple[dict[str, float], JointResult],
) -> None:
    assert len(joint[1].task_weights) == STEPS
    assert all(sum(w.values()) == pytest.approx(2) for w in joint[1].task_weights)
    assert joint[1].task_weights[0] == {"next": 1.0, "kind": 1.0}
    assert joint[1].task_weights[-1] != joint[1].task_weights[0]


@pytest.mark.slow
def test_thresholds_per_component_lose_less_than_a_shared_one_at_equal_sparsity(
    joint: tuple[dict[str, float], JointResult],
) -> None:
    dense = dense_losses(0)
    shared_losses, shared = trained(0, shared=True)
    assert len(set(shared.thresholds.values())) == 1
    assert shared.total_sparsity == pytest.approx(joint[1].total_sparsity, abs=0.005)
    own, common = (mean_relative_change(dense, found) for found in (joint[0], shared_losses))
    assert common < own < 0


# --- on a language model ------------------------------------------------------------------------


@pytest.mark.slow
def test_one_pass_runs_through_all_sparsities_and_spares_sensitive_blocks() -> None:
    evidence = planted_case().context.require_evidence("test")
    path = learn_path(evidence, AdapMtlOptions(steps=100, learning_rate=0.1))
    assert path.thresholds.shape == (100, evidence.profile.num_blocks)
    assert float(path.sparsity[0]) < 0.05
    assert float(path.sparsity[-1]) > 0.8
    step = int((path.sparsity >= 0.5).nonzero()[0])
    blocks = path.thresholds[step].tolist()
    sensitive = [blocks[b] for b in SENSITIVE_BLOCKS]
    assert max(sensitive) < min(s for b, s in enumerate(blocks) if b not in SENSITIVE_BLOCKS)
    assert torch.equal(path.at(0.5), path.fractions[step])
    assert torch.equal(path.at(0.9999), path.fractions[-1])  # never reached: the last step's
