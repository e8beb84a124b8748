"""Whether nodes can ever hold a replica. What this module does not know: what a replica is."""

from __future__ import annotations

import json

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

# What Ray calls the types of nodes that nobody but the user adds.
_UNMANAGED = "node_"
_SLACK = 1e-6  # shares of CPUs are decimals


def too_large(cpus: float, count: int = 1) -> str | None:
    """Say in a line why the nodes can never hold ``count`` actors of ``cpus`` each at once.

    None: they can, or nodes that can may come, be it that none but the head is there yet.
    """
    sizes = [size for node in _nodes() if (size := node.get("CPU", 0.0))]
    room = sum(int(size / cpus + _SLACK) for size in sizes)
    if not sizes or room >= count or _has_autoscaler():
        return None
    largest = f"the largest has {max(sizes):g} CPUs"
    what = f"a replica of {cpus:g} threads fits on no node: {largest}"
    if count > 1:
        what = (
            f"{count} shards of {cpus:g} threads have no room on {len(sizes)} nodes of together "
            f"{sum(sizes):g} CPUs"
        )
    return f"{what}, and no autoscaler adds others; ask for fewer, or add nodes"


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
