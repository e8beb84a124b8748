"""What a pool holds: a replica is one evaluator actor, or a pipeline of shard actors.

Both begin to evaluate an ask at once and answer with one reference. A pipeline passes hidden states
from actor to actor by reference: nothing of them comes through this process. Its actors run calls
in whatever order their inputs arrive, so that none waits for a strategy that another still has
while it could work on the next.

What this module does not know: when replicas are started, and what happens when they die.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray.util.placement_group import remove_placement_group

from cluster.actors import Handle
from unicuco.shards.evaluator import pass_through
from unicuco.types import Ask

# Any: ObjectRef has no public type that both Ray's core and its client share.
Ref = Any


class Replica(Protocol):
    """Something that evaluates, in processes of its own."""

    @property
    def capacity(self) -> int:
        """How many asks it works on at a time."""

    @property
    def ahead(self) -> int:
        """How many more may wait with it: 1 where it works on them one after the other, else 0."""

    def start(self) -> Ref:
        """Build what evaluates; the reference resolves to nothing."""

    def evaluate(self, ask: Ask) -> Ref:
        """Begin to evaluate; the reference resolves to the outcome."""

    def kill(self) -> None:
        """End its processes."""


class ActorReplica:
    """One `EvaluatorActor`.

    Args:
        handle: the actor's.
    """

    capacity = 1
    ahead = 1

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def start(self) -> Ref:
        """Build the evaluator."""
        return self.handle.start.remote()

    def evaluate(self, ask: Ask) -> Ref:
        """Begin to evaluate."""
        return self.handle.evaluate.remote(ask)

    def kill(self) -> None:
        """End the actor."""
        ray.kill(self.handle)


class PipelineReplica:
    """Several `ShardActor` that hold one model between them.

    Args:
        handles: the actors' in the order of their blocks.
        group: the placement group that is theirs alone, or none.
    """

    ahead = 0  # one more would be a message about all tokens that every stage keeps

    # Any: a placement group has no public type in Ray's client.
    def __init__(self, handles: Sequence[Handle], group: Any) -> None:
        self.handles = tuple(handles)
        self._group = group
        # One for every stage to work on, and one that is on its way.
        self.capacity = len(self.handles) + 1

    def start(self) -> Ref:
        """Build all stages at once."""
        started = [handle.start.remote() for handle in self.handles]
        return self.handles[-1].confirm.remote(*started)

    def evaluate(self, ask: Ask) -> Ref:
        """Send an ask through the stages."""
        return pass_through(
            ask,
            [handle.forward.remote for handle in self.handles],
            [handle.backward.remote for handle in self.handles],
        )

    def kill(self) -> None:
        """End all stages, whichever of them live, and give back their place."""
        for handle in self.handles:
            ray.kill(handle)
        if self._group is not None:
            remove_placement_group(self._group)
