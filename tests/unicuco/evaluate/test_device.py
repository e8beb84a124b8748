"""Evaluators on a device: nothing of them stays behind, and bfloat16 measures the same.

The device here is torch's meta device, which knows shapes, types and where a tensor is, refuses to
mix it with another one, and holds no numbers: those that are read off it are ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unicuco.dimensions import have_slopes
from unicuco.evaluate import LocalEvaluator
from unicuco.evaluate.device import on_gpu
from unicuco.shards.evaluator import ShardedEvaluator
from unicuco.shards.plan import ShardPlan
from unicuco.testing.cases import EvaluationCase, make_evaluation_case
from unicuco.testing.tiny import tiny_model_folder
from unicuco.types import Evaluation, Strategy

TWO = ShardPlan(stages=(range(1), range(1, 2)))
_READ: Final[dict[Any, object]] = {  # Any: slots of a C type
    Tensor.__float__: 1.0,
    Tensor.__bool__: True,
    Tensor.item: 1.0,
}


class WithoutNumbers(TorchFunctionMode):
    """Lets numbers be read, and tensors be fetched, that are nowhere."""

    # Any: torch's own protocol
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func in _READ:
                return _READ[func]
            if func is Tensor.cpu:
                return torch.ones(args[0].shape, dtype=args[0].dtype)
        return func(*args, **(kwargs or {}))


def made(folder: Path, family: str = "llama", *dimensions: str) -> EvaluationCase:
    model = tiny_model_folder(folder / "model", family, num_blocks=2, hidden_size=32, tied=True)
    return make_evaluation_case(model, dimensions=dimensions or ("sparsity",))


def middle(case: EvaluationCase) -> Strategy:
    """Return a strategy that moves every axis."""
    axes = case.space.axes
    values = [(1 + a.max_step // 3) / a.num_steps if a.max_step else 0.4 for a in axes]
    return Strategy(settings=tuple(zip(case.space.names, values, strict=True)))


def assert_near(found: Evaluation, exact: Evaluation) -> None:
    assert found.kl == pytest.approx(exact.kl, rel=0.02)
    assert found.gradient is not None
    assert exact.gradient is not None
    largest = max(map(abs, exact.gradient))
    assert found.gradient == pytest.approx(exact.gradient, abs=0.03 * largest)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
def test_stages_leave_nothing_behind(family: str, tmp_path: Path) -> None:
    case = made(tmp_path, family)
    config = replace(case.config, device="meta", dtype="bfloat16")
    with WithoutNumbers():
        found = ShardedEvaluator(config, TWO, case.arrays).evaluate(middle(case), derivatives=True)
    assert found.gradient is not None
    assert len(found.gradient) == case.space.num_axes


@pytest.mark.parametrize(
    "dimensions",
    [
        ("sparsity",),
        ("depth", "width", "sparsity"),
        ("low_rank",),
        ("sparsity", "weight_bits"),
        ("sparsity", "kv_bits"),
    ],
    ids="+".join,
)
def test_every_dimension_is_judged_where_the_model_is(
    dimensions: tuple[str, ...], tmp_path: Path
) -> None:
    case = made(tmp_path, "llama", *dimensions)
    slopes = have_slopes(case.config.profile, dimensions)
    with WithoutNumbers():
        evaluator = LocalEvaluator(replace(case.config, device="meta"), case.arrays)
        for _ in range(2):
            found = evaluator.evaluate(middle(case), derivatives=slopes)
    assert (found.gradient is not None) == slopes


def test_a_tensor_that_stays_behind_is_found(tmp_path: Path) -> None:
    case = made(tmp_path)
    with WithoutNumbers():
        evaluator = LocalEvaluator(replace(case.config, device="meta"), case.arrays)
        evaluator._sites._ranks = case.ranks
        with pytest.raises(RuntimeError, match="device"):
            evaluator.evaluate(middle(case))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_measures_what_float32_does(family: str, tmp_path: Path) -> None:
    case = made(tmp_path, family)
    strategy = middle(case)
    exact = case.evaluator().evaluate(strategy, derivatives=True)
    config = replace(on_gpu(case.config), device="cpu")
    for evaluator in (
        LocalEvaluator(config, case.arrays),
        ShardedEvaluator(config, TWO, case.arrays),
    ):
        found = evaluator.evaluate(strategy, derivatives=True)
        assert_near(found, exact)
        assert found.kl != exact.kl


def test_narrowed_matrices_in_bfloat16_measure_what_float32_does(tmp_path: Path) -> None:
    case = made(tmp_path, "llama", "width", "sparsity")
    strategy = middle(case)
    exact = case.evaluator().evaluate(strategy, derivatives=True)
    found = LocalEvaluator(replace(case.config, dtype="bfloat16"), case.arrays).evaluate(
        strategy, derivatives=True
    )
    assert_near(found, exact)
