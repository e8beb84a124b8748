"""``latency.json`` of a run: a latency model, what it was fitted to, and on what machine.

It belongs to a base model, by its digest, and carries a digest of its own contents. What this
module does not know: how times were measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from unicuco.errors import RunError
from unicuco.objectives import LatencyModel
from unicuco.pipeline.files import save_json

LATENCY: Final = "latency.json"
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLatency:
    """A run's latency model, and how many threads the engine had that it was measured with."""

    model: LatencyModel
    threads: int


def save_latency(
    folder: Path, model: LatencyModel, *, base_digest: str, measured: Mapping[str, object]
) -> None:
    """Keep a model with a run.

    Args:
        folder: the run's.
        model: to keep.
        base_digest: of the base model.
        measured: JSON beside it: rows, errors, and ``machine`` with its ``threads``.

    Raises:
        StorageError: the disk refused; what stood there stays.
    """
    document = {
        "format": _FORMAT,
        "base_model": base_digest,
        **model.to_dict(),
        **measured,
    }
    save_json(folder / LATENCY, {**document, "sha256": _digest(document)})


def load_latency(folder: Path, *, base_digest: str) -> KeptLatency | None:
    """Read a run's model; none: it has none.

    Raises:
        RunError: it is damaged, was altered, or is another base model's.
    """
    path = folder / LATENCY
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        digest = document.pop("sha256", None)
        if document.get("format") != _FORMAT or digest != _digest(document):
            raise ValueError("its contents are not what its sha256 says")
        if document["base_model"] != base_digest:
            raise ValueError("it is of another base model")
        threads = int(document["machine"]["threads"])
        return KeptLatency(model=LatencyModel.from_dict(document), threads=threads)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} can't be used ({error}); remove it, and measure again with: "
            f"unicuco latency {folder}"
        ) from error


def _digest(document: Mapping[str, Any]) -> str:  # Any: JSON
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
