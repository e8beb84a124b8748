"""Whether any node can ever hold a replica. What this module does not know: what a replica is."""

from __future__ import annotations

import json

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

# What Ray calls the types of nodes that nobody but the user adds.
_UNMANAGED = "node_"


def too_large(cpus: float) -> str | None:
    """Say in a line why no node can ever give ``cpus`` to one actor; none: one can, or may come."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    largest = max((node["Resources"].get("CPU", 0.0) for node in nodes), default=0.0)
    if cpus <= largest or _has_autoscaler():
        return None
    return (
        f"a replica of {cpus:g} threads fits on no node: the largest has {largest:g} CPUs, and no "
        "autoscaler adds larger ones; ask for fewer threads, or add a node"
    )


def _has_autoscaler() -> bool:
    """Say whether something adds nodes to this cluster."""
    if not _internal_kv_initialized():  # type: ignore[no-untyped-call]
        return True  # a remote client can't ask
    status = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    report = json.loads(status or b"{}").get("autoscaler_report") or {}
    kinds = [kind for state in ("active_nodes", "idle_nodes") for kind in report.get(state) or {}]
    return any(not str(kind).startswith(_UNMANAGED) for kind in kinds)
