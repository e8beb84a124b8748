"""Byte ranges of a model's files for nodes that do not have them, served by the driver's node.

A `NodeSource` reads from the model's folder where a process sees it, and else asks a `RangeServer`,
an actor that is pinned to the node that the driver runs on. Ranges are some megabytes each and go
through Ray's object store; no process ever holds a whole file. What this module does not know: what
the bytes mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import Handle, RangeServer
from unicuco.errors import ModelError
from unicuco.models.weights import FolderSource, WeightFile, changed

CHUNK_BYTES: Final = 1 << 24
_AHEAD: Final = 2  # ranges that are on their way while one is copied
_SHARDS: Final = 8  # served at a time


def start_range_server(folder: FolderSource, environment: Mapping[str, Any]) -> Handle:
    """Start a server of a folder's files on the node of this process."""
    node = ray.get_runtime_context().get_node_id()
    actor = ray.remote(RangeServer).options(
        num_cpus=0,
        max_concurrency=_SHARDS,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        runtime_env=dict(environment),
    )
    return actor.remote(folder.place, [file.name for file in folder.files])


@dataclass(frozen=True, slots=True)
class NodeSource:
    """Files in a folder of this node, or of the node that serves them."""

    folder: FolderSource
    server: Handle

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """What there is to read."""
        return self.folder.files

    @property
    def place(self) -> str:
        """The folder."""
        return self.folder.place

    def check(self, file: WeightFile) -> None:
        """Find the file here, or compare its size there."""
        if self._is_here(file):
            return
        num_bytes = ray.get(self.server.num_bytes.remote(file.name))
        if num_bytes < 0:
            raise ModelError(
                f"neither this node nor the driver's has {Path(self.place) / file.name}: put the "
                "model where every node sees it, or name it by a URL"
            )
        if num_bytes != file.num_bytes:
            raise changed(self.place, file)

    def read_into(self, file: WeightFile, begin: int, target: memoryview) -> None:
        """Read from the disk, or ask for one range after the other."""
        if self._is_here(file):
            self.folder.read_into(file, begin, target)
            return
        parts = deque(
            (start, min(CHUNK_BYTES, len(target) - start))
            for start in range(0, len(target), CHUNK_BYTES)
        )
        # Any: ObjectRef has no public type that both Ray's core and its client share.
        asked: deque[tuple[int, int, Any]] = deque()
        while parts or asked:
            while parts and len(asked) <= _AHEAD:
                start, count = parts.popleft()
                asked.append(
                    (start, count, self.server.read.remote(file.name, begin + start, count))
                )
            start, count, reference = asked.popleft()
            data = ray.get(reference)
            if len(data) != count:
                raise ModelError(
                    f"{Path(self.place) / file.name} ends too early; fetch the model again"
                )
            target[start : start + count] = data.data

    def _is_here(self, file: WeightFile) -> bool:
        """Say whether this process can read the file."""
        try:
            self.folder.check(file)
        except ModelError:
            return False
        return True
