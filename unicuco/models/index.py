"""The index of a model whose weights are spread over several safetensors files.

What this module does not know: where the files are.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Final

from unicuco.errors import ModelError

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"


def parse_index(data: bytes, where: str) -> dict[str, set[str]]:
    """Return the tensors that an index promises of each file.

    Args:
        data: the index as JSON.
        where: its name, for messages.

    Raises:
        ModelError: it is damaged, empty, or names what is no file beside it.
    """
    try:
        document = json.loads(data)
    except ValueError as error:
        raise ModelError(
            f"{where} can't be read as JSON ({error}); fetch the model again"
        ) from error
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{where} has no weight_map; fetch the model again")
    shards: dict[str, set[str]] = {}
    for tensor, shard in places.items():
        if not isinstance(shard, str) or not _is_weights(shard):
            raise ModelError(
                f"{where} names {shard!r} for {tensor}, which is no file of this folder"
            )
        shards.setdefault(shard, set()).add(tensor)
    return shards


def _is_weights(name: str) -> bool:
    return PurePosixPath(name).name == name and name.endswith(".safetensors")
