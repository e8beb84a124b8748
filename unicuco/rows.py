"""The row rule: how a site's dropped weights are spread over its output rows, stored compactly.

Strategies decide how many weights a site loses; without a rule its rows lose equally many, to
within one. A rule adds an integer offset per row. Offsets of a site sum to zero, so a site's count,
and with it the budget, stays as decided; and any count can be met under any rule, for rows that
would leave ``[0, i]`` stop there and the others make up for them. TRIM and Lua make such rules.

What it does not know: scores, weights, and how good a rule is.

Notation: a site has o rows and i columns, n weights are dropped; q, r = divmod(n, o). Without a
rule row j drops q + (j < r).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unicuco.errors import RunError
from unicuco.files import replace_with

_FORMAT: Final = 1
_HEADER: Final = "unicuco.rows"


@dataclass(frozen=True, eq=False)
class RowRule:
    """Offsets of the rows of some sites; sites that are not named drop equally from every row.

    Attributes:
        offsets: site path to ``o`` int32, summing to zero.
    """

    offsets: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for path, offsets in self.offsets.items():
            if offsets.ndim != 1 or offsets.dtype is not torch.int32 or int(offsets.sum()):
                raise ValueError(f"row offsets of {path} must be a vector of int32 with sum zero")

    @classmethod
    def from_counts(cls, counts: Mapping[str, Tensor]) -> RowRule:
        """Return the rule under which row j of a site drops exactly ``counts[path][j]`` weights.

        Args:
            counts: site path to ``o`` whole numbers of any integer dtype.
        """
        return cls({path: _offsets(rows.to(torch.int64)) for path, rows in counts.items()})

    def of(self, path: str) -> Tensor | None:
        """Return a site's offsets, or none where its rows drop equally."""
        return self.offsets.get(path)

    def to_dict(self) -> dict[str, list[int]]:
        """Return the rule as a JSON object that `from_dict` reads back."""
        return {path: rows.tolist() for path, rows in self.offsets.items()}

    @classmethod
    def from_dict(cls, document: Mapping[str, list[int]]) -> RowRule:
        """Read what `to_dict` returned."""
        offsets = {path: torch.tensor(rows, dtype=torch.int32) for path, rows in document.items()}
        return cls(offsets)

    @property
    def digest(self) -> str:
        """The sha256 over names and offsets, in hexadecimal."""
        digest = hashlib.sha256()
        for path in sorted(self.offsets):
            offsets = self.offsets[path].cpu().contiguous()
            digest.update(f"{path}\n{len(offsets)}\n".encode())
            digest.update(offsets.numpy().astype("<i4", copy=False).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the rule as safetensors, whole or not at all.

        Raises:
            StorageError: the disk refused.
        """
        header = {"format": _FORMAT, "sha256": self.digest}
        tensors = {name: rows.cpu().contiguous() for name, rows in self.offsets.items()}
        metadata = {_HEADER: json.dumps(header, sort_keys=True)}
        replace_with(path, lambda target: save_file(tensors, target, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> RowRule:
        """Read what `save` wrote.

        Raises:
            RunError: the file is missing, damaged, altered or of another format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
                offsets = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            rule = cls(offsets)
        except (SafetensorError, OSError, ValueError) as error:
            raise RunError(f"the row rule {path} can't be read: {error}") from error
        if header.get("format") != _FORMAT or header.get("sha256") != rule.digest:
            raise RunError(f"the row rule {path} was altered or is of another version")
        return rule


def equal_counts(num_rows: int, num_columns: int, num_dropped: int) -> tuple[int, int]:
    """Return q, r: every one of the ``o`` rows drops q weights, and the first r one more.

    Raises:
        ValueError: ``num_dropped`` is negative or more than the matrix holds.
    """
    if not 0 <= num_dropped <= num_rows * num_columns:
        raise ValueError(f"num_dropped must be in [0, {num_rows * num_columns}], got {num_dropped}")
    return divmod(num_dropped, num_rows)


def row_counts(
    num_rows: int, num_columns: int, num_dropped: int, offsets: Tensor | None = None
) -> Tensor:
    """Return how many weights each row drops: ``o`` int64 in [0, i], ``num_dropped`` in all.

    Every row drops offset + level, kept within [0, i], at the highest whole level that does not
    exceed the count; what is left goes to the first rows that have room. So counts only grow with
    ``num_dropped``, and masks stay nested.

    Args:
        num_rows: o.
        num_columns: i.
        num_dropped: n.
        offsets: ``o`` int32 of a `RowRule`; none: equal rows.

    Raises:
        ValueError: ``num_dropped`` is negative or more than the matrix holds, or the offsets are of
            another matrix.
    """
    q, r = equal_counts(num_rows, num_columns, num_dropped)
    if offsets is None:
        counts = torch.full((num_rows,), q, dtype=torch.int64)
        counts[:r] += 1
        return counts
    if offsets.shape != (num_rows,):
        raise ValueError(f"offsets of {len(offsets)} rows don't fit a matrix of {num_rows}")
    own = offsets.to("cpu", torch.int64)
    low, high = -int(own.max()), num_columns - int(own.min())  # all rows empty, all rows full
    while low < high:
        middle = (low + high + 1) // 2
        if int((own + middle).clamp(0, num_columns).sum()) <= num_dropped:
            low = middle
        else:
            high = middle - 1
    counts = (own + low).clamp(0, num_columns)
    room = (own + low + 1).clamp(0, num_columns) > counts
    counts[room.nonzero()[: num_dropped - int(counts.sum()), 0]] += 1
    return counts


def _offsets(counts: Tensor) -> Tensor:
    equal = row_counts(len(counts), int(counts.max()) if len(counts) else 0, int(counts.sum()))
    return (counts - equal).to(torch.int32)
