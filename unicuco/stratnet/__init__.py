"""StratNet: the network that turns a request into its strategy in one forward pass."""

from __future__ import annotations

from unicuco.stratnet.allocator import StratNetAllocator
from unicuco.stratnet.net import (
    NetKind,
    StratNet,
    preference_features,
    size_features,
    target_features,
)
from unicuco.stratnet.train import TrainOptions, train_on_sizes, train_on_tasks

__all__ = [
    "NetKind",
    "StratNet",
    "StratNetAllocator",
    "TrainOptions",
    "preference_features",
    "size_features",
    "target_features",
    "train_on_sizes",
    "train_on_tasks",
]
