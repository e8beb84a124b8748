"""What blocks and head take on this machine, so that stages can be balanced by it.

Times do not depend on the weights' values: one block of every shape, and the head, are filled with
a constant, run, and dropped again. So a model of any size is timed within the memory of one block.

What it does not know: the machines that stages will run on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

import torch

from unicuco.evaluate.measure import EvaluatorConfig
from unicuco.shards.plan import StageCosts, estimated_costs, hidden_size, with_seconds
from unicuco.shards.skeleton import Skeleton

_REPEATS: Final = 3
_CONSTANT: Final = 1e-2


def measured_costs(config: EvaluatorConfig, context: int) -> StageCosts:
    """Return costs whose seconds are those of one forward pass over a window, as measured here.

    Args:
        config: the evaluator's.
        context: tokens of the window.

    Raises:
        ModelError: the model can't be taken apart.
    """
    profile = config.profile
    skeleton = Skeleton(config.model_config, profile)
    hidden = torch.full((1, context, hidden_size(profile)), _CONSTANT)
    by_shape: dict[tuple[torch.Size, ...], float] = {}
    seconds = []
    for block, path in enumerate(profile.block_paths):
        names = [name for name in skeleton.aliases if name.startswith(f"{path}.")]
        shape = tuple(skeleton.model.get_parameter(name).shape for name in names)
        if shape not in by_shape:
            by_shape[shape] = _timed(skeleton, names, lambda: skeleton.run_block(block, hidden))  # noqa: B023 - run now
        seconds.append(by_shape[shape])
    head = _timed(skeleton, skeleton.after, lambda: skeleton.logits(hidden).logsumexp(-1))
    return with_seconds(estimated_costs(profile), seconds, head)


@torch.no_grad()
def _timed(skeleton: Skeleton, names: Iterable[str], work: Callable[[], object]) -> float:
    """Return the shortest of some calls, with a constant in the named parameters for their time."""
    before = {name: skeleton.model.get_parameter(name) for name in names}
    try:
        for name, parameter in before.items():
            skeleton.place(name, torch.full(parameter.shape, _CONSTANT))
        times = []
        for _ in range(1 + _REPEATS):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    finally:
        for name, parameter in before.items():
            skeleton.place(name, parameter.detach())
    return min(times[1:])
