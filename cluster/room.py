"""What one actor asks of Ray, and whether nodes can ever give it.

What this module does not know: what the actor does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

# What Ray calls the types of nodes that nobody but the user adds.
_UNMANAGED = "node_"
_SLACK = 1e-6  # shares are decimals
_GRAIN = 10_000  # Ray counts in ten thousandths


@dataclass(frozen=True, slots=True)
class Share:
    """What one actor asks of its node: CPUs, and of one GPU that much, from 0 to 1."""

    cpus: float
    gpus: float = 0.0

    @property
    def resources(self) -> dict[str, float]:
        """Both by Ray's names; no GPU is not mentioned."""
        named = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: amount for name, amount in named.items() if amount}

    def room_on(self, node: Mapping[str, float]) -> int:
        """Return how many of these a node of such resources holds."""
        return min(
            int(node.get(name, 0.0) / amount + _SLACK) for name, amount in self.resources.items()
        )

    def __str__(self) -> str:
        return f"{self.cpus:g} threads" + (f" and {self.gpus:g} GPU" if self.gpus else "")


def gpu_share(gpus: float, actors: int) -> float:
    """Return the largest share of one of ``gpus`` that all ``actors`` can have; 0 without any."""
    if gpus < 1:
        return 0.0
    each = math.ceil(actors / int(gpus))
    return math.floor(_GRAIN / each) / _GRAIN


def torch_knows_gpus() -> bool:
    """Say whether this torch was built for GPUs; nodes have the same (`cluster.versions`)."""
    import torch  # here alone: the driver may be only about to load it

    return bool(torch.backends.cuda.is_built())


def num_gpus() -> float:
    """Return the GPUs of all nodes that are there."""
    return sum(node.get("GPU", 0.0) for node in _nodes())


def too_large(share: Share, count: int = 1) -> str | None:
    """Say in a line why the nodes can never hold ``count`` actors of a share at once.

    None: they can, or nodes that can may come, be it that none but the head is there yet.
    """
    nodes = [node for node in _nodes() if node.get("CPU")]
    room = sum(map(share.room_on, nodes))
    if not nodes or room >= count or _has_autoscaler():
        return None
    names = ["CPU", *(["GPU"] if share.gpus else [])]
    kind = "the largest has" if count == 1 else f"{len(nodes)} nodes have together"
    fold = max if count == 1 else sum
    found = " and ".join(f"{fold(n.get(name, 0.0) for n in nodes):g} {name}s" for name in names)
    what = f"a replica of {share} fits on no node"
    if count > 1:
        what = f"{count} shards of {share} have no room"
    return f"{what}: {kind} {found}, and no autoscaler adds others; ask for fewer, or add nodes"


def largest_memory_bytes() -> int | None:
    """Return the memory of the largest node; none where larger ones may come, or nobody knows."""
    known = [int(node["memory"]) for node in _nodes() if node.get("memory")]
    return max(known) if known and not _has_autoscaler() else None


def _nodes() -> list[dict[str, float]]:
    """Return the resources of every node that is alive."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def _has_autoscaler() -> bool:
    """Say whether something adds nodes to this cluster."""
    if not _internal_kv_initialized():  # type: ignore[no-untyped-call]
        return True  # a remote client can't ask
    status = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    report = json.loads(status or b"{}").get("autoscaler_report") or {}
    kinds = [kind for state in ("active_nodes", "idle_nodes") for kind in report.get(state) or {}]
    return any(not str(kind).startswith(_UNMANAGED) for kind in kinds)
